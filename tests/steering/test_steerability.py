"""Slopes, ranks and straightness against numpy's own fit and against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tracelens.steering.steerability import line, ranks, slopes, spearman, strictly_increasing

GRID = np.array([-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5])
VALUES = np.random.default_rng(0).normal(size=(9, len(GRID)))


def test_slopes_are_those_of_polyfit_row_by_row() -> None:
    uneven = np.array([0.4, -2.0, 1.0, 3.5, 0.0, 0.1, -0.3])
    for grid in (GRID, uneven):
        expected = [np.polyfit(grid, row, 1)[0] for row in VALUES]
        np.testing.assert_allclose(slopes(grid, VALUES), expected, rtol=1e-10)


def test_the_mean_of_the_slopes_is_the_slope_of_the_mean() -> None:
    found = line(GRID, VALUES.mean(0))
    assert found.slope == pytest.approx(slopes(GRID, VALUES).mean(), abs=1e-12)
    slope, intercept = np.polyfit(GRID, VALUES.mean(0), 1)
    assert (found.slope, found.intercept) == pytest.approx((slope, intercept))
    assert found.r_squared == pytest.approx(np.corrcoef(GRID, VALUES.mean(0))[0, 1] ** 2)


def test_a_flat_curve_has_no_straightness() -> None:
    found = line(GRID, np.full(len(GRID), 3.0))
    assert (found.slope, found.intercept) == (0.0, 3.0)
    assert math.isnan(found.r_squared)
    assert math.isnan(float(spearman(GRID, np.full(len(GRID), 3.0))))


def test_ranks_share_their_mean_where_numbers_are_equal() -> None:
    assert ranks([[2.0, 2.0, 2.0], [5.0, 1.0, 5.0]]).tolist() == [[2.0, 2.0, 2.0], [2.5, 1.0, 2.5]]


def test_spearman_is_one_less_six_sums_of_squares() -> None:
    for row, found in zip(VALUES, spearman(GRID, VALUES), strict=True):
        place = row.argsort().argsort()  # no two are equal here
        apart = ((place - np.arange(len(GRID))) ** 2).sum()
        count = len(GRID)
        assert found == pytest.approx(1 - 6 * apart / (count * (count**2 - 1)))
    assert spearman(GRID, np.exp(3 * GRID)) == pytest.approx(1.0)
    # The order in which multipliers are given says nothing.
    mixed = np.random.default_rng(1).permutation(len(GRID))
    np.testing.assert_allclose(spearman(GRID[mixed], VALUES[:, mixed]), spearman(GRID, VALUES))


def test_increasing_means_at_every_step_of_the_sorted_grid() -> None:
    assert strictly_increasing([0.0, 2.0, 1.0], [5.0, 9.0, 7.0])
    assert not strictly_increasing([0.0, 1.0, 2.0], [5.0, 5.0, 9.0])
    assert not strictly_increasing([0.0, 1.0, 2.0], [5.0, 9.0, 8.0])
