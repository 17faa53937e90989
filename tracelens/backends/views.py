"""Sites that are a part of a module's tensor, or the same numbers in another shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from tracelens.backends.base import HeadsView, NeuronsView, RowsView, View
from tracelens.ir.layout import Layout, Shard

Take = Callable[[torch.Tensor], torch.Tensor]
TakeSized = Callable[[torch.Tensor, Mapping[str, int]], torch.Tensor]
Put = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def taking_and_putting(view: HeadsView | NeuronsView, widths: Mapping[str, int]) -> tuple[Take, Put]:
    """How a site is taken out of the module's tensor, and how a new value of it is put back into a new tensor.

    The module's tensor is never changed in place, and gradients flow through both.
    """
    if isinstance(view, NeuronsView):
        return _stretch([widths[part] for part in view.parts], view.index)
    if view.heads_first:
        return _heads_inside, lambda whole, new: _heads_inside(new)
    width = widths[view.width]
    heads = [widths[part] for part in view.parts]
    if view.grouped:
        return _of_groups(heads, view.index, width, groups=min(heads))
    count = heads[view.index]

    if len(heads) == 1:

        def take_all(whole: torch.Tensor) -> torch.Tensor:
            return whole.unflatten(-1, (count, width))

        def put_all(whole: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
            return new.flatten(-2)

        return take_all, put_all

    flat, put_flat = _stretch([part * width for part in heads], view.index)

    def take(whole: torch.Tensor) -> torch.Tensor:
        part = flat(whole)
        return part if part is whole else part.unflatten(-1, (count, width))

    return take, lambda whole, new: put_flat(whole, new.flatten(-2))


def _stretch(sizes: list[int], index: int) -> tuple[Take, Put]:
    """One of several parts that lie one after the other along the last axis."""
    start = sum(sizes[:index])
    end, total = start + sizes[index], sum(sizes)

    def take(whole: torch.Tensor) -> torch.Tensor:
        # Of another size, the read that follows says what is wrong.
        return whole[..., start:end] if whole.shape[-1] == total else whole

    def put(whole: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        return torch.cat((whole[..., :start], new, whole[..., end:]), dim=-1)

    return take, put


def _of_groups(heads: list[int], index: int, width: int, groups: int) -> tuple[Take, Put]:
    """The heads of one part, of which each group has its share beside its shares of the other parts."""
    shares = [count // groups for count in heads]
    start = sum(shares[:index])
    end, total = start + shares[index], sum(shares)

    def take(whole: torch.Tensor) -> torch.Tensor:
        if whole.shape[-1] != groups * total * width:
            return whole  # the read that follows says what is wrong
        return whole.unflatten(-1, (groups, total, width))[..., start:end, :].flatten(-3, -2)

    def put(whole: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        apart = whole.unflatten(-1, (groups, total, width))
        own = new.unflatten(-2, (groups, shares[index]))
        return torch.cat((apart[..., :start, :], own, apart[..., end:, :]), dim=-2).flatten(-3)

    return take, put


def shown(layout: Layout, view: View | None) -> Layout:
    """How a module's tensor lies in which a site lies so; and the inverse, for a site that is all of that tensor."""
    if isinstance(view, HeadsView) and view.heads_first and isinstance(layout, Shard):
        return Shard({1: 2, 2: 1}.get(layout.dim, layout.dim))
    return layout


def _heads_inside(tensor: torch.Tensor) -> torch.Tensor:
    """[B, H, P, d] as [B, P, H, d], and back."""
    return tensor.transpose(1, 2)


def scaled(factor: float) -> tuple[Take, Put] | None:
    """The same for a site that is the module's tensor times a number; nothing is to be done where that is 1."""
    if factor == 1:
        return None
    return lambda whole: whole * factor, lambda whole, new: new / factor


def rows_apart(view: RowsView) -> tuple[TakeSized, Put]:
    """The same for sites of rows that lie one after the other; what takes them is given the sizes of the pass, too."""

    def apart(tensor: torch.Tensor) -> bool:
        return view.flat is not None and tensor.ndim != view.flat

    def take(tensor: torch.Tensor, sizes: Mapping[str, int]) -> torch.Tensor:
        """[B * P, ...] as [B, P, ...]."""
        if apart(tensor) or not tensor.ndim or tensor.shape[0] != sizes["B"] * sizes["P"]:
            return tensor  # the read that follows says what is wrong
        return tensor.unflatten(0, (sizes["B"], sizes["P"]))

    return take, lambda whole, new: new if apart(whole) else new.flatten(0, 1)
