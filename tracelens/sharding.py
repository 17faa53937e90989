"""Gives every value of a placed graph its layout on the ranks of its place, and puts in what this needs.

A site lies as its module leaves it; so does a parameter. From there on everything is done in parts where that gives the
same numbers (:mod:`tracelens.sharding_rules`): nothing is gathered before it has been indexed and reduced. What needs
whole values is given whole ones, once for all that need them. A tensor in parts, or that the ranks have to add up, is
saved as it is, and put together when the forward pass is over.

Below a gradient's start everything is whole: autograd then gives every rank the derivative with respect to the whole.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from tracelens.errors import LayoutError
from tracelens.ir.gradients import LEAF
from tracelens.ir.graph import Graph
from tracelens.ir.layout import WHOLE_EVERYWHERE, Joined, Layout, Partial, Replicate, Shard
from tracelens.ir.ops import (
    WHOLE,
    Apply,
    Call,
    Const,
    Grad,
    Hold,
    Index,
    IndexItem,
    IndexPut,
    Op,
    OwnTokens,
    Param,
    Read,
    Redistribute,
    Ref,
    Save,
    TokenSelector,
    Transfer,
    Write,
    drops_axis,
    operands,
    results,
)
from tracelens.ir.passes.rebuild import rebuild, substitute
from tracelens.ir.types import DType, TensorType
from tracelens.own_part import OwnPart, own_picks
from tracelens.placement import Placement
from tracelens.placing import Placed
from tracelens.sharding_lens import of_a_part
from tracelens.sharding_rules import Choice, on_parts
from tracelens.sharding_steps import in_steps


@dataclass(frozen=True, slots=True)
class Laid:
    """A placed graph with redistributions, and the layout of every value."""

    placed: Placed
    layouts: Mapping[int, Layout]


def lay_out(placed: Placed, placement: Placement, settled: Collection[str] = ()) -> Laid:
    """``placed`` on places that may consist of several ranks; ``settled``: the saves that are made whole."""
    if all(place.ranks == 1 for place in placement.places):
        return Laid(placed, dict.fromkeys(placed.graph.types, WHOLE_EVERYWHERE))
    return _LayingOut(placed, placement, settled).laid()


class _LayingOut:
    def __init__(self, placed: Placed, placement: Placement, settled: Collection[str]) -> None:
        self.graph = placed.graph
        self.settled = settled
        self.placed = placed
        self.placement = placement
        self.layouts: dict[int, Layout] = {}
        self.home = dict(placed.home)
        self.kept: list[tuple[int, Op]] = []
        self.at: list[int] = []
        self.new = placed.graph.next_value
        self.types = dict(placed.graph.types)
        self.known: dict[tuple[int, Layout], int] = {}
        """The number of a value in another layout than its own."""
        self.differentiable = _from_gradients(placed.graph)
        self.added_up = _added_up(placed.graph, placement)

    def laid(self) -> Laid:
        for number, op in enumerate(self.graph.ops):
            if isinstance(op, Read | Write):
                self._require_known(number, op)
            for step in self._steps(number, op):
                self._lay(number, step)
        graph = rebuild(self.graph, self.kept)
        return Laid(Placed(graph, tuple(self.at), self.home), self.layouts)

    def _require_known(self, number: int, op: Read | Write) -> None:
        """Refuses a site of which nobody knows how it lies, and what would give each rank another derivative."""
        try:
            self.placement.require_known(op.site)
            if self.differentiable and _is_summed(self.placement.layout_of(op.site)):
                raise LayoutError(
                    f"{op.site} lies in parts that ranks add up, and no gradient is taken through a read or a write "
                    "of such a site",
                    instead="the sites around it; or a plan that adds them up (output_layouts=Replicate())",
                )
        except LayoutError as error:
            raise self.graph.blame(error, number) from None

    def _steps(self, number: int, op: Op) -> Sequence[Op]:
        """What is done for an operation: itself, or several that need less of what other ranks have."""
        if not isinstance(op, Call) or any(value in self.differentiable for value in operands(op)):
            return (op,)
        layouts = {value: self._joined(value) for value in operands(op)}
        steps = in_steps(op, layouts, self.types, self._ranks(op), self._number)
        if steps is None:
            return (op,)
        for step in steps:
            for value, type_ in results(step):
                self.types[value], self.home[value] = type_, self.placed.at[number]
        return steps

    def _number(self) -> int:
        self.new += 1
        return self.new - 1

    def _lay(self, number: int, op: Op) -> None:
        choice = self._choice(op)
        using = {
            value: self._as(number, value, choice.needs[value])
            for value in operands(op)
            if value in choice.needs
        }
        self.kept.append((number, substitute(op, using)))
        self.at.append(self.placed.at[number])
        for (value, _), layout in zip(results(op), choice.gives, strict=True):
            self.layouts[value] = layout

    def _as(self, number: int, value: int, wanted: Layout) -> int:
        """The number of ``value`` in a layout; it is redistributed for the operation ``number`` if need be."""
        own = self.layouts[value]
        if own == wanted:
            return value
        known = self.known.get((value, wanted))
        if known is not None:
            return known
        if not isinstance(own, Replicate) and not isinstance(wanted, Replicate):
            value = self._as(number, value, WHOLE_EVERYWHERE)
            own = WHOLE_EVERYWHERE
        out = self.known[value, wanted] = self.new
        self.new += 1
        self.layouts[out], self.home[out] = wanted, self.home[value]
        self.kept.append((number, Redistribute(out, self.types[value], value, own, wanted)))
        self.at.append(self.home[value])
        return out

    # --- the layouts of one operation ------------------------------------------------------------------------

    def _choice(self, op: Op) -> Choice:
        whole = Choice(dict.fromkeys(operands(op), WHOLE_EVERYWHERE), (WHOLE_EVERYWHERE,) * len(results(op)))
        match op:
            case Const() | Apply() | Hold():
                return whole
            case Param():
                return Choice({}, (self.placement.parameters.get(op.path, WHOLE_EVERYWHERE),))
            case Read():
                return Choice({}, (self.placement.layout_of(op.site),))
            case Write():
                return self._written(op)
            case Save():
                return Choice({value: self._kept_as(op, value) for value in op.values}, ())
            case Transfer():
                joined = self._joined(op.value)
                return Choice({op.value: joined}, (joined,))
            case Grad():
                # Each with respect to what the rank itself has of the value.
                own = {value: self._joined(value) for value in op.wrt}
                return Choice({op.loss: WHOLE_EVERYWHERE, **own}, tuple(own[value] for value in op.wrt))
            case _ if any(value in self.differentiable for value in operands(op)) and not _is_leaf(op):
                return whole
            case Index():
                return self._indexed(op) or whole
            case IndexPut():
                return self._put(op) or whole
            case Call() if op.outs[0] in self.added_up:
                return self._linear(op)
            case Call():
                layouts = {value: self._joined(value) for value in operands(op)}
                picks = own_picks(op, layouts, self.types, self._ranks(op), 0)
                if picks is not None:
                    return Choice(layouts, (Partial(Joined.SUM),))
                return of_a_part(op, layouts) or on_parts(op, layouts, self.types, self._ranks(op)) or whole
            case Redistribute():
                raise AssertionError("a graph is laid out once")

    def _joined(self, value: int) -> Layout:
        """A value's layout once partial results have been joined, and positions that ranks share put together."""
        own = self.layouts[value]
        if isinstance(own, Shard) and isinstance(self.types[value].shape[own.dim], int):
            return own
        return WHOLE_EVERYWHERE

    def _linear(self, op: Call) -> Choice:
        """What is done to partial results before they are added up: what is added to them is added once."""
        summed = Partial(Joined.SUM)
        adds = op.function in _ADDING
        needs = {
            value: summed if adds or value in self.added_up else WHOLE_EVERYWHERE for value in operands(op)
        }
        return Choice(needs, (summed,))

    def _kept_as(self, op: Save, value: int) -> Layout:
        """A value leaves as it lies, and ranks put together what they have when the pass is over.

        Partial results are joined before that where they have to be: in another dtype they would be rounded first. And
        where that has been done for something else anyway.
        """
        if op.name in self.settled:
            return WHOLE_EVERYWHERE
        own = self.layouts[value]
        apart = op.dtype in (None, self.types[value].dtype) and (value, WHOLE_EVERYWHERE) not in self.known
        return own if apart else self._joined(value)

    def _ranks(self, op: Op) -> int:
        return self.placement.places[self.home[operands(op)[0]]].ranks

    def _written(self, op: Write) -> Choice:
        if not isinstance(op.value, Ref):
            return Choice({}, ())
        site = self.placement.layout_of(op.site)
        type_ = self.types[op.value.id]
        if isinstance(site, Shard):
            # The value is broadcast to the site: it may lack the axis, or be one wide there.
            own = site.dim - (self.placement.ndim_of(op.site) - type_.ndim)
            site = Shard(own) if own >= 0 and type_.shape[own] != 1 else WHOLE_EVERYWHERE
        return Choice({op.value.id: site}, ())

    # --- indices ---------------------------------------------------------------------------------------------

    def _indexed(self, op: Index) -> Choice | None:
        layout = self._joined(op.base)
        if not isinstance(layout, Shard):
            return None
        found = axis_index(op.index, self.types[op.base], layout.dim, self.types)
        if found is None:
            return None
        item, axis = found.item, found.there
        needs = {**dict.fromkeys(operands(op), WHOLE_EVERYWHERE), op.base: layout}
        if item == WHOLE:
            return Choice(needs, (Shard(axis),))
        # Every rank puts what it owns of the selection into zeros.
        return Choice(needs, (Partial(Joined.SUM),)) if op.type.dtype is not DType.BOOL else None

    def _put(self, op: IndexPut) -> Choice | None:
        layout = self._joined(op.base)
        if not isinstance(layout, Shard):
            return None
        types = self.types
        found = axis_index(op.index, types[op.base], layout.dim, types)
        if found is None:
            return None
        item, axis = found.item, found.there
        needs: dict[int, Layout] = {**dict.fromkeys(operands(op), WHOLE_EVERYWHERE), op.base: layout}
        if isinstance(op.value, Ref) and item == WHOLE:
            type_ = types[op.value.id]
            own = axis - (_indexed_ndim(op.index, types[op.base], types) - type_.ndim)
            if own >= 0 and type_.shape[own] != 1:
                needs[op.value.id] = Shard(own)
        return Choice(needs, (layout,))


