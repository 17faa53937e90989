"""How sure a number is that was taken over rows: percentile bootstrap, and Wilson's interval of a share."""

from __future__ import annotations

from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.95
DRAWS = 10_000

# So many resampled numbers are in memory at a time.
_AT_ONCE = 4_000_000


class Interval(NamedTuple):
    """Two ends between which a number lies, both included."""

    low: float
    high: float

    def __contains__(self, number: object) -> bool:
        return isinstance(number, int | float) and self.low <= number <= self.high

    def __str__(self) -> str:
        return f"[{self.low:.3g}, {self.high:.3g}]"


def bootstrap(
    values: ArrayLike, *, draws: int = DRAWS, seed: int = 0, level: float = LEVEL
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The two ends of the bootstrap interval of the mean over rows: ``values`` [rows, ...] give two arrays [...].

    Rows are drawn with replacement, ``draws`` times, as many as there are; the ends are percentiles of the means of
    these draws (Efron 1979). Every column is drawn alike, so that a band over a curve is that of whole rows. The same
    ``seed`` gives the same draws. One row gives its own value twice.

    >>> low, high = bootstrap([1.0, 2.0, 3.0, 4.0], draws=2000)
    >>> bool(1.0 <= low < 2.5 < high <= 4.0)
    True
    """
    rows = np.asarray(values, dtype=np.float64)
    flat = rows.reshape(len(rows), -1)
    generator = np.random.default_rng(seed)
    means = np.empty((draws, flat.shape[1]))
    step = max(1, _AT_ONCE // len(rows))
    for start in range(0, draws, step):
        count = min(step, draws - start)
        # How often each row is drawn is all that a mean needs.
        times = generator.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=count)
        means[start : start + count] = times @ flat / len(rows)
    tail = (1 - level) / 2
    low, high = np.quantile(means, (tail, 1 - tail), axis=0)
    return low.reshape(rows.shape[1:]), high.reshape(rows.shape[1:])


def mean_interval(values: ArrayLike, *, draws: int = DRAWS, seed: int = 0, level: float = LEVEL) -> Interval:
    """The bootstrap interval of the mean of ``values`` [rows]."""
    low, high = bootstrap(values, draws=draws, seed=seed, level=level)
    return Interval(float(low), float(high))


def wilson(successes: int, count: int, level: float = LEVEL) -> Interval:
    """Wilson's score interval of a share (Wilson 1927): right for few rows and for shares near 0 and 1 as well.

    >>> print(wilson(0, 20), wilson(10, 20))
    [0, 0.161] [0.299, 0.701]
    """
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = successes / count
    centre = share + z * z / (2 * count)
    half = z * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5
    scale = 1 + z * z / count
    # At the ends the root is exact on paper only.
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == count else (centre + half) / scale
    return Interval(low, high)
