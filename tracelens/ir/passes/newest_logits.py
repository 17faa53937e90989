"""Has a generation compute the logits of the newest position alone, where nothing looks at others.

That is what transformers does by itself: the logits of a whole prompt are by far its largest tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tracelens.ir.dims import P
from tracelens.ir.functions import FUNCTIONS, Kind
from tracelens.ir.graph import Graph
from tracelens.ir.module_sites import ModuleSite
from tracelens.ir.ops import (
    WHOLE,
    Call,
    Index,
    IndexItem,
    IndexPut,
    Op,
    Read,
    Ref,
    Slice,
    Write,
    operands,
    results,
)
from tracelens.ir.sites import Scope, Site
from tracelens.ir.types import TensorType

_NAMES = ("lm_head", "logits")


def newest_logits(graph: Graph) -> Graph:
    """The graph with one position at the logits, if it uses no more of them; else the graph as it is."""
    reached = [op.site for op in graph.ops if isinstance(op, Read | Write)]
    if not any(map(of_logits, reached)):
        return graph
    if any(isinstance(site, ModuleSite) and site.kind.scope is Scope.AFTER for site in reached):
        return graph  # sides of modules behind the layers are those of all positions
    narrow: set[int] = set()
    for op in graph.ops:
        if not _keeps_apart(op, narrow, graph.types):
            return graph
    return replace(graph, ops=tuple(_narrowed(op, narrow) for op in graph.ops))


def of_logits(site: Site) -> bool:
    """Is a site one that is made of the newest position alone, unless more are asked for?"""
    return site.name in _NAMES


def _keeps_apart(op: Op, narrow: set[int], types: Mapping[int, TensorType]) -> bool:
    """Does an operation leave the newest position of the logits what it is without the others?"""
    match op:
        case Read() if of_logits(op.site):
            narrow.add(op.out)
            return True
        case Write() if of_logits(op.site):
            # A number is the same at all positions, and so is what has none.
            return (
                not isinstance(op.value, Ref)
                or op.value.id in narrow
                or not _has_positions(types[op.value.id])
            )
        case _ if not any(value in narrow for value in operands(op)):
            return True
        case Index():
            item = _at_positions(op.index, types[op.base])
            if item == WHOLE:
                narrow.add(op.out)
            return item == WHOLE or _is_newest(item)
        case IndexPut():
            item = _at_positions(op.index, types[op.base])
            narrow.add(op.out)
            others = [value for value in operands(op) if value not in narrow]
            return (item == WHOLE or _is_newest(item)) and not any(
                _has_positions(types[value]) for value in others
            )
        case Call():
            known = FUNCTIONS.get(op.function)
            narrow.update(op.outs)
            others = [value for value in operands(op) if value not in narrow]
            alone = known is not None and known.kind is Kind.POINTWISE
            return alone and not any(_has_positions(types[value]) for value in others)
        case _:
            return False


def _at_positions(index: tuple[IndexItem, ...], type_: TensorType) -> IndexItem:
    """The entry of an index that stands at the axis of positions; ``...`` and new axes are taken for something else."""
    axes = type_.position_axes
    if len(axes) != 1 or any(item is None or isinstance(item, Ref) for item in index):
        return 0
    return index[axes[0]] if axes[0] < len(index) else WHOLE


def _is_newest(item: IndexItem) -> bool:
    return item == -1 or item == Slice(-1)


def _has_positions(type_: TensorType) -> bool:
    return bool(type_.position_axes)


def _narrowed(op: Op, narrow: set[int]) -> Op:
    made = [value for value, _ in results(op)]
    if not any(value in narrow for value in made):
        return op
    match op:
        case Read() | Index() | IndexPut():
            return replace(op, type=_one(op.type))
        case Call():
            return replace(op, types=tuple(map(_one, op.types)))
        case _:
            return op


def _one(type_: TensorType) -> TensorType:
    return TensorType(type_.dtype, tuple(1 if dim == P else dim for dim in type_.shape))
