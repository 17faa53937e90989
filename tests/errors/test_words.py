"""Mistakes that used to end in Python's own errors, or in words that lead astray: what is said and hinted at."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import tracelens as tl
from tests.errors import IDS, LLAMA, refused
from tracelens.errors import (
    NotALanguageModelError,
    OptionError,
    ReplacementError,
    ShapeError,
    SpliceError,
    TracelensError,
    UnknownArchitectureError,
    UnknownConstantError,
    UnknownSaveError,
    UnknownSiteError,
    UnsupportedFunctionError,
    ValueAttributeError,
)

model: Any = LLAMA.model
layers = model.layers
PATH = "model.layers.1.mlp"


class Class(nn.Module):
    def encode(self, x: Any) -> Any:
        return x

    def decode(self, features: Any) -> Any:
        return features


IN_A_BLOCK: dict[str, tuple[Callable[[], Any], type[TracelensError], str, str]] = {
    "a call by name": (lambda: model.module(PATH).call("a"), OptionError, "not by 'a'", ".call(0)"),
    "a class": (
        lambda: tl.splice(layers[1].resid_post, Class),
        SpliceError,
        "Class is a class",
        "Class(...)",
    ),
    "replace without a site": (
        lambda: layers[2].replace(0.0),
        ReplacementError,
        "without the site",
        "resid_post=value",
    ),
    "of layers": (
        lambda: layers[1:].replace(0.0),
        ReplacementError,
        "without the site",
        "model.layers[1:3].replace(",
    ),
    "skip with a value": (
        lambda: layers[2].skip(0.5),
        ReplacementError,
        "takes nothing",
        "model.layers[2].skip()",
    ),
    "skip of layers": (
        lambda: layers[1:].skip(0.5),
        ReplacementError,
        "takes nothing",
        "model.layers[1:3].skip()",
    ),
    "torch.autograd.grad": (
        lambda: torch.autograd.grad(model.logits.sum(), layers[1].resid_post),
        UnsupportedFunctionError,
        "torch.autograd.grad needs tensors",
        "tl.grad(loss, h)",
    ),
    "a hook on a module": (
        lambda: model.module(PATH).register_forward_hook(print),
        UnknownSiteError,
        "hooks are set by tracelens",
        f"model.module('{PATH}').output = new",
    ),
    "a hook on a layer": (
        lambda: layers[1].register_full_backward_hook(print),
        UnknownSiteError,
        "register_full_backward_hook",
        "model.layers[1].resid_post.save()",
    ),
    "a hook on the model": (
        lambda: model.register_forward_pre_hook(print),
        UnknownSiteError,
        "register_forward_pre_hook",
        "model.layers[i].resid_post.save()",
    ),
    "a module as a value": (
        lambda: layers[1].replace(mlp_add=nn.Linear(3, 3)),
        UnsupportedFunctionError,
        "of type Linear",
        "Linear(model.layers[i].mlp_in)",
    ),
    "a function as a value": (
        lambda: setattr(layers[1], "mlp_out", torch.tanh),
        UnsupportedFunctionError,
        "cannot hold",
        "tanh(model.layers[i].mlp_in)",
    ),
    "an index": (lambda: layers[1].resid_post[:, :, 99], ShapeError, "99 is outside", "from -48 to 47"),
    "a position": (lambda: layers[1].resid_post[:, 9], ShapeError, "9 is outside", "from -4 to 3"),
    "heads": (lambda: layers[1].heads(0), UnknownSiteError, "'heads'", "model.layers[1].head(3)"),
    "blocks": (lambda: model.blocks[0], UnknownSiteError, "'blocks'", "model.layers[i]"),
    "model.replace": (
        lambda: model.replace(embed=0.0),
        UnknownSiteError,
        "'replace'",
        "model.layers[i].replace(",
    ),
    "model.skip": (lambda: model.skip(), UnknownSiteError, "'skip'", "model.layers[i].skip()"),
}


@pytest.mark.parametrize("case", IN_A_BLOCK.values(), ids=IN_A_BLOCK)
def test_in_a_block(case: tuple[Callable[[], Any], type[TracelensError], str, str]) -> None:
    mistake, error, says, instead = case
    with pytest.raises(error) as caught, model.trace(IDS):
        mistake()
    assert type(caught.value) is error
    assert says in caught.value.problem
    assert instead in str(caught.value.instead)
    assert caught.value.at is not None
    assert caught.value.at.filename == __file__
    LLAMA.check()


def test_names_that_results_do_not_have() -> None:
    with model.record() as r:
        layers[0].resid_post *= tl.constant(1.0, name="k")
        model.logits[:, -1].save("x")
    program = model.compile(r)
    results, found = program(IDS), tl.sweep(program, IDS, k=[0.0, 1.0])
    for one in (results, found):
        with pytest.raises(UnknownSaveError, match="nothing was saved as 'typo'; saved: 'x'"):
            one.to_pandas("typo")
    with pytest.raises(UnknownConstantError, match="'kk' was not swept; swept: 'k'") as caught:
        found.swept["kk"]
    assert "sweep.swept['k']" in str(caught.value.instead)
    assert found.swept["k"].tolist() == [0.0, 1.0]
    with pytest.raises(UnknownConstantError) as caught:
        program(IDS, strength=1.0)
    assert caught.value.instead == "program(prompt, k=value)"


def test_what_cannot_be_wrapped() -> None:
    with pytest.raises(UnknownArchitectureError, match="a function is no module") as caught:
        tl.wrap(lambda x: x)
    assert caught.value.at is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that it will go
        scripted: Any = torch.jit.trace(nn.Linear(3, 3), torch.ones(1, 3))
    with pytest.raises(UnknownArchitectureError, match="runs without Python"):
        tl.wrap(scripted)
    net = tl.wrap(nn.Linear(3, 3))
    with pytest.raises(NotALanguageModelError, match="hooks are set by tracelens"):
        net.register_forward_hook(print)


def test_a_saved_tensor_has_no_gradient() -> None:
    with model.trace(IDS):
        h = layers[1].resid_post.save()
    with pytest.raises(ValueAttributeError, match="has no gradient") as caught:
        h.grad
    assert "tl.grad(loss, h).save()" in str(caught.value.instead)
    h.value.requires_grad_()
    (h * 2).sum().backward()
    assert torch.equal(h.grad, torch.full_like(h.value, 2.0))


def test_the_plan_of_a_plain_model_counts_no_layers() -> None:
    net = tl.wrap(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    with net.trace(torch.ones(1, 3)) as t:
        net.module("0").output.save("y")
    assert 'the forward pass stops after module("0").output\n' in t.explain()
    assert "layers" not in t.explain()


def test_a_program_goes_to_nnsight_as_its_graph() -> None:
    with pytest.raises(OptionError, match="not a str"):
        tl.run_with_nnsight("graph", None, IDS)


def test_a_module_is_called_and_not_given() -> None:
    probe = nn.Linear(48, 48)
    with (
        refused(UnsupportedFunctionError, "Linear", instead="Linear(model.layers[i].mlp_in)"),
        model.trace(IDS),
    ):
        layers[1].replace(mlp_add=probe)  # <-
    with model.trace(IDS) as t:
        layers[1].replace(mlp_add=probe(layers[1].mlp_in))
        model.logits.save("logits")
    assert not torch.equal(t["logits"], LLAMA.logits)
