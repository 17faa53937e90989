"""Streams: each step's tokens and saves are there when it has been made, and leaving a stream ends its generation."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import tracelens as tl
from tests.support import hand_generation as hand
from tests.support.families import D_MODEL, FAMILIES
from tests.support.hand_generation import Edit, steps_of
from tests.support.plain import assert_untouched, model_fingerprint
from tests.support.tokenizers import byte_level_bpe
from tracelens import errors

IDS = [3, 14, 15, 9, 2, 6]
ROWS = [[3, 14, 15, 9, 2, 6], [20, 21], [5, 6, 7, 8]]
HF = FAMILIES["llama"].build()
MODEL = tl.wrap(HF)
V = 2 * torch.randn(D_MODEL, generator=torch.Generator().manual_seed(7))


def workers() -> int:
    return threading.active_count()


def test_events_are_the_steps_of_the_generation() -> None:
    with MODEL.record(generation=True) as r:
        r.decode.layers[1].resid_post += V
        MODEL.layers[:].resid_post.save("all")
        MODEL.logits[:, -1].argmax(-1).save("pick")
        r.steps[2:4].layers[0].resid_post[:, -1].save("window")
    edit = Edit(1, lambda text, prompt: steps_of(len(text), prompt) >= 1, lambda h: h + V)
    before = workers()
    for rows in ([IDS], ROWS):
        expected = [hand.generate(HF, "llama", row, 6, [edit]) for row in rows]
        events = list(MODEL.stream(rows, r, max_new_tokens=6))
        assert [event.step for event in events] == list(range(6))
        for row, (prompt, new) in enumerate(zip(rows, expected, strict=True)):
            assert [event.tokens[row] for event in events] == new
            _, streams = hand.forward(HF, "llama", [*prompt, *new[:-1]], len(prompt), [edit])
            first = events[0]["all"]
            parts = [
                first[row][:, 0] if len(rows) > 1 else first[:, 0],
                *(e["all"][:, row] for e in events[1:]),
            ]
            torch.testing.assert_close(torch.cat(parts, 1), streams, rtol=2e-5, atol=2e-5)
            assert [int(event["pick"][row]) for event in events] == new
        assert [event.step for event in events if "window" in event.saves] == [2, 3]
    assert workers() == before


def test_rows_that_have_ended_have_no_tokens() -> None:
    end = hand.generate(HF, "llama", ROWS[1], 5, [])[1]
    expected = [hand.generate(HF, "llama", row, 5, [], end) for row in ROWS]
    events = list(MODEL.stream(ROWS, max_new_tokens=5, eos_token_id=end))
    assert len(events) == max(map(len, expected))
    for row, new in enumerate(expected):
        assert [event.tokens[row] for event in events] == new + [None] * (len(events) - len(new))


def test_rows_that_a_criterion_has_ended_have_no_tokens() -> None:
    counts = [5, 2, 4]
    width = max(map(len, ROWS))

    def stop(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """True in the step that ends a row, and in no later one."""
        return torch.tensor([input_ids.shape[1] - width == count for count in counts])

    expected = [hand.generate(HF, "llama", *given, []) for given in zip(ROWS, counts, strict=True)]
    events = list(MODEL.stream(ROWS, max_new_tokens=5, stopping_criteria=[stop]))
    for row, new in enumerate(expected):
        assert [event.tokens[row] for event in events] == new + [None] * (5 - len(new))


def test_pieces_of_text_make_the_text() -> None:
    tokenizer = byte_level_bpe()
    model = tl.wrap(FAMILIES["qwen2"].build(vocab_size=len(tokenizer)), tokenizer)
    with model.generate(ROWS, max_new_tokens=9) as t:
        pass
    events = list(model.stream(ROWS, max_new_tokens=9))
    for row, text in enumerate(t.text):
        said = "".join(event.texts[row] for event in events)
        assert text.startswith(said)
        assert len(text) - len(said) <= 1


def test_leaving_the_loop_ends_the_generation() -> None:
    threads = workers()
    passes: list[int] = []
    counting = HF.model.embed_tokens.register_forward_hook(lambda *_: passes.append(1))
    for event in MODEL.stream(IDS, max_new_tokens=50):
        if event.step == 2:
            break
    del event
    gc.collect()
    deadline = time.monotonic() + 20
    while workers() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    counting.remove()
    assert workers() == threads
    assert len(passes) <= 6  # at most some steps ahead of the loop, and not all 50
    before = model_fingerprint(HF)
    with MODEL.stream(IDS, max_new_tokens=50) as stream:
        next(stream)
    assert workers() == threads
    with pytest.raises(StopIteration):
        next(stream)
    assert_untouched(before, model_fingerprint(HF))
    with MODEL.trace(IDS):  # and the model is free
        assert MODEL.logits.save() is not None


def test_a_block_right_after_a_loop_that_was_left_waits_for_the_step_that_is_being_made() -> None:
    with MODEL.trace(IDS):
        expected = MODEL.logits.save()
    threads = workers()
    for _ in range(5):
        for _ in MODEL.stream(IDS, max_new_tokens=50):
            break
        with MODEL.trace(IDS):
            logits = MODEL.logits.save()
        assert torch.equal(logits.value, expected.value)
    deadline = time.monotonic() + 20
    while workers() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert workers() == threads


def test_leaving_the_loop_over_a_stream_with_a_name_ends_it() -> None:
    """Whether by ``break`` or by an error, whose traceback has the stream; but not between two ``next(stream)``."""
    stream = MODEL.stream(IDS, max_new_tokens=50)
    assert next(stream).step == 0
    for event in stream:
        if event.step == 2:
            break
    with MODEL.trace(IDS):
        logits = MODEL.logits.save()
    assert logits.value.shape[1] == len(IDS)
    assert next(stream, None) is None
    with pytest.raises(errors.NestedTraceError, match="gone through once") as caught:
        list(stream)
    assert caught.value.also[0][1].text == "stream = MODEL.stream(IDS, max_new_tokens=50)"

    def body() -> None:
        held = MODEL.stream(IDS, max_new_tokens=50)
        for event in held:
            raise RuntimeError(event.step)

    with pytest.raises(RuntimeError) as failed:
        body()
    assert any("held" in entry.frame.f_locals for entry in failed.traceback)
    with MODEL.trace(IDS):
        again = MODEL.logits.save()
    assert torch.equal(again.value, logits.value)


def test_a_stream_in_the_loop_over_another_one_is_refused() -> None:
    """The second would wait for the first, and the first for the loop."""
    with MODEL.stream(IDS, max_new_tokens=9) as stream:
        next(stream)
        other = MODEL.stream(IDS, max_new_tokens=2)
        with pytest.raises(errors.NestedTraceError, match="loop over a stream") as caught:
            next(other)
        assert caught.value.at is not None
        assert caught.value.at.text == "other = MODEL.stream(IDS, max_new_tokens=2)"
        assert next(stream).step == 1


@pytest.mark.parametrize("ending", ["del stream", "pass"], ids=["let go of", "still held"])
def test_a_script_that_ends_with_an_open_stream_ends(ending: str) -> None:
    script = f"""
