"""Programs: what each place does during a forward pass, site by site."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from tracelens.ir.module_sites import ModuleSite
from tracelens.ir.ops import Grad, Op, Read, Save, Transfer, Write, moment, operands, results
from tracelens.ir.sites import BEFORE_ALL, Scope, Site
from tracelens.ir.sites import Sequence as Moment
from tracelens.ir.text import member_text, op_text
from tracelens.placement import Place, Placement
from tracelens.plan import Plan


class Side(Enum):
    """What one place does of an operation that two or more have a part in."""

    WHOLE = "all of it"
    SEND = "sends the value"
    RECEIVE = "receives the value"
    ARRIVE = "is given the gradients of its own tensors, by a backward pass that another place runs"


@dataclass(frozen=True, slots=True)
class Step:
    """One operation, its number in the planned graph, and the values that nobody needs after it.

    ``parts``: of gradients, which of the values are of this place; of a save, which one it is. ``after``: of a save,
    the number of the operation that makes this value; right after it the value is saved, so that nothing larger has to
    be held until other members of a stack are there.
    """

    op: Op
    number: int
    frees: tuple[int, ...] = ()
    side: Side = Side.WHOLE
    parts: tuple[int, ...] = ()
    after: int | None = None

    @property
    def order(self) -> tuple[int, int]:
        """Where it stands among the steps at its site, whichever places do them."""
        return (self.number, int(self.side is Side.ARRIVE)) if self.after is None else (self.after, 2)

    @property
    def uses(self) -> tuple[int, ...]:
        """The values of this place that the step needs."""
        match self.op:
            case Transfer():
                return () if self.side is Side.RECEIVE else (self.op.value,)
            case Save():
                return tuple(self.op.values[part] for part in self.parts)
            case Grad():
                here = tuple(self.op.wrt[part] for part in self.parts)
                return here if self.side is Side.ARRIVE else (self.op.loss, *here)
            case _:
                return operands(self.op)

    @property
    def makes(self) -> tuple[int, ...]:
        """The values that this place holds after the step."""
        match self.op:
            case Transfer():
                return () if self.side is Side.SEND else (self.op.out,)
            case Grad():
                return tuple(self.op.outs[part] for part in self.parts)
            case _:
                return tuple(value for value, _ in results(self.op))

    @property
    def text(self) -> str:
        frees = f"   free {', '.join(f'%{value}' for value in self.frees)}" if self.frees else ""
        return self._what + frees

    @property
    def _what(self) -> str:
        op = self.op
        if isinstance(op, Transfer):
            return (
                f"send %{op.value} -> place {op.target}"
                if self.side is Side.SEND
                else f"%{op.out} = recv <- place {op.source} (its %{op.value}) : {op.type}"
            )
        if self.side is Side.ARRIVE:
            return f"{', '.join(f'%{value}' for value in self.makes)} = gradients, by the backward pass"
        if isinstance(op, Save) and op.stacked:
            return "; ".join(member_text(op, part) for part in self.parts)
        return op_text(op)


@dataclass(frozen=True, slots=True)
class Block:
    """What is done at a site, or with ``site=None`` before the forward pass starts."""

    site: Site | None
    steps: tuple[Step, ...]

    @property
    def moment(self) -> Moment:
        """When it is done: the site's place in the forward pass."""
        return BEFORE_ALL if self.site is None else self.site.sequence

    @property
    def where(self) -> str:
        """At which site, or in place of which module."""
        if isinstance(self.site, ModuleSite) and self.stands_in:
            return f"instead of {self.site.module}"
        return f"at {self.site}"

    @property
    def stands_in(self) -> bool:
        """Is this done in place of a module, rather than beside it?"""
        return any(isinstance(step.op, Write) and step.op.instead is not None for step in self.steps)

    @property
    def writes(self) -> bool:
        return any(isinstance(step.op, Write) for step in self.steps)


@dataclass(frozen=True, slots=True)
class Program:
    """The blocks of one place, in forward order, and where the pass is left (``None``: it runs to its end)."""

    place: Place
    blocks: tuple[Block, ...]
    stop: Site | None = None

    def steps(self) -> Iterator[Step]:
        for block in self.blocks:
            yield from block.steps

    def text(self) -> str:
        """The program, one line per step."""
        lines = [f"program for {self.place} {{"]
        for block in self.blocks:
            lines.append("  before the pass:" if block.site is None else f"  {block.where}:")
            lines += [f"    {step.text}" for step in block.steps]
        if self.stop is not None:
            lines.append(f"  stop after {self.stop}")
        return "\n".join([*lines, "}"])


def lower(plan: Plan) -> tuple[Program, ...]:
    """One program per place. Each operation is done at the first site where all its operands are there."""
    return _Lowering(plan).programs()


def merged(programs: Sequence[Program]) -> tuple[Block, ...]:
    """What one process that owns all the places does at each site, in order.

    Where a value was sent it has arrived, so receiving is left out.
    """
    if len(programs) == 1:
        return programs[0].blocks
    found: dict[Site | None, list[Step]] = {}
    for program in programs:
        for block in program.blocks:
            steps = [step for step in block.steps if step.side is not Side.RECEIVE]
            found.setdefault(block.site, []).extend(steps)
    blocks = (
        Block(site, tuple(sorted(steps, key=lambda step: step.order)))
        for site, steps in found.items()
        if steps
    )
    return tuple(sorted(blocks, key=lambda block: block.moment))