@dataclass(frozen=True, slots=True)
class AxisIndex:
    """What stands in an index for one axis: the entry and its number, and where the axis is in the result."""

    item: IndexItem
    entry: int
    there: int


def _indexed_ndim(index: tuple[IndexItem, ...], base: TensorType, types: Mapping[int, TensorType]) -> int:
    """How many axes ``base[index]`` has."""
    ndim = base.ndim
    for item in index:
        if item is None:
            ndim += 1
        elif drops_axis(item):
            ndim -= 1
        elif isinstance(item, Ref):
            ndim += types[item.id].ndim - 1
    return ndim


def axis_index(
    index: tuple[IndexItem, ...], base: TensorType, axis: int, types: Mapping[int, TensorType]
) -> AxisIndex | None:
    """What an index does to an axis; ``None`` for what only whole values can do.

    One tensor of numbers may stand in it, and takes the place of its axis; with several, or beside numbers, torch moves
    axes around.
    """
    tensors = [item for item in index if isinstance(item, Ref)]
    if len(tensors) > 1 or (tensors and any(isinstance(item, int) for item in index)):
        return None
    if any(types[item.id].dtype is DType.BOOL for item in tensors):
        return None
    at = 0  # the axis of the base that comes next
    there = 0  # and that of the result
    for entry, item in enumerate((*index, *([WHOLE] * base.ndim))):
        if item is None:
            there += 1
            continue
        if at == axis:
            single = not isinstance(item, Ref) or types[item.id].ndim == 1
            tokens = isinstance(item, TokenSelector | OwnTokens)
            return AxisIndex(item, entry, there) if single and not tokens else None
        at += 1
        if isinstance(item, Ref):
            there += types[item.id].ndim
        elif not drops_axis(item):
            there += 1
    raise AssertionError("an index has an entry for every axis")


