"""Moves indexing to where the data is, so that only what is needed travels between places.

``(early + late)[:, -1]`` with ``early`` and ``late`` at two places would send the whole of one of them. Indexing each
and adding then gives the same numbers to the last bit, as long as the function works element by element: so it is only
pushed through those, and only where something would travel.
"""

from __future__ import annotations

from collections.abc import Mapping

from tracelens.errors import TracelensError
from tracelens.ir.functions import FUNCTIONS, Kind
from tracelens.ir.graph import Graph
from tracelens.ir.ops import WHOLE, Call, Index, IndexItem, Op, Slice, operands
from tracelens.ir.passes.forward_order import forward_order
from tracelens.ir.passes.rebuild import rebuild, renamed
from tracelens.ir.retype import retype, sizes_of
from tracelens.ir.types import TensorType
from tracelens.placement import Placement
from tracelens.placing import homes

Items = tuple[int | Slice, ...]


def push_indices(graph: Graph, placement: Placement) -> Graph:
    """``graph`` with indices before the element-by-element functions whose operands lie at several places."""
    if len(placement.places) == 1:
        return graph
    while (number := _candidate(graph, homes(graph, placement))) is not None:
        # The operands are indexed as soon as they are there, which is before where the result was.
        graph = forward_order(_pushed(graph, number))
    return graph


def _candidate(graph: Graph, home: Mapping[int, int]) -> int | None:
    """The first indexing of a value that is made, for it alone, of values at several places."""
    for number, op in enumerate(graph.ops):
        if not isinstance(op, Index) or graph.uses[op.base] != (number,):
            continue
        maker = graph.ops[graph.producer[op.base]]
        if not isinstance(maker, Call) or len(maker.outs) != 1 or not _by_element(maker):
            continue
        if len({home[value] for value in operands(maker) if value in home}) > 1 and (
            _rewritten(graph, op, maker) is not None
        ):
            return number
    return None


def _by_element(op: Call) -> bool:
    known = FUNCTIONS.get(op.function)
    return known is not None and known.kind is Kind.POINTWISE


def _pushed(graph: Graph, number: int) -> Graph:
    op = graph.ops[number]
    assert isinstance(op, Index)
    made = graph.producer[op.base]
    maker = graph.ops[made]
    assert isinstance(maker, Call)
    new = _rewritten(graph, op, maker)
    assert new is not None
    kept: list[tuple[int, Op]] = []
    for place, other in enumerate(graph.ops):
        if place == number:
            kept += [(number, part) for part in new[:-1]]
            kept.append((made, new[-1]))
        elif place != made:
            kept.append((place, other))
    return rebuild(graph, kept)


def _rewritten(graph: Graph, op: Index, maker: Call) -> list[Op] | None:
    """The operands indexed one by one, and the function of these; ``None`` where that is not the same."""
    items: list[int | Slice] = []
    for item in op.index:
        if not isinstance(item, int | Slice) or isinstance(item, bool):
            return None  # new axes, tensors and tokens stay where they are
        items.append(item)
    whole = graph.types[op.base]
    items += [WHOLE] * (whole.ndim - len(items))
    indices: list[Op] = []
    using: dict[int, int] = {}
    number = graph.next_value
    sizes = sizes_of(graph)
    types = dict(graph.types)
    try:
        for value in dict.fromkeys(operands(maker)):
            own = _own_items(tuple(items), graph.types[value], whole)
            if own is None:
                return None
            if all(item == WHOLE for item in own):
                continue
            found = retype(Index(number, whole, value, own), types, sizes, {})
            if found is None:
                return None
            types[number] = found.types[0]
            indices.append(Index(number, found.types[0], value, own))
            using[value] = number
            number += 1
        call = renamed(maker, {**using, maker.outs[0]: op.out})
        found = retype(call, types, sizes, {})
    except TracelensError:
        return None
    if found is None or found.types != (op.type,):
        return None
    assert isinstance(call, Call)
    return [*indices, Call(call.outs, (op.type,), call.function, call.args, call.kwargs)]


def _own_items(items: Items, type_: TensorType, whole: TensorType) -> tuple[IndexItem, ...] | None:
    """The index of an operand that is broadcast to the result, whose index is ``items``."""
    missing = whole.ndim - type_.ndim
    if missing < 0:
        return None
    own: list[IndexItem] = []
    for item, size, full in zip(items[missing:], type_.shape, whole.shape[missing:], strict=True):
        if size == full:
            own.append(item)
        elif size == 1:
            own.append(0 if isinstance(item, int) else WHOLE)
        else:
            return None
    return tuple(own)
