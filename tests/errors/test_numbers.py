"""Asking values for numbers that do not exist before the run: branches, loops, prints, indices, masks."""

from __future__ import annotations

import copy
import math
import operator
import pickle
from typing import Any

import numpy as np
import pytest
import torch

import tracelens as tl
from tests.errors import IDS, LLAMA, D, refused
from tracelens.errors import (
    DynamicShapeError,
    IndexingError,
    ShapeError,
    SymbolicSizeError,
    UnsupportedFunctionError,
    ValueAttributeError,
    ValueBranchError,
)

model = LLAMA.model

QUESTIONS = [
    (lambda h: bool(h), "branching on", "tl.where"),
    (lambda h: not h, "branching on", "tl.where"),
    (lambda h: 1 if h.mean() > 0 else 0, "branching on", "tl.where"),
    (lambda h: 0 < h < 1, "branching on", "tl.where"),
    (lambda h: h and 1, "branching on", "tl.where"),
    (lambda h: max(h, h * 2), "branching on", "tl.where"),
    (lambda h: any([h]), "branching on", "tl.where"),
    (lambda h: iter(h), "iterating over", "value.unbind(0)"),
    (lambda h: list(h), "iterating over", "value.unbind(0)"),
    (lambda h: sum(h), "iterating over", "value.unbind(0)"),
    (lambda h: [*h], "iterating over", "value.unbind(0)"),
    (lambda h: len(h), "len() of", "h.shape[0]"),
    (lambda h: torch.tensor(h), "len() of", "the value itself instead of torch.tensor"),
    (lambda h: float(h), "float() of", ".save()"),
    (lambda h: int(h), "int() of", ".save()"),
    (lambda h: complex(h), "complex() of", ".save()"),
    (lambda h: math.sqrt(h), "float() of", ".save()"),
    (lambda h: operator.mod("%.3f", h), "float() of", ".save()"),
    (lambda h: f"{h:.3f}", "formatting", ".save()"),
    (lambda h: round(h), "round() of", "torch.round(value)"),
    (lambda h: math.floor(h), "floor() of", "torch.floor(value)"),
    (lambda h: math.ceil(h), "ceil() of", "torch.ceil(value)"),
    (lambda h: math.trunc(h), "trunc() of", "torch.trunc(value)"),
    (lambda h: 1.0 in h, "`in` on", "(value == item).any()"),
    (lambda h: [1, 2][h], "indexing or counting", "torch.gather"),
    (lambda h: range(h), "indexing or counting", "torch.gather"),
    (lambda h: operator.index(h), "indexing or counting", "torch.gather"),
    (lambda h: h.item(), "Tensor.item", ".save()"),
    (lambda h: h.tolist(), "Tensor.tolist", ".save()"),
    (lambda h: h.numpy(), "Tensor.numpy", ".save()"),
    (lambda h: np.asarray(h), "numpy() of", "a torch function"),
    (lambda h: np.zeros((3, D), dtype=np.float32).__setitem__(0, h), "numpy() of", "a torch function"),
    (lambda h: torch.equal(h, h), "torch.equal", "(a == b).all()"),
    (lambda h: h.allclose(h), "Tensor.allclose", "torch.isclose"),
    (lambda h: h.is_nonzero(), "Tensor.is_nonzero", "tl.where"),
    (lambda h: pickle.dumps(h), "pickling", ".save()"),
]


@pytest.mark.parametrize(("ask", "says", "instead"), QUESTIONS)
def test_asking_a_value_for_a_number(ask, says: str, instead: str) -> None:
    with refused(ValueBranchError, says, instead=instead, text="lambda h:"), model.trace(IDS):
        ask(model.layers[0].resid_post)


@pytest.mark.parametrize(("ask", "says", "instead"), [q for q in QUESTIONS if "Tensor." not in q[1]])
def test_asking_a_mapped_value_for_a_number(ask, says: str, instead: str) -> None:
    instead = "for layer in model.layers[0:2]: layer.resid_post" if says == "iterating over" else instead
    with refused(ValueBranchError, says, instead=instead, text="lambda h:"), model.trace(IDS):
        ask(model.layers[0:2].resid_post)


def test_iterating_over_layers_goes_over_the_layers() -> None:
    says, hint = "iterating over", "for layer in model.layers[1:3]: layer.resid_post"
    with refused(ValueBranchError, says, instead=hint), model.trace(IDS):
        for h in model.layers[1:3].resid_post[:, -1]:  # <-
            h.save()
    hint = "for layer in model.layers[[0, 2]]: layer.<site>"
    with refused(ValueBranchError, says, instead=hint), model.trace(IDS):
        _first, _second = model.layers[[0, 2]].resid_post * 2  # <-
    with model.trace(IDS):
        one_by_one = [layer.resid_post.save() for layer in model.layers[1:3]]
        stacked = model.layers[1:3].resid_post.save()
    assert [torch.equal(a.value, b) for a, b in zip(one_by_one, stacked, strict=True)] == [True, True]


