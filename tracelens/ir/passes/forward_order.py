"""Puts operations in the order in which the forward pass can do them."""

from __future__ import annotations

from tracelens.ir.graph import Graph
from tracelens.ir.ops import Op, Read, Write, moment, operands, results
from tracelens.ir.passes.rebuild import rebuild
from tracelens.ir.sites import BEFORE_ALL, Sequence


def forward_order(graph: Graph) -> Graph:
    """Sorts operations by the moment at which their last operand is there; equal moments keep their order."""
    moments = moments_of(graph)
    numbers = sorted(range(len(graph.ops)), key=lambda number: moments[number])
    return rebuild(graph, ((number, graph.ops[number]) for number in numbers))


def moments_of(graph: Graph) -> tuple[Sequence, ...]:
    """For every operation, the site at which it can be done (as the site's place in the forward pass)."""
    known: dict[int, Sequence] = {}
    moments: list[Sequence] = []
    for op in graph.ops:
        latest = max((known[value] for value in operands(op)), default=BEFORE_ALL)
        latest = max(latest, _own(op))
        moments.append(latest)
        known.update(dict.fromkeys((value for value, _ in results(op)), latest))
    return tuple(moments)


def _own(op: Op) -> Sequence:
    return moment(op).sequence if isinstance(op, Read | Write) else BEFORE_ALL
