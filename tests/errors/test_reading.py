"""Reading results: too early, too late, unsaved, after a failure, under a wrong name."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

import tracelens as tl
from tests.errors import IDS, LLAMA, D, refused
from tracelens.errors import (
    BlockEndedError,
    FailedRunError,
    NoTokenizerError,
    NotRunYetError,
    OpFailedError,
    OptionError,
    SaveInGenerationError,
    UnknownSaveError,
    UnsavedValueError,
    WriteTargetError,
)

model = LLAMA.model

READINGS = [
    lambda h: h.value,
    lambda h: h + 1,
    lambda h: 1 - h,
    lambda h: -h,
    lambda h: h[0],
    lambda h: h.mean(),
    lambda h: torch.relu(h),
    lambda h: np.asarray(h),
    lambda h: np.exp(h),
    lambda h: float(h),
    lambda h: bool(h),
    lambda h: len(h),
    lambda h: list(h),
    lambda h: 1.0 in h,
    lambda h: h.tolist(),
    lambda h: pickle.dumps(h),
    lambda h: copy.deepcopy(h),
    lambda h: h.save(),
]


# --- not saved -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reading", READINGS)
def test_reading_an_unsaved_value(reading) -> None:
    with model.trace(IDS):
        h = model.layers[0].resid_post * 2  # recorded
    with refused(
        UnsavedValueError, "was not saved", instead="add .save() to that line", text="lambda h:"
    ) as caught:
        reading(h)
    # It names the line where .save() belongs.
    assert "# recorded" in caught.error.also[0][1].text


@pytest.mark.parametrize("reading", READINGS)
def test_reading_an_unsaved_mapped_value(reading) -> None:
    with model.trace(IDS):
        h = model.layers[0:2].resid_post  # recorded
    with refused(
        UnsavedValueError, "was not saved", instead="add .save() to that line", text="lambda h:"
    ) as caught:
        reading(h)
    assert "# recorded" in caught.error.also[0][1].text


@pytest.mark.parametrize("reading", READINGS[:-1])
def test_the_same_readings_of_a_saved_value(reading) -> None:
    with model.trace(IDS):
        h = (model.layers[0].resid_post[0, 0, :1] * 2).save()
    reading(h)


def test_reading_an_unsaved_value_of_a_generation() -> None:
    with model.generate(IDS, max_new_tokens=1):
        h = model.layers[0].resid_post
    with refused(UnsavedValueError, "was not saved", instead="trace the whole text"):
        h.value  # <-


# --- too early -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reading", "instead"),
    [
        (lambda t, h: h.value, "after the block"),
        (lambda t, h: t["h"], "after the block"),
        (lambda t, h: t.results, "after the block"),
        (lambda t, h: t.graph, "after the block"),
        (lambda t, h: t.explain(), "after the block"),
        (lambda t, h: str(t.plan()), "after the block"),
    ],
)
def test_reading_before_the_block_has_ended(reading, instead) -> None:
    with refused(NotRunYetError, instead=instead, text="lambda t, h:"), model.trace(IDS) as t:
        h = model.layers[0].resid_post.save("h")
        reading(t, h)
    with model.trace(IDS) as t:
        h = model.layers[0].resid_post.save("h")
    reading(t, h)


def test_reading_before_the_block_has_begun() -> None:
    t = model.trace(IDS)
    with refused(NotRunYetError, "has not run yet", instead="after the block"):
        t["h"]  # <-


@pytest.mark.parametrize("reading", [lambda t: t.tokens, lambda t: t.text])
def test_reading_before_a_generation_has_ended(reading) -> None:
    t = model.generate(IDS, max_new_tokens=1)
    with refused(NotRunYetError, "not generated", instead="after the block", text="lambda t:"), t:
        model.layers[0].resid_post *= 1
        reading(t)
    with model.generate(IDS, max_new_tokens=1) as t:
        model.layers[0].resid_post *= 1
    assert len(reading(t)) >= 1


def test_a_recording_has_no_numbers() -> None:
    with model.record() as r:
        h = model.layers[0].resid_post.save("h")
    with refused(NotRunYetError, "only writes down", instead="model.compile(r)(prompt)"):
        h.value  # <-
    assert model.compile(r)(IDS)["h"].shape == (1, 4, D)


# --- after a failure -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reading", [lambda t, h: h.value, lambda t, h: t["h"], lambda t, h: t.graph])
def test_reading_after_the_body_raised(reading) -> None:
    with pytest.raises(KeyError), model.trace(IDS) as t:  # noqa: PT012  # the body is what raises
        h = model.layers[0].resid_post.save("h")
        {"happy": 1}["sad"]
    says = ("the block failed", "KeyError: 'sad'")
    with refused(FailedRunError, *says, instead="a new block", text="lambda t, h:") as caught:
        reading(t, h)
    assert isinstance(caught.error.__cause__, KeyError)


@pytest.mark.parametrize("reading", [lambda t, h: h.value, lambda t, h: t["h"], lambda t, h: h + 1])
def test_reading_after_the_run_failed(reading) -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("boom")

    with refused(OpFailedError, "boom", instead=None, forwards=1), model.trace(IDS) as t:
        h = model.layers[0].resid_post.save("h")
        tl.apply(broken, h)  # <-
    with refused(FailedRunError, "boom", instead="a new block", text="lambda t, h:") as caught:
        reading(t, h)
    # It names the line of the failure too.
    assert "tl.apply(broken, h)" in caught.error.also[0][1].text
    assert isinstance(caught.error.__cause__, OpFailedError)


@pytest.mark.parametrize("reading", [lambda t: t.tokens, lambda t: t.text])
def test_reading_after_a_generation_failed(reading) -> None:
    with pytest.raises(ZeroDivisionError), model.generate(IDS, max_new_tokens=1) as t:
        model.layers[0].resid_post *= 1 / 0
    with refused(FailedRunError, "ZeroDivisionError", instead="a new block", text="lambda t:"):
        reading(t)


# --- too late, and names ---------------------------------------------------------------------------------------------


def test_saving_after_the_block() -> None:
    with model.trace(IDS):
        h = model.layers[0].resid_post.save()
        mapped = model.layers[0:2].resid_post.save()
    with refused(BlockEndedError, "has ended", instead="handle.value"):
        h.save("again")  # <-
    with refused(BlockEndedError, "has ended", instead="handle.value"):
        mapped.save("again")  # <-


def test_addressing_tokens_after_the_block() -> None:
    with model.trace(IDS):
        h = model.layers[0].resid_post.save()
    with refused(BlockEndedError, "has ended", instead="inside the block"):
        h.tok[0]  # <-
    with refused(BlockEndedError, "has ended", instead="inside the block"):
        h.tok[0] = 1  # <-


def test_a_name_that_nothing_was_saved_under() -> None:
    with model.trace(IDS) as t:
        model.layers[0].resid_post.save("resid")
    with refused(UnknownSaveError, "'residual'", "saved: 'resid'", instead="value.save(name)"):
        t["residual"]  # <-
    with refused(UnknownSaveError, "'residual'", instead="value.save(name)"):
        t.results["residual"]  # <-
    assert t.results.get("residual") is None
    assert t["resid"].shape == (1, 4, D)


@pytest.mark.parametrize("name", [5, "#0", ("a", 1)])
def test_a_name_that_is_none(name) -> None:
    with refused(OptionError, repr(name), instead='value.save("name")'), model.trace(IDS):
        model.layers[0].resid_post.save(name)  # <-


@pytest.mark.parametrize("device", ["cuda:0", "gpu", ""])
def test_a_place_that_is_none(device) -> None:
    with refused(OptionError, repr(device), instead='device="cpu" or device="keep"'), model.trace(IDS):
        model.layers[0].resid_post.save(device=device)  # <-
    with model.trace(IDS):
        model.layers[0].resid_post.save("a", device="cpu")
        model.layers[0].resid_post.save("b", device="keep")


def test_assigning_into_a_saved_handle() -> None:
    with model.trace(IDS):
        h = model.layers[0].resid_post.save()
        mapped = model.layers[0:2].resid_post.save()
    for handle in (h, mapped):
        with refused(WriteTargetError, "saved result", instead="result = handle.value.clone()"):
            handle[0] = 1  # <-
    result = h.value.clone()
    result[0] = 1
    assert not torch.equal(result, h.value)


def test_saving_in_a_generation() -> None:
    block = model.generate("The capital", max_new_tokens=2)
    with refused(SaveInGenerationError, "an axis of keys", instead="t.prefill"), block:
        model.layers[0].resid_post *= 1
        model.layers[0].pattern.save()  # <-
    with model.generate("The capital", max_new_tokens=2) as t:
        h = model.layers[0].resid_post.save()
    assert h.shape[1] == len(model.tokens("The capital")[0]) + len(t.tokens) - 1


def test_text_without_a_tokenizer() -> None:
    bare = tl.wrap(LLAMA.hf)
    with bare.generate(IDS, max_new_tokens=1) as t:
        bare.layers[0].resid_post *= 1
    with refused(NoTokenizerError, "no tokenizer", instead="t.tokens"):
        t.text  # <-
    assert len(t.tokens) == 1
