"""Runs a set of programs without any device: each place with values of its own, one step at a time.

What a program does here is what it does on its device, but that nothing is fast: steps are computed as the reference
computes them, and a place that waits for a value does so until another has sent it. If nobody ever does, the programs
are refused, where real ones would hang.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tracelens.errors import UnusedGradientError, VerificationError
from tracelens.ir.graph import Graph
from tracelens.ir.infer import torch_dtype
from tracelens.ir.layout import WHOLE_EVERYWHERE, Joined, Layout, Partial, Replicate, Shard, owned
from tracelens.ir.ops import (
    Call,
    Grad,
    Hold,
    Index,
    IndexPut,
    Op,
    Param,
    Redistribute,
    Ref,
    Save,
    Selector,
    Transfer,
    Write,
)
from tracelens.ir.rules_lens import KNOWS_RANK
from tracelens.ir.sites import Site
from tracelens.own_part import own_picks
from tracelens.placement import Placement
from tracelens.program import Program, Side, Step
from tracelens.reference import Evaluator, Forward, Selected
from tracelens.sharding import own_part


def simulate(
    programs: Sequence[Program],
    graph: Graph,
    placement: Placement,
    forward: Forward,
    *,
    constants: Sequence[Tensor] = (),
    parameters: Callable[[str], Tensor] | None = None,
    select: Callable[[Selector], Selected] | None = None,
    functions: Sequence[Callable[..., Any]] = (),
    sizes: Mapping[str, int] | None = None,
    layouts: Mapping[int, Layout] | None = None,
) -> dict[str, Tensor]:
    """The saved tensors by name, as :func:`tracelens.reference.evaluate` gives them for the recorded graph.

    ``graph`` is the planned one that the programs were made from, and ``layouts`` are the plan's: the ranks of a place
    take every step together. Raises
    :class:`~tracelens.errors.VerificationError` for programs that wait for ever, use what they do not have, or leave a
    value that was sent and never received.
    """
    evaluators = [
        [Evaluator(graph, constants, parameters, select, functions) for _ in range(program.place.ranks)]
        for program in programs
    ]
    simulation = _Simulation(programs, placement, evaluators, layouts or {})
    known: dict[str, int] = dict(sizes or {})
    for evaluator in (one for ranks in evaluators for one in ranks):
        evaluator.sizes = known  # what the prompt is is the same for all; what has been computed is not
    with torch.set_grad_enabled(any(isinstance(op, Grad) for op in graph.ops)):
        forward(simulation.intercept)
        return simulation.end()


Parts = list[Tensor]
"""What each rank of a place has of a value."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    """What a place waits for, and inside of which block."""

    inside: Site | None
    what: str


class _Simulation:
    def __init__(
        self,
        programs: Sequence[Program],
        placement: Placement,
        evaluators: Sequence[Sequence[Evaluator]],
        layouts: Mapping[int, Layout],
    ) -> None:
        self.programs = programs
        self.placement = placement
        self.evaluators = evaluators
        """Of every place its ranks."""
        self.layouts = layouts
        self.site: Site | None = None
        self.tensor: Tensor | None = None
        self.underway: dict[int, Parts] = {}
        self.members: dict[int, dict[int, Tensor]] = {}
        self.saves: dict[int, Save] = {}
        self.done = 0
        self.stopped = False
        self.running = [self._run(program) for program in programs]
        self.waits: dict[int, _Waiting] = {}

    # --- the forward pass ----------------------------------------------------------------------------------------

    def intercept(self, site: Site, tensor: Tensor) -> Tensor:
        """The forward pass has come to a site; gives the tensor that it goes on with."""
        here = self.placement.place_of(site).index
        self.evaluators[here][0].reached(site, tensor)
        self._seen(site, 0, tensor)
        self.site, self.tensor = site, tensor
        self._advance()
        waiting = self.waits.get(here)
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

    def _seen(self, site: Site, version: int, tensor: Tensor) -> None:
        """Gives the ranks of a site's place what they have of a version of it."""
        ranks = self.evaluators[self.placement.place_of(site).index]
        for evaluator, part in zip(
            ranks, split(tensor, self.placement.layout_of(site), len(ranks)), strict=True
        ):
            evaluator.versions[site, version] = part

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
        ranks, op = self.evaluators[index], step.op
        for value in step.uses:
            if value not in ranks[0].values:
                raise VerificationError(f"place {index} uses %{value}, which it does not have: {step.text}")
        match op:
            case Transfer():
                if step.side is Side.SEND:
                    self.underway[op.out] = self._held(index, op.value)
                else:
                    self._hold(index, op.out, self.underway.pop(op.out))
            case Redistribute():
                whole = join(self._held(index, op.value), op.source)
                self._hold(index, op.out, split(whole, op.target, len(ranks)))
            case Grad():
                self._differentiate(index, step, op)
            case Save():
                self.saves[step.number] = op
                kept = self.members.setdefault(step.number, {})
                kept.update({part: self._joined(index, op.values[part]) for part in step.parts})
            case Write():
                self._write(index, op)
            case Hold():
                raise VerificationError("one forward pass is simulated, and no later generation step")
            case _:
                for rank, evaluator in enumerate(ranks):
                    self._compute(evaluator, op, rank, len(ranks))
        for value in step.frees:
            for evaluator in ranks:
                del evaluator.values[value]

    def _compute(self, evaluator: Evaluator, op: Op, rank: int, ranks: int) -> None:
        """One rank's part of an operation."""
        values = evaluator.values
        if isinstance(op, Param):
            whole = evaluator.parameters(op.path).detach()
            values[op.out] = split(whole, self.layouts.get(op.out, WHOLE_EVERYWHERE), ranks)[rank]
        elif isinstance(op, Index | IndexPut) and (
            own := own_part(op, self.layouts, evaluator.graph.types, ranks, rank)
        ):
            index = tuple(evaluator.item(item) for item in op.index)
            base = values[op.base]
            values[op.out] = (
                own.take(base, index)
                if isinstance(op, Index)
                else own.put(base, index, evaluator.plain(op.value))
            )
        elif isinstance(op, Call) and (
            picks := own_picks(op, self.layouts, evaluator.graph.types, ranks, rank)
        ):
            values[op.outs[0]] = picks(values[picks.base], values[picks.index])
        elif isinstance(op, Call) and op.function in KNOWS_RANK:
            evaluator.compute(replace(op, kwargs=(*op.kwargs, ("rank", rank))))
        else:
            evaluator.compute(op)

    def _write(self, index: int, op: Write) -> None:
        assert self.tensor is not None
        ranks = self.evaluators[index]
        layout = self.placement.layout_of(op.site)
        parts = split(self.tensor, layout, len(ranks))
        written = [evaluator.written(op, part) for evaluator, part in zip(ranks, parts, strict=True)]
        if isinstance(layout, Partial) and not isinstance(op.value, Ref):
            written = split(written[0], layout, len(ranks))  # a number is written once
        self.tensor = join(written, layout)
        self._seen(op.site, op.version, self.tensor)

    def _held(self, index: int, value: int) -> Parts:
        return [evaluator.values[value] for evaluator in self.evaluators[index]]

    def _hold(self, index: int, value: int, parts: Parts) -> None:
        for evaluator, part in zip(self.evaluators[index], parts, strict=True):
            evaluator.values[value] = part

    def _joined(self, index: int, value: int) -> Tensor:
        return join(self._held(index, value), self.layouts.get(value, WHOLE_EVERYWHERE))

    def _differentiate(self, index: int, step: Step, op: Grad) -> None:
        """One backward pass, which goes through all places; each is given the gradients of its own tensors."""
        if step.side is Side.ARRIVE:
            for value in step.makes:
                self._hold(index, value, self.underway.pop(value))
            return
        loss = self.evaluators[index][0].values[op.loss]
        for out, wrt in zip(op.outs, op.wrt, strict=True):
            there = next(place for place, ranks in enumerate(self.evaluators) if wrt in ranks[0].values)
            parts = self._held(there, wrt)
            if isinstance(self.layouts.get(wrt, WHOLE_EVERYWHERE), Replicate):
                # The pass went on with the first rank's, which is everybody's.
                found = [_derivative(op, loss, parts[0])] * len(parts)
            else:
                found = [_derivative(op, loss, part) for part in parts]
            if out in step.makes:
                self._hold(index, out, found)
            else:
                self.underway[out] = found


