"""Gradients: losses that are none, sites that are none, sites that the loss does not depend on, and their use."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tracelens as tl
from tests.errors import IDS, LLAMA, RAGGED, D, refused
from tracelens.errors import (
    CausalityError,
    ForeignValueError,
    GradientInGenerationError,
    GradientTargetError,
    LossError,
    NestedGradientError,
    NoTraceError,
    OpFailedError,
    PositionAxisError,
    StaleValueError,
    UnusedGradientError,
    WriteTargetError,
)

model = LLAMA.model


# --- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "words", "instead"),
    [
        (lambda: model.logits[:, -1, 3], "f32[B]", "loss.sum()"),
        (lambda: model.logits, "f32[B,P,420]", "loss.sum()"),
        (lambda: model.logits.argmax(), "i64[]", "floating"),
        (lambda: (model.logits > 0).all(), "bool[]", "floating"),
        (lambda: 3.0, "a float", "model.logits"),
        (lambda: torch.ones(()), "a Tensor", "model.logits"),
        (lambda: model.layers[:].resid_post.norm(), "mapped", ".stack()"),
    ],
)
def test_a_loss_that_is_not_one_number(loss: Any, words: str, instead: str) -> None:
    with refused(LossError, words, instead=instead), model.trace(IDS):
        h = model.layers[0].resid_post
        tl.grad(loss(), h)  # <-
    with model.trace(IDS):
        h = model.layers[0].resid_post
        tl.grad(model.logits[:, -1, 3].sum(), h).save()


def test_one_element_is_one_number() -> None:
    with model.trace(IDS) as t:
        h = model.layers[0].resid_post
        a, b = (tl.grad(loss, h) for loss in (h[0, 0, 0], (h[0, :1, :1])[None]))
        a.save("a")
        b.save("b")
    assert torch.equal(t["a"], t["b"])
    assert t["a"].sum() == 1


def test_a_loss_over_rows_of_different_lengths() -> None:
    with refused(PositionAxisError, "sum", instead="tl.masked_mean"), model.trace(RAGGED):
        h = model.layers[0].resid_post
        tl.grad(model.logits.sum(), h).save()  # <-
    with model.trace(RAGGED):
        h = model.layers[0].resid_post
        tl.grad(tl.masked_mean(model.logits).sum(), h).save()


# --- what it is with respect to --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrt", "words", "instead"),
    [
        (lambda h: h[:, -1], "a part of layers.0.resid_post", "tl.grad(loss, h)[:, -1]"),
        (lambda h: h[:, -1][0], "a part of", "tl.grad(loss, h)[...]"),
        (lambda h: h.tok[-1], "a part of", "tl.grad(loss, h).tok[-1]"),
        (lambda h: h * 2, "was computed", "tl.grad(loss, h)"),
        (lambda h: model.unembed, "parameters", "loss.backward()"),
        (lambda h: model.layers[0], "a LayerHandle", "model.layers[i].resid_post"),
        (lambda h: torch.ones(D), "a Tensor", "model.layers[i].resid_post"),
        (lambda h: model.layers[:].resid_post[:, -1], "a part of", "tl.grad(loss, h)[:, -1]"),
        (lambda h: [], "nothing", "[h1, h2]"),
        (lambda h: [[h]], "a list", "a site"),
        (lambda h: {"h": h}, "a dict", "a site"),
    ],
)
def test_what_is_not_a_site(wrt: Any, words: str, instead: str) -> None:
    with refused(GradientTargetError, words, instead=instead), model.trace(IDS):
        h = model.layers[0].resid_post
        tl.grad(model.logits.sum(), wrt(h))  # <-
    with model.trace(IDS):
        h = model.layers[0].resid_post
        tl.grad(model.logits.sum(), h)[:, -1].save()


def test_the_mask_of_tokens_has_no_gradient() -> None:
    with refused(GradientTargetError, "token_mask", "bool", instead="model.sites()"), model.trace(IDS) as t:
        value = tl.Value(t._recorder, t._recorder.read(tl.Site("token_mask")))
        tl.grad(model.logits.sum(), value)  # <-


def test_a_value_that_was_written_through() -> None:
    with refused(StaleValueError, "written through", instead="resid_post"), model.trace(IDS):
        h = model.layers[0].resid_post
        h[:, -1] = 0.0
        tl.grad(model.logits.sum(), h)  # <-


def test_values_of_other_traces() -> None:
    with model.trace(IDS):
        old = model.layers[0].resid_post
        loss = model.logits.sum()
        kept = model.layers[0].resid_post.save()
        model.logits.sum().save("loss")
    with refused(NoTraceError, "inside a block", instead="torch.autograd.grad"):
        tl.grad(loss, old)  # <-
    with refused(GradientTargetError, "has ended", instead="in this block"), model.trace(IDS):
        tl.grad(model.logits.sum(), kept)  # <-
    with refused(ForeignValueError, "another trace", instead=".save()"), model.trace(IDS):
        tl.grad((model.logits * old).sum(), model.layers[0].resid_post)  # <-


# --- unused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda: model.layers[0].resid_pre.sum(), "layers.0.resid_pre"),
        (lambda: (model.layers[0].mlp_up * model.layers[0].mlp_pre).sum(), "layers.0.mlp_pre"),
        (lambda: model.unembed.sum(), "no site"),
        (lambda: model.layers[1].resid_post.detach().sum(), "no site"),
        (lambda: (model.layers[1].resid_post > 0).to(torch.float32).sum(), "no site"),
    ],
)
def test_a_loss_that_comes_before_the_site(loss: Any, words: str) -> None:
    with refused(UnusedGradientError, words, "was read at", instead="comes after"), model.trace(IDS):
        site = model.layers[0].resid_post
        tl.grad(loss(), site)  # <-
    with model.trace(IDS):
        site = model.layers[0].resid_post
        tl.grad(model.layers[1].resid_post.sum(), site).save()


def test_sites_of_one_moment_do_not_feed_each_other() -> None:
    with refused(UnusedGradientError, "mlp_pre", instead="comes after"), model.trace(IDS):
        tl.grad(model.layers[0].mlp_pre.sum(), model.layers[0].mlp_up)  # <-


def test_a_version_that_was_written_over() -> None:
    """The order of the sites cannot tell: it is found while the model runs."""
    with refused(UnusedGradientError, "layers.0.resid_post", instead="loss", forwards=1), model.trace(IDS):
        h = model.layers[0].resid_post
        model.layers[0].resid_post = 1.0
        tl.grad(model.logits.sum(), h).save()  # <-
    with refused(UnusedGradientError, "layers.0.resid_post", instead="comes after"), model.trace(IDS):
        h = model.layers[0].resid_post
        model.layers[0].resid_post = torch.ones(D)
        tl.grad(model.layers[0].resid_post.sum(), h).save()  # <-


def test_one_of_several_is_named() -> None:
    with refused(UnusedGradientError, "layers.1.mlp_out", instead="gradient", forwards=1), model.trace(IDS):
        h, mlp = model.layers[0].resid_post, model.layers[1].mlp_out
        model.layers[1].mlp_add = 0.0
        tl.grad(model.logits.sum(), [h, mlp])[0].save()  # <-


def test_a_function_of_the_users_that_leaves_autograd() -> None:
    with refused(UnusedGradientError, "layers.0.resid_post", instead="loss", forwards=1), model.trace(IDS):
        h = model.layers[0].resid_post
        tl.grad(tl.apply(lambda x: x.detach() * 2, h).sum(), h).save()  # <-
    with refused(OpFailedError, "numpy", instead=None, forwards=1), model.trace(IDS):
        h = model.layers[0].resid_post
        doubled = tl.apply(lambda x: torch.from_numpy(x.numpy() * 2), h)  # <-
        tl.grad(doubled.sum() + h.sum(), h).save()


# --- the use of gradients --------------------------------------------------------------------------------------------


def test_gradients_are_not_written_into_the_same_pass() -> None:
    with refused(CausalityError, "a gradient", "was taken at", instead="second"), model.trace(IDS):
        g = tl.grad(model.layers[0].mlp_out.sum(), model.layers[0].mlp_in)
        model.layers[2].resid_post += 0.1 * g  # <-
        model.logits.save()
    with refused(CausalityError, "layers.1.resid_post", "a gradient", instead="second"), model.trace(IDS):
        streams = model.layers[:].resid_post
        g = tl.grad(model.logits.sum(), streams)
        model.layers[1:3].resid_post = g[:, -1:].stack()[0]  # <-
        model.logits.save()
    with model.trace(IDS):
        g = tl.grad(model.layers[0].mlp_out.sum(), model.layers[0].mlp_in).save()
    with model.trace(IDS):
        model.layers[2].resid_post += 0.1 * g
        model.logits.save()


def test_a_gradient_is_no_site() -> None:
    with refused(WriteTargetError, "computed", instead="torch.where"), model.trace(IDS):
        g = tl.grad(model.logits.sum(), model.layers[0].mlp_in)
        g[:, -1] = 0  # <-
    with model.trace(IDS) as t:
        g = tl.grad(model.logits.sum(), model.layers[0].mlp_in)
        g *= 2
        g.save("g")
    assert t["g"].shape == (1, 4, D)


def test_gradients_of_gradients() -> None:
    with refused(NestedGradientError, "gradients of gradients", instead="g.detach()"), model.trace(IDS):
        h = model.layers[0].resid_post
        g = tl.grad(model.logits.sum(), h)
        tl.grad((g * h).sum(), h)  # <-


def test_gradients_while_the_model_generates() -> None:
    with (
        refused(GradientInGenerationError, "generates", instead="prompt + t.text"),
        model.generate(IDS, max_new_tokens=2),
    ):
        tl.grad(model.logits[:, -1].sum(), model.layers[0].resid_post)  # <-