def test_what_to_write_instead_of_asking() -> None:
    with model.trace(IDS):
        h = model.layers[0].resid_post[0, :2, :3]
        switched = tl.where(h.mean() > 0, h, -h).save()
        parts = [part.save() for part in h.unbind(0)]
        rounded = [torch.round(h).save(), torch.floor(h).save(), torch.ceil(h).save(), torch.trunc(h).save()]
        count = h.shape[0]
        has = (h == 1.0).any().save()
        same = (h == h).all().save()
        close = torch.isclose(h, h).all().save()
        picked = (
            torch.tensor([1, 2, 3]).mul(1).save() if False else torch.index_select(h, 0, h.argmax(0)).save()
        )
        mean = h.mean().save()
    assert switched.value.mean() > 0
    assert len(parts) == count == 2
    assert all(part.value.shape == (2, 3) for part in rounded)
    assert not has.value
    assert same.value
    assert close.value
    assert picked.value.shape == (3, 3)
    assert math.isfinite(float(mean))
    assert len(f"{mean:.3f}") >= 5


def test_a_copy_of_a_value_is_the_value() -> None:
    with model.trace(IDS):
        h = model.layers[0].resid_post
        assert copy.copy(h) is h
        assert copy.deepcopy({"h": h})["h"] is h


# --- shapes that depend on numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("select", "instead"),
    [
        (lambda h: h[h > 0], "tl.where"),
        (lambda h: h[:, h[0, :, 0] > 0], "tl.where"),
        (lambda h: h.__setitem__(h > 0, 0), "tl.where"),
        (lambda h: torch.nonzero(h), "tl.where"),
        (lambda h: h.nonzero(), "tl.where"),
        (lambda h: torch.where(h > 0), "where(c, a, b)"),
        (lambda h: torch.masked_select(h, h > 0), "tl.where"),
        (lambda h: h.masked_select(h > 0), "tl.where"),
        (lambda h: h.unique(), "tl.where"),
        (lambda h: torch.bincount(h[0, 0].to(torch.int64)), "tl.where"),
        (lambda h: h[0 : h.argmax()], "torch.gather"),
        (lambda h: h[True], "value[None]"),
        (lambda h: h.tok[h[..., 0] > 0].sum(), "tl.where(mask"),
        (lambda h: h.tok[h[0, 0].argmax()], "a concrete mask"),
        (lambda h: h.tok[0 : h[0, 0].argmax()], "torch.gather"),
    ],
)
def test_shapes_that_depend_on_numbers(select, instead: str) -> None:
    with refused(DynamicShapeError, instead=instead, text="lambda h:"), model.trace(IDS):
        select(model.layers[0].resid_post)


def test_what_to_write_instead_of_selecting() -> None:
    with model.trace(IDS):
        h = model.layers[0].resid_post
        kept = tl.where(h > 0, h, 0.0).save()
        model.layers[1].resid_post = torch.where(h > 0, 0.0, h)
        some = h[torch.ones(1, 4, dtype=torch.bool)].save()
        one = h[None].save()
        gathered = torch.gather(h, 1, h.argmax(1, keepdim=True)).save()
    assert kept.value.min() == 0
    assert some.value.shape == (4, D)
    assert one.value.shape == (1, 1, 4, D)
    assert gathered.value.shape == (1, 1, D)


@pytest.mark.parametrize(
    ("mask", "shape"), [(torch.ones(2, 3, dtype=torch.bool), [1, 4]), (torch.ones(4, dtype=torch.bool), [1])]
)
def test_a_mask_of_another_shape(mask: torch.Tensor, shape: list[int]) -> None:
    with (
        refused(ShapeError, str(list(mask.shape)), str(shape), instead="a mask of the same sizes"),
        model.trace(IDS),
    ):
        model.layers[0].resid_post[mask].save()  # <-
    with refused(ShapeError, str(list(mask.shape)), instead="a mask of the same sizes"), model.trace(IDS):
        model.layers[0].resid_post[mask.numpy()] = 0  # <-


