"""What a curve says of its numbers, and that files keep them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas
import pytest

from tracelens import errors
from tracelens.steering import Damage, SteeringCurve, SteeringCurves, SweepFacts
from tracelens.steering.steerability import slopes

GRID = np.array([-1.0, 0.0, 1.0, 2.0])
SLOPES = np.array([2.0, 1.0, -0.5, 3.0, 0.0, 1.5])


def curve(**changes: object) -> SteeringCurve:
    """Six rows on straight lines but for one number, with controls and damage."""
    propensity = 0.25 + SLOPES[:, None] * GRID
    propensity[1, 3] = -2.0
    found = SteeringCurve(
        place=("resid_post", 12),
        multipliers=GRID,
        propensity=propensity,
        unsteered=propensity[:, 1],
        mass=np.full((6, 4), 0.9),
        unsteered_mass=np.full(6, 0.9),
        correct=np.array([True, False, True, True, False, True]),
        rows=(4, 0, 7, 1, 2, 9),
        labels=("A", "A", "B", "B", "A", "B"),
        facts=SweepFacts(
            model="tiny",
            data="sizes",
            digest="abc",
            part="test",
            method="mean_difference",
            norm=2.0,
            scale=10.0,
            positions="decision",
            operator="add",
            seed=0,
            refused=2,
        ),
        controls={
            "random": np.array([[0.0, 0.1, 0.2, 0.3], [0.3, 0.2, 0.1, 0.0]]),
            "shuffled": np.zeros((1, 4)),
        },
        redrawn=np.array([0.9, 1.0, 1.4])[:, None] * GRID,
        damage=Damage(np.array([0.2, 0.0, 0.3, 1.0]), np.array([12.0, 9.0, 14.0, 30.0]), 9.0, 3, 40, "all"),
    )
    return dataclasses.replace(found, **changes)


def test_statistics_follow_from_the_numbers() -> None:
    found = curve()
    by_fit = [np.polyfit(GRID, row, 1)[0] for row in found.propensity]
    np.testing.assert_allclose(found.slopes, by_fit, atol=1e-12)
    assert found.slope == pytest.approx(np.mean(by_fit))
    assert found.anti_steerable == pytest.approx(3 / 6)  # one falls, one lies flat, and one was bent down
    assert found.relative_slope == pytest.approx(5 * found.slope)
    assert found.training_interval == pytest.approx(np.quantile([0.9, 1.0, 1.4], (0.025, 0.975)))
    assert curve(redrawn=None).training_interval is None
    assert found.accuracy == pytest.approx(4 / 6)
    count, slope, interval = found.by_label["B"]
    assert (count, slope) == (3, pytest.approx(np.mean([-0.5, 3.0, 1.5])))
    assert interval.low < slope < interval.high
    assert found.slope in found.interval
    assert found.interval_at(0.5).low > found.interval.low
    assert found.monotone == pytest.approx(3 / 6)
    assert np.isnan(found.row_spearman[4])
    assert found.control_slopes("random") == pytest.approx([0.1, -0.1])
    assert found.beyond("random")
    assert not curve(controls={"random": 5 * GRID[None]}).beyond("random")
    low, high = found.band
    assert ((low < found.mean) & (found.mean < high))[[0, 2, 3]].all()
    assert low[1] == high[1] == 0.25
    with pytest.raises(errors.SteeringSweepError, match="no controls 'other set'"):
        found.control_slopes("other set")
    assert curve(facts=dataclasses.replace(found.facts, scale=None)).relative_slope is None


def test_a_terminal_has_every_number_in_words() -> None:
    found = curve()
    text = repr(found)
    for words in (
        "layers[12].resid_post, add at decision: 6 rows of sizes (test), tiny",
        f"{found.slope:.4g}",
        str(found.interval),
        "anti-steerable",
        "slope where 'A' is positive",
        "2 random vectors",
        "all below the slope",
        "unsteered accuracy",
        "67%",
        "rows left out",
        "KL on neutral text",
        "perplexity (9.0)",
        "30.0",
    ):
        assert words in text, words
    several = repr(SteeringCurves({("resid_post", 12): found, ("attn_out", 3): curve(place=("attn_out", 3))}))
    assert "layers[3].attn_out" in several
    assert "for 2 places" in several


def test_files_keep_all_of_it(tmp_path: Path) -> None:
    found = curve()
    path = found.save(tmp_path / "curve.json")
    again = SteeringCurve.load(path)
    for field in dataclasses.fields(found):
        mine, theirs = getattr(found, field.name), getattr(again, field.name)
        if isinstance(mine, np.ndarray):
            np.testing.assert_array_equal(mine, theirs)
            assert mine.dtype == theirs.dtype
        elif field.name == "controls":
            assert list(mine) == list(theirs)
            for name in mine:
                np.testing.assert_array_equal(mine[name], theirs[name])
        elif field.name == "damage":
            np.testing.assert_array_equal(mine.kl, theirs.kl)
            assert (mine.unsteered, mine.tokens) == (theirs.unsteered, theirs.tokens)
        else:
            assert mine == theirs, field.name
    assert repr(again) == repr(found)
    said = json.loads(path.read_text())["statistics"]
    assert said["slope"] == pytest.approx(found.slope)
    assert said["interval"] == pytest.approx(list(found.interval))
    assert said["control_slopes"]["random"] == pytest.approx([0.1, -0.1])
    bare = curve(damage=None, controls={}, redrawn=None)
    bare = SteeringCurve.load(bare.save(tmp_path / "bare.json"))
    assert (bare.damage, bare.redrawn) == (None, None)


@pytest.mark.parametrize("text", ["", "{}", '{"format": "other", "version": 1}', '{"format": 3', "[]"])
def test_another_file_is_no_curve(tmp_path: Path, text: str) -> None:
    path = tmp_path / "curve.json"
    path.write_text(text)
    with pytest.raises(errors.SteeringSweepError, match="not a steering curve"):
        SteeringCurve.load(path)


def test_a_table_has_a_line_for_each_row_and_multiplier() -> None:
    found = curve()
    frame = found.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert len(frame) == 24
    per_row = frame.groupby("row", sort=False)
    assert set(per_row.groups) == {4, 0, 7, 1, 2, 9}
    for (number, rows), own in zip(per_row, found.slopes, strict=True):
        fit = slopes(rows["multiplier"].to_numpy(), rows["propensity"].to_numpy())
        assert fit == pytest.approx(own), number
        assert rows["slope"].unique().tolist() == [own]