import tracelens as tl
from tests.support.families import FAMILIES
stream = tl.wrap(FAMILIES["llama"].build()).stream([3, 14, 15], max_new_tokens=50)
print(next(stream).step, flush=True)
{ending}
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


def test_the_model_cannot_be_run_in_the_loop_over_its_stream() -> None:
    """Both would wait for each other for ever."""
    with MODEL.stream(IDS, max_new_tokens=5) as stream:
        next(stream)
        with pytest.raises(errors.NestedTraceError, match="loop over a stream"), MODEL.trace(IDS):
            MODEL.logits.save()
        assert next(stream).step == 1


def test_an_error_in_a_step_comes_at_its_line() -> None:
    def fail(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("in a step")

    threads = workers()
    with MODEL.record(generation=True) as r:
        x = r.steps[2].layers[1].resid_post
        tl.apply(fail, x, like=x).save("x")
    seen: list[int] = []
    with pytest.raises(errors.OpFailedError, match="in a step") as caught:
        seen += [event.step for event in MODEL.stream(IDS, r, max_new_tokens=5)]
    assert "test_streaming.py" in str(caught.value.at)
    assert workers() == threads
    events = MODEL.stream(IDS, r, max_new_tokens=5)
    assert [next(events).step, next(events).step] == [0, 1]
    with pytest.raises(errors.OpFailedError):
        next(events)
    with pytest.raises(errors.UnknownSaveError, match="saved nothing as 'y'"):
        _ = next(iter(MODEL.stream(IDS, max_new_tokens=1)))["y"]


@pytest.mark.parametrize("wrong", ["graph {}", 5])
def test_what_is_no_graph_is_refused(wrong: Any) -> None:
    with pytest.raises(errors.OptionError, match="no graph"):
        MODEL.stream(IDS, wrong, max_new_tokens=2)


def test_a_graph_with_steps_is_no_graph_for_a_trace() -> None:
    with MODEL.record(generation=True) as r:
        r.decode.layers[0].resid_post.save("h")
    with pytest.raises(errors.VerificationError, match="names steps"):
        MODEL.compile(r.graph)
    again = tl.parse(str(r.graph))
    assert again == r.graph
    event = list(MODEL.stream(IDS, again, max_new_tokens=2))[1]
    assert event["h"].shape == (1, 1, D_MODEL)


def test_a_file_is_refused_and_not_left_unwritten(tmp_path: Path) -> None:
    file = tmp_path / "h.safetensors"
    with MODEL.record(generation=True) as r:
        MODEL.layers[1].resid_post.save("other")
        MODEL.layers[0].resid_post.save("h", to=file)  # <-
    for given in (r, r.graph):
        with pytest.raises(errors.OptionError, match="writes no file") as caught:
            MODEL.stream(IDS, given, max_new_tokens=2)
        assert caught.value.at is not None
        assert caught.value.at.text.endswith("# <-")
        assert "model.generate" in str(caught.value.instead)
        assert 'event["h"]' in str(caught.value.instead)
    assert not file.exists()
    with MODEL.generate(IDS, max_new_tokens=2):
        MODEL.layers[0].resid_post.save("h", to=file)
    assert file.exists()
