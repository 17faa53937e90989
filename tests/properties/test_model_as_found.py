"""Whatever happens in a trace, the model is as it was and the next trace works: promise 6 of the design."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tracelens as tl
from tests.support.batches import batch, random_rows
from tests.support.families import FAMILIES
from tests.support.plain import plain_logits, untouched
from tracelens.errors import FailedRunError, OpFailedError, TracelensError

ROWS = random_rows((6, 6))


class Fuse(nn.Module):
    """An activation function that raises what it is told to, before or after its work."""

    def __init__(self, inner: nn.Module, orders: list[BaseException]) -> None:
        super().__init__()
        self.inner, self.orders = inner, orders

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = self.inner(x)
        if self.orders:
            raise self.orders.pop()
        return result


def build(orders: list[BaseException]) -> tl.Model:
    hf = FAMILIES["llama"].build()
    hf.model.layers[1].mlp.act_fn = Fuse(hf.model.layers[1].mlp.act_fn, orders)
    return tl.wrap(hf)


ORDERS: list[BaseException] = []
MODEL = build(ORDERS)


@pytest.fixture(autouse=True)
def _afterwards_it_works() -> Iterator[None]:
    """The model is untouched by the test, and a fresh trace of it gives what it ought to."""
    with untouched(MODEL.hf):
        yield
        assert not ORDERS
        with MODEL.trace(ROWS) as trace:
            MODEL.layers[2].mlp_act += 0.0
            logits = MODEL.logits.save()
        assert torch.equal(logits.value, plain_logits(MODEL.hf, batch(ROWS)))
        assert len(trace.results) == 1


def an_error_in(where: str, error: BaseException) -> None:
    """A trace with writes and saves in which ``error`` is raised somewhere."""

    def raising(x: torch.Tensor) -> torch.Tensor:
        raise error

    if where == "the model":
        ORDERS.append(error)
    with MODEL.trace(ROWS):
        MODEL.layers[0].resid_mid += 1.0
        saved = MODEL.layers[0].attn_out.save("a")
        MODEL.layers[1].mlp_pre[:, -1] = 0
        if where == "an applied function":
            MODEL.layers[2].resid_post = tl.apply(raising, MODEL.layers[2].resid_post)
        HANDLES.append(saved)
        MODEL.logits.save("l")
        if where == "the body":
            raise error


HANDLES: list[tl.Saved] = []
PLACES = ["the body", "the model", "an applied function"]
ERRORS = [
    ValueError("x"),
    KeyboardInterrupt(),
    SystemExit(3),
    RuntimeError("boom"),
    StopIteration(),
    GeneratorExit(),
]


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_leaves_the_model_as_it_was(where, error):
    expected = type(error)
    if where == "an applied function" and isinstance(error, Exception):
        expected = OpFailedError
    with pytest.raises(expected) as caught:
        an_error_in(where, error)
    if expected is OpFailedError:
        assert caught.value.__cause__ is error
        assert caught.value.at is not None
        assert caught.value.at.function == "an_error_in"
    else:
        assert caught.value is error
    handle = HANDLES.pop()
    with pytest.raises(FailedRunError):
        handle.value
    with pytest.raises(TracelensError):
        handle + 1


@given(st.data())
def test_any_sequence_of_good_and_bad_traces_leaves_the_model_as_it_was(data):
    for where in data.draw(st.lists(st.sampled_from([*PLACES, "nowhere"]), min_size=1, max_size=5)):
        if where == "nowhere":
            an_error_in(where, ValueError())
        else:
            with pytest.raises((ValueError, OpFailedError)):
                an_error_in(where, ValueError("x"))
    HANDLES.clear()


def _mismatch() -> None:
    with MODEL.trace(ROWS):
        tl.apply(lambda x: x[:, :1], MODEL.layers[1].mlp_out).save()


def _changed_constant() -> None:
    v = torch.ones(48)
    with MODEL.trace(ROWS):
        MODEL.layers[1].mlp_out += v
        MODEL.logits.save()
        v += 1


def _nested_in_apply() -> None:
    def trace_again(x: torch.Tensor) -> torch.Tensor:
        with MODEL.trace(ROWS):
            MODEL.logits.save()
        return x

    with MODEL.trace(ROWS):
        tl.apply(trace_again, MODEL.layers[1].mlp_out).save()


def _lost_update() -> None:
    with MODEL.trace(ROWS):
        h = MODEL.layers[1].mlp_out
        h += 1
        MODEL.logits.save()


def _abandoned_generator() -> None:
    def steps() -> Iterator[None]:
        with MODEL.trace(ROWS):
            MODEL.layers[1].mlp_out += 1
            MODEL.logits.save()
            yield

    generator = steps()
    next(generator)
    generator.close()
    raise TracelensError("as the others do")


@pytest.mark.parametrize(
    "failing", [_mismatch, _changed_constant, _nested_in_apply, _lost_update, _abandoned_generator]
)
def test_a_refused_run_leaves_the_model_as_it_was(failing: Callable[[], None]):
    with pytest.raises(TracelensError):
        failing()


def test_an_interrupt_in_generation_leaves_the_model_as_it_was():
    ORDERS.append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt), MODEL.generate(ROWS[0], max_new_tokens=3):
        MODEL.layers[0].resid_mid += 1.0


def test_hooks_of_the_user_stay_and_still_fire():
    seen: list[int] = []
    handle = MODEL.hf.model.layers[1].register_forward_hook(lambda module, args, output: seen.append(1))
    try:
        with untouched(MODEL.hf):
            with MODEL.trace(ROWS):
                MODEL.layers[1].resid_post += 1.0
                MODEL.logits.save()
            with pytest.raises(ValueError, match="x"):
                an_error_in("the model", ValueError("x"))
    finally:
        handle.remove()
        HANDLES.clear()
    assert seen == [1]


def test_training_mode_and_grad_flags_are_left_alone():
    hf = FAMILIES["llama"].build(attention_dropout=0.0).train()
    hf.model.layers[0].requires_grad_(False)
    model = tl.wrap(hf)
    with untouched(hf), model.trace(ROWS):
        model.layers[0].resid_post += 1.0
        model.logits.save()
    assert hf.training
