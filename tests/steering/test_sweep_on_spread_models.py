"""Sweeps and readings of models over several devices and ranks: one device's numbers, and little that travels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tracelens as tl
from tests.steering.toy_models import drawn_rows
from tests.support.families import D_MODEL
from tests.support.pretend import Pretend, pretend, watched
from tests.support.spread_models import Both, fixture_of, over_devices
from tracelens.steering import SteeringCurve, SteeringCurves, SteeringVector, read, sweep
from tracelens.steering.propensity import End, readings

__all__ = ["pretend"]

ROWS = drawn_rows(5)
TEXTS = [[5, 9, 33, 12], [4, 80, 7, 7, 61, 30]]
GRID = [-1.0, 0.0, 1.5]


def vector() -> SteeringVector:
    generator = torch.Generator().manual_seed(0)
    places = (("resid_post", 0), ("post_ln", 1), ("resid_post", 2))
    return SteeringVector({place: 2 * torch.randn(D_MODEL, generator=generator) for place in places})


def same(one: tl.Model, spread: tl.Model, *, controls: int = 2, **options: object) -> None:
    """The same sweep twice; raises where any number differs by more than rounding does."""
    mine, theirs = (
        sweep(model, vector(), ROWS, GRID, controls=controls, batch_size=3, **options)
        for model in (one, spread)
    )
    assert isinstance(mine, SteeringCurves)
    assert isinstance(theirs, SteeringCurves)
    for place, curve in mine.items():
        other = theirs[place]
        for name in ("propensity", "unsteered", "mass", "unsteered_mass"):
            np.testing.assert_allclose(getattr(other, name), getattr(curve, name), atol=2e-5, rtol=1e-5)
        for name in curve.controls:
            np.testing.assert_allclose(other.controls[name], curve.controls[name], atol=2e-5, rtol=1e-5)
        assert other.slope == pytest.approx(curve.slope, rel=1e-4, abs=1e-5)
        assert (other.correct == curve.correct).all()
        assert other.facts.plainly == curve.facts.plainly
        assert np.ptp(curve.propensity, axis=1).min() > 1e-2  # the vector matters
        if curve.damage is not None:
            assert other.damage is not None
            np.testing.assert_allclose(other.damage.kl, curve.damage.kl, atol=1e-5, rtol=1e-4)
            np.testing.assert_allclose(other.damage.perplexity, curve.damage.perplexity, rtol=1e-4)


SPREADS = {"llama tp2": ("llama", {"tp": 2}), "qwen3 pp2": ("qwen3", {"pp": 2})}


models = fixture_of(SPREADS)


def test_ranks_measure_what_one_process_does(models: Both) -> None:
    same(models.one, models.spread, damage=TEXTS)


def test_ranks_run_plainly_too(models: Both) -> None:
    same(models.one, models.spread, quick=False, controls=0)


def test_ranks_make_the_vector_anew_of_other_draws_of_its_rows(models: Both) -> None:
    site = ("resid_post", 1)
    states: list[torch.Tensor] = []
    for answers in ([row.positive for row in ROWS], [row.negative for row in ROWS]):
        with models.one.trace([list(tokens) for tokens in answers]):
            states.append(models.one.layers[1].resid_post[:, -1].save())
    v = SteeringVector({site: 3 * (states[0].value - states[1].value).mean(0)})
    mine, theirs = (
        sweep(model, v, drawn_rows(4, seed=9), GRID, controls=1, train=ROWS, batch_size=3, seed=4)
        for model in (models.one, models.spread)
    )
    assert isinstance(mine, SteeringCurve)
    assert isinstance(theirs, SteeringCurve)
    assert mine.redrawn is not None
    assert theirs.redrawn is not None
    np.testing.assert_allclose(theirs.redrawn, mine.redrawn, atol=2e-5, rtol=1e-5)
    assert np.ptp(mine.redrawn[:, 2]) > 1e-2, "draws matter"
    assert theirs.training_interval == pytest.approx(mine.training_interval, rel=1e-4, abs=1e-5)


def test_ranks_read_what_one_process_does(models: Both) -> None:
    mine, theirs = (read(model, vector(), TEXTS[1]) for model in (models.one, models.spread))
    assert theirs.tokens == mine.tokens == tuple(map(str, TEXTS[1]))
    assert theirs.places == mine.places
    np.testing.assert_allclose(theirs.projections, mine.projections, atol=2e-5, rtol=1e-5)
    np.testing.assert_allclose(theirs.cosines, mine.cosines, atol=1e-5)
    assert np.ptp(mine.cosines, axis=1).min() > 1e-2, "tokens differ"


def test_devices_measure_what_one_does_and_send_two_numbers_an_end(
    pretend: Pretend, tmp_path_factory: pytest.TempPathFactory
) -> None:
    models = over_devices("llama", tmp_path_factory.mktemp("devices"))
    same(models.one, models.spread, damage=TEXTS)
    own = vector().at(layers=1)
    ends = [End(own, strength) for strength in GRID]
    readings(models.spread, ROWS, ends, batch_size=5)
    with watched() as seen:
        read = readings(models.spread, ROWS, ends, batch_size=5)
    assert read.plainly is None
    host = sum(size for (_, target), size in seen.moved().items() if target == "cpu")
    assert host == len(ROWS) * len(ends) * 4, "one number for each row and end, and nothing else"
