"""The generated function of a hook point: shared source, freed variables, errors with their line."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import tracelens as tl
from tests.support.families import FAMILIES
from tracelens import errors
from tracelens.backends.local import LocalCode

HF = FAMILIES["llama"].build()
IDS = [[5, 9, 2, 7]]


def code_of(recording: tl.tracing.Recording) -> LocalCode:
    return recording._compiled().code


def test_layers_with_the_same_steps_share_their_code() -> None:
    model = tl.wrap(HF)
    with model.record(IDS) as r:
        for layer in model.layers:
            layer.resid_post += torch.ones(48)
        model.logits.save()
    bodies = [hook.code.body for hook in code_of(r).hooks if "layers" in hook.code.path]
    assert len(bodies) == 3
    # Each layer adds a constant of its own, which the source names by its place; all else is the same.
    assert len({body.source.count("\n") for body in bodies}) == 1
    again = [hook.code.body for hook in code_of(r).hooks if "layers" in hook.code.path]
    assert all(one.run.__code__ is other.run.__code__ for one, other in zip(bodies, again, strict=True))


def test_a_value_that_no_other_hook_needs_is_a_variable() -> None:
    model = tl.wrap(HF)
    with model.record(IDS) as r:
        early = model.layers[0].resid_post
        model.layers[1].resid_post = model.layers[1].resid_post * 2 + early
        model.logits.save()
    first, second, _ = (hook.code.body for hook in code_of(r).hooks)
    assert "values[" in first.source.replace("values = state.values", "")
    assert f"values[{r.graph.ops[0].out}] = None" in second.source
    assert second.source.count("values[") == 2  # taken, and freed


def test_functions_that_give_several_tensors_or_a_tuple_of_one() -> None:
    model = tl.wrap(HF)
    with model.trace(IDS) as t:
        h = model.layers[1].resid_post
        h.save("h")
        for width in (48, 24, 16):
            parts = torch.split(h, width, dim=-1)
            for number, part in enumerate(parts):
                part.save(f"{width}.{number}")
        top = h.topk(2, dim=-1)
        top.values.save("values")
        top.indices.save("indices")
        model.layers[1].resid_post = torch.cat(torch.split(h, 24, dim=-1)[::-1], dim=-1)
        model.layers[2].resid_pre.save("after")
    for width in (48, 24, 16):
        for number, part in enumerate(torch.split(t["h"], width, dim=-1)):
            assert torch.equal(t[f"{width}.{number}"], part)
    assert torch.equal(t["values"], t["h"].topk(2, dim=-1).values)
    assert torch.equal(t["indices"], t["h"].topk(2, dim=-1).indices)
    assert torch.equal(t["after"], torch.cat([t["h"][..., 24:], t["h"][..., :24]], dim=-1))


def test_an_error_is_blamed_on_the_line_whose_step_raised_it() -> None:
    model = tl.wrap(HF)

    def broken(h: torch.Tensor) -> torch.Tensor:
        raise ValueError("no luck")

    def run() -> None:
        with model.trace(IDS):
            h = model.layers[1].resid_post
            doubled = h * 2
            wrong = tl.apply(broken, doubled, like=doubled)
            wrong.mean().save()
            model.layers[1].resid_post = doubled

    with pytest.raises(errors.OpFailedError, match="no luck") as caught:
        run()
    assert caught.value.at is not None
    assert caught.value.at.text == "wrong = tl.apply(broken, doubled, like=doubled)"
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_value_is_gone_as_soon_as_nobody_needs_it() -> None:
    """Within one hook: the second function sees that what only the first one needed is no longer held."""
    model = tl.wrap(HF)
    seen: list[weakref.ref[torch.Tensor]] = []
    held: list[bool] = []

    def note(h: torch.Tensor) -> torch.Tensor:
        seen.append(weakref.ref(h))
        return h.mean(-1)

    def look(h: torch.Tensor) -> torch.Tensor:
        gc.collect()
        held.append(seen[0]() is not None)
        return h.clone()

    with model.trace(IDS):
        h = model.layers[1].resid_post
        big = h * 2
        small = tl.apply(note, big, like=h[..., 0])
        tl.apply(look, small, like=small).save()
    assert held == [False]
