"""Several threads, several models: recordings do not meet, runs take turns, and nobody else's forward is touched."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import tracelens as tl
from tests.support.batches import batch, random_rows
from tests.support.families import FAMILIES
from tests.support.plain import plain_logits, untouched
from tracelens.errors import ForeignValueError, NestedTraceError

THREADS = 4
HF = FAMILIES["llama"].build()
MODEL = tl.wrap(HF)
OTHER_HF = FAMILIES["gpt2"].build()
OTHER = tl.wrap(OTHER_HF)
PROMPTS = [random_rows((5 + number, 5 + number), seed=number) for number in range(THREADS)]


def edit(number: int, turn: int) -> dict[str, Tensor]:
    """A trace that is another one for every thread and turn."""
    rows = PROMPTS[number]
    with MODEL.trace(rows) as trace:
        MODEL.layers[turn % 3].resid_post[:, -1] += (number + 1) * 0.25
        MODEL.layers[0:2].attn_out *= 1.0 + turn / 10
        h = MODEL.layers[(number + turn) % 3].mlp_act
        if number % 2:
            h[..., : 7 + turn] = 0
        MODEL.layers[0:3].resid_mid.tok[-2:].save("stream")
        MODEL.logits.save("logits")
    return dict(trace.results)


def all_at_once(work: Callable[[int], object]) -> list[object]:
    """Runs ``work(number)`` in several threads that start together; the first error is raised."""
    start = threading.Barrier(THREADS, timeout=60)

    def begin(number: int) -> object:
        start.wait()
        return work(number)

    with ThreadPoolExecutor(THREADS) as pool:
        return [future.result(timeout=120) for future in [pool.submit(begin, n) for n in range(THREADS)]]


def test_threads_that_trace_one_model_get_what_they_would_get_alone():
    turns = range(8)
    alone = [[edit(number, turn) for turn in turns] for number in range(THREADS)]
    with untouched(HF):
        together = all_at_once(lambda number: [edit(number, turn) for turn in turns])
    for one, other in zip(alone, together, strict=True):
        for wanted, found in zip(one, other, strict=True):
            assert wanted.keys() == found.keys()
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_threads_share_a_fresh_model_from_its_first_trace_on():
    """Types, paths and programs are found out at the first use, here by all threads at the same moment."""
    for _ in range(3):
        fresh = tl.wrap(HF)

        def work(number: int, fresh: tl.Model = fresh) -> Tensor:
            with fresh.trace(PROMPTS[number]):
                fresh.layers[1].attn_out += fresh.unembed[number + 1]
                saved = fresh.logits.save()
            return saved.value

        for number, found in enumerate(all_at_once(work)):
            with MODEL.trace(PROMPTS[number]):
                MODEL.layers[1].attn_out += MODEL.unembed[number + 1]
                wanted = MODEL.logits.save()
            assert torch.equal(found, wanted.value)


def test_recordings_of_one_model_are_open_in_several_threads_at_once():
    """All blocks are open at the same time; each is its own."""
    inside = threading.Barrier(THREADS, timeout=60)

    def work(number: int) -> Tensor:
        with MODEL.trace(PROMPTS[0]):
            inside.wait()
            MODEL.layers[0].resid_post += float(number)
            inside.wait()
            saved = MODEL.logits.save()
        return saved.value

    for number, found in enumerate(all_at_once(work)):
        with MODEL.trace(PROMPTS[0]):
            MODEL.layers[0].resid_post += float(number)
            wanted = MODEL.logits.save()
        assert torch.equal(found, wanted.value)


def test_a_failure_in_one_thread_is_that_threads_alone():
    def failing() -> None:
        with MODEL.trace(PROMPTS[2]):
            MODEL.layers[0].resid_post += 1.0
            raise KeyError("mine")

    def work(number: int) -> object:
        if number == 2:
            with pytest.raises(KeyError, match="mine"):
                failing()
            return None
        return [edit(number, turn) for turn in range(4)]

    with untouched(HF):
        found = all_at_once(work)
    assert torch.equal(found[3][1]["logits"], edit(3, 1)["logits"])


def test_a_plain_forward_in_another_thread_is_not_touched_by_a_trace():
    """It runs to its end in the very middle of the traced forward pass."""
    prompt = batch(PROMPTS[1])
    with torch.no_grad():
        wanted = plain_logits(HF, prompt)

    def plainly() -> Tensor:
        with torch.no_grad():
            return plain_logits(HF, prompt)

    seen: list[Tensor] = []
    with ThreadPoolExecutor(1) as pool:

        def meanwhile(x: Tensor) -> Tensor:
            seen.append(pool.submit(plainly).result(timeout=60))
            return x * 2

        with untouched(HF), MODEL.trace(PROMPTS[1]):
            MODEL.layers[0].attn_out = 0
            MODEL.layers[1].resid_post = tl.apply(meanwhile, MODEL.layers[1].resid_post)
            MODEL.layers[2].mlp_act[..., :9] = 0
            traced = MODEL.logits.save()
    assert torch.equal(seen[0], wanted)
    assert not torch.equal(traced.value, wanted)


def test_a_generation_and_traces_take_turns():
    ids = PROMPTS[3][0]

    def tokens() -> list[int]:
        with MODEL.generate(ids, max_new_tokens=6) as t:
            MODEL.layers[1].resid_post += 0.5
        return t.tokens

    alone = tokens()
    found = all_at_once(lambda number: tokens() if number == 0 else edit(number, 2))
    assert found[0] == alone
    assert torch.equal(found[1]["logits"], edit(1, 2)["logits"])


def test_two_models_interleave_in_one_block():
    with untouched(HF), untouched(OTHER_HF):
        with MODEL.trace(PROMPTS[0]), OTHER.trace(PROMPTS[1]):
            MODEL.layers[0].resid_post += 1.0
            OTHER.layers[0].mlp_act = 0
            MODEL.layers[1].resid_post *= 2
            other = OTHER.logits.save()
            one = MODEL.logits.save()
        with MODEL.trace(PROMPTS[0]):
            MODEL.layers[0].resid_post += 1.0
            MODEL.layers[1].resid_post *= 2
            one_alone = MODEL.logits.save()
        with OTHER.trace(PROMPTS[1]):
            OTHER.layers[0].mlp_act = 0
            other_alone = OTHER.logits.save()
    assert torch.equal(one.value, one_alone.value)
    assert torch.equal(other.value, other_alone.value)


def test_values_of_one_model_are_foreign_to_another_until_they_are_saved():
    with pytest.raises(ForeignValueError), MODEL.trace(PROMPTS[0]), OTHER.trace(PROMPTS[0]):
        OTHER.layers[0].resid_post += MODEL.layers[0].resid_post
    with MODEL.trace(PROMPTS[0]):
        h = MODEL.layers[0].resid_post.save()
    with OTHER.trace(PROMPTS[0]):
        OTHER.layers[0].resid_post += h
        mixed = OTHER.layers[0].resid_post.save()
    with OTHER.trace(PROMPTS[0]):
        own = OTHER.layers[0].resid_post.save()
    torch.testing.assert_close(mixed.value, own.value + h.value, rtol=0, atol=0)


def test_two_handles_of_one_model_run_one_after_the_other():
    """They have their own recordings, and one lock between them."""
    second = tl.wrap(HF)

    def work(number: int) -> Tensor:
        model = MODEL if number % 2 else second
        with model.trace(PROMPTS[number]):
            model.layers[1].mlp_out *= number + 1.0
            saved = model.logits.save()
        return saved.value

    wanted = [work(number) for number in range(THREADS)]
    with untouched(HF):
        found = all_at_once(work)
    assert all(map(torch.equal, found, wanted))


def test_nested_means_the_same_context_and_the_same_model():
    def alone() -> Tensor:
        return edit(1, 1)["logits"]

    wanted = alone()
    with ThreadPoolExecutor(1) as pool, MODEL.trace(PROMPTS[0]):
        MODEL.layers[0].resid_post.save("h")
        with pytest.raises(NestedTraceError):
            MODEL.trace(PROMPTS[0]).__enter__()
        # Another thread is another context: it may trace, and even run, while this block is open.
        assert torch.equal(pool.submit(alone).result(timeout=60), wanted)
