"""Reads the unembedding once for all lenses of a pass, instead of once for each.

What is asked of one state is asked in one call; states of one type that are asked the same are stacked and go through
the head together. A product with many rows reads the matrix once, where a product for each layer would read it as
often: in a generation, where a step has one row, that is most of the time.

The joined call is done when the last of its states is there. So a lens that a write waits for is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from tracelens.ir.graph import Graph
from tracelens.ir.ops import Arg, Call, Grad, Hold, Index, Op, Ref, Save, operands, results
from tracelens.ir.passes.rebuild import rebuild
from tracelens.ir.rules_lens import DISTANCE, LENS, LENSES, OF_TARGETS
from tracelens.ir.text import op_text
from tracelens.ir.types import TensorType

Numbered = tuple[int, Op]
Types = Mapping[int, TensorType]


def join_lenses(graph: Graph) -> Graph:
    """The graph with lenses on the same head joined, as far as nothing waits for one of them."""
    if sum(map(_is_lens, graph.ops)) < 2 or any(isinstance(op, Grad) for op in graph.ops):
        return graph
    joining = _Joining(graph)
    joining.join(_of_one_state, joining.asked_together)
    joining.join(_of_one_kind, joining.stacked)
    return rebuild(graph, joining.ops) if joining.changed else graph


@dataclass(frozen=True)
class _Lens:
    """One call, taken apart."""

    number: int
    op: Call
    level: int
    """How many lenses it depends on, one after the other."""

    @property
    def state(self) -> Ref:
        state = self.op.args[0]
        assert isinstance(state, Ref)
        return state

    @property
    def targets(self) -> tuple[Arg, ...]:
        targets = self.op.args[4]
        assert isinstance(targets, tuple)
        return targets

    @property
    def of_rows(self) -> dict[int, Ref]:
        """The arguments that have a row for each of the state's, by their number."""
        numbers = (0, 4) if self.op.function == DISTANCE else (0,)
        return {number: arg for number in numbers if isinstance(arg := self.op.args[number], Ref)}

    @property
    def asks(self) -> tuple[tuple[Arg, ...], ...]:
        asks = self.op.args[5]
        assert isinstance(asks, tuple)
        return tuple(ask for ask in asks if isinstance(ask, tuple))


def _is_lens(op: Op) -> bool:
    return isinstance(op, Call) and op.function in LENSES and isinstance(op.args[0], Ref)


def _text(*args: Arg) -> str:
    """What tells arguments apart, also those that Python takes for equal."""
    return op_text(Call((0,), (), LENS, args))


def _head(lens: _Lens) -> str:
    return f"{lens.op.function} {_text(*lens.op.args[1:3])} {lens.op.kwargs!r} {lens.level}"


def _of_one_state(lens: _Lens, types: Types) -> str:
    # A distance is asked for alone.
    own = lens.op.outs if lens.op.function == DISTANCE else ()
    return f"{_head(lens)} {lens.state} {own}"


def _of_one_kind(lens: _Lens, types: Types) -> str:
    rest = [arg for number, arg in enumerate(lens.op.args) if number not in lens.of_rows]
    return f"{_head(lens)} {types[lens.state.id]} {_text(*rest)}"


