"""Drops what nothing needs: unused computations, and writes that no later read can see."""

from __future__ import annotations

from tracelens.ir.graph import Graph
from tracelens.ir.ops import Apply, Hold, Read, Save, Write, operands, results
from tracelens.ir.passes.rebuild import rebuild


def drop_dead(graph: Graph, *, keep_writes: bool = False) -> Graph:
    """Keeps saves and applies, what is held for later steps, and all that they depend on.

    A write is kept if some kept read sees it: a read of the same site and a version not before it, or of any site that
    the forward pass reaches later, also where values cannot flow (sites of one level). A graph that saves nothing is
    there for its writes: all stay. So they do with ``keep_writes``, in a generation, whose text they change.
    """
    keep_writes = keep_writes or not any(isinstance(op, Save | Apply | Hold) for op in graph.ops)
    needed: set[int] = set()
    live: set[int] = set()
    changed = True
    while changed:
        changed = False
        reads = [op for number, op in enumerate(graph.ops) if number in live and isinstance(op, Read)]
        for number in reversed(range(len(graph.ops))):
            op = graph.ops[number]
            if number in live:
                continue
            if isinstance(op, Write):
                wanted = keep_writes or any(_sees(read, op) for read in reads)
            elif isinstance(op, Save | Apply | Hold):
                wanted = True
            else:
                wanted = any(value in needed for value, _ in results(op))
            if wanted:
                live.add(number)
                needed.update(operands(op))
                changed = True
    return rebuild(graph, ((number, graph.ops[number]) for number in sorted(live)))


def _sees(read: Read, write: Write) -> bool:
    if read.site == write.site:
        return read.version >= write.version
    return write.site.sequence < read.site.sequence
