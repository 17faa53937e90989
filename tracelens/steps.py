"""What recordings of the same structure have in common, found step by step instead of worked out again.

A block records the same operations each time it runs on a model and a prompt of the same size. What an operation is,
which types it has and what it pins follows from the operations before it: so each is kept as a step from the one
before, under a key that is cheap to make from what the user wrote. A repeated block walks along known steps.
"""

from __future__ import annotations

from collections.abc import Hashable

from tracelens.ir.graph import Pin
from tracelens.ir.ops import Op
from tracelens.ir.types import TensorType
from tracelens.origins import Origin


class Step:
    """One operation after all those before it; without an operation, the start or a pinned size."""

    __slots__ = ("fields", "next", "op", "ops", "origin", "pins", "types")

    def __init__(
        self,
        op: Op | None = None,
        types: tuple[TensorType, ...] = (),
        origin: Origin | None = None,
        pins: tuple[Pin, ...] = (),
        fields: tuple[str, ...] | None = None,
    ) -> None:
        self.op = op
        self.types = types
        self.origin = origin
        self.pins = pins
        self.fields = fields
        self.next: dict[Hashable, Step] = {}
        # All operations from the start to here; made when a recording first ends here.
        self.ops: tuple[Op, ...] | None = None


class Steps:
    """The known steps of one model, from the start of each kind of recording."""

    LIMIT = 20_000
    """How many steps are kept; beyond it all are forgotten, and made again as blocks run."""

    def __init__(self) -> None:
        self._starts: dict[Hashable, Step] = {}
        self._count = 0

    def start(self, kind: Hashable) -> Step:
        """Where recordings start for which the same operations have the same types."""
        if self._count > self.LIMIT:
            self._starts, self._count = {}, 0
        return self._starts.setdefault(kind, Step())

    def add(self, before: Step, key: Hashable, step: Step) -> Step:
        """Makes ``step`` known as what ``key`` leads to."""
        self._count += 1
        return before.next.setdefault(key, step)
