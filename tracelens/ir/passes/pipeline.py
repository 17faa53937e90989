"""The passes that every graph goes through before it is planned, in order."""

from __future__ import annotations

from collections.abc import Callable

from tracelens.ir.graph import Graph
from tracelens.ir.passes.drop_dead import drop_dead
from tracelens.ir.passes.fold_writes import fold_writes
from tracelens.ir.passes.forward_order import forward_order
from tracelens.ir.passes.join_lenses import join_lenses
from tracelens.ir.passes.join_members import join_members
from tracelens.ir.passes.share_values import share_values
from tracelens.ir.verify import verify

Pass = Callable[[Graph], Graph]

PASSES: tuple[Pass, ...] = (share_values, fold_writes, drop_dead, join_lenses, join_members, forward_order)


def improve(graph: Graph, *, verify_each: bool = False, keep_writes: bool = False) -> Graph:
    """``graph`` after all passes. With ``verify_each`` every intermediate graph is verified (as the tests do).

    What one pass removes can give another more to do (a write that only a dropped computation looked at), so they go
    round until nothing is removed any more. ``keep_writes``: also those that nothing in the graph sees.
    """
    while True:
        size = len(graph.ops)
        for step in PASSES:
            graph = drop_dead(graph, keep_writes=keep_writes) if step is drop_dead else step(graph)
            if verify_each:
                verify(graph)
        if len(graph.ops) == size:
            return graph