def test_a_mask_in_a_recording_for_any_prompt() -> None:
    mask = torch.tensor([[True, False, True, False]])
    with refused(SymbolicSizeError, "[1, 4]", instead="model.record(prompt)"), model.record():
        model.layers[0].resid_post[mask].save("h")  # <-
    with model.record(IDS) as r:
        model.layers[0].resid_post[mask].save("h")
    assert model.compile(r)(IDS)["h"].shape == (2, D)


# --- what is no index ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "select",
    [
        lambda h: h["France"],
        lambda h: h[1.5],
        lambda h: h[{"a": 1}],
        lambda h: h[["a"]],
        lambda h: h[..., 0, ...],
        lambda h: h[0:"a"],
        lambda h: h[0:1.5],
        lambda h: h.__setitem__("France", 0),
        lambda h: h.tok[1.5],
        lambda h: h.tok[None],
        lambda h: h.tok[True],
        lambda h: h.tok[0, 1],
        lambda h: h.tok[[0.5]],
        lambda h: h.tok["a":"b"],
        lambda h: h.tok[::0],
    ],
)
def test_what_is_no_index(select) -> None:
    for value in (lambda: model.layers[0].resid_post, lambda: model.layers[0:2].resid_post):
        block = model.trace(IDS)
        with refused(IndexingError, instead="", text="lambda h:") as caught, block:
            select(value())
        assert len(caught.error.instead) > 5


# --- attributes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "near"),
    [("mena", "mean"), ("shap", "shape"), ("tpok", "topk"), ("sav", "save"), ("add__", "add")],
)
def test_an_unknown_attribute(name: str, near: str) -> None:
    for value in (lambda: model.layers[0].resid_post, lambda: model.layers[0:2].resid_post):
        with refused(ValueAttributeError, repr(name), instead=near), model.trace(IDS):
            getattr(value(), name)  # <-
    with model.trace(IDS):
        getattr(model.layers[0].resid_post, near)


def test_an_attribute_like_no_other() -> None:
    with refused(ValueAttributeError, "'qqqqqq'", instead=None), model.trace(IDS):
        model.layers[0].resid_post.qqqqqq  # <-


@pytest.mark.parametrize("value", [lambda: model.layers[0].resid_post, lambda: model.layers[0:2].resid_post])
def test_the_device_of_a_value(value) -> None:
    with refused(ValueAttributeError, "no device", instead="leave devices out"), model.trace(IDS):
        torch.ones(D, device=value().device)  # <-
    with model.trace(IDS):
        (value() + torch.ones(D)).save()


@pytest.mark.parametrize(
    ("use", "says"),
    [
        (lambda h: h.to("cuda"), "Tensor.to with a device"),
        (lambda h: h.to(device="cpu"), "Tensor.to with a device"),
        (lambda h: h.cuda(), "Tensor.cuda"),
        (lambda h: h.cpu(), "Tensor.cpu"),
        (lambda h: h.is_cuda, "Tensor.is_cuda"),
        (lambda h: h.get_device(), "Tensor.get_device"),
        (lambda h: h.requires_grad, "Tensor.requires_grad"),
        (lambda h: h.grad, "Tensor.grad"),
        (lambda h: h.data, "Tensor.data"),
        (lambda h: h.is_leaf, "Tensor.is_leaf"),
        (lambda h: h.backward(), "Tensor.backward"),
        (lambda h: h.requires_grad_(), "Tensor.requires_grad_"),
        (lambda h: h.stride(), "Tensor.stride"),
        (lambda h: h.data_ptr(), "Tensor.data_ptr"),
        (lambda h: h.storage(), "Tensor.storage"),
    ],
)
def test_attributes_of_tensors_that_values_do_not_have(use, says: str) -> None:
    with refused(UnsupportedFunctionError, says, instead="", text="lambda h:"), model.trace(IDS):
        use(model.layers[0].resid_post)


def test_properties_that_are_functions_are_recorded() -> None:
    with model.trace(IDS):
        h = model.layers[0].resid_post
        pairs: list[Any] = [(h.mT.save(), h), (h.real.save(), h)]
        assert h.dtype is torch.float32
        assert h.ndim == h.dim() == 3
        assert h.numel() == 4 * D
        mapped = model.layers[0:2].resid_post
        assert mapped.numel() == 4 * D
        assert mapped.ndim == mapped.dim() == 3
        assert mapped.size(-1) == mapped.size()[-1] == D
        assert h.is_floating_point()
        assert mapped.is_floating_point()
        assert not (mapped > 0).is_floating_point()
        kept = mapped.save()
    assert (kept.numel(), kept.ndim, kept.is_floating_point()) == (2 * 4 * D, 4, True)
    assert pairs[0][0].value.shape == (1, D, 4)
