"""Bootstrap and Wilson against formulas of their own, and what seeds promise."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tracelens.steering.intervals import Interval, bootstrap, mean_interval, wilson

Z = 1.959963984540054


@pytest.mark.parametrize(("successes", "count"), [(0, 7), (1, 20), (10, 20), (43, 102), (7, 7), (199, 200)])
def test_wilsons_ends_solve_the_equation_that_defines_them(successes: int, count: int) -> None:
    share = successes / count
    # The interval holds exactly the shares p with |share - p| <= z sqrt(p (1 - p) / n): its ends are the roots.
    a, b, c = 1 + Z * Z / count, -2 * share - Z * Z / count, share * share
    root = math.sqrt(b * b - 4 * a * c)
    low, high = wilson(successes, count)
    assert low == pytest.approx((-b - root) / (2 * a), abs=1e-12)
    assert high == pytest.approx((-b + root) / (2 * a), abs=1e-12)
    assert 0 <= low <= share <= high <= 1
    assert wilson(successes, count, level=0.5).high <= high


def test_bootstrap_of_a_mean_is_the_normal_interval_where_rows_are_many() -> None:
    rows = np.random.default_rng(3).normal(2.0, 1.5, size=(400, 2))
    low, high = bootstrap(rows, draws=20_000)
    half = Z * rows.std(0) / math.sqrt(len(rows))
    np.testing.assert_allclose(low, rows.mean(0) - half, atol=0.05 * half.max())
    np.testing.assert_allclose(high, rows.mean(0) + half, atol=0.05 * half.max())


def test_bootstrap_of_two_rows_by_counting() -> None:
    # Means of two draws from {0, 1}: 0 and 1 with a quarter each, so both ends lie at the rows themselves.
    assert mean_interval([0.0, 1.0]) == (0.0, 1.0)
    # At a level of a half, the quartiles: the share of draws below one half is a quarter, give or take the draws.
    low, high = mean_interval([0.0, 1.0], level=0.2)
    assert (low, high) == (0.5, 0.5)
    assert mean_interval([3.5]) == (3.5, 3.5)


def test_columns_are_drawn_alike_and_a_seed_says_all() -> None:
    rows = np.random.default_rng(0).normal(size=(30, 3))
    low, high = bootstrap(rows, draws=500, seed=7)
    shifted = bootstrap(np.concatenate([rows, rows + 5], 1), draws=500, seed=7)
    np.testing.assert_allclose(shifted[0][3:], low + 5)  # the same draws, or these would differ
    np.testing.assert_allclose(shifted[1][:3], high)
    again = bootstrap(rows, draws=500, seed=7)
    np.testing.assert_array_equal(low, again[0])
    assert not np.array_equal(low, bootstrap(rows, draws=500, seed=8)[0])


def test_many_rows_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).normal(size=50)
    whole = mean_interval(rows, draws=1000)
    monkeypatch.setattr("tracelens.steering.intervals._AT_ONCE", 50 * 300)
    assert mean_interval(rows, draws=1000) == pytest.approx(whole, abs=1e-12)


def test_an_interval_knows_what_lies_in_it() -> None:
    interval = Interval(-0.25, 1.5)
    assert -0.25 in interval
    assert 1.51 not in interval
    assert str(interval) == "[-0.25, 1.5]"
