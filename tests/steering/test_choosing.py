"""The place and the strength are chosen on validation rows, and on no others."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import tracelens as tl
from tests.support.families import D_MODEL, FAMILIES
from tests.support.tokenizers import byte_level_bpe
from tracelens import errors
from tracelens.steering import Contrast, SteeringCurve, SteeringCurves, SteeringVector, choose, sweep

TEXTS = [[5, 9, 33, 12], [4, 80, 7, 7, 61, 30]]


@pytest.fixture(scope="module")
def model() -> tl.Model:
    tokenizer = byte_level_bpe(answers=True)
    hf = FAMILIES["llama"].build(vocab_size=len(tokenizer), max_position_embeddings=256)
    return tl.wrap(hf, tokenizer)


@pytest.fixture(scope="module")
def data() -> Contrast:
    pairs = [
        (
            f"Is {number} large?\n (A) yes\n (B) no\n\nAnswer:",
            *((" (A)", " (B)") if number % 3 else (" (B)", " (A)")),
        )
        for number in range(20)
    ]
    return Contrast.pairs(pairs, split=(0.4, 0.3, 0.3))


@pytest.fixture(scope="module")
def v() -> SteeringVector:
    generator = torch.Generator().manual_seed(0)
    places = [(site, layer) for layer in range(3) for site in ("resid_post", "attn_out")]
    return SteeringVector({place: 3 * torch.randn(D_MODEL, generator=generator) for place in places})


def test_the_largest_slope_on_validation_rows_is_chosen(
    model: tl.Model, data: Contrast, v: SteeringVector
) -> None:
    best = choose(model, v, data.validation)
    curves = sweep(model, v, data.validation, controls=False)
    assert isinstance(curves, SteeringCurves)
    slopes = {place: curve.slope for place, curve in curves.items()}
    assert best.place == max(slopes, key=lambda place: slopes[place])
    assert best.tried == 6
    assert best.curve.facts.part == "validation"
    assert torch.equal(best.vector[best.place], v[best.place])
    assert best.vector.places == (best.place,)
    means = curves[best.place].mean
    assert best.strength == curves[best.place].multipliers[means.argmax()]
    assert "6 places" in repr(best)

    other = choose(model, v, data.validation, by="interval")
    lows = {place: curve.interval.low for place, curve in curves.items()}
    assert other.place == max(lows, key=lambda place: lows[place])
    smallest = choose(model, v, data.validation.tokens(model), by=lambda curve: -curve.slope)
    assert smallest.place == min(slopes, key=lambda place: slopes[place])


def test_what_was_chosen_is_applied(model: tl.Model, data: Contrast, v: SteeringVector) -> None:
    best = choose(model, v, data.validation, [-1.0, 2.0])
    for given, strength in ((None, best.strength), (0.5, 0.5)):
        with model.trace("Is 3 large?") as t:
            best.apply(t, given, positions="last_prompt_token")
            model.logits[:, -1].save("logits")
        with model.trace("Is 3 large?") as plain:
            best.vector.apply(plain, strength, positions="last_prompt_token")
            model.logits[:, -1].save("logits")
        assert torch.equal(t["logits"], plain["logits"])


def test_what_speaks_against_a_choice_is_said(model: tl.Model, data: Contrast, v: SteeringVector) -> None:
    place = v.at(sites="resid_post", layers=1)
    best = choose(model, place, data.validation, [-1.0, 1.0])
    down = place if best.strength < 0 else -1 * place
    none = choose(model, down, data.validation, [0.0, 1.0])
    assert none.strength == 0
    assert "No multiplier of the grid did better than none" in none.doubts
    assert "No multiplier" in repr(none)
    with model.trace("Is 3 large?") as t:
        with pytest.raises(errors.OptionError, match="the chosen strength is 0"):
            none.apply(t, positions="last_prompt_token")
        none.apply(t, 1.0, positions="last_prompt_token")
        model.logits.save()
    chance = dataclasses.replace(
        best, curve=dataclasses.replace(best.curve, propensity=np.zeros_like(best.curve.propensity))
    )
    assert any("may be chance: its interval is [0, 0]" in doubt for doubt in chance.doubts)
    short = dataclasses.replace(best.curve.facts, scale=1000 * best.curve.facts.norm)
    assert any(
        "0.1% of the activations" in doubt
        for doubt in dataclasses.replace(best, curve=dataclasses.replace(best.curve, facts=short)).doubts
    )


def test_slopes_at_the_activations_length(model: tl.Model, data: Contrast) -> None:
    made = tl.steering.extract(model, data.train, sites="resid_post", positions="label")
    made = SteeringVector({place: (1 + 9 * (place[1] == 0)) * made[place] for place in made}, made.facts)
    best = choose(model, made, data.validation, by="relative_slope")
    relative = {place: curve.relative_slope or 0.0 for place, curve in best.curves.items()}
    assert best.place == max(relative, key=lambda place: relative[place])
    raw = SteeringVector(dict(made.directions))
    with pytest.raises(errors.OptionError, match="does not say how large activations"):
        choose(model, raw, data.validation, by="relative_slope")


def test_damage_bounds_the_strength(model: tl.Model, data: Contrast, v: SteeringVector) -> None:
    grid = [-1.0, 0.25, 0.5, 1.0, 2.0]
    place = v.at(sites="resid_post", layers=1)
    free = choose(model, place, data.validation, grid)
    swept = sweep(model, place, data.validation, grid, controls=False, damage=TEXTS)
    assert isinstance(swept, SteeringCurve)
    hurt = swept.damage
    assert hurt is not None
    most = float(np.sort(hurt.kl)[1])
    bound = choose(model, place, data.validation, grid, damage=TEXTS, most_kl=most)
    allowed = hurt.kl <= most
    assert allowed.sum() == 2
    assert (
        bound.strength
        == max((mean, one) for mean, one, fits in zip(free.curve.mean, grid, allowed, strict=True) if fits)[1]
    )
    with pytest.raises(errors.OptionError, match="the least is"):
        choose(model, place, data.validation, grid, damage=TEXTS, most_kl=0.0)


def test_other_rows_than_those_for_validation_are_refused(
    model: tl.Model, data: Contrast, v: SteeringVector
) -> None:
    for rows, words in (
        (data.test, "the rows to report"),
        (data.test[:2], "the rows to report"),
        (data.test.tokens(model), "the rows to report"),
        (data.train, "vectors are made of"),
        (data, "not split"),
        (data[:3], "not split"),
        (list(data.validation.tokens(model)), "does not say"),
    ):
        with pytest.raises(errors.ChoosingRowsError, match=words):
            choose(model, v, rows)
    renamed = dataclasses.replace(data.test, name="validation")
    with pytest.raises(errors.ChoosingRowsError):
        choose(model, v, renamed)
    with pytest.raises(errors.OptionError, match="nothing to choose by"):
        choose(model, v, data.validation, by="luck")
    with pytest.raises(errors.OptionError, match="belong together"):
        choose(model, v, data.validation, most_kl=0.1)
