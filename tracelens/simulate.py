"""Runs a set of programs without any device: each place with values of its own, one step at a time.

What a program does here is what it does on its device, but that nothing is fast: steps are computed as the reference
computes them, and a place that waits for a value does so until another has sent it. If nobody ever does, the programs
are refused, where real ones would hang.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tracelens.errors import UnusedGradientError, VerificationError
from tracelens.ir.graph import Graph
from tracelens.ir.infer import torch_dtype
from tracelens.ir.ops import Grad, Save, TokenSelector, Transfer, Write
from tracelens.ir.sites import Site
from tracelens.placement import Placement
from tracelens.program import Program, Side, Step
from tracelens.reference import Evaluator, Forward, Selected


def simulate(
    programs: Sequence[Program],
    graph: Graph,
    placement: Placement,
    forward: Forward,
    *,
    constants: Sequence[Tensor] = (),
    parameters: Callable[[str], Tensor] | None = None,
    select: Callable[[TokenSelector], Selected] | None = None,
    functions: Sequence[Callable[..., Any]] = (),
    sizes: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """The saved tensors by name, as :func:`tracelens.reference.evaluate` gives them for the recorded graph.

    ``graph`` is the planned one that the programs were made from. Raises
    :class:`~tracelens.errors.VerificationError` for programs that wait for ever, use what they do not have, or leave a
    value that was sent and never received.
    """
    evaluators = [Evaluator(graph, constants, parameters, select, functions) for _ in programs]
    simulation = _Simulation(programs, placement, evaluators)
    for evaluator in evaluators:
        # What the model and the prompt are is the same for all; what has been computed is not.
        evaluator.sizes, evaluator.versions = evaluators[0].sizes, evaluators[0].versions
    evaluators[0].sizes.update(sizes or {})
    with torch.set_grad_enabled(any(isinstance(op, Grad) for op in graph.ops)):
        forward(simulation.intercept)
        return simulation.end()


@dataclass(frozen=True, slots=True)
class _Waiting:
    """What a place waits for, and inside of which block."""

    inside: Site | None
    what: str


class _Simulation:
    def __init__(
        self, programs: Sequence[Program], placement: Placement, evaluators: Sequence[Evaluator]
    ) -> None:
        self.programs = programs
        self.placement = placement
        self.evaluators = evaluators
        self.site: Site | None = None
        self.tensor: Tensor | None = None
        self.underway: dict[int, Tensor] = {}
        self.members: dict[int, dict[int, Tensor]] = {}
        self.saves: dict[int, Save] = {}
        self.done = 0
        self.stopped = False
        self.running = [self._run(program) for program in programs]
        self.waits: dict[int, _Waiting] = {}

    # --- the forward pass ----------------------------------------------------------------------------------------

    def intercept(self, site: Site, tensor: Tensor) -> Tensor:
        """The forward pass has come to a site; gives the tensor that it goes on with."""
        evaluator = self.evaluators[self.placement.place_of(site).index]
        evaluator.reached(site, tensor)
        evaluator.versions[site, 0] = tensor
        self.site, self.tensor = site, tensor
        self._advance()
        waiting = self.waits.get(self.placement.place_of(site).index)
        if waiting is not None and waiting.inside == site:
            raise VerificationError(f"the forward pass stands still at {site}: {waiting.what}")
        return self.tensor

    def end(self) -> dict[str, Tensor]:
        """What was saved, once the pass is over."""
        self.site = None
        self._advance()
        if self.waits:
            raise VerificationError(
                f"the programs wait for ever: {'; '.join(waiting.what for waiting in self.waits.values())}"
            )
        if self.underway:
            raise VerificationError(f"%{next(iter(self.underway))} was sent and never received")
        found: dict[str, Tensor] = {}
        for number in sorted(self.saves):
            save, members = self.saves[number], self.members[number]
            parts = [members[part] for part in range(len(save.values))]
            tensor = torch.stack(parts) if save.stacked else parts[0]
            found[save.name] = (tensor.to(torch_dtype(save.dtype)) if save.dtype else tensor).detach()
        return found

    # --- the places ----------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Lets every place go as far as it can."""
        before = -1
        while before != self.done:
            before = self.done
            for index, running in enumerate(self.running):
                waiting = next(running, None)
                if waiting is None:
                    self.waits.pop(index, None)
                else:
                    self.waits[index] = waiting

    def _run(self, program: Program) -> Iterator[_Waiting]:
        """One place's program; gives what it waits for, whenever it has to."""
        index = program.place.index
        for block in program.blocks:
            own = block.site is not None and (
                any(isinstance(step.op, Write) for step in block.steps)
                or self.placement.place_of(block.site).index == index
            )
            while own and self.site != block.site:
                yield _Waiting(None, f"{program.place} waits for the pass to reach {block.site}")
            for step in block.steps:
                while (missing := self._missing(step)) is not None:
                    yield _Waiting(block.site, f"{program.place} waits for {missing}")
                self._do(index, step)
                self.done += 1

    def _missing(self, step: Step) -> str | None:
        if isinstance(step.op, Transfer) and step.side is Side.RECEIVE and step.op.out not in self.underway:
            return f"%{step.op.value} from place {step.op.source}"
        if step.side is Side.ARRIVE and any(value not in self.underway for value in step.makes):
            return f"the backward pass of %{step.op.loss}" if isinstance(step.op, Grad) else None
        return None

    def _do(self, index: int, step: Step) -> None:
        evaluator, op = self.evaluators[index], step.op
        for value in step.uses:
            if value not in evaluator.values:
                raise VerificationError(f"place {index} uses %{value}, which it does not have: {step.text}")
        match op:
            case Transfer():
                if step.side is Side.SEND:
                    self.underway[op.out] = evaluator.values[op.value]
                else:
                    evaluator.values[op.out] = self.underway.pop(op.out)
            case Grad():
                self._differentiate(index, step, op)
            case Save():
                self.saves[step.number] = op
                kept = self.members.setdefault(step.number, {})
                kept.update({part: evaluator.values[op.values[part]] for part in step.parts})
            case Write():
                assert self.tensor is not None
                self.tensor = evaluator.written(op, self.tensor)
                evaluator.versions[op.site, op.version] = self.tensor
            case _:
                evaluator.compute(op)
        for value in step.frees:
            del evaluator.values[value]

    def _differentiate(self, index: int, step: Step, op: Grad) -> None:
        """One backward pass, which goes through all places; each is given the gradients of its own tensors."""
        values = self.evaluators[index].values
        if step.side is Side.ARRIVE:
            values.update({value: self.underway.pop(value) for value in step.makes})
            return
        wrt = [
            next(known.values[value] for known in self.evaluators if value in known.values)
            for value in op.wrt
        ]
        loss = values[op.loss]
        found = (
            torch.autograd.grad(loss, wrt, retain_graph=True, allow_unused=True)
            if loss.requires_grad
            else [None] * len(wrt)
        )
        for out, part in zip(op.outs, found, strict=True):
            if part is None:
                raise UnusedGradientError(f"%{op.loss} does not depend on all sites by a derivative")
            (values if out in step.makes else self.underway)[out] = part