def alone(program: Program, placement: Placement) -> tuple[tuple[Block, ...], tuple[Step, ...]]:
    """What a process that owns one place does at each of its sites, in order, and what when its pass is over.

    What is done for a site of another place, with what has come from there, is done before the next one of its own.
    """
    blocks: list[Block] = []
    waiting: list[Step] = []
    for block in program.blocks:
        if block.site is None:
            blocks.append(block)
        elif block.writes or placement.place_of(block.site) == program.place:
            blocks.append(Block(block.site, (*waiting, *block.steps)))
            waiting = []
        else:
            waiting += block.steps
    return tuple(blocks), tuple(waiting)


_Key = tuple[Moment, int, int]
"""When a step is done: the moment, the number of the operation that it is done for, and before (0) or after that."""


class _Lowering:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.sites: dict[Moment, Site] = {}
        for op in plan.graph.ops:
            if isinstance(op, Read | Write) and (site := moment(op)).kind.scope is not Scope.INPUT:
                self.sites[site.sequence] = site
        self.steps: dict[int, list[tuple[_Key, Step]]] = {place.index: [] for place in plan.placement.places}
        # By source and target, the transfers that were sent and not yet received, in order.
        self.underway: dict[tuple[int, int], deque[tuple[Transfer, int]]] = {}
        self.expected: dict[int, tuple[int, int]] = {}
        """For every value that is under way, from where to where it goes."""
        self.received: dict[tuple[int, int], _Key] = {}
        """By source and target, when the last of what was sent is received."""
        self.arrived: dict[int, _Key] = {}
        """By value, when it is received."""
        for number in range(len(plan.graph.ops)):
            self._add(number)

    def _add(self, number: int) -> None:
        op, there = self.plan.graph.ops[number], self.plan.at[number]
        if isinstance(op, Transfer):
            pair = self.expected[op.out] = (op.source, op.target)
            self.underway.setdefault(pair, deque()).append((op, number))
            self._step(there, number, Step(op, number, side=Side.SEND))
            return
        match op:
            case Save():
                for part, value in enumerate(op.values):
                    step = Step(op, number, parts=(part,), after=self.plan.graph.producer[value])
                    self._step(self.plan.home[value], number, step)
            case Grad():
                by_place = self._by_place(op.wrt)
                self._step(there, number, Step(op, number, parts=by_place.pop(there, ())))
                for place, parts in by_place.items():
                    self._step(place, number, Step(op, number, side=Side.ARRIVE, parts=parts))
            case _:
                self._step(there, number, Step(op, number))

    def _by_place(self, values: tuple[int, ...]) -> dict[int, tuple[int, ...]]:
        found: dict[int, tuple[int, ...]] = {}
        for part, value in enumerate(values):
            place = self.plan.home[value]
            found[place] = (*found.get(place, ()), part)
        return found

    def _step(self, place: int, number: int, step: Step) -> None:
        # A save is done as soon as its value is there, everything else when all operands are.
        moment = self.plan.done[number if step.after is None else step.after]
        when = moment if moment in self.sites else BEFORE_ALL
        key = (when, number, 1) if step.after is None else (when, step.after, 2)
        for value in step.uses:
            self._receive(place, value, (when, key[1], 0))
            key = max(key, self.arrived.get(value, key))
        self.steps[place].append((key, step))

    def _receive(self, place: int, value: int, key: _Key) -> None:
        """Receives a value that is under way, after those that were sent to this place before it."""
        pair = self.expected.get(value)
        if pair is None:
            return
        # A member of a stack may be asked for later than what was sent after it, and at an earlier site.
        key = self.received[pair] = max(key, self.received.get(pair, key))
        while value in self.expected:
            op, number = self.underway[pair].popleft()
            del self.expected[op.out]
            self.arrived[op.out] = key
            self.steps[place].append((key, Step(op, number, side=Side.RECEIVE)))

    def programs(self) -> tuple[Program, ...]:
        stop = self.plan.stop
        places = self.plan.placement.places
        return tuple(
            Program(
                place,
                self._blocks(place.index),
                stop if stop is not None and self.plan.placement.place_of(stop) == place else None,
            )
            for place in places
        )

    def _blocks(self, place: int) -> tuple[Block, ...]:
        ordered = sorted(self.steps[place], key=lambda entry: entry[0])
        last: dict[int, int] = {}
        for index, (_, step) in enumerate(ordered):
            last.update(dict.fromkeys((*step.uses, *step.makes), index))
        dying: dict[int, list[int]] = {}
        for value, index in last.items():
            dying.setdefault(index, []).append(value)
        blocks: dict[Moment, list[Step]] = {}
        for index, ((when, _, _), step) in enumerate(ordered):
            frees = tuple(sorted(dying.get(index, ())))
            freeing = Step(step.op, step.number, frees, step.side, step.parts, step.after)
            blocks.setdefault(when, []).append(freeing)
        return tuple(
            Block(None if when == BEFORE_ALL else self.sites[when], tuple(steps))
            for when, steps in blocks.items()
        )
