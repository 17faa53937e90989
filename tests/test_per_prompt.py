"""What was saved for prompts of different lengths: used as one tensor, and used in another block."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import tracelens as tl
from tests.errors import LLAMA, RAGGED, D, refused
from tests.support.families import FAMILIES, WITH_NEURONS
from tracelens.errors import PerPromptError, PositionAxisError, SpecialisedGraphError

model = LLAMA.model


def saved(site: str = "resid_post", rows: Any = RAGGED) -> Any:
    with model.trace(rows):
        return getattr(model.layers[1], site).save()


MISTAKES: dict[str, Callable[[Any], Any]] = {
    "+": lambda h: h + 1,
    "+ after": lambda h: 1 + h,
    "@": lambda h: h @ torch.ones(D),
    "-": operator.neg,
    "float": float,
    "a method": lambda h: h.mean(),
    "shape": lambda h: h.shape,
    "dtype": lambda h: h.dtype,
    "device": lambda h: h.device,
    "torch": torch.norm,
    "torch of two": lambda h: torch.cosine_similarity(h, h),
    "numpy": np.asarray,
    "axes": lambda h: h[:, -1],
    "ellipsis": lambda h: h[..., 0],
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_a_list_is_not_one_tensor(mistake: Callable[[Any], Any]) -> None:
    h = saved()
    with pytest.raises(PerPromptError, match=r"\.value is a list with one tensor for each prompt") as caught:
        mistake(h)
    assert f"(1, 4, {D}), (1, 2, {D})" in caught.value.problem
    assert "for part in h.value" in str(caught.value.instead)
    assert caught.value.at is not None
    assert caught.value.at.filename == __file__
    mistake(h[0][0, 0, 0] if mistake is float else saved(rows=RAGGED[0])[:, -1:])


def test_what_a_list_can_do() -> None:
    h = saved()
    assert len(h) == 2
    assert [part.shape for part in h] == [(1, 4, D), (1, 2, D)]
    assert torch.equal(h[0], h.value[0])
    assert torch.equal(torch.cat(h, 1), torch.cat(h.value, 1))
    assert not hasattr(h, "shape")
    assert "2 prompts" in repr(h)


@pytest.mark.parametrize("name", WITH_NEURONS)
def test_a_list_is_written_to_the_same_prompts(name: str) -> None:
    m = tl.wrap(FAMILIES[name].build())
    with m.trace(RAGGED):
        h = m.layers[0].resid_post.save()
    patches: dict[str, Callable[[Any, Any], Any]] = {
        "=": lambda site, new: new,
        "+=": lambda site, new: site + new,
        "a function of it": lambda site, new: torch.tanh(site - new) * new,
    }
    for patch in patches.values():
        with m.trace(RAGGED) as t:
            m.layers[2].resid_post = patch(m.layers[2].resid_post, h)
            m.logits.save("logits")
        for row, part, found in zip(RAGGED, h.value, t["logits"], strict=True):
            with m.trace(row) as alone:
                m.layers[2].resid_post = patch(m.layers[2].resid_post, part)
                m.logits.save("logits")
            with m.trace(row) as plain:
                m.logits.save("logits")
            assert not torch.allclose(found, plain["logits"], atol=1e-2)
            torch.testing.assert_close(found, alone["logits"], rtol=1e-4, atol=1e-5)


def test_assignments_in_place_and_repeated_use() -> None:
    h = saved()
    with model.trace(RAGGED) as t:
        model.layers[2].resid_post += h
        model.layers[2].mlp_out -= h
        model.logits.save("logits")
    assert sum(type(op).__name__ == "IndexPut" for op in t.graph.ops) == 1
    for row, part, found in zip(RAGGED, h.value, t["logits"], strict=True):
        with model.trace(row) as alone:
            model.layers[2].resid_post += part
            model.layers[2].mlp_out -= part
            model.logits.save("logits")
        torch.testing.assert_close(found, alone["logits"], rtol=1e-4, atol=1e-5)


def test_padding_is_nobodys_token() -> None:
    h = saved()
    with pytest.raises(PositionAxisError), model.trace(RAGGED):
        (model.layers[1].resid_post + h).mean(1)
    with pytest.raises(PositionAxisError), model.trace(RAGGED):
        (h + model.layers[1].resid_post)[:, 0]
    with model.trace(RAGGED) as t:
        mean = tl.masked_mean(model.layers[1].resid_post * 0 + h)
        mean.save("mean")
        model.layers[1].resid_post.save("h")
        (model.layers[1].resid_post * 0 + h).save("again")
    for row, (part, again) in enumerate(zip(h.value, t["again"], strict=True)):
        torch.testing.assert_close(t["mean"][row], part[0].mean(0))
        assert torch.equal(part, again)


def test_in_the_step_over_the_prompts() -> None:
    """As each prompt for itself, bit for bit; and as in a trace."""
    h = saved()
    found: list[list[torch.Tensor]] = []
    for way in ("nothing", "list", "prompts"):
        with model.generate(RAGGED, max_new_tokens=3) as t:
            if way == "list":
                t.prefill.layers[2].resid_post += h
            elif way == "prompts":
                for p, part in zip(t.prompts, h.value, strict=True):
                    p.layers[2].resid_post += part
            t.prefill.layers[:].resid_post.save("prompt")
            model.layers[2].resid_post.save("all")
        found.append([*t["prompt"], *t["all"]])
        if way == "list":
            graph = t.graph
            prompt = t["prompt"]
    for nothing, one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
        assert not torch.equal(one, nothing)
    with model.trace(RAGGED) as traced:
        model.layers[2].resid_post += h
        model.layers[:].resid_post.save("prompt")
    for one, other in zip(prompt, traced["prompt"], strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(SpecialisedGraphError):
        list(model.stream([[1, 2, 3, 4], [5, 6, 7]], graph, max_new_tokens=2))


def test_a_graph_with_a_list_is_for_these_lengths() -> None:
    h = saved()
    with model.record(RAGGED) as r:
        model.layers[2].resid_post = h
        model.logits.save("logits")
    program = model.compile(r)
    torch.testing.assert_close(
        program(RAGGED)["logits"], program([[1, 2, 3, 4], [5, 6]])["logits"], rtol=1, atol=9
    )
    with pytest.raises(SpecialisedGraphError):
        program([[1, 2, 3, 4], [5, 6, 7]])


def test_other_prompts_than_those_that_it_was_saved_for() -> None:
    h, pattern = saved(), saved("pattern")
    says = "what was saved for 2 prompts of different lengths"
    for rows in (RAGGED[::-1], RAGGED[0], [*RAGGED, [1]], [RAGGED[0], RAGGED[0]]):
        with refused(PerPromptError, says, "tokens, not 4, 2", instead="h.value[i]"), model.trace(rows):
            model.layers[2].resid_post = h  # <-
    with refused(PerPromptError, says, "this block has no prompt", instead="h.value[i]"), model.record():
        model.layers[2].resid_post += h  # <-
    with (
        refused(PerPromptError, says, "tokens, not 4, 2", instead="h.value[i]"),
        model.generate(RAGGED[::-1], max_new_tokens=1) as t,
    ):
        t.prefill.layers[2].resid_post += h  # <-
    for scope in ("all", "decode"):
        with (
            refused(PositionAxisError, "the positions of step 0", instead="t.prefill"),
            model.generate(RAGGED, max_new_tokens=3) as t,
        ):
            (t.decode if scope == "decode" else model).layers[2].resid_post += h  # <-
    with (
        refused(PerPromptError, says, r"only values with axes \[B, P, ...\]", instead="h.value[i]"),
        model.trace(RAGGED),
    ):
        model.layers[2].pattern = pattern  # <-
