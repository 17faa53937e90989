"""How much memory a run takes on each device beside the model's own forward pass, said before it starts.

The programs are walked through without running them. What counts is what the plan holds on to: values from when they
are made to when they are freed, what has arrived from other places, constants, offloaded weights that are loaded as
values, and what was saved. A site's own tensor is the model's, and counts only once the model would have let go of it.
Views count with the tensor that they are a part of. What one operation needs for a moment, within itself, is not
counted, but for the logits that a lens has in hand and the weights that accelerate loads when a module of the model is
applied; what autograd keeps is not.
Of a place that several ranks have together it is what the first of them holds, which has most.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from tracelens.errors import ExtraMemoryError, OptionError
from tracelens.ir.dims import Sizes
from tracelens.ir.functions import FUNCTIONS, Kind
from tracelens.ir.graph import Graph
from tracelens.ir.layout import WHOLE_EVERYWHERE, OwnType, Partial, Shard, local_type
from tracelens.ir.ops import (
    Apply,
    Call,
    Const,
    Grad,
    Hold,
    Index,
    Keep,
    Op,
    Param,
    PromptRow,
    PromptTokens,
    Read,
    Redistribute,
    Save,
    Slice,
    Transfer,
    operands,
)
from tracelens.ir.text import op_text
from tracelens.ir.types import TensorType, bytes_text
from tracelens.lens_memory import workspace_of
from tracelens.placement import Place
from tracelens.plan import Plan
from tracelens.program import Block, Program, Side, Step, merged

_VIEWING = int | Slice | PromptRow | PromptTokens
_VIEWS = frozenset(
    f"torch.{name}" for name in ("detach", "narrow", "select", "chunk", "split", "split_with_sizes", "unbind")
)
_WITHOUT_WEIGHTS = (
    "what the model itself makes with the weight, where it loads it anyway: model.logits, or any module's output, "
    "model.module(path).output; or a map in which the weight stays on its device: tl.load(name, device_map={...})"
)
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True, slots=True)
class Holding:
    """Something that is held at a place: the operation that made it, and its bytes."""

    number: int
    what: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Lent:
    """Offloaded weights of a module of the model that accelerate loads while :func:`tracelens.apply` calls it.

    ``bytes``: the most that are there at once.
    """

    module: str
    device: str
    bytes: int


@dataclass(frozen=True, slots=True)
class ExtraMemory:
    """What one place holds at most, and what of it weighs most at that moment."""

    place: Place
    bytes: int
    holdings: tuple[Holding, ...]


def extra_memory(
    programs: Sequence[Program],
    plan: Plan,
    sizes: Sizes,
    lent: Mapping[int, Sequence[Lent]],
    apart: Collection[int] = (),
) -> tuple[ExtraMemory, ...]:
    """The most that each place holds, for a prompt of these sizes; the programs are those of ``plan``.

    ``lent``: what is loaded for functions that the graph applies, by their numbers. ``apart``: the numbers of
    constants that are counted elsewhere.
    """
    places = plan.placement.places
    walk = _Walk(plan, sizes, lent, apart)
    for block in merged(programs):
        walk.block(block)
    walk.gathered()
    return tuple(
        ExtraMemory(
            place,
            walk.most.get(place.index, 0),
            tuple(sorted(walk.at_most.get(place.index, ()), key=lambda one: -one.bytes)),
        )
        for place in places
    )


def require_room(found: Sequence[ExtraMemory], graph: Graph, most: int) -> None:
    """Raises :class:`~tracelens.errors.ExtraMemoryError` where a place would hold more than ``most`` bytes."""
    for extra in found:
        if extra.bytes <= most:
            continue
        largest = "; ".join(f"{bytes_text(one.bytes)} for `{one.what}`" for one in extra.holdings[:3])
        raise graph.blame(
            ExtraMemoryError(
                f"the run would hold {bytes_text(extra.bytes)} on {extra.place.device} beside the model, and "
                f"max_extra_memory is {bytes_text(most)}; the most of it: {largest}",
                instead=_WITHOUT_WEIGHTS
                if isinstance(graph.ops[extra.holdings[0].number], Param | Apply)
                else "save less of it: some positions, a reduction, or a narrower dtype: "
                "value[:, -1].save(), value.norm(dim=-1).save(), value.save(dtype=torch.bfloat16)",
            ),
            extra.holdings[0].number,
        )


def bytes_of(size: int | str) -> int:
    """``"2GiB"`` as a number of bytes; :class:`~tracelens.errors.OptionError` for what is no size."""
    if type(size) is int and size >= 0:
        return size
    found = (
        re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMG]i?B|B)\s*", size) if isinstance(size, str) else None
    )
    if found is None:
        raise OptionError(
            f"max_extra_memory={size!r} is not a size",
            instead='max_extra_memory="2GiB", or a number of bytes',
        )
    return int(float(found[1]) * _UNITS[found[2]])


class _Walk:
    def __init__(
        self, plan: Plan, sizes: Sizes, lent: Mapping[int, Sequence[Lent]], apart: Collection[int]
    ) -> None:
        self.apart = apart
        self.graph = plan.graph
        self.places = plan.placement.places
        self.layouts = plan.layouts
        self.devices = [place.device for place in plan.placement.places]
        self.home = plan.home
        self.brought = plan.placement.brought
        self.sizes = sizes
        self.lent = lent
        self.root: dict[int, int] = {}
        """The value whose memory a value lies in."""
        self.users: dict[int, int] = {}
        """How many values, and saves, hold on to a root."""
        self.held: dict[int, dict[int, Holding]] = {}
        """By place and root."""
        self.now: dict[int, int] = {}
        self.most: dict[int, int] = {}
        self.at_most: dict[int, tuple[Holding, ...]] = {}
        self.copies = -1
        self.stacks: set[int] = set()
        """The stacks that stay on their device and have been begun."""

    def block(self, block: Block) -> None:
        """One site: afterwards the model goes on, and lets go of the site's tensor."""
        read: list[int] = []
        for step in block.steps:
            if step.side is not Side.ARRIVE:
                self._step(step, read)
            for value in step.frees:
                self._release(self.root[value])
        for root in read:
            if self.users.get(root):
                self._hold(self.home[root], root, root)

    def _step(self, step: Step, read: list[int]) -> None:
        op = step.op
        match op:
            case Read():
                self._own(op.out)
                read.append(op.out)
            case Param():
                self._own(op.out)
                if op.path in self.brought:
                    self._hold(self.home[op.out], op.out, op.out)
            case Apply():
                for out in op.outs:
                    self._made(out)
                for one in self.lent.get(op.index, ()):
                    self._lend(one, step.number)
            case Save():
                for part in step.parts:
                    self._save(op, op.values[part], step.number)
            case Transfer() | Redistribute():
                self._made(op.out)
            case Hold() if op.part is not None:
                pass  # it goes into a tensor that is there for several steps
            case Hold():
                self.copies -= 1
                self.users[self.copies] = 1
                size = self._nbytes(op.value)
                self._add(op.place, self.copies, Holding(step.number, op_text(op), size))
            case Grad():
                for out in op.outs:
                    self._made(out)
            case Const():
                self._own(op.out)
                # On the host it is the user's own tensor.
                if self.devices[self.home[op.out]] != "cpu" and op.index not in self.apart:
                    self._hold(self.home[op.out], op.out, op.out)
            case _:
                if isinstance(op, Call) and (size := workspace_of(op, self._local, self.sizes)):
                    self._meanwhile(self.home[op.outs[0]], Holding(step.number, op_text(op), size))
                for out in op.outs if isinstance(op, Call) else list(step.makes):
                    base = _viewed(op)
                    if base is None:
                        self._made(out)
                    else:
                        self.root[out] = self.root[base]
                        self.users[self.root[out]] += 1

    def _own(self, value: int) -> None:
        self.root[value] = value
        self.users[value] = 1

    def _made(self, value: int) -> None:
        self._own(value)
        self._hold(self.home[value], value, value)

    def _save(self, op: Save, value: int, number: int) -> None:
        root = self.root[value]
        type_ = self.graph.types[value]
        if op.stacked and op.keep is Keep.DEVICE:
            # It is there as a whole from the first member on, and members are copied into it.
            if number not in self.stacks:
                self.stacks.add(number)
                self._copied(op, value, number, len(op.values))
            return
        if (
            root == value
            and op.dtype in (None, type_.dtype)
            and not (op.keep is Keep.DEVICE and self._lasts(root))
        ):
            self.users[root] += 1
            return
        # A part of something larger, in another dtype, or not ours to give away: a tensor of its own.
        self._copied(op, value, number)

    def _copied(self, op: Save, value: int, number: int, members: int = 1) -> None:
        type_ = self.graph.types[value]
        size = members * self._nbytes(value)
        if op.dtype is not None:
            size = size // type_.dtype.itemsize * op.dtype.itemsize
        self.copies -= 1
        self.users[self.copies] = 1
        self._add(self.home[value], self.copies, Holding(number, op_text(op), size))

    def _lasts(self, root: int) -> bool:
        """Is it the model's or the user's, or the cache's, beyond the run?"""
        made = self.graph.ops[self.graph.producer[root]]
        return isinstance(made, Const) or (isinstance(made, Param) and made.path not in self.brought)

    def _lend(self, lent: Lent, number: int) -> None:
        """Weights that are there for the time of a call, and beside them what it returns."""
        place = self.devices.index(lent.device)
        self._meanwhile(place, Holding(number, f"the weights of {lent.module}", lent.bytes))

    def _meanwhile(self, place: int, holding: Holding) -> None:
        """What is there for the time of a call alone."""
        self.copies -= 1
        self._add(place, self.copies, holding)
        del self.held[place][self.copies]
        self.now[place] -= holding.bytes

    def _hold(self, place: int, root: int, value: int) -> None:
        number = self.graph.producer[value]
        size = self._nbytes(value)
        self._add(place, root, Holding(number, op_text(self.graph.ops[number]), size))

    def _nbytes(self, value: int) -> int:
        return self._local(value).nbytes(self.sizes)

    def _local(self, value: int) -> TensorType | OwnType:
        """What one rank holds of a value: of those in parts its own, the longest one."""
        layout = self.layouts.get(value, WHOLE_EVERYWHERE)
        ranks = self.places[self.home[value]].ranks
        return local_type(self.graph.types[value], layout, ranks)

    def gathered(self) -> None:
        """When the pass is over: beside its own parts of what was saved, the first rank has the whole of it."""
        for save in self.graph.saves:
            for value in save.values:
                if isinstance(self.layouts.get(value), Shard | Partial):
                    size = self.graph.types[value].nbytes(self.sizes)
                    if save.dtype is not None:
                        size = size // self.graph.types[value].dtype.itemsize * save.dtype.itemsize
                    self.copies -= 1
                    holding = Holding(self.graph.ops.index(save), op_text(save), size)
                    self._add(self.home[value], self.copies, holding)

    def _add(self, place: int, root: int, holding: Holding) -> None:
        held = self.held.setdefault(place, {})
        if root in held:
            return
        held[root] = holding
        self.now[place] = self.now.get(place, 0) + holding.bytes
        if self.now[place] > self.most.get(place, 0):
            self.most[place] = self.now[place]
            self.at_most[place] = tuple(held.values())

    def _release(self, root: int) -> None:
        self.users[root] -= 1
        if self.users[root]:
            return
        if isinstance(self.graph.ops[self.graph.producer[root]], Const):
            return  # it stays where it was put, for the next run
        holding = self.held.get(self.home[root], {}).pop(root, None)
        if holding is not None:
            self.now[self.home[root]] -= holding.bytes


def _viewed(op: Op) -> int | None:
    """The operand in whose memory the result lies, if it makes no memory of its own."""
    if isinstance(op, Index):
        return op.base if all(item is None or isinstance(item, _VIEWING) for item in op.index) else None
    if not isinstance(op, Call):
        return None
    known = FUNCTIONS.get(op.function)
    viewing = op.function in _VIEWS or (known is not None and known.kind is Kind.SHAPE)
    used = operands(op)
    return used[0] if viewing and used else None
