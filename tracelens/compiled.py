"""A graph made ready for one model, and what is known of it before it runs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from tracelens.backends.local import LocalCode
from tracelens.backends.spread import lent_to
from tracelens.errors import TracelensError
from tracelens.ir.dims import KEY, POSITION, Sizes, symbols
from tracelens.ir.graph import Graph
from tracelens.ir.ops import Const, Index, IndexPut, Read, Ref, Save, Selector
from tracelens.ir.retype import mixing_operations
from tracelens.ir.sites import TEXT
from tracelens.ir.text import text
from tracelens.ir.types import TensorType
from tracelens.location import Location
from tracelens.memory import ExtraMemory, Lent, extra_memory, require_room
from tracelens.plan import Plan
from tracelens.program import Program
from tracelens.report import RunReport
from tracelens.results import Results, SavedTensor, describe
from tracelens.subject import PADS

OPERATION = "<operation>"
"""The file that operations of a compiled graph say they are from: recordings of one structure have other lines."""


@dataclass(frozen=True)
class OfRecorded:
    """What is known of a recorded graph that was made ready for a model."""

    recorded: Graph

    @cached_property
    def document(self) -> str:
        """What the graph does, as ranks that this process owns are told of it."""
        return document(self.recorded)

    @cached_property
    def digest(self) -> str:
        """The name of the graph among those ranks."""
        return digest(self.document)

    @cached_property
    def selectors(self) -> tuple[tuple[int, Selector], ...]:
        """The recorded operations that address tokens, with what they address."""
        return tuple(
            (number, item)
            for number, op in enumerate(self.recorded.ops)
            if isinstance(op, Index | IndexPut)
            for item in op.index
            if isinstance(item, Selector)
        )


@dataclass(frozen=True)
class Compiled(OfRecorded):
    """A graph made ready for one model: its plan, its programs, and their code. It holds no tensors."""

    plan: Plan
    programs: tuple[Program, ...]
    prepared: LocalCode | None
    """The programs as code; ``None`` where they are run by ranks that this process owns."""
    saves: tuple[Save, ...]
    spread: object
    """The key of what the model's parts ran on (:attr:`tracelens.backends.spread.Spread.key`)."""

    @property
    def code(self) -> LocalCode:
        assert self.prepared is not None, "the programs are run elsewhere"
        return self.prepared

    @cached_property
    def plan_digest(self) -> str:
        """Two plans have it in common if and only if they do the same."""
        return digest(document(self.plan.graph))

    @cached_property
    def described(self) -> tuple[SavedTensor, ...]:
        """What each save holds."""
        return tuple(describe(self.recorded, save) for save in self.recorded.saves)

    def held(self, graph: Graph, sizes: Sizes, apart: Collection[int] = ()) -> tuple[ExtraMemory, ...]:
        """The most that a run of ``graph`` for these sizes holds on each device beside the model.

        ``apart``: the numbers of constants that are counted elsewhere.
        """
        return extra_memory(self.programs, self.plan, sizes, self.lent(graph), apart)

    def lent(self, graph: Graph) -> Mapping[int, tuple[Lent, ...]]:
        """The offloaded weights that the functions of ``graph`` have for the time of a call, by function."""
        return {} if self.prepared is None else lent_to(self.prepared.keepers, graph.functions)

    def require_room(self, graph: Graph, sizes: Sizes, most: int) -> None:
        """Raises :class:`~tracelens.errors.ExtraMemoryError` for a run that would hold more than ``most`` bytes."""
        try:
            require_room(self.held(graph, sizes), self.plan.graph, most)
        except TracelensError as error:
            raise relocate(error, graph) from None

    def results(self, tensors: Mapping[str, Callable[[], Any]]) -> Results:
        """The results of a run."""
        return Results(self.described, tensors)

    @cached_property
    def inputs(self) -> frozenset[str]:
        """The sites that are no part of the model, and that the program reads: what the pass is over."""
        return frozenset(
            op.site.name for op in self.plan.graph.ops if isinstance(op, Read) and op.site.kind.scope in TEXT
        )

    @cached_property
    def used(self) -> tuple[tuple[int, int], ...]:
        """The constants that the plan kept, by their numbers and those of the places that need them."""
        home = self.plan.home
        return tuple({(op.index, home[op.out]) for op in self.plan.graph.ops if isinstance(op, Const)})

    @cached_property
    def padded(self) -> tuple[tuple[int, TensorType], ...]:
        """The recorded saves whose positions do not stay apart by row, so that padding could not be taken out."""
        types = self.recorded.types
        return tuple(
            (number, types[op.values[0]])
            for number, op in enumerate(self.recorded.ops)
            if isinstance(op, Save) and keeps_padding(types[op.values[0]])
        )

    @cached_property
    def mixing(self) -> tuple[int, ...]:
        """The recorded operations that rows of different lengths do not allow."""
        graph = self.plan.graph
        by_mask = any(pin.symbol == PADS for pin in graph.pins)
        found: list[int] = []
        for number in mixing_operations(graph):
            op = graph.ops[number]
            # An index made from a mask names rows and positions of this very prompt, whose lengths are pinned.
            if (
                by_mask
                and isinstance(op, Index | IndexPut)
                and all(isinstance(item, Ref) for item in op.index[:2])
            ):
                continue
            found.append(graph.location(number).line - 1)
        return tuple(found)


class Ran(NamedTuple):
    """What a run gave."""

    tensors: dict[str, Callable[[], Any]]
    report: RunReport
    copies: Callable[[], dict[str, list[str]]] = dict
    """Digests, by name, of what this rank saved that every rank of its place has whole."""


def keeps_padding(type_: TensorType) -> bool:
    """Does a tensor hold positions in a way from which padding cannot be taken out, prompt by prompt?"""
    carrying = [axis for axis, dim in enumerate(type_.shape) if symbols(dim) & {POSITION, KEY}]
    return bool(carrying) and (carrying != list(type_.padded_axes) or type_.batch_axis is None)


def document(graph: Graph) -> str:
    """What a graph does, without its constants and lines. Where results are written is the owner's affair."""
    return text(
        replace(graph, ops=tuple(replace(op, to=None) if isinstance(op, Save) else op for op in graph.ops))
    )


def digest(document: str) -> str:
    """Two documents have the same digest if and only if they are the same."""
    return hashlib.sha256(document.encode()).hexdigest()


def numbered(graph: Graph) -> Graph:
    """The graph with the numbers of its operations for lines: :func:`relocate` turns them into a recording's own."""
    lines = (Location(OPERATION, number + 1) for number in range(len(graph.ops)))
    return replace(graph, locations=tuple(lines))


def relocate(error: TracelensError, graph: Graph) -> TracelensError:
    """The error with the line of the recording that is running, in place of the operation's number."""
    if error.at is not None and error.at.filename == OPERATION:
        error.at = graph.location(error.at.line - 1)
    return error
