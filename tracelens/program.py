"""A program: what one place does during a forward pass, site by site."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tracelens.ir.module_sites import ModuleSite
from tracelens.ir.ops import Apply, Op, Read, Write, moment, operands, results
from tracelens.ir.sites import BEFORE_ALL, Scope, Site
from tracelens.ir.text import op_text
from tracelens.placement import Place
from tracelens.plan import Plan


@dataclass(frozen=True, slots=True)
class Step:
    """One operation, its number in the planned graph, and the values that nobody needs after it."""

    op: Op
    number: int
    frees: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Block:
    """What is done at a site, or with ``site=None`` before the forward pass starts."""

    site: Site | None
    steps: tuple[Step, ...]

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
            for step in block.steps:
                frees = f"   free {', '.join(f'%{value}' for value in step.frees)}" if step.frees else ""
                lines.append(f"    {op_text(step.op)}{frees}")
        if self.stop is not None:
            lines.append(f"  stop after {self.stop}")
        return "\n".join([*lines, "}"])


def lower(plan: Plan) -> tuple[Program, ...]:
    """One program per place. Each operation is done at the first site where all its operands are there."""
    graph = plan.graph
    last_use: dict[int, int] = {}
    for number, op in enumerate(graph.ops):
        for value in operands(op):
            last_use[value] = number
        for value, _ in results(op):
            last_use.setdefault(value, number)
    dying: dict[int, list[int]] = {}
    for value, number in last_use.items():
        dying.setdefault(number, []).append(value)
    steps: dict[Site | None, list[Step]] = {}
    current: Site | None = None
    sites = {
        site.sequence: site for op in graph.ops if isinstance(op, Read | Write) for site in (moment(op),)
    }
    for number, (op, known) in enumerate(zip(graph.ops, plan.moments, strict=True)):
        current = None if known == BEFORE_ALL else sites[known]
        if current is not None and current.kind.scope is Scope.INPUT:
            current = None
        steps.setdefault(current, []).append(Step(op, number, tuple(sorted(dying.get(number, ())))))
    # Only one place so far: transfers between places come with the backends that have several.
    (place,) = plan.placement.places
    blocks = tuple(Block(site, tuple(found)) for site, found in steps.items())
    # Values live in the place's own memory between sites; user code must not see them change, so that frees are safe.
    return (Program(place, blocks, plan.stop),)


def uses_python(program: Program) -> bool:
    """Does the program run Python code of the user's?"""
    return any(isinstance(step.op, Apply) for step in program.steps())
