"""Writes each site once where that is the same: later reads take the written value, and the last write counts."""

from __future__ import annotations

from dataclasses import replace

from tracelens.ir.gradients import differentiated
from tracelens.ir.graph import Graph
from tracelens.ir.ops import Op, Read, Ref, Write
from tracelens.ir.passes.rebuild import rebuild, substitute
from tracelens.ir.sites import Site


def fold_writes(graph: Graph) -> Graph:
    """Forwards written values to later reads of their site, then drops writes that nothing sees before the next one.

    A value is forwarded only if it has the site's own type, so that the write neither casts nor broadcasts it. Writing
    back what was just read is dropped as well. A version that a gradient is taken with respect to stays as it is: the
    written value may have other uses, which are none of the site's.
    """
    forwarded = _forward(graph)
    return _drop_unseen(forwarded)


def _forward(graph: Graph) -> Graph:
    kept_apart = differentiated(graph)
    written: dict[tuple[Site, int], int] = {}
    renamed: dict[int, int] = {}
    kept: list[tuple[int, Op]] = []
    for number, original in enumerate(graph.ops):
        op = substitute(original, renamed)
        if isinstance(op, Write) and isinstance(op.value, Ref):
            written[op.site, op.version] = op.value.id
        if isinstance(op, Read):
            value = written.get((op.site, op.version))
            if (
                value is not None
                and graph.types[value] == op.type
                and (op.site, op.version) not in kept_apart
            ):
                renamed[op.out] = value
                continue
        kept.append((number, op))
    return rebuild(graph, kept)


def _drop_unseen(graph: Graph) -> Graph:
    kept_apart = differentiated(graph)
    last: dict[Site, int] = {}
    current: dict[int, tuple[Site, int]] = {}
    for op in graph.ops:
        if isinstance(op, Write):
            last[op.site] = op.version
        if isinstance(op, Read):
            current[op.out] = (op.site, op.version)
    seen = {(op.site, op.version) for op in graph.ops if isinstance(op, Read)}
    new_version: dict[tuple[Site, int], int] = {}
    kept: list[tuple[int, Op]] = []
    for number, op in enumerate(graph.ops):
        if isinstance(op, Read):
            kept.append((number, replace(op, version=new_version.get((op.site, op.version), 0))))
        elif isinstance(op, Write):
            before = new_version.get((op.site, op.version - 1), 0)
            source = current.get(op.value.id) if isinstance(op.value, Ref) else None
            # The site's own value, from a version that is still the current one.
            unchanged = (
                source is not None
                and source[0] == op.site
                and new_version.get(source, 0) == before
                and (op.site, op.version) not in kept_apart
            )
            unseen = op.version < last[op.site] and (op.site, op.version) not in seen
            # That a module is not run can be seen otherwise than by its output: by the time that it takes.
            dropped = op.instead is None and (unchanged or unseen)
            new_version[op.site, op.version] = before if dropped else before + 1
            if not dropped:
                kept.append((number, replace(op, version=before + 1)))
        else:
            kept.append((number, op))
    return rebuild(graph, kept)
