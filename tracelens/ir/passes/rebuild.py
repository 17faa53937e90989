"""Makes the graph that a pass returns, keeping every operation's line and every pin in step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from tracelens.ir.graph import Graph
from tracelens.ir.ops import (
    Apply,
    Arg,
    Call,
    Const,
    Grad,
    Hold,
    Index,
    IndexItem,
    IndexPut,
    Op,
    Param,
    Read,
    Redistribute,
    Ref,
    Save,
    Transfer,
    Write,
)


def rebuild(graph: Graph, kept: Iterable[tuple[int, Op]]) -> Graph:
    """``graph`` with the operations ``kept``, each given with the number that it (or its original) had before."""
    pairs = tuple(kept)
    new_number = {old: new for new, (old, _) in reversed(tuple(enumerate(pairs)))}
    return replace(
        graph,
        ops=tuple(op for _, op in pairs),
        pins=tuple(replace(pin, op=new_number.get(pin.op, -1)) for pin in graph.pins),
        locations=tuple(graph.location(old) for old, _ in pairs) if graph.locations else (),
    )


def substitute(op: Op, values: Mapping[int, int]) -> Op:
    """``op`` using ``values[v]`` wherever it used ``v``."""
    if not values:
        return op
    match op:
        case Call():
            return replace(
                op,
                args=tuple(_argument(arg, values) for arg in op.args),
                kwargs=tuple((name, _argument(arg, values)) for name, arg in op.kwargs),
            )
        case Apply():
            return replace(op, args=tuple(_argument(arg, values) for arg in op.args))
        case Index():
            return replace(op, base=values.get(op.base, op.base), index=_items(op.index, values))
        case IndexPut():
            new = Ref(values.get(op.value.id, op.value.id)) if isinstance(op.value, Ref) else op.value
            return replace(op, base=values.get(op.base, op.base), index=_items(op.index, values), value=new)
        case Write():
            return (
                replace(op, value=Ref(values.get(op.value.id, op.value.id)))
                if isinstance(op.value, Ref)
                else op
            )
        case Save():
            return replace(op, values=tuple(values.get(value, value) for value in op.values))
        case Grad():
            wrt = tuple(values.get(value, value) for value in op.wrt)
            return replace(op, loss=values.get(op.loss, op.loss), wrt=wrt)
        case Transfer() | Redistribute() | Hold():
            return replace(op, value=values.get(op.value, op.value))
        case Const() | Param() | Read():
            return op


def renamed(op: Op, values: Mapping[int, int]) -> Op:
    """``op`` under other numbers: what it uses and what it makes."""
    op = substitute(op, values)
    match op:
        case Const() | Param() | Read() | Index() | IndexPut() | Transfer() | Redistribute():
            return replace(op, out=values.get(op.out, op.out))
        case Call() | Apply() | Grad():
            return replace(op, outs=tuple(values.get(out, out) for out in op.outs))
        case Write() | Save() | Hold():
            return op


def _argument(arg: Arg, values: Mapping[int, int]) -> Arg:
    if isinstance(arg, Ref):
        return Ref(values.get(arg.id, arg.id))
    if isinstance(arg, tuple):
        return tuple(_argument(part, values) for part in arg)
    return arg


def _items(index: tuple[IndexItem, ...], values: Mapping[int, int]) -> tuple[IndexItem, ...]:
    return tuple(Ref(values.get(item.id, item.id)) if isinstance(item, Ref) else item for item in index)
