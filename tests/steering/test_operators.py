"""Each operator against its formula in numpy: on one device, several, and ranks, in masks and with a strength a row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tracelens as tl
from tests.steering.operators_by_hand import ABLATING, BY_HAND, settings_of
from tests.support.families import D_MODEL, FAMILIES, NEURONS
from tests.support.spread_models import Both
from tracelens import errors
from tracelens.steering import SteeringVector

ROWS = [[5, 6, 7, 8, 9], [11, 12, 13]]
STRENGTHS = torch.tensor([0.75, -1.5])
MASK = torch.tensor([[True, False, False, True, True], [False, False, False, True, False]])
WIDTHS = {"resid_post": D_MODEL, "mlp_act": NEURONS, "attn_out": D_MODEL}
NEAR: dict[str, float] = {"rtol": 2e-5, "atol": 2e-5}


def drawn(site: str, layer: int, seed: int) -> SteeringVector:
    generator = torch.Generator().manual_seed(seed)
    return SteeringVector({(site, layer): torch.randn(WIDTHS[site], generator=generator)})


# Each with another site, another scope and another vector: whole, in parts on ranks, and a sum of parts on ranks.
WRITES: tuple[tuple[str, int, Any], ...] = (
    ("resid_post", 0, MASK),
    ("mlp_act", 1, "all"),
    ("attn_out", 2, "last_prompt_token"),
)
V = {site: drawn(site, layer, seed) for seed, (site, layer, _) in enumerate(WRITES)}
W = {site: drawn(site, layer, 10 + seed) for seed, (site, layer, _) in enumerate(WRITES)}


def steered(model: tl.Model, name: str, strength: Any = STRENGTHS) -> dict[str, Any]:
    """What each of the sites holds before and after, and the logits."""
    with model.trace(ROWS) as t:
        for site, layer, positions in WRITES:
            getattr(model.layers[layer], site).save(f"{site} before")
            V[site].apply(t, strength, positions=positions, **settings_of(name, W[site]))
            getattr(model.layers[layer], site).save(f"{site} after")
        model.logits[:, -1].save("logits")
    return dict(t.results)


def expected(name: str, site: str, layer: int, positions: Any, row: int, before: Tensor, k: float) -> Tensor:
    """What numpy makes of one row [1, P, D] at the positions that are meant; the others stay."""
    h = before.double().numpy()
    v, w = (vector[site][site, layer].double().numpy() for vector in (V, W))
    changed = BY_HAND[name](h, v, np.full((*h.shape[:-1], 1), k), w)
    length = h.shape[1]
    chosen = np.zeros((1, length, 1), dtype=bool)
    if isinstance(positions, Tensor):
        chosen[0, :, 0] = positions[row, -length:].numpy()
    else:
        chosen[:, 0 if positions == "all" else -1 :] = True
    return torch.from_numpy(np.where(chosen, changed, h)).float()


def strength_of(name: str) -> Any:
    return 1.0 if name == "ablate" else STRENGTHS


@pytest.fixture(scope="module")
def one() -> tl.Model:
    return tl.wrap(FAMILIES["llama"].build())


@pytest.mark.parametrize("name", BY_HAND)
def test_an_operator_is_its_formula_in_its_mask_with_a_strength_for_each_row(
    name: str, one: tl.Model
) -> None:
    found = steered(one, name, strength_of(name))
    for site, layer, positions in WRITES:
        for row in range(len(ROWS)):
            before, after = found[f"{site} before"][row], found[f"{site} after"][row]
            k = 1.0 if name == "ablate" else STRENGTHS[row].item()
            wanted = expected(name, site, layer, positions, row, before, k)
            torch.testing.assert_close(after, wanted, **NEAR)
            assert (wanted - before).abs().max() > 1e-2 or "clamp" in name or "adaptive" in name
    changed = [
        (found[f"{site} after"][row] - found[f"{site} before"][row]).abs().max()
        for site in WIDTHS
        for row in (0, 1)
    ]
    assert max(changed) > 1e-2


@pytest.mark.parametrize("name", BY_HAND)
def test_an_operator_does_the_same_on_devices_and_ranks(name: str, spread: Both) -> None:
    wanted, found = (steered(model, name, strength_of(name)) for model in (spread.one, spread.spread))
    assert list(found) == list(wanted)
    for key, right in wanted.items():
        for x, y in zip(found[key], right, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", [name for name in BY_HAND if name not in ABLATING])
def test_at_strength_0_nothing_changes(name: str, one: tl.Model) -> None:
    found = steered(one, name, 0.0)
    for site in WIDTHS:
        for row in range(len(ROWS)):
            assert torch.equal(found[f"{site} after"][row], found[f"{site} before"][row])


@pytest.mark.parametrize("name", ["ablate_then_add", "affine"])
def test_what_ablates_does_so_at_strength_0(name: str, one: tl.Model) -> None:
    found = steered(one, name, 0.0)
    after, v = found["mlp_act after"][0].double(), V["mlp_act"].unit(("mlp_act", 1)).double()
    kept = 0.0 if name == "ablate_then_add" else (W["mlp_act"]["mlp_act", 1].double() @ v).item()
    torch.testing.assert_close(after @ v, torch.full((1, 5), kept, dtype=torch.float64), **NEAR)


def test_in_bfloat16_it_is_computed_in_float32_and_rounded_once() -> None:
    half = tl.wrap(FAMILIES["llama"].build(dtype=torch.bfloat16))
    for name in BY_HAND:
        found = steered(half, name, strength_of(name))
        site, layer, positions = WRITES[1]
        for row in range(len(ROWS)):
            before, after = found[f"{site} before"][row], found[f"{site} after"][row]
            assert after.dtype is torch.bfloat16
            k = 1.0 if name == "ablate" else STRENGTHS[row].item()
            wanted = expected(name, site, layer, positions, row, before, k)
            # A number that lies between two of bfloat16 is rounded to either, and here and there to the other one.
            torch.testing.assert_close(after, wanted.bfloat16(), rtol=2**-7, atol=1e-5)
            assert (after == wanted.bfloat16()).float().mean() > 0.99


def test_the_limits_of_a_clamp_may_differ_from_place_to_place(one: tl.Model) -> None:
    v = V["resid_post"]
    place = ("resid_post", 0)
    with one.trace(ROWS[0]) as t:
        v.apply(t, operator="clamp", low={place: 0.5})
        found = one.layers[0].resid_post.save()
    assert ((found.value @ v.unit(place)) > 0.5 - 1e-4).all()


WRONG: dict[str, tuple[type[errors.TracelensError], dict[str, Any]]] = {
    "no such operator": (errors.OptionError, {"operator": "addition"}),
    "no such setting": (errors.OptionError, {"operator": "add", "low": 1.0}),
    "a setting is missing": (errors.OptionError, {"operator": "rotate", "degrees": 3.0}),
    "no limit": (errors.OptionError, {"operator": "clamp"}),
    "no number": (errors.OptionError, {"operator": "clamp", "low": "a"}),
    "no limit of that place": (errors.OptionError, {"operator": "clamp", "low": {("resid_post", 1): 0.5}}),
    "limits the wrong way round": (errors.OptionError, {"operator": "clamp", "low": 2.0, "high": 1.0}),
    "half an ablation": (errors.OptionError, {"operator": "ablate", "strength": 0.5}),
    "no vector beside it": (errors.OptionError, {"operator": "affine", "reference": torch.ones(D_MODEL)}),
    "no angle": (errors.OptionError, {"operator": "rotate", "towards": W["resid_post"], "degrees": "a"}),
    "neither": (
        errors.OptionError,
        {"operator": "rotate", "towards": W["resid_post"], "degrees": 1, "adaptive": "x"},
    ),
    "another place": (errors.SteeringSelectionError, {"operator": "affine", "reference": W["attn_out"]}),
    "another width": (
        errors.SteeringMismatchError,
        {"operator": "affine", "reference": SteeringVector({("resid_post", 0): torch.ones(3)})},
    ),
    "one line": (
        errors.SteeringVectorError,
        {"operator": "rotate", "towards": -2 * V["resid_post"], "degrees": 10},
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_an_operator_cannot_do_is_refused_where_it_is_written(name: str, one: tl.Model) -> None:
    kind, settings = WRONG[name]
    with pytest.raises(kind) as caught, one.trace(ROWS) as t:
        V["resid_post"].apply(t, **settings)
    assert type(caught.value) is kind
    assert caught.value.at is not None
    assert "apply(t, **settings)" in caught.value.at.text
    assert caught.value.instead or name == "neither"


def test_a_direction_of_another_models_vector_is_refused(one: tl.Model) -> None:
    other = SteeringVector.from_directions(
        tl.wrap(FAMILIES["llama"].build(seed=3)), {("resid_post", 0): torch.ones(D_MODEL)}
    )
    mine = SteeringVector.from_directions(one, {("resid_post", 0): V["resid_post"]["resid_post", 0]})
    with pytest.raises(errors.SteeringMismatchError, match="reference"), one.trace(ROWS) as t:
        mine.apply(t, operator="affine", reference=other)


def test_a_zero_direction_points_nowhere(one: tl.Model) -> None:
    for name in ("ablate", "norm_relative", "scale"):
        with pytest.raises(errors.SteeringVectorError, match="zero"), one.trace(ROWS) as t:
            (0 * V["resid_post"]).apply(t, operator=name)
