"""Indexing a tensor of which a rank owns a stretch of one axis, by numbers that mean the whole axis.

Reading gives every rank a tensor of the result's shape, in which only what the rank owns is filled in and all else is
zero: the ranks' sum is the result. Writing gives every rank its own stretch, changed where the index meets it. Nothing
is asked of the host, and no rank needs to know of the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tracelens.ir.layout import owned


@dataclass(frozen=True, slots=True)
class OwnPart:
    """A rank's stretch of axis ``axis`` of a value, which stands at ``there`` once the other axes have been indexed.

    ``size``: of the whole axis. ``entry``: where the axis has its place in the index.
    """

    axis: int
    there: int
    entry: int
    size: int
    ranks: int
    rank: int

    @property
    def bounds(self) -> tuple[int, int]:
        return owned(self.size, self.ranks, self.rank)

    def take(self, base: Tensor, index: tuple[Any, ...]) -> Tensor:
        """This rank's share of ``base[index]``; the shares of all ranks add up to it."""
        item, others = self._split(index)
        rest = base[others]
        low, high = self.bounds
        if isinstance(item, int):
            number = item % self.size
            if low <= number < high:
                return rest.select(self.there, number - low)
            return rest.new_zeros((*rest.shape[: self.there], *rest.shape[self.there + 1 :]))
        if isinstance(item, slice):
            chosen = range(self.size)[item]
            first, count, own = self._met(chosen)
            shape = (*rest.shape[: self.there], len(chosen), *rest.shape[self.there + 1 :])
            share = rest.new_zeros(shape)
            if count:
                share.narrow(self.there, first, count).copy_(rest[(*[slice(None)] * self.there, own)])
            return share
        wanted = torch.where(item < 0, item + self.size, item) - low
        shape = [1] * rest.ndim
        shape[self.there] = -1
        if low == high:
            return rest.new_zeros((*rest.shape[: self.there], len(item), *rest.shape[self.there + 1 :]))
        mine = ((wanted >= 0) & (wanted < high - low)).reshape(shape)
        found = rest.index_select(self.there, wanted.clamp(0, high - low - 1))
        return torch.where(mine, found, found.new_zeros(()))

    def put(self, base: Tensor, index: tuple[Any, ...], value: Any) -> Tensor:
        """This rank's stretch of a copy of ``base`` in which ``base[index]`` is ``value``."""
        item, _ = self._split(index)
        low, high = self.bounds
        before, after = index[: self.entry], index[self.entry + 1 :]
        result = base.clone()
        if isinstance(item, int):
            number = item % self.size
            if low <= number < high:
                result[(*before, number - low, *after)] = value
            return result
        if isinstance(item, slice):
            first, count, own = self._met(range(self.size)[item])
            if count:
                result[(*before, own, *after)] = self._narrowed(
                    value, base[self._whole(index)].ndim, first, count
                )
            return result
        # What others own goes into an element behind the last, which is then left out.
        width = high - low
        wanted = torch.where(item < 0, item + self.size, item) - low
        mine = (wanted >= 0) & (wanted < width)
        longer = torch.cat((result, result.new_zeros(_one(result.shape, self.axis))), dim=self.axis)
        longer[(*before, torch.where(mine, wanted, width), *after)] = value
        return longer.narrow(self.axis, 0, width)

    def _split(self, index: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
        """What stands for the axis, and the index with the whole axis in its place."""
        return index[self.entry], self._whole(index)

    def _whole(self, index: tuple[Any, ...]) -> tuple[Any, ...]:
        return (*index[: self.entry], slice(None), *index[self.entry + 1 :])

    def _met(self, chosen: range) -> tuple[int, int, slice]:
        """Of the chosen elements, from which on and how many are this rank's, and where these lie in its stretch."""
        low, high = self.bounds
        step = chosen.step
        first = max(0, -(-(low - chosen.start) // step))
        last = min(len(chosen), -(-(high - chosen.start) // step))
        count = max(0, last - first)
        start = chosen.start + first * step - low
        return first, count, slice(start, start + (count - 1) * step + 1 if count else start, step)

    def _narrowed(self, value: Any, ndim: int, first: int, count: int) -> Any:
        """The part of a written value that belongs to this rank, where the value has the axis at all."""
        if not isinstance(value, Tensor):
            return value
        own = self.there - (ndim - value.ndim)
        return value if own < 0 or value.shape[own] == 1 else value.narrow(own, first, count)


def _one(shape: torch.Size, axis: int) -> tuple[int, ...]:
    return (*shape[:axis], 1, *shape[axis + 1 :])
