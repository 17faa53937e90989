"""Makes a leaf of everything that a gradient is taken with respect to, and lets the model go on from it."""

from __future__ import annotations

from tracelens.ir.gradients import LEAF, differentiated, differentiated_values
from tracelens.ir.graph import Graph
from tracelens.ir.ops import Call, Op, Read, Ref, Write, results
from tracelens.ir.passes.rebuild import rebuild, substitute
from tracelens.ir.sites import Site


def mark_leaves(graph: Graph) -> Graph:
    """Every use of such a read becomes a use of its leaf, the model's own included.

    The model's is a write of the leaf to the site, which changes no number. Before a later write it is not needed: what
    the model goes on with is made of the leaf there, if of the site at all. A computed value reaches the model by
    writes alone, which are uses like all others.
    """
    wanted, computed = differentiated(graph), differentiated_values(graph)
    last: dict[Site, int] = {}
    for op in graph.writes:
        last[op.site] = op.version
    leaves: dict[tuple[Site, int], int] = {}
    renamed: dict[int, int] = {}
    kept: list[tuple[int, Op]] = []
    new = graph.next_value
    marked = {
        op.args[0].id
        for op in graph.ops
        if isinstance(op, Call) and op.function == LEAF and isinstance(op.args[0], Ref)
    }
    for number, original in enumerate(graph.ops):
        op = substitute(original, renamed)
        if not isinstance(op, Read) or (op.site, op.version) not in wanted or op.out in marked:
            kept.append((number, op))
            for value, type_ in results(original):
                if value in computed:
                    kept.append((number, Call((new,), (type_,), LEAF, (Ref(value),))))
                    renamed[value] = new
                    new += 1
            continue
        known = leaves.get((op.site, op.version))
        if known is not None:
            renamed[op.out] = known
            continue
        kept.append((number, op))
        kept.append((number, Call((new,), (op.type,), LEAF, (Ref(op.out),))))
        if op.version == last.get(op.site, 0):
            kept.append((number, Write(op.site, op.version + 1, Ref(new))))
        leaves[op.site, op.version] = renamed[op.out] = new
        new += 1
    return rebuild(graph, kept)
