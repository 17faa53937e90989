"""A graph: what one trace does to a model, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

from tracelens.errors import TracelensError
from tracelens.ir.ops import Apply, Op, Read, Save, Write, operands, results
from tracelens.ir.types import TensorType
from tracelens.location import NOWHERE, Location


class Constant(Protocol):
    """What a graph needs of a captured tensor; the tensor itself is the holder's business."""

    @property
    def type(self) -> TensorType: ...

    @property
    def name(self) -> str | None: ...

    def payload(self) -> bytes:
        """The tensor's bytes, contiguous, little-endian."""
        ...


@dataclass(frozen=True, slots=True)
class Pin:
    """The graph is only right for prompts in which the size ``symbol`` is ``size``; op ``op`` made it so."""

    symbol: str
    size: int
    op: int


@dataclass(frozen=True)
class Graph:
    """An ordered tuple of operations over values that are assigned once.

    Two graphs are equal if they do the same: same operations, same pins. Where the user wrote each operation
    (``locations``, one per op) and the captured tensors (``constants``) do not take part in the comparison.
    """

    ops: tuple[Op, ...]
    pins: tuple[Pin, ...] = ()
    constants: tuple[Constant, ...] = field(default=(), compare=False, repr=False)
    functions: tuple[object, ...] = field(default=(), compare=False, repr=False)
    locations: tuple[Location, ...] = field(default=(), compare=False, repr=False)

    def location(self, op: int) -> Location:
        """Where the user wrote operation number ``op``."""
        return self.locations[op] if op < len(self.locations) else NOWHERE

    @cached_property
    def types(self) -> Mapping[int, TensorType]:
        """The type of every value."""
        return {value: type_ for op in self.ops for value, type_ in results(op)}

    @cached_property
    def producer(self) -> Mapping[int, int]:
        """For every value, the number of the operation that makes it."""
        return {value: number for number, op in enumerate(self.ops) for value, _ in results(op)}

    @cached_property
    def uses(self) -> Mapping[int, tuple[int, ...]]:
        """For every value, the numbers of the operations that use it."""
        found: dict[int, list[int]] = {value: [] for value in self.types}
        for number, op in enumerate(self.ops):
            for value in dict.fromkeys(operands(op)):
                found[value].append(number)
        return {value: tuple(numbers) for value, numbers in found.items()}

    @property
    def saves(self) -> tuple[Save, ...]:
        """The saves, in order."""
        return tuple(op for op in self.ops if isinstance(op, Save))

    @property
    def writes(self) -> tuple[Write, ...]:
        """The writes, in order."""
        return tuple(op for op in self.ops if isinstance(op, Write))

    @property
    def reads(self) -> tuple[Read, ...]:
        """The reads, in order."""
        return tuple(op for op in self.ops if isinstance(op, Read))

    @property
    def applies(self) -> tuple[Apply, ...]:
        """The uses of the user's own Python, in order."""
        return tuple(op for op in self.ops if isinstance(op, Apply))

    @property
    def next_value(self) -> int:
        """A number that no value has yet."""
        return max(self.types, default=-1) + 1

    def excerpt(self, number: int, around: int = 2) -> str:
        """A few lines of the graph around operation ``number``, with an arrow at it."""
        from tracelens.ir.text import op_text  # text is a later row of this floor

        lines: list[str] = []
        for index in range(max(0, number - around), min(len(self.ops), number + around + 1)):
            lines.append(("--> " if index == number else "    ") + op_text(self.ops[index]))
        return "\n".join(lines)

    def text(self) -> str:
        """The graph's text form, one line per operation; :func:`tracelens.parse` reads it back."""
        from tracelens.ir.text import text

        return text(self)

    def to_json(self, path: str | Path | None = None, *, trusted: bool = False) -> str:
        """The graph as JSON text; with ``path`` also written there, its constants beside it as ``.safetensors``.

        ``trusted=True`` is needed for graphs with ``tl.apply``, whose functions are written down by name.
        """
        from tracelens.ir import wire

        if path is not None:
            wire.write(self, path, trusted=trusted)
        return wire.to_json(self, trusted=trusted)

    @staticmethod
    def from_json(source: str | Path, *, constants: bytes | None = None, trusted: bool = False) -> Graph:
        """The graph in a file of :meth:`to_json`, or in its JSON text (then ``constants`` holds its tensors)."""
        from tracelens.ir import wire

        if isinstance(source, str) and source.lstrip()[:1] in ("{", "["):
            return wire.from_json(source, constants, trusted=trusted)
        return wire.read(source, trusted=trusted)

    def constants_bytes(self) -> bytes:
        """The captured tensors as a safetensors file, for :meth:`from_json` with JSON text."""
        from tracelens.ir import wire

        return wire.constants_bytes(self)

    def __repr__(self) -> str:
        # The whole is in str(graph); a container of graphs, or a debugger, shows a line for each.
        saves = ", ".join(repr(save.name) for save in self.saves)
        return f"<graph: {len(self.ops)} operations, saves {saves or 'nothing'}>"

    def __str__(self) -> str:
        return self.text()

    def _repr_html_(self) -> str:
        from tracelens.view import Code, html

        return html(Code(self.text()))

    def blame(self, error: TracelensError, number: int) -> TracelensError:
        """``error`` with the line and the surroundings of operation ``number`` filled in."""
        if error.at is None and (location := self.location(number)) is not NOWHERE:
            error.at = location
        if error.excerpt is None:
            error.excerpt = self.excerpt(number)
        return error
