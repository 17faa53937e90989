"""What is written at a site of the matrix: new numbers for every part that ranks may have a share of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import tracelens as tl
from tests.conformance.test_reads import looks, read
from tracelens.ir.sites import Scope, Site

_IN_PARTS = ("H", "K", "M", "V")


def axis_in_parts(site: Site) -> int:
    """The axis that ranks may share: heads, neurons, the vocabulary; of others the last one."""
    return next(
        (axis for axis, dim in enumerate(site.kind.shape) if dim in _IN_PARTS), len(site.kind.shape) - 1
    )


def numbers(before: Tensor, seed: int, *shape: int) -> Tensor:
    """Random numbers, half as far from each other as those of ``before``, and of its shape if no other is asked for."""
    drawn = torch.randn(*(shape or before.shape), generator=torch.Generator().manual_seed(seed))
    return 0.5 * before[before.abs() < 1e30].float().std() * drawn


def _across(site: Site, size: int) -> tuple[Any, ...]:
    """An index of the middle of the axis in parts, from one rank's share into those of others."""
    before = (slice(None),) * axis_in_parts(site)
    return (*before, slice(size // 4, size - size // 4 + (size == 2)))


def _assign(model: tl.Model, site: Site, new: object) -> None:
    setattr(model if site.layer is None else model.layers[site.layer], site.name, new)


def _add(model: tl.Model, site: Site, before: Tensor) -> None:
    _assign(model, site, read(model, site) + numbers(before, 1))


def _replace(model: tl.Model, site: Site, before: Tensor) -> None:
    """By a mixture of what is there and what another prompt has, one position (or head) before.

    All numbers are others, of a kind that the model knows: random ones would make a real model grow what is rounded.
    """
    _assign(model, site, (3 * before + before.flip(0).roll(1, 1)) / 4)


def _vector(model: tl.Model, site: Site, before: Tensor) -> None:
    _assign(model, site, numbers(before, 3, before.shape[-1]))


def _part(model: tl.Model, site: Site, before: Tensor) -> None:
    handle = read(model, site)
    index = _across(site, before.shape[axis_in_parts(site)])
    handle[index] = numbers(before, 4, *before[index].shape)


def _part_added(model: tl.Model, site: Site, before: Tensor) -> None:
    handle = read(model, site)
    index = _across(site, before.shape[axis_in_parts(site)])
    handle[index] += numbers(before, 5, *before[index].shape)


def _one(model: tl.Model, site: Site, before: Tensor) -> None:
    """The last of what the last rank has, at the last position of each prompt."""
    handle = read(model, site)
    axis = axis_in_parts(site)
    index: list[Any] = [slice(None)] * before.ndim
    index[axis] = before.shape[axis] - 1
    index[2 if looks(site) else 1] = -1
    handle[tuple(index)] = 3.0


def _lowered(model: tl.Model, site: Site, before: Tensor) -> None:
    """A quarter of the way to its own mean over the axis that may be in parts, where it is above that.

    Not by the mean: a norm that centres would take that away again.
    """
    value = read(model, site)
    if looks(site):
        value = tl.where(value < -1e30, 0.0, value)
    mean = value.mean(axis_in_parts(site), keepdim=True)
    _assign(model, site, tl.where(value > mean, 0.75 * value + 0.25 * mean, value))


@dataclass(frozen=True)
class Edit:
    name: str
    run: Callable[[tl.Model, Site, Tensor], None]


EDITS = {
    edit.name: edit
    for edit in (
        Edit("add", _add),
        Edit("replace", _replace),
        Edit("vector", _vector),
        Edit("part", _part),
        Edit("part added", _part_added),
        Edit("one", _one),
        Edit("lowered", _lowered),
    )
}


def seen_later(model: tl.Model, site: Site) -> Site:
    """A site after this one that an edit shows in, as far along as there is one, and in parts where that can be."""
    last = model.n_layers - 1
    if site.kind.scope is Scope.AFTER:
        return Site("logits") if site.name == "logits" else Site("lm_head")
    if site.layer == last:
        return Site("final_norm")
    neurons = Site("mlp_act", last)
    return neurons if model.anatomy.has(neurons) else Site("z", last)
