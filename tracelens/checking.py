"""Holds a set of programs to the rules under which they can run together, without any device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tracelens.errors import VerificationError
from tracelens.ir.ops import Read, Save, Transfer, Write
from tracelens.ir.sites import Scope
from tracelens.ir.sites import Sequence as Moment
from tracelens.placement import Placement
from tracelens.program import Program, Side


def check(programs: Sequence[Program], placement: Placement) -> None:
    """Raises :class:`~tracelens.errors.VerificationError` for programs that could not run together, or would go wrong.

    Sends match receives, one for one, in the same order between two places, and none is received before the forward
    pass comes to where it is sent. Every place uses only values that it has: made here or received, and not freed.
    Sites are read and written at their own places, in the order of the forward pass. Of what is saved in part, every
    member is saved, and once.
    """
    problems = [
        *_blocks_follow_the_pass(programs),
        *_sites_are_at_home(programs, placement),
        *_values_are_there(programs),
        *_sends_match_receives(programs),
        *_members_are_saved_once(programs),
    ]
    if problems:
        raise VerificationError("the programs do not fit together: " + "; ".join(problems))


def _blocks_follow_the_pass(programs: Sequence[Program]) -> Iterator[str]:
    for program in programs:
        moments = [block.moment for block in program.blocks]
        if moments != sorted(set(moments)):
            yield f"the blocks of {program.place} are not in the order of the forward pass"


def _sites_are_at_home(programs: Sequence[Program], placement: Placement) -> Iterator[str]:
    for program in programs:
        for step in program.steps():
            if isinstance(step.op, Read | Write) and placement.place_of(step.op.site) != program.place:
                yield f"{program.place} has a step at {step.op.site}, which is elsewhere"
        for block in program.blocks:
            for step in block.steps:
                if isinstance(step.op, Write) and block.site != (step.op.instead or step.op.site):
                    yield f"{step.op.site} is written {'before the pass' if block.site is None else block.where}"
                if (
                    isinstance(step.op, Read)
                    and step.op.site.kind.scope is not Scope.INPUT
                    and block.site != step.op.site
                ):
                    yield f"{step.op.site} is read {'before the pass' if block.site is None else block.where}"


def _values_are_there(programs: Sequence[Program]) -> Iterator[str]:
    for program in programs:
        there: set[int] = set()
        for step in program.steps():
            for value in step.uses:
                if value not in there:
                    yield f"{program.place} uses %{value}, which it does not have: {step.text}"
            for value in step.makes:
                if value in there:
                    yield f"{program.place} makes %{value} twice"
            there.update(step.makes)
            there.difference_update(step.frees)


def _members_are_saved_once(programs: Sequence[Program]) -> Iterator[str]:
    saved: dict[Save, list[int]] = {}
    for program in programs:
        for step in program.steps():
            if isinstance(step.op, Save):
                saved.setdefault(step.op, []).extend(step.parts)
    for op, parts in saved.items():
        if sorted(parts) != list(range(len(op.values))):
            yield f"of the {len(op.values)} members of {op.name!r} those numbered {sorted(parts)} are saved"


def _sends_match_receives(programs: Sequence[Program]) -> Iterator[str]:
    sent: dict[tuple[int, int], list[tuple[Transfer, Moment]]] = {}
    received: dict[tuple[int, int], list[tuple[Transfer, Moment]]] = {}
    for program in programs:
        for block in program.blocks:
            for step in block.steps:
                if not isinstance(step.op, Transfer):
                    continue
                sends = step.side is Side.SEND
                if program.place.index != (step.op.source if sends else step.op.target):
                    yield f"{program.place} does what is another's part: {step.text}"
                pair = (step.op.source, step.op.target)
                (sent if sends else received).setdefault(pair, []).append((step.op, block.moment))
    for pair in dict.fromkeys((*sent, *received)):
        between = f"from place {pair[0]} to place {pair[1]}"
        out, into = sent.get(pair, []), received.get(pair, [])
        for (one, sending), (other, receiving) in zip(out, into, strict=False):
            if one != other:
                yield f"{between} %{one.value} is sent where %{other.value} is expected"
            if sending > receiving:
                yield f"%{one.value} is received {between} before it is sent"
        if len(out) != len(into):
            yield f"{len(out)} values are sent {between} and {len(into)} received"
