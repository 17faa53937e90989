"""How a value lies on the ranks of one place: whole on each, in parts along an axis, or as parts that add up.

The words are PyTorch's (``torch.distributed.tensor``): a rank that owns part ``r`` of ``n`` along an axis holds what
``torch.chunk`` gives it. A graph knows nothing of this; only plans do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from tracelens.ir.dims import Sizes
from tracelens.ir.types import DType, TensorType


class Joined(Enum):
    """What the ranks' partial results are joined by to make the value."""

    SUM = "sum"
    MEAN = "mean"
    MAX = "max"
    MIN = "min"
    NORM = "norm"
    """The root of the sum of squares."""


@dataclass(frozen=True, slots=True)
class Replicate:
    """Every rank holds the whole value."""

    def __str__(self) -> str:
        return "whole"


@dataclass(frozen=True, slots=True)
class Shard:
    """Every rank holds its own stretch of axis ``dim``, counted from the front."""

    dim: int

    def __str__(self) -> str:
        return f"parts of axis {self.dim}"


@dataclass(frozen=True, slots=True)
class Partial:
    """Every rank holds a tensor of the value's full shape; joined, they are the value."""

    joined: Joined = Joined.SUM

    def __str__(self) -> str:
        return f"partial results ({self.joined.value})"


Layout = Replicate | Shard | Partial
WHOLE_EVERYWHERE = Replicate()


def owned(size: int, ranks: int, rank: int) -> tuple[int, int]:
    """Where a rank's stretch of an axis starts, and where it ends.

    >>> [owned(10, 4, rank) for rank in range(4)]
    [(0, 3), (3, 6), (6, 9), (9, 10)]
    """
    each = -(-size // ranks)
    return min(rank * each, size), min((rank + 1) * each, size)


def local_type(type_: TensorType, layout: Layout, ranks: int, rank: int = 0) -> TensorType | OwnType:
    """The type of what a rank has of a value; the first one's stretch is the longest."""
    if not isinstance(layout, Shard):
        return type_
    size = type_.shape[layout.dim]
    if not isinstance(size, int):
        return OwnType(type_, layout.dim, ranks, rank)
    start, end = owned(size, ranks, rank)
    shape = (*type_.shape[: layout.dim], end - start, *type_.shape[layout.dim + 1 :])
    return TensorType(type_.dtype, shape)


@dataclass(frozen=True, slots=True)
class OwnType:
    """The type of what a rank has of a value in parts along an axis whose size only a prompt gives."""

    whole: TensorType
    dim: int
    ranks: int
    rank: int

    @property
    def dtype(self) -> DType:
        return self.whole.dtype

    def sizes(self, sizes: Sizes) -> tuple[int, ...]:
        """The shape as numbers."""
        found = self.whole.sizes(sizes)
        start, end = owned(found[self.dim], self.ranks, self.rank)
        return (*found[: self.dim], end - start, *found[self.dim + 1 :])

    def nbytes(self, sizes: Sizes) -> int:
        return math.prod(self.sizes(sizes)) * self.dtype.itemsize
