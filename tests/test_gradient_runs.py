"""Runs with gradients leave the model, autograd and the user's own state as they were, and no memory behind."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch

import tracelens as tl
from tests.support.batches import EVEN, RAGGED, random_rows
from tests.support.families import D_MODEL, FAMILIES, WITH_NEURONS
from tests.support.plain import untouched
from tests.test_gradients import WEIGHTS, last_loss
from tracelens.errors import OpFailedError, TracelensError, UndifferentiableModelError, UnusedGradientError

ROWS, RAGGED_ROWS = random_rows(EVEN), random_rows(RAGGED)
MODEL = tl.wrap(FAMILIES["llama"].build())


def gradients(model: tl.Model = MODEL, rows: list[list[int]] = ROWS) -> tl.Trace:
    """A trace with an intervention, selectors, constants and gradients at two sites."""
    with model.trace(rows) as t:
        h, mid = model.layers[0].resid_post, model.layers[1].resid_mid
        model.layers[1].mlp_out.tok[[1, 0]] *= WEIGHTS[:D_MODEL]
        for name, g in zip(("h", "mid"), tl.grad(last_loss(model.logits), [h, mid]), strict=True):
            tl.masked_mean(g).save(name)
        h.tok[-1].save("site")
    return t


def gradient_through(model: tl.Model, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    with model.trace(ROWS):
        h = model.layers[0].resid_post
        tl.grad(model.logits.sum() + tl.apply(function, model.layers[1].resid_post).sum(), h).save()


# --- grad modes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("rows", [ROWS, RAGGED_ROWS], ids=["even", "ragged"])
@pytest.mark.parametrize("name", WITH_NEURONS)
def test_the_users_grad_mode_does_not_matter(
    name: str, rows: list[list[int]], mode: Callable[[], AbstractContextManager[object]]
) -> None:
    model = tl.wrap(FAMILIES[name].build())
    wanted = gradients(model, rows)
    with mode():
        before = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        found = gradients(model, rows)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
    for key, tensor in wanted.results.items():
        assert torch.equal(found[key], tensor)
        assert not found[key].is_inference()
        assert not found[key].requires_grad


def test_constants_made_in_inference_mode_can_be_used() -> None:
    with torch.inference_mode():
        v = torch.linspace(0, 1, D_MODEL)
    with MODEL.trace(ROWS) as t:
        h = MODEL.layers[0].resid_post
        tl.grad((h * h * v).sum(), h).save("g")
        h.save("h")
    torch.testing.assert_close(t["g"], 2 * t["h"] * v, rtol=1e-6, atol=1e-6)


def test_saved_gradients_are_fit_for_training_on() -> None:
    t = gradients()
    probe = torch.nn.Linear(D_MODEL, 1)
    (probe(t["h"]) + probe(t["site"])).sum().backward()
    torch.testing.assert_close(probe.weight.grad[0], (t["h"] + t["site"]).sum(0), rtol=1e-5, atol=1e-5)


# --- the model -------------------------------------------------------------------------------------------------------


def test_parameters_keep_their_flags_and_their_own_gradients() -> None:
    hf = FAMILIES["llama"].build()
    wanted = gradients(tl.wrap(hf))
    for number, parameter in enumerate(hf.parameters()):
        if number % 3 == 0:
            parameter.requires_grad_(False)
        elif number % 3 == 1:
            parameter.grad = torch.full_like(parameter, float(number))
    kept = {name: p.grad.clone() for name, p in hf.named_parameters() if p.grad is not None}
    assert kept
    with untouched(hf):
        found = gradients(tl.wrap(hf))
    assert all(torch.equal(hf.get_parameter(name).grad, grad) for name, grad in kept.items())
    for key, tensor in wanted.results.items():
        assert torch.equal(found[key], tensor)


def test_a_training_step_of_the_users_may_be_under_way() -> None:
    """Autograd's graph of a loss that is not yet differentiated still leads to the parameters afterwards."""
    hf = FAMILIES["llama"].build()
    ids = torch.tensor(ROWS)
    hf(ids).logits.sum().backward()
    wanted = [p.grad.clone() for p in hf.parameters() if p.grad is not None]
    hf.zero_grad()
    loss = hf(ids).logits.sum()
    gradients(tl.wrap(hf))
    loss.backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(hf.parameters(), wanted, strict=True))


@pytest.mark.parametrize(
    "error", [ValueError("x"), KeyboardInterrupt()], ids=lambda error: type(error).__name__
)
@pytest.mark.parametrize("place", ["before the loss", "the model"])
def test_an_error_leaves_the_parameters_as_they_were(place: str, error: BaseException) -> None:
    hf = FAMILIES["llama"].build()
    hf.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    model = tl.wrap(hf)

    def failing(*_: object) -> torch.Tensor:
        raise error

    handle = hf.model.layers[2].register_forward_pre_hook(failing) if place == "the model" else None
    with untouched(hf):
        expected = OpFailedError if handle is None and isinstance(error, Exception) else type(error)
        with pytest.raises(expected):
            gradient_through(model, failing if handle is None else lambda x: x)
    if handle:
        handle.remove()
    assert torch.is_grad_enabled()
    gradients(model)


