"""Values over several layers: layers that differ, rows that do not count up, single sites."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import tracelens as tl
from tests.errors import IDS, LLAMA, D, refused
from tracelens.errors import CausalityError, LayerMappingError, ShapeError

model = LLAMA.model
V = torch.ones(3, D)


@pytest.mark.parametrize(
    "combine",
    [
        lambda a, b: a + b,
        lambda a, b: a - b.mean(1, keepdim=True),
        lambda a, b: torch.cat([a, b]),
        lambda a, b: torch.where(a > 0, b, 0.0),
        lambda a, b: torch.lerp(a, b, weight=0.5),
        lambda a, b: a[b.argmax(-1)[0]],
        lambda a, b: a.__setitem__(slice(None), b),
        lambda a, b: a.tok.__setitem__(0, b[:, 0]),
        lambda a, b: tl.apply(torch.add, a, b),
        lambda a, b: setattr(model.layers[0:2], "resid_post", b),
    ],
)
def test_values_over_different_layers(combine) -> None:
    says = ("layers [0, 1]", "[1, 2]")
    block = model.trace(IDS)
    with refused(LayerMappingError, *says, instead="over the same layers", text="lambda a, b:"), block:
        combine(model.layers[0:2].resid_post, model.layers[1:3].resid_pre)
    with model.trace(IDS):
        combine(model.layers[1:3].resid_post, model.layers[1:3].resid_pre) if "0:2" not in source(
            combine
        ) else None
        model.logits.save()


def source(function: Any) -> str:
    import inspect

    return inspect.getsource(function)


def test_another_number_of_layers() -> None:
    with refused(LayerMappingError, "0..2", "[0, 2]", instead=".stack()"), model.trace(IDS):
        (model.layers[:].resid_post - model.layers[[0, 2]].resid_post).save()  # <-
    with model.trace(IDS):
        change = (model.layers[:].resid_post - model.layers[[0, 2]].resid_post.stack().mean(0)).save()
    assert change.value.shape == (3, 1, 4, D)


@pytest.mark.parametrize(
    "rows", [torch.ones(3, D), torch.ones(1, D), [torch.ones(D)], np.ones((3, D), np.float32)]
)
def test_a_wrong_number_of_rows(rows: Any) -> None:
    with (
        refused(LayerMappingError, f"{len(rows)} rows for 2 layers", "[0, 1]", instead="2 rows"),
        model.trace(IDS),
    ):
        model.layers[0:2].resid_post += tl.per_layer(rows)  # <-
    with refused(LayerMappingError, f"{len(rows)} rows", instead="2 rows"), model.trace(IDS):
        model.layers[0:2].resid_post = tl.per_layer(rows)  # <-
    with refused(LayerMappingError, f"{len(rows)} rows", instead="2 rows"), model.trace(IDS):
        model.layers[0:2].resid_post[:, -1] = tl.per_layer(rows)  # <-
    with model.trace(IDS):
        model.layers[0:2].resid_post += tl.per_layer([torch.ones(D), torch.zeros(D)])
        model.logits.save()


@pytest.mark.parametrize("rows", [3.0, torch.tensor(1.0), None, "V", np.float32(2)])
def test_what_has_no_rows(rows: Any) -> None:
    with refused(LayerMappingError, "one row per layer", instead="first axis has one entry per layer"):
        tl.per_layer(rows)  # <-


@pytest.mark.parametrize(
    "use",
    [
        lambda rows: model.layers[0].resid_post + rows,
        lambda rows: rows - model.layers[0].resid_post,
        lambda rows: rows + torch.ones(D),
        lambda rows: torch.ones(D) + rows,
        lambda rows: torch.relu(rows),
        lambda rows: torch.add(model.layers[0].resid_post, rows),
        lambda rows: torch.stack([model.layers[0].resid_post[0, 0], rows]),
        lambda rows: setattr(model.layers[0], "resid_post", rows),
        lambda rows: setattr(model, "logits", rows),
        lambda rows: model.layers[0].resid_post.__setitem__(slice(None), rows),
    ],
)
def test_rows_of_layers_for_a_single_layer(use) -> None:
    with (
        refused(LayerMappingError, "per.layer", instead="model.layers[", text="lambda rows:"),
        model.trace(IDS),
    ):
        use(tl.per_layer(V))


@pytest.mark.parametrize(
    ("use", "instead"),
    [
        (lambda h: setattr(model.layers[1], "resid_post", h), "value.stack()[i]"),
        (lambda h: setattr(model, "logits", h), ".stack()[i]"),
        (lambda h: model.layers[1].resid_post.__setitem__(slice(None), h), ".stack()[i]"),
        (lambda h: model.layers[1].resid_post.tok.__setitem__(0, h[:, 0]), ".stack()[i]"),
        (
            lambda h: setattr(model.layers[1], "resid_post", model.layers[1].resid_post + h),
            "value.stack()[i]",
        ),
    ],
)
def test_several_layers_into_one(use, instead: str) -> None:
    with refused(LayerMappingError, r"\[0, 1\]", instead=instead, text="lambda h:"), model.trace(IDS):
        use(model.layers[0:2].resid_pre)
    with model.trace(IDS):
        model.layers[1].resid_post = model.layers[0:2].resid_pre.stack()[0]
        model.layers[0:2].resid_post = model.layers[0:2].resid_pre
        model.logits.save()


def test_layers_of_different_shapes_do_not_stack() -> None:
    with refused(ShapeError, "cannot be stacked", instead=None), model.trace(IDS):
        h = model.layers[0:2].resid_post
        tl.MappedValue(h.layers, (h._members[0], model.layers[1].mlp_act)).save()  # <-


def test_a_mapped_value_from_the_future() -> None:
    with refused(
        CausalityError, "layers.0.resid_post would need layers.1.resid_post", instead="a later site"
    ):
        with_block(lambda: setattr(model.layers[0:2], "resid_post", model.layers[1].resid_post))  # <-


def with_block(write: Any) -> None:
    with model.trace(IDS):
        write()
        model.logits.save()
