"""How numbers become shades: the same in pictures and on pages, so that a colour means one thing."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tracelens.lens.statistics import Kind

BLUE = "#2563a8"
RED = "#b3372f"
_COMMON = 0.99
"""What lies beyond this quantile has the full shade: one extreme cell would make all others pale."""


@dataclass(frozen=True, slots=True)
class Scale:
    """From ``low`` (pale) to ``high`` (dark); ``signed`` ones have a second colour for what is below zero.

    ``counts``: whole numbers from 0, the smallest dark, by their logarithms. ``clipped``: there are numbers beyond.
    """

    low: float
    high: float
    signed: bool = False
    counts: bool = False
    clipped: bool = False

    def shade(self, value: float) -> float | None:
        """Between 0 and 1, or -1 and 1 if signed; ``None`` where there is no number."""
        if math.isnan(value) or (self.counts and value < 0):
            return None
        if self.counts:
            return max(1 - math.log1p(value) / math.log1p(self.high), 0.0)
        if self.signed:
            return min(max(value / self.high, -1.0), 1.0)
        return min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)


def scale_of(kind: Kind, *tensors: Tensor) -> Scale:
    """The scale that suits all these numbers, of one kind."""
    values = torch.cat([tensor.reshape(-1).double() for tensor in tensors])
    values = values[values.isfinite()]
    if kind is Kind.SHARE:
        return Scale(0.0, 1.0)
    if kind is Kind.RANK:
        return Scale(0.0, max(float(values.max()) if len(values) else 0.0, 1.0), counts=True)
    if not len(values):
        return Scale(-1.0, 1.0, signed=True) if kind is Kind.SIGNED else Scale(0.0, 1.0)
    if kind is Kind.SIGNED:
        high = _common(values.abs())
        return Scale(-high, high, signed=True, clipped=float(values.abs().max()) > high)
    if kind is Kind.NATS:
        high = _common(values)
        return Scale(0.0, high, clipped=float(values.max()) > high)
    if kind is Kind.LOG:
        low = -_common(-values)
        return Scale(low, 0.0, clipped=float(values.min()) < low)
    low, high = float(values.min()), float(values.max())
    return Scale(low, high if high > low else low + 1.0)


def _common(values: Tensor) -> float:
    """Something larger than 0 that nearly all of these do not exceed."""
    most = float(values.sort().values[math.ceil(_COMMON * len(values)) - 1])
    return most if most > 0 else max(float(values.max()), 1e-6)
