"""What the ranks of a place do together for a plan, and the bytes that cross between them for it.

Of ``n`` ranks, for a value of ``N`` bytes:

* a *gather* of parts of at most ``p`` bytes gives every rank the whole: each sends its part to all others,
  ``n (n - 1) p`` in all (``(n - 1) N`` where ``n`` divides the axis; shorter parts are filled up);
* partial results that are *summed* or averaged: ``2 (n - 1) N``, as rings do it, each rank ``2 (n - 1) / n * N``;
* those of which the largest or smallest counts are all seen by every rank: ``n (n - 1) N``;
* a save in parts is gathered on one rank, when the pass is over: ``(n - 1) p``; one of partial results is summed there:
  ``(n - 1) N``;
* a part of what every rank has whole costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tracelens.ir.dims import Sizes
from tracelens.ir.layout import WHOLE_EVERYWHERE, Joined, Layout, Partial, Replicate, Shard, local_type
from tracelens.ir.ops import Index, IndexPut, Redistribute, Save, Slice
from tracelens.ir.sites import Sequence as Moment
from tracelens.ir.text import index_text
from tracelens.ir.types import TensorType, bytes_text
from tracelens.sharding import own_part

if TYPE_CHECKING:
    from tracelens.plan import Plan

SUMMED = (Joined.SUM, Joined.MEAN, Joined.NORM)
"""What a ring of ranks can do on the way; of all else every rank sees everything."""
_VERBS = {
    Joined.SUM: "sums",
    Joined.MEAN: "averages",
    Joined.MAX: "takes the largest of",
    Joined.MIN: "takes the smallest of",
    Joined.NORM: "takes the norm of",
}


@dataclass(frozen=True, slots=True)
class Collective:
    """One thing that the ``ranks`` of a place do together; every rank of the place takes part.

    ``saved``: the name of the save for which one rank is given the result after the pass; else it is done at the moment
    ``at``, and every rank has the result.
    """

    place: int
    ranks: int
    value: int
    type: TensorType
    source: Layout
    at: Moment | None = None
    saved: str | None = None

    @property
    def what(self) -> str:
        """``gathers`` or ``reductions``, as a report counts them."""
        return "gathers" if isinstance(self.source, Shard) else "reductions"

    def nbytes(self, sizes: Sizes) -> int:
        """The bytes that cross between ranks."""
        others = self.ranks - 1
        match self.source:
            case Shard():
                part = local_type(self.type, self.source, self.ranks).nbytes(sizes)
                return others * part if self.saved is not None else self.ranks * others * part
            case Partial():
                whole = self.type.nbytes(sizes)
                if self.saved is not None:
                    return others * whole
                return (2 if self.source.joined in SUMMED else self.ranks) * others * whole
            case Replicate():
                return 0

    def text(self, when: str, sizes: Sizes | None) -> str:
        """The line of a plan."""
        size = "" if sizes is None else f", {bytes_text(self.nbytes(sizes))} between ranks"
        if self.saved is not None:
            verb = _VERBS[self.source.joined] if isinstance(self.source, Partial) else "gathers"
            return f"{verb} {self.saved!r} on the first of {self.ranks} ranks when the pass is over{size}"
        match self.source:
            case Partial():
                verb = _VERBS[self.source.joined]
                return f"{verb} %{self.value} {self.type} over {self.ranks} ranks {when}{size}"
            case _:
                return f"gathers %{self.value} {self.type} from {self.ranks} ranks {when}{size}"


def collectives(plan: Plan) -> tuple[Collective, ...]:
    """What ranks do together, in the order in which they do it."""
    found: list[Collective] = []
    for op, known in zip(plan.graph.ops, plan.moments, strict=True):
        if isinstance(op, Redistribute) and not isinstance(op.source, Replicate):
            place = plan.home[op.value]
            ranks = plan.placement.places[place].ranks
            found.append(Collective(place, ranks, op.value, op.type, op.source, known))
    for save in plan.graph.saves:
        for value in save.values:
            layout = plan.layouts.get(value, WHOLE_EVERYWHERE)
            if not isinstance(layout, Replicate):
                place = plan.home[value]
                ranks = plan.placement.places[place].ranks
                type_ = _as_saved(plan, save, value)
                found.append(Collective(place, ranks, value, type_, layout, saved=save.name))
    return tuple(found)


def _as_saved(plan: Plan, save: Save, value: int) -> TensorType:
    own = plan.graph.types[value]
    return TensorType(save.dtype or own.dtype, own.shape)


def lines(plan: Plan, sizes: Sizes | None) -> list[str]:
    """What a plan says of its ranks: how the sites lie that it uses, and what they do together."""
    lying: dict[tuple[str, Layout, int], list[int]] = {}
    for site in plan.sites:
        layout = plan.placement.layout_of(site)
        if not isinstance(layout, Replicate):
            ranks = plan.placement.place_of(site).ranks
            layers = lying.setdefault((site.name, layout, ranks), [])
            layers += [] if site.layer is None else [site.layer]
    texts = [
        f"{name}{_of_layers(sorted(layers))} lies in {layout} on {ranks} ranks"
        for (name, layout, ranks), layers in sorted(lying.items(), key=lambda item: item[0][0])
    ]
    texts += _owners(plan)
    for one in collectives(plan):
        when = next((f"after {site}" for site in plan.sites if site.sequence == one.at), "before the pass")
        texts.append(one.text(when, sizes))
    return [f"  {text}" for text in texts]


def _owners(plan: Plan) -> list[str]:
    """Which ranks have what an index names of an axis in parts; the others do nothing there, or give zeros."""
    found: dict[str, list[int]] = {}
    for op in plan.graph.ops:
        if not isinstance(op, Index | IndexPut):
            continue
        ranks = plan.placement.places[plan.home[op.base]].ranks
        own = own_part(op, plan.layouts, plan.graph.types, ranks, 0)
        item = None if own is None else op.index[own.entry]
        if own is None or not isinstance(item, int | Slice):
            continue
        chosen = range(own.size)
        if isinstance(item, int):
            chosen = range(chosen[item], chosen[item] + 1)
        else:
            chosen = chosen[item.start : item.stop : item.step]
        having: list[str] = []
        for rank in range(ranks):
            first, count, _ = replace(own, rank=rank).met(chosen)
            if count:
                having.append(f"rank {rank} has {_counted(chosen[first : first + count])}")
        text = f"[{index_text(op.index)}]: {', '.join(having) or 'no rank has any of it'}"
        found.setdefault(text, []).append(op.base)
    return [f"{_values(values)}{text}" for text, values in found.items()]


def _counted(mine: range) -> str:
    """Numbers that a rank has, as the user counts them: ``48 to 69``."""
    if len(mine) == 1:
        return str(mine[0])
    return f"{mine[0]} to {mine[-1]}" + (f" in steps of {mine.step}" if mine.step > 1 else "")


def _values(values: Sequence[int]) -> str:
    """``%0``, or for what is done in many layers, the first and how many more there are."""
    return f"%{values[0]}" if len(values) == 1 else f"%{values[0]} and {len(values) - 1} more "


def _of_layers(layers: list[int]) -> str:
    if not layers:
        return ""
    return f" of layer{'s' if len(layers) > 1 else ''} {ranges(layers)}"


def ranges(layers: list[int]) -> str:
    """``0 to 3, 8``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def journeys(plan: Plan, sizes: Sizes) -> list[tuple[str, str, str, int]]:
    """What travels for a plan whose places are ranks in processes of their own: from, to, kind and bytes of each.

    Every rank of a place sends what it has of a value to the rank of the same number at the other place. What was
    saved goes to the first rank of all, and from there to the process that owns the ranks.
    """
    places, found = plan.placement.places, list[tuple[str, str, str, int]]()
    names = [f"place {place.index}" for place in places]
    for one in collectives(plan):
        found.append((names[one.place], names[one.place], one.what, one.nbytes(sizes)))
    for op in plan.transfers:
        shared = isinstance(plan.layouts.get(op.out), Shard)
        size = op.type.nbytes(sizes) * (1 if shared else places[op.target].ranks)
        found.append((names[op.source], names[op.target], "transfers", size))
    for save in plan.graph.saves:
        for value in save.values:
            size = _as_saved(plan, save, value).nbytes(sizes)
            if plan.home[value]:
                found.append((names[plan.home[value]], names[0], "results", size))
            found.append((names[0], "owner", "results", size))
    return found
