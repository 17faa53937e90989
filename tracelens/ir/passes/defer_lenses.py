"""Takes the lenses out of a generation step, so that those of several steps go through the unembedding together.

A lens multiplies the states of a position with the whole unembedding, which is read once for each product: a step has
one position, and a product for each step is several times slower than one for many. What is done to each position
alone, and leads to nothing but what is saved position after position, need not be done in its step. Its operands are
kept there, in a constant that has their positions behind one another, and a graph without sites goes from that to the
saves, for any number of positions at once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from tracelens.ir import dims
from tracelens.ir.dims import BATCH, POSITION, Sym
from tracelens.ir.graph import Graph
from tracelens.ir.ops import (
    Arg,
    Call,
    Const,
    Hold,
    Index,
    IndexItem,
    IndexPut,
    Op,
    Param,
    Ref,
    Save,
    Slice,
    operands,
    results,
)
from tracelens.ir.passes.drop_dead import drop_dead
from tracelens.ir.passes.rebuild import rebuild
from tracelens.ir.passes.share_values import share_values
from tracelens.ir.rules_lens import LENSES
from tracelens.ir.types import TensorType

_ONE = {"B": 1, "P": 1, "S": 1}


@dataclass(frozen=True)
class Kept:
    """Values of one type that are kept of each step: members of the constant ``index``, [members, *shape]."""

    index: int
    values: tuple[int, ...]
    type: TensorType

    @property
    def whole(self) -> TensorType:
        """The type of the constant."""
        return TensorType(self.type.dtype, (len(self.values), *self.type.shape))

    @property
    def axis(self) -> int:
        """The axis of a member along which positions go on."""
        return self.type.position_axes[0]


@dataclass(frozen=True)
class Deferred:
    """A step's graph in two parts: what is left of it, and what is done to the positions of several steps."""

    rest: Graph
    kept: tuple[Kept, ...]
    tail: Graph

    def step(self, places: Mapping[int, Collection[int]]) -> Graph:
        """What is left to do in a step. ``places``: where the tail needs what is kept, by the constant's number."""
        holds: dict[int, list[Op]] = {}
        for one in self.kept:
            for part, value in enumerate(one.values):
                holds[value] = [Hold(value, one.index, there, part) for there in sorted(places[one.index])]
        ops: list[tuple[int, Op]] = []
        for number, op in enumerate(self.rest.ops):
            ops.append((number, op))
            ops += [(number, hold) for value, _ in results(op) for hold in holds.get(value, ())]
        return rebuild(self.rest, ops)


def defer_lenses(graph: Graph, first: int, *, spread: bool) -> Deferred | None:
    """The graph of one step in two parts; ``None`` where no lens can wait.

    ``first``: from which number on constants are free. ``spread``: does the model lie on several places? Then what is
    computed with more than a vector of the model's or the user's stays where it is.
    """
    if not any(isinstance(op, Call) and op.function in LENSES for op in graph.ops):
        return None
    if any(pin.symbol != BATCH for pin in graph.pins):
        return None  # right for some number of positions alone
    graph = drop_dead(share_values(graph), keep_writes=True)
    splitting = _Splitting(graph, spread=spread)
    inside = splitting.inside()
    return splitting.split(inside, first) if inside else None