def test_a_gradient_that_fails_leaves_the_model_as_it_was() -> None:
    def cut() -> None:
        with MODEL.trace(ROWS):
            h = MODEL.layers[0].resid_post
            MODEL.layers[1].resid_post = 0.0
            tl.grad(last_loss(MODEL.logits), h).save()  # what layer 1 gives no longer depends on it

    with untouched(MODEL.hf), pytest.raises(UnusedGradientError) as caught:
        cut()
    assert caught.value.at is not None
    assert "tl.grad" in caught.value.at.text
    assert "layers.0.resid_post" in str(caught.value)
    gradients()


def test_states_in_which_gradients_would_be_wrong_are_refused() -> None:
    hf = FAMILIES["llama"].build(attention_dropout=0.0).train()
    hf.gradient_checkpointing = True
    with untouched(hf), pytest.raises(UndifferentiableModelError, match="again in the backward pass"):
        gradients(tl.wrap(hf))
    gradients(tl.wrap(hf.eval()))
    with torch.inference_mode():
        frozen = copy.deepcopy(hf)
    with pytest.raises(UndifferentiableModelError, match="inference mode"):
        gradients(tl.wrap(frozen))


def test_traces_without_gradients_run_without_autograd() -> None:
    seen: list[bool] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.is_grad_enabled())
        return x

    with MODEL.trace(ROWS):
        tl.apply(look, MODEL.layers[1].resid_post).save()
    assert seen == [False]


# --- autograd's graph ------------------------------------------------------------------------------------------------


def test_autograd_starts_at_the_first_site_and_ends_after_the_last_gradient() -> None:
    history: dict[str, bool] = {}

    def look(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        def see(x: torch.Tensor) -> torch.Tensor:
            history[name] = x.requires_grad
            return x

        return see

    with MODEL.trace(ROWS):
        h = MODEL.layers[1].resid_post
        tl.apply(look("below"), MODEL.layers[1].mlp_out).save()
        tl.apply(look("above"), MODEL.layers[2].attn_out).save()
        tl.grad(MODEL.layers[2].mlp_act.sum(), h).save()
        tl.apply(look("after"), MODEL.lm_head).save()
    assert history["below"] is False
    assert history["above"] is True
    # What came after the loss is made of tensors with a history, and adds nothing to it.
    assert history["after"] is False


def test_nothing_of_the_graph_outlives_the_trace() -> None:
    alive: list[weakref.ref[torch.Tensor]] = []

    def watch(x: torch.Tensor) -> torch.Tensor:
        result = x * 1.0
        alive.append(weakref.ref(result))
        alive.append(weakref.ref(x))
        return result

    with MODEL.trace(ROWS) as t:
        h = MODEL.layers[0].resid_post
        loss = last_loss(MODEL.logits) + tl.apply(watch, MODEL.layers[1].resid_mid).sum()
        g = tl.grad(loss, h).save("g")
        tl.grad(loss * 2, h).save("twice")
        loss.save("loss")
        h.save("h")
    assert len(alive) == 2
    assert [reference() for reference in alive] == [None, None]
    for name in ("g", "twice", "loss", "h"):
        assert t[name].grad_fn is None
        assert not t[name].requires_grad
    assert torch.allclose(t["twice"], 2 * g.value)


@pytest.mark.slow
def test_hundreds_of_traces_leave_no_tensors_behind() -> None:
    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    gradients(rows=[[5, 6, 7]])
    before = tensors()
    for _ in range(300):
        gradients(rows=[[5, 6, 7]])
    assert tensors() <= before + 2


def test_no_run_is_left_open_by_a_gradient_in_a_nested_function() -> None:
    def again(x: torch.Tensor) -> torch.Tensor:
        gradients()
        return x

    with untouched(MODEL.hf), pytest.raises(TracelensError):
        gradient_through(MODEL, again)
    gradients()


# --- programs whose constants change ---------------------------------------------------------------------------------


def test_a_sweep_takes_the_gradient_at_each_point() -> None:
    """Points that ran in one batch would add up to one loss."""
    with MODEL.record() as r:
        h = MODEL.layers[0].resid_post
        strength = tl.constant(1.0, name="strength")
        MODEL.layers[1].resid_post *= strength
        tl.grad(last_loss(MODEL.logits), h).save("g")
    program = MODEL.compile(r)
    points = [0.5, 1.0, 3.0]
    swept = tl.sweep(program, ROWS, strength=points)
    for number, point in enumerate(points):
        with MODEL.trace(ROWS) as t:
            h = MODEL.layers[0].resid_post
            MODEL.layers[1].resid_post *= point
            tl.grad(last_loss(MODEL.logits), h).save("g")
        torch.testing.assert_close(swept["g"][number], t["g"], rtol=1e-5, atol=1e-6)
        assert torch.equal(program(ROWS, strength=point)["g"], t["g"])
