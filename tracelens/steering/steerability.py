"""What a grid of multipliers does to a number, row by row: slopes, ranks, straightness.

Pure numbers: multipliers [K], and values [..., K] with one row for each prompt. Definitions are those of Tan et al.
2024 (arXiv:2407.12404): steerability is the least-squares slope of a row's propensity over the multipliers, that of a
set the mean over its rows, and a row whose slope is not positive is anti-steerable.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Numbers = NDArray[np.float64]


class Line(NamedTuple):
    """A least-squares line: what it rises by for one more of the multiplier, where it is at 0, and how straight.

    ``r_squared``: the share of the variance of the values that is on the line; nan where all values are the same.
    """

    slope: float
    intercept: float
    r_squared: float


def slopes(multipliers: ArrayLike, values: ArrayLike) -> Numbers:
    """The least-squares slope of each row: values [..., K] over multipliers [K] give [...].

    It is linear in the values, so the mean of the slopes is the slope of the mean.

    >>> slopes([-1.0, 0.0, 1.0], [[0.0, 2.0, 4.0], [3.0, 3.0, 3.0]]).tolist()
    [2.0, 0.0]
    """
    x = np.asarray(multipliers, dtype=np.float64)
    centred = x - x.mean()
    return np.asarray(values, dtype=np.float64) @ centred / (centred @ centred)


def line(multipliers: ArrayLike, values: ArrayLike) -> Line:
    """The least-squares line through one curve: values [K] over multipliers [K]."""
    x, y = np.asarray(multipliers, dtype=np.float64), np.asarray(values, dtype=np.float64)
    slope = float(slopes(x, y))
    intercept = float(y.mean() - slope * x.mean())
    spread = float(((y - y.mean()) ** 2).sum())
    left = float(((y - intercept - slope * x) ** 2).sum())
    return Line(slope, intercept, 1 - left / spread if spread > 0 else float("nan"))


def ranks(values: ArrayLike) -> Numbers:
    """The rank of each number along the last axis, from 1; equal numbers share the mean of their ranks.

    >>> ranks([10.0, 30.0, 10.0, 20.0]).tolist()
    [1.5, 4.0, 1.5, 3.0]
    """
    found = np.asarray(values, dtype=np.float64)
    one, other = found[..., :, None], found[..., None, :]
    # K is small, so counting is quicker than sorting with ties: those below, and half of those that are equal.
    return 0.5 + (other < one).sum(-1) + 0.5 * (other == one).sum(-1)


def spearman(multipliers: ArrayLike, values: ArrayLike) -> Numbers:
    """Spearman's rank correlation of each row with the multipliers: [..., K] gives [...], nan for a row of one value.

    >>> spearman([-1.0, 0.0, 1.0], [[1.0, 2.0, 9.0], [9.0, 2.0, 1.0]]).tolist()
    [1.0, -1.0]
    """
    x, y = ranks(multipliers), ranks(values)
    x, y = x - x.mean(), y - y.mean(-1, keepdims=True)
    size = np.sqrt((x @ x) * (y * y).sum(-1))
    with np.errstate(invalid="ignore"):
        return np.where(size > 0, (y @ x) / np.where(size > 0, size, 1.0), np.nan)


def strictly_increasing(multipliers: ArrayLike, values: ArrayLike) -> bool:
    """Is every step to a larger multiplier a step up?"""
    order = np.argsort(np.asarray(multipliers, dtype=np.float64), kind="stable")
    return bool((np.diff(np.asarray(values, dtype=np.float64)[order]) > 0).all())
