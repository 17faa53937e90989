"""What the types of a graph's operations ought to be, and which operations mix positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tracelens.errors import TracelensError
from tracelens.ir.dims import Sizes
from tracelens.ir.graph import Graph
from tracelens.ir.infer import AbstractArg, Inferred, infer_call, infer_index, infer_index_put
from tracelens.ir.keys import Keys
from tracelens.ir.ops import Arg, Call, Index, IndexItem, IndexPut, Op, Read, Ref, Write
from tracelens.ir.padding import has_keys
from tracelens.ir.sites import Site
from tracelens.ir.types import TensorType

# Sizes for a graph that is pinned in only some of its sizes: primes that no width of a model equals.
ANY_SIZES = {"B": 1009, "P": 1013, "S": 1019}


def sizes_of(graph: Graph) -> Sizes | None:
    """Sizes under which the graph's types can be inferred: its pins, and anything for the others."""
    if not graph.pins:
        return None
    return {**ANY_SIZES, **{pin.symbol: pin.size for pin in graph.pins if pin.symbol in ANY_SIZES}}


def retype(
    op: Op, types: Mapping[int, TensorType], sizes: Sizes | None, sites: Mapping[Site, TensorType]
) -> Inferred | None:
    """What inference says of an operation; ``None`` where it has nothing to say (constants, reads, saves)."""

    def abstract(arg: Arg) -> AbstractArg:
        if isinstance(arg, Ref):
            return types[arg.id]
        if isinstance(arg, tuple):
            return tuple(abstract(part) for part in arg)
        return arg

    def index(items: tuple[IndexItem, ...]) -> tuple[Any, ...]:
        return tuple(types[item.id] if isinstance(item, Ref) else item for item in items)

    match op:
        case Call():
            args = tuple(abstract(arg) for arg in op.args)
            return infer_call(
                op.function, args, tuple((name, abstract(arg)) for name, arg in op.kwargs), sizes
            )
        case Index():
            return infer_index(types[op.base], index(op.index), sizes)
        case IndexPut():
            new = types[op.value.id] if isinstance(op.value, Ref) else op.value
            return infer_index_put(types[op.base], index(op.index), new, sizes)
        case Write() if op.site.always in sites:
            new = types[op.value.id] if isinstance(op.value, Ref) else op.value
            return infer_index_put(sites[op.site.always], (), new, sizes)
        case _:
            return None


def site_types(graph: Graph) -> dict[Site, TensorType]:
    """The types of the sites that the graph reads."""
    return {op.site.always: op.type for op in graph.ops if isinstance(op, Read)}


def mixing_operations(graph: Graph) -> list[int]:
    """The operations that rows of different lengths do not allow.

    They index, reduce or mix the position axis, or let keys that are padding count.
    """
    sizes, sites = sizes_of(graph), site_types(graph)
    found: list[int] = []
    keys = Keys() if has_keys(graph.types.values()) else None
    for number, op in enumerate(graph.ops):
        try:
            inferred = retype(op, graph.types, sizes, sites)
        except TracelensError as error:
            raise graph.blame(error, number) from None
        if (inferred is not None and inferred.mixes) or (keys is not None and keys.counts_padding(op)):
            found.append(number)
        if keys is not None:
            keys.add(op)
    return found