def own_part(
    op: Index | IndexPut,
    layouts: Mapping[int, Layout],
    types: Mapping[int, TensorType],
    ranks: int,
    rank: int,
) -> OwnPart | None:
    """What a rank does by itself of an index into the axis that its operand is in parts along, if it is one."""
    layout = layouts.get(op.base)
    if not isinstance(layout, Shard):
        return None
    found = axis_index(op.index, types[op.base], layout.dim, types)
    if found is None or found.item == WHOLE:
        return None
    size = types[op.base].shape[layout.dim]
    assert isinstance(size, int)
    return OwnPart(layout.dim, found.there, found.entry, size, ranks, rank)


_ADDING = ("torch.add", "torch.sub")


def _added_up(graph: Graph, placement: Placement) -> frozenset[int]:
    """The values that stay partial results on their way from a site that ranks add up to such a site.

    There what is done to the sum can be done to its parts, and nothing need be exchanged: adding, and scaling. A value
    that anything else needs is summed first.
    """
    uses: dict[int, list[Op]] = {}
    for op in graph.ops:
        for value in operands(op):
            uses.setdefault(value, []).append(op)
    reads = {op.out for op in graph.ops if isinstance(op, Read) and _is_summed(placement.layout_of(op.site))}
    kept = set(reads)
    for op in graph.ops:
        if isinstance(op, Call) and _keeps_sums(op, kept, graph.types):
            kept.update(op.outs)
    while True:
        # Those of which every use is such a step too, or the write.
        left = {
            value
            for value in kept
            if value in reads
            or all(
                _is_summed(placement.layout_of(use.site))
                if isinstance(use, Write)
                else isinstance(use, Call) and use.outs[0] in kept
                for use in uses.get(value, ())
            )
        }
        left = {
            value
            for value in left
            if value in reads or any(source in left for source in operands(graph.ops[graph.producer[value]]))
        }
        if left == kept:
            return frozenset(left)
        kept = left


