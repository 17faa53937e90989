"""Medians, spread, and ratios of times that were taken in turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True)
class Spread:
    """The middle and the ends of some times, in milliseconds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        milliseconds = np.asarray(seconds) * 1e3
        return cls(float(np.median(milliseconds)), float(milliseconds.min()), float(milliseconds.max()))


@dataclass(frozen=True)
class Ratio:
    """The ratio of two medians, with the interval that holds 95% of its bootstrap resamples over rounds."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: Sequence[float], base: Sequence[float], *, seed: int = 0) -> Ratio:
        """``seconds`` and ``base``: one time per round each; rounds are resampled whole, since load comes and goes."""
        above, below = np.asarray(seconds), np.asarray(base)
        if above.shape != below.shape or not above.size:
            raise ValueError(f"ratios need as many rounds on both sides, not {above.size} and {below.size}")
        rounds = np.random.default_rng(seed).integers(0, above.size, (RESAMPLES, above.size))
        resampled = np.median(above[rounds], axis=1) / np.median(below[rounds], axis=1)
        low, high = np.quantile(resampled, [0.025, 0.975])
        return cls(float(np.median(above) / np.median(below)), float(low), float(high))

    def as_dict(self) -> dict[str, float]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"