class _Splitting:
    def __init__(self, graph: Graph, *, spread: bool) -> None:
        self.graph = graph
        self.spread = spread
        self.constant: set[int] = set()
        """Values that are the same in all steps."""
        for op in graph.ops:
            pure = isinstance(op, Const | Param) or (
                isinstance(op, Call | Index | IndexPut)
                and all(value in self.constant for value in operands(op))
            )
            if pure:
                self.constant.update(value for value, _ in results(op))
        self.apart = [self._is_apart(op) for op in graph.ops]

    def _is_apart(self, op: Op) -> bool:
        """Is an operation done to each position alone, whatever others there are?

        Steps that are no prompt's do nothing that mixes positions (:mod:`tracelens.ir.step_flow`), but one position
        may have lost its axis, or be used by its number.
        """
        match op:
            case Call():
                plain = not any(map(_counts_positions, (*op.args, *(arg for _, arg in op.kwargs))))
            case Index() | IndexPut():
                plain = all(isinstance(item, int | Slice | Ref | None) for item in op.index)
            case Save():
                plain = True
            case _:
                return False
        types = [type_ for _, type_ in results(op)]
        types += [self.graph.types[value] for value in operands(op) if value not in self.constant]
        return plain and bool(types) and all(map(_has_positions, types))

    # --- what waits ----------------------------------------------------------------------------------------------

    def inside(self) -> frozenset[int]:
        """The numbers of the operations that can wait: lenses, what depends on them, and what is made for them."""
        graph = self.graph
        waits = [False] * len(graph.ops)
        for number in reversed(range(len(graph.ops))):
            waits[number] = self.apart[number] and all(map(waits.__getitem__, self._users(number)))
        behind: set[int] = set()
        for number, op in enumerate(graph.ops):
            lens = isinstance(op, Call) and op.function in LENSES
            if waits[number] and (lens or any(graph.producer[value] in behind for value in operands(op))):
                behind.add(number)
        if not behind:
            return frozenset()
        before = set(behind)
        for number in reversed(range(len(graph.ops))):
            users = self._users(number)
            if self._can_come_along(number) and users and before.issuperset(users):
                before.add(number)
        # What is made for a lens may be made of more than it is itself.
        larger = self._bytes(before) > self._bytes(behind)
        return frozenset(behind if larger else before)

    def _users(self, number: int) -> set[int]:
        return {user for value, _ in results(self.graph.ops[number]) for user in self.graph.uses[value]}

    def _can_come_along(self, number: int) -> bool:
        op = self.graph.ops[number]
        if not self.apart[number] or isinstance(op, Save):
            return False
        fixed = [self.graph.types[value] for value in operands(op) if value in self.constant]
        if len(fixed) == len(operands(op)):
            return False
        return not self.spread or all(type_.ndim <= 1 for type_ in fixed)

    def _kept(self, inside: Collection[int]) -> dict[int, None]:
        """The values that have to be kept of a step, in order."""
        graph = self.graph
        used = (value for number in sorted(inside) for value in operands(graph.ops[number]))
        return dict.fromkeys(
            value for value in used if value not in self.constant and graph.producer[value] not in inside
        )

    def _bytes(self, inside: Collection[int]) -> int:
        return sum(self.graph.types[value].nbytes(_ONE) for value in self._kept(inside))

    # --- the two parts -------------------------------------------------------------------------------------------

    def split(self, inside: frozenset[int], first: int) -> Deferred:
        graph = self.graph
        alike: dict[TensorType, list[int]] = {}
        for value in self._kept(inside):
            alike.setdefault(graph.types[value], []).append(value)
        kept = tuple(
            Kept(first + number, tuple(sorted(values)), type_)
            for number, (type_, values) in enumerate(alike.items())
        )
        rest = rebuild(graph, ((number, op) for number, op in enumerate(graph.ops) if number not in inside))
        return Deferred(rest, kept, rebuild(graph, self._tail(inside, kept)))

    def _tail(self, inside: frozenset[int], kept: tuple[Kept, ...]) -> Iterator[tuple[int, Op]]:
        graph = self.graph
        for number, one in enumerate(kept):
            whole = graph.next_value + number
            yield graph.producer[one.values[0]], Const(whole, one.whole, one.index)
            for part, value in enumerate(one.values):
                yield graph.producer[value], Index(value, one.type, whole, (part,))
        for number, op in enumerate(graph.ops):
            made = [value for value, _ in results(op)]
            if number in inside or (made and self.constant.issuperset(made)):
                yield number, op


def _has_positions(type_: TensorType) -> bool:
    """Does a type have one axis of positions, and depend on nothing else of a step?"""
    return (
        len(type_.position_axes) == 1
        and type_.symbols <= {BATCH, POSITION}
        and sum(POSITION in dims.symbols(dim) for dim in type_.shape) == 1
    )


def _counts_positions(arg: Arg | IndexItem) -> bool:
    if isinstance(arg, tuple):
        return any(map(_counts_positions, arg))
    return isinstance(arg, Sym) and POSITION in dims.symbols(arg)