def _is_summed(layout: Layout) -> bool:
    return layout == Partial(Joined.SUM)


def _keeps_sums(op: Call, kept: set[int], types: Mapping[int, TensorType]) -> bool:
    """Is a call, done to the parts of sums, a part of what it makes of the sums?"""
    if op.kwargs or len(op.outs) != 1 or not op.types[0].dtype.is_floating:
        return False
    given = [arg.id for arg in op.args if isinstance(arg, Ref) and arg.id in kept]
    if any(types[value].dtype is not op.types[0].dtype for value in given):
        return False
    match op.args:
        case (Ref(), Ref()) if op.function in _ADDING:
            return bool(given)
        case (Ref(),) if op.function == "torch.neg":
            return bool(given)
        case (Ref(), int() | float() as number) | (int() | float() as number, Ref()) if (
            op.function == "torch.mul"
        ):
            return bool(given) and math.isfinite(number)
        case (Ref(), int() | float() as number) if op.function == "torch.div":
            # By zero, what is infinite in one part and in another does not add up.
            return bool(given) and math.isfinite(number) and number != 0
        case _:
            return False


def _is_leaf(op: Op) -> bool:
    return isinstance(op, Call) and op.function == LEAF


def _from_gradients(graph: Graph) -> frozenset[int]:
    """The values that autograd may follow: in a graph with gradients, whatever is made of a site."""
    if not any(isinstance(op, Grad) for op in graph.ops):
        return frozenset()
    followed: set[int] = set()
    for op in graph.ops:
        if isinstance(op, Read) or any(value in followed for value in operands(op)):
            followed.update(value for value, _ in results(op))
    return frozenset(followed)
