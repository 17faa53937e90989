"""Sites that are a part of a module's tensor, or the same numbers in another shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from tracelens.backends.base import HeadsView, RowsView
from tracelens.ir.layout import Layout, Shard

Take = Callable[[torch.Tensor], torch.Tensor]
TakeSized = Callable[[torch.Tensor, Mapping[str, int]], torch.Tensor]
Put = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def taking_and_putting(view: HeadsView, widths: Mapping[str, int]) -> tuple[Take, Put]:
    """How a site is taken out of the module's tensor, and how a new value of it is put back into a new tensor.

    The module's tensor is never changed in place, and gradients flow through both.
    """
    if view.heads_first:
        return _heads_inside, lambda whole, new: _heads_inside(new)
    width = widths["d"]
    heads = [widths[part] for part in view.parts]
    start = sum(heads[: view.index]) * width
    count = heads[view.index]
    end = start + count * width
    total = sum(heads) * width

    if len(heads) == 1:

        def take_all(whole: torch.Tensor) -> torch.Tensor:
            return whole.unflatten(-1, (count, width))

        def put_all(whole: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
            return new.flatten(-2)

        return take_all, put_all

    def take(whole: torch.Tensor) -> torch.Tensor:
        if whole.shape[-1] != total:
            return whole  # the read that follows says what is wrong
        return whole[..., start:end].unflatten(-1, (count, width))

    def put(whole: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        return torch.cat((whole[..., :start], new.flatten(-2), whole[..., end:]), dim=-1)

    return take, put


def shown(layout: Layout, view: HeadsView | RowsView | None) -> Layout:
    """How a module's tensor lies in which a site lies so; and the inverse, for a site that is all of that tensor."""
    if isinstance(view, HeadsView) and view.heads_first and isinstance(layout, Shard):
        return Shard({1: 2, 2: 1}.get(layout.dim, layout.dim))
    return layout


def _heads_inside(tensor: torch.Tensor) -> torch.Tensor:
    """[B, H, P, d] as [B, P, H, d], and back."""
    return tensor.transpose(1, 2)


def rows_apart() -> tuple[TakeSized, Put]:
    """The same for sites of rows that lie one after the other; what takes them is given the sizes of the pass, too."""
    return _rows_apart, lambda whole, new: new.flatten(0, 1)


def _rows_apart(tensor: torch.Tensor, sizes: Mapping[str, int]) -> torch.Tensor:
    """[B * P, ...] as [B, P, ...]."""
    if not tensor.ndim or tensor.shape[0] != sizes["B"] * sizes["P"]:
        return tensor  # the read that follows says what is wrong
    return tensor.unflatten(0, (sizes["B"], sizes["P"]))
