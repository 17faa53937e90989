"""What a compiled program refuses: prompts that its graph is not right for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import tracelens as tl
from tests.support.families import FAMILIES

IDS = [3, 14, 15, 9, 2, 6]
MIXING: dict[str, Callable[[Any], Any]] = {
    "mean": lambda h: h.mean(1),
    "first": lambda h: h[:, 0],
    "flatten": lambda h: h.flatten(1),
    "cumsum": lambda h: h.cumsum(1),
    "row": lambda h: h[0],
    "rows": lambda h: h.mean(0),
}
PLAIN: dict[str, Callable[[Any], Any]] = {
    "last": lambda h: h[:, -1],
    "pointwise": lambda h: torch.tanh(h) * 2,
    "norm": lambda h: h.norm(dim=-1),
    "early token": lambda h: h.tok[1],
    "masked mean": tl.masked_mean,
    "softmax": lambda h: h.softmax(-1),
    "token": lambda h: h.tok[-2] * 1,
}


@pytest.fixture(scope="module")
def model() -> tl.Model:
    return tl.wrap(FAMILIES["llama"].build())


@pytest.mark.parametrize("function", MIXING.values(), ids=MIXING)
def test_a_program_that_mixes_positions_refuses_rows_of_different_lengths(
    model: tl.Model, function: Callable[[Any], Any]
) -> None:
    with model.record() as r:
        function(model.layers[0].resid_post).save("f")
    program = model.compile(r)
    assert program([IDS, IDS[::-1]])["f"].isfinite().all()
    with pytest.raises(tl.errors.PositionAxisError) as caught:
        program([IDS, IDS[:3]])
    assert caught.value.at is not None


@pytest.mark.parametrize("function", PLAIN.values(), ids=PLAIN)
def test_a_program_that_keeps_positions_apart_takes_ragged_rows(
    model: tl.Model, function: Callable[[Any], Any]
) -> None:
    with model.record() as r:
        function(model.layers[0].resid_post).save("f")
    program = model.compile(r)
    rows = [IDS, IDS[:3]]
    for row, found in zip(rows, program(rows)["f"], strict=True):
        alone = program(row)["f"]
        torch.testing.assert_close(found.reshape(alone.shape), alone, rtol=1e-5, atol=1e-5)


def test_an_operation_that_nothing_needs_does_not_count(model: tl.Model) -> None:
    with model.record() as r:
        h = model.layers[0].resid_post
        h.mean(1)
        h.save("h")
    assert len(model.compile(r)([IDS, IDS[:2]])["h"]) == 2


def test_a_mask_ties_a_program_to_the_lengths_of_its_rows(model: tl.Model) -> None:
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[0, 1] = mask[1, 4] = True
    with model.record([IDS, IDS[:4]]) as r:
        model.layers[0].resid_post.tok[mask].save("f")
    program = model.compile(r)
    assert program([IDS[::-1], IDS[1:5]])["f"].shape == (2, 48)
    with pytest.raises(tl.errors.SpecialisedGraphError):
        program([IDS, IDS[:3]])


def test_a_graph_of_another_model_is_checked_against_this_one(model: tl.Model) -> None:
    with model.record() as r:
        model.layers[2].mlp_up.save("m")
    with pytest.raises(tl.TracelensError, match="mlp_up"):
        tl.wrap(FAMILIES["gpt2"].build()).compile(r)
    with pytest.raises(tl.errors.LayerRangeError):
        tl.wrap(FAMILIES["llama"].build(num_hidden_layers=2)).compile(r)
    assert tl.wrap(FAMILIES["llama"].build(seed=5)).compile(r)(IDS)["m"].shape == (1, 6, 80)
