"""Puts sites of one level in the order in which one family of models reaches them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tracelens.ir.graph import Graph
from tracelens.ir.module_sites import ModuleSite
from tracelens.ir.ops import Op, Read, Write
from tracelens.ir.passes.forward_order import forward_order
from tracelens.ir.sites import rows_of


def as_reached(graph: Graph, reached: Sequence[str]) -> Graph:
    """The graph for a model that reaches the sites ``reached``, all of one level, in this order.

    The vocabulary has one order for all families, and a recorded graph follows it, so that it runs on any of them. What
    combines two such sites has to wait for the one that this very model comes to last, and so has the end of the pass.
    No value can be in the wrong order then: sites of one level feed each other through no operation of a graph. Sides
    of modules keep their places, which were learned from the model: none lies amid sites that are out of order.
    """
    rows = rows_of(reached)

    def placed(op: Op) -> Op:
        if not isinstance(op, Read | Write) or isinstance(op.site, ModuleSite) or op.site.name not in rows:
            return op
        return replace(op, site=replace(op.site, row=rows[op.site.name]))

    if not any(isinstance(op, Read | Write) and op.site.name in rows for op in graph.ops):
        return graph
    return forward_order(replace(graph, ops=tuple(placed(op) for op in graph.ops)))
