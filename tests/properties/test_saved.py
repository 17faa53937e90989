"""What leaves a run: exactly what was saved, in memory of its own, for good: promise 7 of the design."""

from __future__ import annotations

import gc
import resource
import weakref
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tracelens as tl
from tests.properties.drawn import programs, traceable_sites
from tests.properties.programs import CONSTANTS, Keep, KeepLayers, perform
from tests.support.batches import EVEN, RAGGED, batch, random_rows
from tests.support.families import FAMILIES
from tests.support.plain import plain_logits, untouched
from tracelens.errors import MutatedActivationError
from tracelens.ir import memo
from tracelens.ir.infer import memo_clear

ROWS = {"even": random_rows(EVEN), "ragged": random_rows(RAGGED)}
HF = FAMILIES["llama"].build()
MODEL = tl.wrap(HF)
SITES = traceable_sites(HF)
SOME = settings(max_examples=settings().max_examples // 2)


def tensors_of(results: tl.Results) -> Iterator[Tensor]:
    for value in results.values():
        yield from value if isinstance(value, list) else [value]


def bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@SOME
@given(data=st.data(), rows=st.sampled_from(list(ROWS)))
def test_results_hold_the_saved_names_and_only_their_bytes(data, rows):
    program = data.draw(programs(SITES, aligned=rows == "even"))
    with MODEL.trace(ROWS[rows]) as trace:
        perform(program, MODEL)
    names = [statement.name for statement in program if isinstance(statement, Keep | KeepLayers)]
    assert list(trace.results) == names
    found = list(tensors_of(trace.results))
    owners = [tensor.untyped_storage() for tensor in found]
    assert [storage.nbytes() for storage in owners] == [bytes_of(tensor) for tensor in found]
    foreign = [*HF.parameters(), *HF.buffers(), *CONSTANTS.values()]
    addresses = [storage.data_ptr() for storage in owners if storage.nbytes()]
    assert len(set(addresses)) == len(addresses)
    assert not set(addresses) & {tensor.untyped_storage().data_ptr() for tensor in foreign}
    assert not any(tensor.requires_grad or tensor.is_inference() for tensor in found)
    assert all(tensor.is_contiguous() for tensor in found)


def alive() -> dict[int, Tensor]:
    gc.collect()
    return {id(thing): thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)}


@pytest.mark.parametrize("rows", ROWS)
def test_no_other_tensor_is_alive_after_a_trace(rows):
    """While the trace is held, its saves, its prompt and the user's own constants; afterwards the saves alone."""
    v = CONSTANTS["c48"]
    before = alive()
    with MODEL.trace(ROWS[rows]) as trace:
        h = MODEL.layers[0].mlp_act
        MODEL.layers[1].resid_mid.tok[-1] += v
        MODEL.layers[0:3].attn_out += tl.per_layer(CONSTANTS["rows48"])
        torch.topk(h.softmax(-1), 3).values.tok[-1].save("top")
        h[..., :5].save("part")
        MODEL.layers[0:2].resid_post.save("stream")
        tl.apply(lambda x: x * 2, MODEL.logits).save("logits")
    saved = {tensor.untyped_storage().data_ptr() for tensor in tensors_of(trace.results)}
    held = (getattr(trace._prompt.batch, part) for part in type(trace._prompt.batch).__slots__)
    prompt = {part.untyped_storage().data_ptr() for part in held if torch.is_tensor(part)}
    mine = {tensor.untyped_storage().data_ptr() for tensor in CONSTANTS.values()}
    new = {key: tensor.untyped_storage().data_ptr() for key, tensor in alive().items() if key not in before}
    assert set(new.values()) <= saved | prompt | mine
    assert saved <= set(new.values())
    results = trace.results
    del trace, h
    new = {key: tensor.untyped_storage().data_ptr() for key, tensor in alive().items() if key not in before}
    assert set(new.values()) == saved
    assert len(results) == 4


@SOME
@given(data=st.data(), rows=st.sampled_from(list(ROWS)))
def test_a_saved_tensor_never_changes(data, rows):
    program = data.draw(programs(SITES, aligned=rows == "even"))
    with untouched(HF):
        with MODEL.trace(ROWS[rows]) as trace:
            perform(program, MODEL)
        found = list(tensors_of(trace.results))
        copies = [tensor.clone() for tensor in found]
        constants = {name: tensor.clone() for name, tensor in CONSTANTS.items()}
        # Other traces, the plain model, and the user's own work in place on every second tensor.
        with MODEL.trace(ROWS[rows]) as again:
            perform(program, MODEL)
        plain_logits(HF, batch(ROWS[rows]))
        for tensor in [*found[::2], *tensors_of(again.results)]:
            tensor.zero_()
        for tensor, copy in zip(found[1::2], copies[1::2], strict=True):
            torch.testing.assert_close(tensor, copy, rtol=0, atol=0, equal_nan=True)
        # ... which reaches neither the user's tensors nor the model (untouched).
        assert all(torch.equal(CONSTANTS[name], tensor) for name, tensor in constants.items())