def _derivative(op: Grad, loss: Tensor, part: Tensor) -> Tensor:
    found = (
        torch.autograd.grad(loss, [part], retain_graph=True, allow_unused=True)[0]
        if loss.requires_grad
        else None
    )
    if found is None:
        raise UnusedGradientError(f"%{op.loss} does not depend on all sites by a derivative")
    return found


# --- parts of a tensor -----------------------------------------------------------------------------------------------


def split(whole: Tensor, layout: Layout, ranks: int) -> Parts:
    """What every rank has of a tensor."""
    match layout:
        case Shard():
            ends = [owned(whole.shape[layout.dim], ranks, rank) for rank in range(ranks)]
            return [whole.narrow(layout.dim, start, end - start) for start, end in ends]
        case Partial():
            return [whole, *[torch.zeros_like(whole) for _ in range(ranks - 1)]]
        case Replicate():
            return [whole] * ranks


_JOINED: Mapping[Joined, Callable[[Tensor], Tensor]] = {
    Joined.SUM: lambda parts: parts.sum(0, dtype=parts.dtype),
    Joined.MEAN: lambda parts: parts.mean(0),
    Joined.MAX: lambda parts: parts.amax(0),
    Joined.MIN: lambda parts: parts.amin(0),
    Joined.NORM: lambda parts: parts.square().sum(0).sqrt(),
}


def join(parts: Parts, layout: Layout) -> Tensor:
    """The tensor that the ranks have together; where each has the whole, all must have the same."""
    match layout:
        case Shard():
            return torch.cat(parts, dim=layout.dim)
        case Partial():
            return _JOINED[layout.joined](torch.stack(parts))
        case Replicate():
            if any(not torch.equal(part.nan_to_num(), parts[0].nan_to_num()) for part in parts[1:]):
                raise VerificationError("a value that every rank has whole is not the same on all of them")
            return parts[0]