class _Joining:
    def __init__(self, graph: Graph) -> None:
        self.ops: list[Numbered] = list(enumerate(graph.ops))
        self.types = dict(graph.types)
        self.next = graph.next_value
        self.changed = False

    def new(self) -> int:
        self.next += 1
        return self.next - 1

    def join(self, key: Callable[[_Lens, Types], str], merge: Callable[[Sequence[_Lens]], None]) -> None:
        """Replaces each group of lenses that have a key in common by what ``merge`` makes of it."""
        groups: dict[str, list[_Lens]] = {}
        for lens in self._free():
            groups.setdefault(key(lens, self.types), []).append(lens)
        for group in groups.values():
            if len(group) > 1:
                merge(group)
        if self.changed:
            self.ops = _in_order(self.ops)

    def _free(self) -> list[_Lens]:
        """The lenses that nothing but what is saved waits for."""
        waited: set[int] = set()
        for _, op in reversed(self.ops):
            ends = not isinstance(op, Save | Hold | Call | Index) and bool(operands(op))
            if ends or any(value in waited for value, _ in results(op)):
                waited.update(operands(op))
        levels: dict[int, int] = {}
        found: list[_Lens] = []
        for number, op in self.ops:
            level = max((levels[value] for value in operands(op)), default=0)
            made = [value for value, _ in results(op)]
            if isinstance(op, Call) and _is_lens(op):
                if not any(value in waited for value in made):
                    found.append(_Lens(number, op, level))
                level += 1
            levels.update(dict.fromkeys(made, level))
        return found

    def _replace(self, group: Sequence[_Lens], new: Sequence[Op]) -> None:
        gone = {id(lens.op) for lens in group}
        last = max(at for at, (_, op) in enumerate(self.ops) if id(op) in gone)
        number = self.ops[last][0]
        before = [pair for pair in self.ops[: last + 1] if id(pair[1]) not in gone]
        self.ops = [*before, *((number, op) for op in new), *self.ops[last + 1 :]]
        for op in new:
            self.types.update(dict(results(op)))
        self.changed = True

    def asked_together(self, group: Sequence[_Lens]) -> None:
        """One call for all that is asked of one state."""
        references = {
            _text(lens.op.args[3]): lens.op.args[3] for lens in group if lens.op.args[3] is not None
        }
        if len(references) > 1:
            for text in references:
                some = [lens for lens in group if lens.op.args[3] is None or _text(lens.op.args[3]) == text]
                if len(some) > 1:
                    self.asked_together(some)
                    return  # the others compare with something else
            return
        targets: list[Arg] = []
        asks: list[Arg] = []
        outs: list[int] = []
        types: list[TensorType] = []
        for lens in group:
            for ask in lens.asks:
                if ask[0] in OF_TARGETS:
                    assert isinstance(ask[1], int)
                    target = lens.targets[ask[1]]
                    known = next((n for n, one in enumerate(targets) if _text(one) == _text(target)), None)
                    if known is None:
                        known = len(targets)
                        targets.append(target)
                    ask = (ask[0], known)
                asks.append(ask)
            outs += lens.op.outs
            types += lens.op.types
        first = group[0].op
        reference = next(iter(references.values()), None)
        args = (*first.args[:3], reference, tuple(targets), tuple(asks))
        self._replace(group, [replace(first, outs=tuple(outs), types=tuple(types), args=args)])

    def stacked(self, group: Sequence[_Lens]) -> None:
        """One call for states of one type, of which the same is asked."""
        first, count = group[0].op, len(group)
        outs = tuple(self.new() for _ in first.outs)
        types = tuple(TensorType(type_.dtype, (count, *type_.shape)) for type_ in first.types)
        new: list[Op] = []
        args = list(first.args)
        for number, one in group[0].of_rows.items():
            stack, whole = self.new(), self.types[one.id]
            type_ = TensorType(whole.dtype, (count, *whole.shape))
            members = tuple(lens.of_rows[number] for lens in group)
            new.append(Call((stack,), (type_,), "torch.stack", (members,)))
            args[number] = Ref(stack)
        new.append(replace(first, outs=outs, types=types, args=tuple(args)))
        for row, lens in enumerate(group):
            new += [
                Index(out, type_, base, (row,))
                for out, type_, base in zip(lens.op.outs, lens.op.types, outs, strict=True)
            ]
        self._replace(group, new)


def _in_order(ops: Sequence[Numbered]) -> list[Numbered]:
    """The operations, those that use a joined call put behind it."""
    made: set[int] = set()
    found: list[Numbered] = []
    every = {value for _, op in ops for value, _ in results(op)}
    waiting: list[Numbered] = []
    for pair in ops:
        waiting.append(pair)
        while True:
            ready = next((one for one in waiting if _is_ready(one[1], made, every)), None)
            if ready is None:
                break
            waiting.remove(ready)
            found.append(ready)
            made.update(value for value, _ in results(ready[1]))
    assert not waiting
    return found


def _is_ready(op: Op, made: set[int], every: set[int]) -> bool:
    return all(value in made or value not in every for value in operands(op))
