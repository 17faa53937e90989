"""Does once to a whole tensor what is done alike to each of its members, where the results are stacked again.

The states of all layers that steps of a generation have kept lie in one tensor, and the norm that a lens needs is some
small operations for each layer. The same operations on the tensor are as many as for one layer, and make no other copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tracelens.errors import TracelensError
from tracelens.ir.functions import FUNCTIONS, Kind
from tracelens.ir.graph import Graph
from tracelens.ir.ops import Arg, Call, Grad, Index, Op, Ref, Slice, operands, results
from tracelens.ir.passes.rebuild import rebuild, substitute
from tracelens.ir.retype import retype, sizes_of
from tracelens.ir.text import op_text
from tracelens.ir.types import TensorType

_BY_SHAPE = frozenset(("torch.nn.functional.layer_norm", "torch.nn.functional.rms_norm"))
"""Functions of the last axes."""
_LAST_AXES = frozenset((*_BY_SHAPE, "torch.mean", "torch.sum"))
"""These, and functions of the axes that they are given, if these are counted from the end."""


def join_members(graph: Graph) -> Graph:
    """The graph without stacks of what is computed alike of consecutive members of one tensor."""
    if not any(map(_stacked, graph.ops)) or any(isinstance(op, Grad) for op in graph.ops):
        return graph
    joining = _Joining(graph)
    kept: list[tuple[int, Op]] = []
    gone: dict[int, int] = {}
    for number, op in enumerate(graph.ops):
        new, whole = joining.made(_stacked(op))
        if whole is None or not isinstance(op, Call):
            kept.append((number, substitute(op, gone)))
            continue
        kept += [(number, substitute(one, gone)) for one in new]
        gone[op.outs[0]] = whole
    return rebuild(graph, _needed(kept)) if gone else graph


def _needed(ops: Sequence[tuple[int, Op]]) -> list[tuple[int, Op]]:
    """The operations without those on single members that nothing waits for any more."""
    used: set[int] = set()
    found: list[tuple[int, Op]] = []
    for number, op in reversed(ops):
        if not isinstance(op, Call | Index) or any(value in used for value, _ in results(op)):
            used.update(operands(op))
            found.append((number, op))
    return found[::-1]


def _stacked(op: Op) -> tuple[int, ...]:
    """The values that an operation stacks on a new first axis."""
    if not isinstance(op, Call) or op.function != "torch.stack" or len(op.args) != 1 or op.kwargs:
        return ()
    members = op.args[0] if isinstance(op.args[0], tuple) else ()
    return tuple(member.id for member in members if isinstance(member, Ref))


class _Joining:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.types = dict(graph.types)
        self.sizes = sizes_of(graph)
        self.next = graph.next_value
        self.known: dict[tuple[int, ...], int] = {}
        """By its members, the number of a whole tensor."""
        self.new: list[Op] = []

    def made(self, members: tuple[int, ...]) -> tuple[list[Op], int | None]:
        """The value that has these as its members, and the operations that make it at once; ``None`` if none do."""
        before = dict(self.known)
        self.new = []
        found = self.whole(members) if members else None
        if found is None:
            self.known = before
        return self.new, found

    def whole(self, members: tuple[int, ...]) -> int | None:
        known = self.known.get(members)
        if known is not None:
            return known
        ops = [self.graph.ops[self.graph.producer[member]] for member in members]
        indices = [op for op in ops if isinstance(op, Index)]
        calls = [op for op in ops if isinstance(op, Call)]
        found = None
        if len(indices) == len(ops):
            found = self._of_one(indices)
        elif len(calls) == len(ops):
            found = self._alike(calls)
        if found is not None:
            self.known[members] = found
        return found

    def _of_one(self, indices: Sequence[Index]) -> int | None:
        """Of members that follow each other in one tensor: it, or a part of it."""
        first = indices[0]
        base = self.types[first.base]
        places = [op.index[0] for op in indices if op.base == first.base and len(op.index) == 1]
        start = places[0] if places else None
        consecutive = type(start) is int and places == list(range(start, start + len(indices)))
        if type(start) is not int or start < 0 or not consecutive or not isinstance(base.shape[0], int):
            return None
        if start == 0 and base.shape[0] == len(indices):
            return first.base
        type_ = TensorType(base.dtype, (len(indices), *base.shape[1:]))
        return self._add(Index(self.next, type_, first.base, (Slice(start, start + len(indices)),)), type_)

    def _alike(self, calls: Sequence[Call]) -> int | None:
        """One call for members that are each computed in the same way."""
        first = calls[0]
        if len(first.outs) != 1 or not _carries_first_axes(first):
            return None
        same = all(
            (op.function, len(op.args), op_text(replace(op, outs=(0,), types=first.types, args=())))
            == (first.function, len(first.args), op_text(replace(first, outs=(0,), args=())))
            for op in calls
        )
        if not same:
            return None
        args: list[Arg] = []
        ranks: set[int] = set()
        for each in zip(*(op.args for op in calls), strict=True):
            texts = {op_text(replace(first, outs=(0,), args=(arg,), kwargs=())) for arg in each}
            if len(texts) == 1:
                args.append(each[0])
                continue
            members = tuple(arg.id for arg in each if isinstance(arg, Ref))
            whole = self.whole(members) if len(members) == len(each) else None
            if whole is None:
                return None
            ranks.add(self.types[members[0]].ndim)
            args.append(Ref(whole))
        type_ = TensorType(first.types[0].dtype, (len(calls), *first.types[0].shape))
        op = Call((self.next,), (type_,), first.function, tuple(args), first.kwargs)
        # What all members share is broadcast to the last axes, and all else has the new one in front of the same axes.
        if len(ranks) != 1 or {one.types for one in calls} != {first.types} or not self._is(op, type_):
            return None
        return self._add(op, type_)

    def _is(self, op: Call, type_: TensorType) -> bool:
        try:
            found = retype(op, self.types, self.sizes, {})
        except TracelensError:
            return False
        return found is not None and found.types == (type_,) and not found.mixes

    def _add(self, op: Op, type_: TensorType) -> int:
        self.new.append(op)
        self.types[self.next] = type_
        self.next += 1
        return self.next - 1


def _carries_first_axes(op: Call) -> bool:
    """Does a function do the same with one more axis in front of its operands?"""
    known = FUNCTIONS.get(op.function)
    if known is not None and known.kind is Kind.POINTWISE:
        return True
    axes = (*op.args[1:2], *(arg for name, arg in op.kwargs if name == "dim"))
    counted = op.function not in _BY_SHAPE and any(not _from_the_end(axis) for axis in axes)
    return op.function in _LAST_AXES and (op.function in _BY_SHAPE or bool(axes)) and not counted


def _from_the_end(axis: Arg) -> bool:
    axes = axis if isinstance(axis, tuple) else (axis,)
    return bool(axes) and all(type(one) is int and one < 0 for one in axes)
