"""Gives every operation of a planned graph its place, and puts in the transfers that this needs.

A site is where its layer is; a parameter is where its module is. The rest follows the data, so that what is indexed,
reduced or cast to a smaller dtype travels after that and not before:

* What is made of constants alone is made at each place that uses it, where that is cheap: constants lie at every place.
* A computation on values of one place is done there.
* On values of several places it is done where the last of them appears, so that nothing travels against the forward
  pass.
* A parameter is there before the pass, so it can be sent anywhere. It is sent to the values that it meets, or, for
  results that nothing is written from, these are sent to it: whatever takes fewer bytes (:mod:`tracelens.fetching`).

A saved stack leaves each member's place from there. Gradients arrive where the tensor is that they are gradients of,
because autograd sends them back the way that the forward pass came.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from tracelens.fetching import fetching
from tracelens.ir.functions import FUNCTIONS, Kind
from tracelens.ir.graph import Graph
from tracelens.ir.ops import (
    Call,
    Const,
    Grad,
    Hold,
    Index,
    IndexPut,
    Keep,
    Op,
    Param,
    Read,
    Save,
    Transfer,
    Write,
    operands,
    results,
)
from tracelens.ir.passes.forward_order import moments_of
from tracelens.ir.passes.rebuild import rebuild, renamed
from tracelens.ir.sites import BEFORE_ALL
from tracelens.ir.sites import Sequence as Moment
from tracelens.placement import Placement

_CHEAP = frozenset({Kind.POINTWISE, Kind.SHAPE, Kind.REDUCTION, Kind.AXIS})
_NOMINAL = {"B": 1, "P": 64, "S": 64}
"""Sizes for comparing what two values weigh before there is a prompt."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A graph with transfers, and the place of each operation.

    A save has the place of its last member; the others leave from where they are (:attr:`home`).
    """

    graph: Graph
    at: tuple[int, ...]
    home: Mapping[int, int]
    """For every value the place that holds it."""


def place(
    graph: Graph, placement: Placement, settled: Mapping[str, tuple[int, ...]] = MappingProxyType({})
) -> Placed:
    """``graph`` on the places of ``placement``; ``settled``: those from which the members of some saves leave."""
    if len(placement.places) == 1:
        return Placed(graph, (0,) * len(graph.ops), dict.fromkeys(graph.types, 0))
    return _Placing(graph, placement, settled).placed()


def homes(graph: Graph, placement: Placement) -> Mapping[int, int]:
    """The place of every value that is not made of constants alone."""
    return _Placing(graph, placement).home


class _Placing:
    def __init__(
        self,
        graph: Graph,
        placement: Placement,
        settled: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
    ) -> None:
        self.graph = graph
        self.settled = settled
        self.placement = placement
        self.moments = moments_of(graph)
        self.sizes = {**_NOMINAL, **{pin.symbol: pin.size for pin in graph.pins}}
        self.written = _leading_to_writes(graph)
        self.fetching = fetching(graph, placement, self.moments, self.written, self._weight)
        """The operations that parameters are sent to."""
        self.everywhere: set[int] = set()
        """Values made of constants alone, cheaply."""
        self.waiting: set[int] = set()
        """Values made of constants alone, at a cost: made once, where they are needed first."""
        self.parameters: set[int] = set()
        """Values made of parameters and constants alone."""
        self.home: dict[int, int] = {}
        self.at: list[int | None] = []
        for number, op in enumerate(graph.ops):
            self.at.append(self._place_of(number, op))
        # Later consumers first: what they need first decides where costly constants are made.
        for number in reversed(range(len(graph.ops))):
            if self.at[number] is None and not self._is_everywhere(graph.ops[number]):
                self._settle(number)

    # --- where ---------------------------------------------------------------------------------------------------

    def _place_of(self, number: int, op: Op) -> int | None:
        """The operation's place; ``None`` for what is made of constants alone."""
        made = [value for value, _ in results(op)]
        found: int | None
        match op:
            case Const():
                self.everywhere.add(op.out)
                return None
            case Param():
                self.parameters.add(op.out)
                found = self.placement.of_path(op.path)
            case Read() | Write():
                found = self.placement.place_of(op.site).index
            case Hold():
                return op.place
            case Grad():
                for out, value in zip(op.outs, op.wrt, strict=True):
                    self.home[out] = self.home[value]
                return self.home[op.loss]
            case Save():
                fixed = [self.home[value] for value in op.values if value in self.home]
                return fixed[-1] if fixed else 0
            case _:
                found = self._of_computation(number, op)
        if found is None:
            (self.everywhere if self._cheap(op) else self.waiting).update(made)
        else:
            self.home.update(dict.fromkeys(made, found))
        return found

    def _of_computation(self, number: int, op: Op) -> int | None:
        used = [value for value in operands(op) if value in self.home]
        if used and all(value in self.parameters for value in used):
            self.parameters.update(value for value, _ in results(op))
        there = {self.home[value] for value in used}
        if len(there) <= 1:
            return next(iter(there), None)
        weights = [value for value in used if value in self.parameters]
        written = any(value in self.written for value, _ in results(op))
        if weights and not written and number not in self.fetching:
            return self.home[max(weights, key=self._weight)]
        latest = max((self._moment(value) for value in used), default=BEFORE_ALL)
        if latest == BEFORE_ALL:
            return self.home[max(used, key=self._weight)]
        # At the place of the last: it is the one that the forward pass has come to.
        return self.home[next(value for value in used if self._moment(value) == latest)]

    def _cheap(self, op: Op) -> bool:
        if not all(value in self.everywhere for value in operands(op)):
            return False
        if isinstance(op, Index | IndexPut):
            return True
        return (
            isinstance(op, Call)
            and (known := FUNCTIONS.get(op.function)) is not None
            and known.kind in _CHEAP
        )

    def _is_everywhere(self, op: Op) -> bool:
        made = results(op)
        return bool(made) and all(value in self.everywhere for value, _ in made)

    def _settle(self, number: int) -> None:
        """A costly constant is made at the place of the first operation that needs it."""
        op = self.graph.ops[number]
        users = [user for value, _ in results(op) for user in self.graph.uses[value]]
        found = next((there for user in sorted(users) if (there := self.at[user]) is not None), 0)
        self.at[number] = found
        self.home.update(dict.fromkeys((value for value, _ in results(op)), found))

    def _moment(self, value: int) -> Moment:
        return self.moments[self.graph.producer[value]]

    def _weight(self, value: int) -> int:
        # A slice may be longer than the nominal prompt: then it is empty.
        return max(0, self.graph.types[value].nbytes(self.sizes))

    # --- the graph with transfers --------------------------------------------------------------------------------

    def placed(self) -> Placed:
        """The graph in which every operation finds its operands at its own place."""
        needed = self._needed()
        number_at: dict[tuple[int, int], int] = {}
        """The number of a value at a place."""
        new = self.graph.next_value
        kept: list[tuple[int, Op]] = []
        at: list[int] = []
        home: dict[int, int] = {}

        def number_for(value: int, there: int) -> int:
            nonlocal new
            known = number_at.get((value, there))
            if known is None:
                first = value not in home
                known = number_at[value, there] = value if first else new
                new += not first
                home[known] = there
            return known

        for number, op in enumerate(self.graph.ops):
            made = results(op)
            fixed = self.at[number]
            for there in sorted(needed[number]) if fixed is None else (fixed,):
                using = {
                    value: number_at.get((value, there), value)
                    for value in operands(op)
                    if not isinstance(op, Save | Grad)
                }
                if isinstance(op, Save):
                    using = {value: number_at[value, self._leaves_from(number, value)] for value in op.values}
                elif isinstance(op, Grad):
                    using = {value: number_at[value, self.home[value]] for value in operands(op)}
                making = {
                    value: number_for(value, self.home[value] if isinstance(op, Grad) else there)
                    for value, _ in made
                }
                kept.append((number, renamed(op, {**using, **making})))
                at.append(there)
            for value, type_ in made:
                if value in self.home:
                    source = self.home[value]
                    for target in sorted(self._targets.get(value, ())):
                        out = number_for(value, target)
                        kept.append((number, Transfer(out, type_, number_at[value, source], source, target)))
                        at.append(source)
        return Placed(rebuild(self.graph, kept), tuple(at), home)

    def _leaves_from(self, number: int, value: int) -> int:
        """The place that a member of a save leaves from."""
        op, last = self.graph.ops[number], self.at[number]
        assert isinstance(op, Save)
        assert last is not None
        if op.name in self.settled:
            return self.settled[op.name][op.values.index(value)]
        if op.stacked and op.keep is Keep.DEVICE:
            return last  # a stack that stays on a device is made on one
        return self.home.get(value, last)

    def _needed(self) -> list[set[int]]:
        """For each operation made at several places, where; and, as a side effect, where other values are sent."""
        wanted: dict[int, set[int]] = {}
        self._targets: dict[int, set[int]] = {}
        places: list[set[int]] = [set() for _ in self.graph.ops]
        for number in reversed(range(len(self.graph.ops))):
            op, fixed = self.graph.ops[number], self.at[number]
            if fixed is None:
                places[number] = set[int]().union(*(wanted.get(value, set()) for value, _ in results(op)))
            else:
                places[number] = {fixed}
            for value in operands(op):
                at = {self._leaves_from(number, value)} if isinstance(op, Save) else places[number]
                if value in self.everywhere:
                    wanted.setdefault(value, set()).update(at)
                elif not isinstance(op, Grad) and (others := at - {self.home[value]}):
                    self._targets.setdefault(value, set()).update(others)
        return places


def _leading_to_writes(graph: Graph) -> frozenset[int]:
    """The values that something written to the model is made of."""
    found: set[int] = set()
    for op in reversed(graph.ops):
        if isinstance(op, Write) or any(value in found for value, _ in results(op)):
            found.update(operands(op))
    return frozenset(found)
