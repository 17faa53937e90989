"""Indexing a tensor of which a rank owns a stretch of one axis, by numbers that mean the whole axis.

Reading gives every rank a tensor of the result's shape, in which only what the rank owns is filled in and all else is
zero: the ranks' sum is the result. Writing gives every rank its own stretch, changed where the index meets it. Nothing
is asked of the host, and no rank needs to know of the others. A number that no rank has is an error on all, as it would
be of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tracelens.ir.abstract import Defer, bind
from tracelens.ir.layout import Layout, Replicate, Shard, owned
from tracelens.ir.ops import Call, Ref
from tracelens.ir.types import DType, TensorType


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
            first, count, own = self.met(chosen)
            shape = (*rest.shape[: self.there], len(chosen), *rest.shape[self.there + 1 :])
            share = rest.new_zeros(shape)
            if count:
                share.narrow(self.there, first, count).copy_(rest[(*[slice(None)] * self.there, own)])
            return share
        require_within(item, -self.size, self.size)
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
            first, count, own = self.met(range(self.size)[item])
            if count:
                result[(*before, own, *after)] = self._narrowed(
                    value, base[self._whole(index)].ndim, first, count
                )
            return result
        # What others own goes into an element behind the last, which is then left out.
        width = high - low
        require_within(item, -self.size, self.size)
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

    def met(self, chosen: range) -> tuple[int, int, slice]:
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


def require_within(numbers: Tensor, lowest: int, size: int) -> None:
    """Raises what an index of a whole axis raises; on a GPU that is an assertion of the device, which asks no host."""
    fit = (numbers >= lowest) & (numbers < size)
    if numbers.device.type != "cpu":
        torch.ops.aten._assert_async.msg(fit.all(), "index out of bounds")
    elif not bool(fit.all()):
        wrong = int(numbers[~fit].flatten()[0])
        raise IndexError(f"index {wrong} is out of bounds for an axis of size {size}")


# --- functions that pick by number -----------------------------------------------------------------------------------

_PICKING: Mapping[str, tuple[Callable[..., Tensor], str]] = {
    "torch.gather": (lambda base, dim, index: base.gather(dim, index), "input dim index * sparse_grad"),
    "torch.take_along_dim": (lambda base, dim, index: base.take_along_dim(index, dim), "input indices dim"),
}
"""How it is called, and the names of its arguments."""


@dataclass(frozen=True, slots=True)
class OwnPicks:
    """A rank's share of what ``function`` picks along an axis that is in parts: zero where another rank has it.

    ``base`` and ``index``: the values of the plan.
    """

    function: Callable[..., Tensor]
    base: int
    index: int
    axis: int
    size: int
    ranks: int
    rank: int

    def __call__(self, base: Tensor, index: Tensor) -> Tensor:
        require_within(index, 0, self.size)
        low, high = owned(self.size, self.ranks, self.rank)
        if low == high:
            nothing = base.new_zeros(_one(base.shape, self.axis))
            return self.function(nothing, self.axis, torch.zeros_like(index))
        wanted = index - low
        mine = (wanted >= 0) & (wanted < high - low)
        found = self.function(base, self.axis, wanted.clamp(0, high - low - 1))
        return torch.where(mine, found, found.new_zeros(()))


def own_picks(
    op: Call, layouts: Mapping[int, Layout], types: Mapping[int, TensorType], ranks: int, rank: int
) -> OwnPicks | None:
    """What a rank does by itself of a call that picks along the axis that its operand is in parts along."""
    if op.function not in _PICKING:
        return None
    function, signature = _PICKING[op.function]
    try:
        bound = bind(signature, op.args, op.kwargs)
    except Defer:
        return None
    base, index, dim = bound.get("input"), bound.get("index", bound.get("indices")), bound.get("dim")
    if not isinstance(base, Ref) or not isinstance(index, Ref) or not isinstance(dim, int):
        return None
    layout, type_ = layouts.get(base.id), types[base.id]
    if not isinstance(layout, Shard) or dim % type_.ndim != layout.dim or type_.dtype is DType.BOOL:
        return None
    if not isinstance(layouts.get(index.id, Replicate()), Replicate):
        return None
    size = type_.shape[layout.dim]
    assert isinstance(size, int)
    return OwnPicks(function, base.id, index.id, layout.dim, size, ranks, rank)
