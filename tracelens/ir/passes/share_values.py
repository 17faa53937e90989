"""Computes each thing once: operations that are the same, on the same operands, become one."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

from tracelens.ir.gradients import differentiated_values
from tracelens.ir.graph import Graph
from tracelens.ir.ops import Call, Const, Grad, Index, IndexPut, Op, Param, Read, results
from tracelens.ir.passes.rebuild import rebuild, substitute
from tracelens.ir.text import op_text


def share_values(graph: Graph) -> Graph:
    """Merges equal reads, constants, parameters and pure computations. ``Apply`` is not pure and is never merged."""
    alone = differentiated_values(graph)
    renamed: dict[int, int] = {}
    first: dict[Hashable, Op] = {}
    kept: list[tuple[int, Op]] = []
    for number, original in enumerate(graph.ops):
        op = substitute(original, renamed)
        # A gradient counts the uses of one value, and not those of another one that is computed alike.
        key = None if any(value in alone for value, _ in results(original)) else _meaning(op)
        if key is not None:
            known = first.setdefault(key, op)
            if known is not op:
                renamed.update(
                    {old: new for (old, _), (new, _) in zip(results(op), results(known), strict=True)}
                )
                continue
        kept.append((number, op))
    return rebuild(graph, kept)


def _meaning(op: Op) -> Hashable:
    """What makes two operations the same; the text tells apart arguments that Python takes for equal (1 and 1.0)."""
    match op:
        case Const() | Param() | Read() | Index() | IndexPut():
            return (type(op), op_text(replace(op, out=0)))
        case Call() | Grad():
            return (type(op), op_text(replace(op, outs=tuple(0 for _ in op.outs))))
        case _:
            return None
