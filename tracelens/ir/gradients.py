"""What a loss is made of, as far as derivatives go: which sites it can have a gradient with respect to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tracelens.ir.graph import Graph
from tracelens.ir.module_sites import ModuleSite
from tracelens.ir.ops import (
    Apply,
    Call,
    Grad,
    Index,
    IndexPut,
    Op,
    Read,
    Redistribute,
    Ref,
    Transfer,
    Write,
    operands,
    results,
)
from tracelens.ir.sites import Effect, Site
from tracelens.ir.types import TensorType

LEAF = "tracelens.leaf"
"""What the plan makes of a read that a gradient is taken with respect to."""

_CUTS = frozenset(
    {"torch.detach", "torch.zeros_like", "torch.ones_like", "torch.full_like"}
    | {f"torch.Tensor.{name}" for name in ("new_zeros", "new_ones", "new_full")}
)
"""Functions of what a tensor is, and not of the numbers in it, and the one that is there to cut."""


@dataclass(frozen=True, slots=True)
class Sources:
    """The values that a loss is made of, back to the sites that the model itself computes."""

    values: frozenset[int]
    reads: tuple[Read, ...]
    gradient: bool
    """Is one of the values itself a gradient?"""

    def may_use(self, value: int, read: Read) -> bool:
        """Can the loss change with the site's version ``read``, whose value is ``value``?

        What is written to a site decides about its later versions; through the model, a site can change all later ones.
        ``True`` is no promise: a later write may cut the model's own path.
        """
        return value in self.values or any(
            (other.site == read.site and other.version == read.version)
            or (other.version == 0 and leads_to(read.site, other.site))
            for other in self.reads
        )


def carries_derivatives(op: Op) -> bool:
    """Is ``op`` a computation through which derivatives go from its results to its operands?"""
    return isinstance(op, Call | Apply | Index | IndexPut | Transfer | Redistribute) and not (
        isinstance(op, Call) and op.function in _CUTS
    )


def leads_to(site: Site, later: Site) -> bool:
    """Can the model's own computation lead from one site to the other?"""
    if isinstance(site, ModuleSite) or isinstance(later, ModuleSite):
        return (
            site.sequence < later.sequence
        )  # where it lies among sites of one level is for the run to find out
    return site.precedes(later)


def sources(ops: Sequence[Op], loss: int) -> Sources:
    """What ``loss`` is made of: floating values, through everything that has a derivative."""
    makers: dict[int, Op] = {}
    types: dict[int, TensorType] = {}
    writes: dict[tuple[Site, int], Write] = {}
    for op in ops:
        for value, type_ in results(op):
            makers[value], types[value] = op, type_
        if isinstance(op, Write):
            writes[op.site, op.version] = op
    seen: set[int] = set()
    reads: list[Read] = []
    gradient = False
    waiting = [loss]
    while waiting:
        value = waiting.pop()
        if value in seen or not types[value].dtype.is_floating:
            continue
        seen.add(value)
        op = makers[value]
        if isinstance(op, Grad):
            gradient = True
        elif isinstance(op, Read):
            reads.append(op)
            written = writes.get((op.site, op.version))
            if written is not None and isinstance(written.value, Ref):
                waiting.append(written.value.id)
        elif carries_derivatives(op):
            waiting += operands(op)
    return Sources(frozenset(seen), tuple(reads), gradient)


def site_read(op: Op, makers: Sequence[Op]) -> Read | None:
    """The read behind a value that a gradient can be taken with respect to; ``op`` makes it, out of ``makers``."""
    if isinstance(op, Call) and op.function == LEAF and len(op.args) == 1 and isinstance(op.args[0], Ref):
        source = op.args[0].id
        op = next(other for other in makers if any(value == source for value, _ in results(other)))
    return op if isinstance(op, Read) and op.site.kind.effect is not Effect.NONE else None


def is_computed(op: Op) -> bool:
    """Does ``op`` compute its values in the block, so that a leaf can be made of one of them?"""
    return isinstance(op, Call | Apply | Index | IndexPut)


def is_one_number(type_: TensorType) -> bool:
    """Is this the type of a loss: floating, and of one element whatever the prompt?"""
    return type_.dtype.is_floating and all(dim == 1 for dim in type_.shape)


def differentiated(graph: Graph) -> frozenset[tuple[Site, int]]:
    """The sites with the versions that gradients are taken with respect to."""
    found: set[tuple[Site, int]] = set()
    for op in graph.ops:
        if isinstance(op, Grad):
            for value in op.wrt:
                read = site_read(graph.ops[graph.producer[value]], graph.ops)
                if read is not None:
                    found.add((read.site, read.version))
    return frozenset(found)


def differentiated_values(graph: Graph) -> frozenset[int]:
    """The computed values that gradients are taken with respect to, and that are no leaves yet."""
    wanted = {value for op in graph.ops if isinstance(op, Grad) for value in op.wrt}
    makers = {value: graph.ops[graph.producer[value]] for value in wanted}
    return frozenset(
        value
        for value, op in makers.items()
        if is_computed(op) and not (isinstance(op, Call) and op.function == LEAF)
    )