@pytest.mark.parametrize(
    "expression",
    [
        "model.unembed",
        "model.param('model.norm.weight')",
        "model.unembed.T",
        "model.unembed[3:4]",
        "model.unembed[None].squeeze(0)",
        "torch.broadcast_tensors(v, model.layers[0].resid_post)[0]",
        "tl.where(model.layers[0].resid_post > 0, v, 0.0)",
        "model.layers[0].resid_post.expand_as(model.layers[1].resid_post)",
        "model.layers[0].resid_post.to(torch.float32)",
        "tl.apply(lambda x: KEPT.setdefault('x', x), model.layers[0].resid_post)",
        "tl.apply(lambda x: FOREIGN, model.layers[0].resid_post)",
    ],
)
def test_nobody_elses_memory_leaves_a_run(expression):
    """Parameters, constants and what the user's functions hold on to are copied on the way out."""
    rows = ROWS["even"]
    v = torch.arange(len(rows) * len(rows[0]) * 48.0).reshape(len(rows), len(rows[0]), 48)
    foreign, kept = torch.ones_like(v), {}
    names = {"model": MODEL, "torch": torch, "tl": tl, "v": v, "KEPT": kept, "FOREIGN": foreign}
    with untouched(HF), MODEL.trace(rows):
        one = eval(f"({expression}).save('one')", names)
        other = eval(f"({expression}).save('two')", names)
    first = one.value.clone()
    other.value.fill_(7.0)
    assert torch.equal(one.value, first)
    one.value.fill_(9.0)
    assert not (v == 9.0).all()
    assert torch.equal(foreign, torch.ones_like(v))
    assert not kept or not (kept["x"] == 9.0).all()


def test_an_applied_function_that_changes_its_argument_is_refused():
    """It would be a write that the graph does not show."""
    with pytest.raises(MutatedActivationError), MODEL.trace(ROWS["even"]):
        tl.apply(lambda x: x.mul_(2), MODEL.layers[0].resid_post).save()


@given(
    start=st.integers(0, 40),
    width=st.integers(1, 8),
    part=st.sampled_from(["[:, -1]", "[0]", "", "[:, :, None]"]),
)
def test_a_slice_of_a_large_tensor_is_compact(start, width, part):
    with MODEL.trace(ROWS["even"]):
        h = eval(f"model.layers[1].mlp_act{part}", {"model": MODEL})[..., start : start + width].save()
    assert h.value.untyped_storage().nbytes() == bytes_of(h.value)


def test_a_thousand_traces_do_not_grow_memory():
    v = torch.ones(48)

    def one_trace(number: int) -> None:
        with MODEL.trace(ROWS["even"]) as trace:
            MODEL.layers[number % 3].resid_post[:, -1] += (number % 7) * v
            MODEL.layers[0:3].attn_out.save("a")
            MODEL.logits[:, -1].save("l")
        assert len(trace.results) == 2

    def objects() -> int:
        memo_clear()  # what inference remembers is bounded; see below
        gc.collect()
        return len(gc.get_objects())

    for number in range(50):  # every structure is compiled
        one_trace(number)
    few, high_water = objects(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(1000):
        one_trace(number)
    assert objects() - few < 200
    # In kilobytes; a leak of the saved tensors alone would be 20 MB, of a trace's activations far more.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - high_water < 15_000


def test_inference_remembers_a_bounded_number_of_type_objects():
    """Every index and every captured tensor makes a new one."""
    sizes = []
    for _ in range(60):
        with MODEL.trace(ROWS["even"]) as trace:
            h = MODEL.layers[0].resid_post
            for width in range(1, 48):
                (h[..., :width] * 2).sum()
        assert len(trace.results) == 0
        sizes.append(len(memo._by_identity))
    assert max(sizes) < 2500


def test_a_thousand_different_traces_keep_only_so_many_programs():
    """Programs are kept by structure; structures without end must not be."""
    sizes = []
    for number in range(600):
        with MODEL.trace(ROWS["even"]):
            MODEL.layers[0].resid_post[:, -1] += float(number) / 7 + 0.01
            MODEL.layers[0].resid_post.save()
        sizes.append(len(MODEL._compiler._known))
    assert max(sizes) < 500


def test_constants_are_let_go():
    v = torch.ones(48)
    gone = weakref.ref(v)
    with MODEL.trace(ROWS["even"]) as trace:
        MODEL.layers[0].resid_post += v
        MODEL.logits.save("l")
    results = trace.results
    del trace, v
    gc.collect()
    assert gone() is None
    assert results["l"].shape == (*batch(ROWS["even"]).mask.shape, 97)
