"""One generation: the forward passes that transformers' own loop makes, each with the program of its step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import nn

from tracelens.backends.deferring import Tail, Waiting
from tracelens.backends.enduring import remember
from tracelens.backends.execute import State
from tracelens.backends.gathering import Gathering
from tracelens.backends.local import LocalCode, Run
from tracelens.backends.pipeline_generation import StagedGeneration
from tracelens.backends.side_hooks import ForwardStopped
from tracelens.backends.transfer import Everywhere, following, moved
from tracelens.errors import GenerationStepError
from tracelens.ir.windows import StepWindow
from tracelens.plan import Plan


class Segment(NamedTuple):
    """Steps in a row that do the same, and what they do."""

    window: StepWindow
    plan: Plan
    code: LocalCode
    tail: Tail | None = None
    """What is done for several of the steps together."""


class SteppedRun(Run):
    """A run of many passes: step 0 is over the prompt, and each of the others over one more token.

    ``sizes``, ``mask``: the prompt's. ``cached``: does a pass have the new token alone?  ``ragged``: is there padding?
    ``inputs``: are sites read that are no part of the model?  ``any_passes``: is any pass right, whatever it is over?
    """

    __slots__ = (
        "_awaiting",
        "_waiting",
        "any_passes",
        "begun",
        "cached",
        "gathering",
        "inputs",
        "mask",
        "ragged",
        "segment",
        "segments",
        "sizes",
        "staged",
        "step",
    )

    def __init__(
        self,
        model: nn.Module,
        segments: Sequence[Segment],
        state: State,
        gathering: Gathering,
        *,
        sizes: Mapping[str, int],
        cached: bool,
        any_passes: bool,
        mask: torch.Tensor,
        ragged: bool,
        inputs: bool,
    ) -> None:
        super().__init__(model, segments[0].code, state)
        self.segments = segments
        self.segment = 0
        self.gathering = gathering
        self.sizes = sizes
        self.cached = cached
        self.ragged = ragged
        self.inputs = inputs
        self.any_passes = any_passes
        self.mask = mask
        self.begun = False
        """Has a pass begun?"""
        self.step = 0
        """Of the pass that comes next, or that runs."""
        self._awaiting: tuple[LocalCode, list[Any]] | None = None
        """What a step that is over does when its tokens are there, and its values."""
        self._waiting: Waiting | None = None
        """The positions that steps have left for later."""
        self.staged: StagedGeneration | None = None
        """What leads a pass through the stages of a pipeline."""

    def put_on(self) -> None:
        """Puts the program of the next step on the model, and what leads from step to step around it."""
        seat = self.code.seat
        # The passes that are the run's own: other threads may use the model meanwhile.
        seat.before(self.model, self._starting)
        super().put_on()
        seat.after(self.model, self._ended)
        if self.staged is not None:
            self.staged.begin(seat)

    def _starting(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if get_ident() != self.thread:
            return None
        self.begun = True
        given = kwargs
        found = kwargs.get("input_ids")
        if isinstance(found, torch.Tensor) and found.device != self.mask.device:
            # transformers gives a model that is spread its inputs where its first weights are. accelerate returns the
            # logits, which are larger, to where the first of the inputs is: that is where they are made, as in a trace.
            found = moved(found, self.mask.device)
            given = {
                "input_ids": found,
                **{name: value for name, value in kwargs.items() if name != "input_ids"},
            }
        found = args[0] if found is None and args else found
        ids: torch.Tensor = torch.empty(0, 0) if found is None else found
        rows, columns = ids.shape
        text = self.sizes["P"] + self.step
        expected = text if self.step == 0 or not self.cached else 1
        if not self.any_passes and (rows, columns) != (self.sizes["B"], expected):
            raise GenerationStepError(
                f"transformers made a pass over {rows} rows of {columns} tokens as step {self.step} of the generation, "
                f"where {self.sizes['B']} of {expected} were expected",
                instead="the options of plain generation: greedy or sampled, one token at a time",
            )
        if (self.ragged or self.inputs) and not self.any_passes:
            # Of our own: for some caches transformers has made other masks of it by now.
            real = torch.cat([self.mask, self.mask.new_ones(rows, self.step)], 1) if self.step else self.mask
            if self.ragged:
                self.real = Everywhere(real)
            if self.inputs:
                self.state.inputs = _inputs(ids, real)
        segment = self.segments[self.segment]
        self.state.into = self.gathering.open(segment.plan, self.code.devices, self.step)
        if segment.tail is not None:
            if self._waiting is None or self._waiting.tail is not segment.tail:
                self._waiting = Waiting(
                    segment.tail, self.sizes, self.gathering.steps, self.code.devices, cached=self.cached
                )
            self.state.deferred = self._waiting.open(self.step)
        self.begin({"B": rows, "P": columns, "S": text})
        return None if given is kwargs else (args, given)

    def _ended(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Between two passes: the program changes where the next step does something else."""
        if get_ident() != self.thread:
            return
        self.finish()
        self.vote()
        if self.code.tail is not None:
            self._awaiting = self.code, self.state.values
        else:
            self._over(self.step)
        self.step += 1
        if self.step in self.segments[self.segment].window:
            return
        self.require_reached()
        self.segment += 1
        seat = self.code.seat
        self.code = self.segments[self.segment].code
        self.state.values = [None] * self.code.count
        seat.clear()
        self.put_on()

    def vote(self) -> None:
        """Ends the generation on all ranks where one has failed; every rank calls it."""
        mesh = self.code.devices.mesh
        if mesh is not None and mesh.first_failed(self.state.failure is not None) is not None:
            # A rank that has failed would choose other tokens than the others, and end at another.
            remember(self.state, None)
            raise ForwardStopped

    def chosen(self, tokens: torch.Tensor | None) -> None:
        """The tokens [B] that the step has led to, ``None`` after a pass that none are chosen from."""
        if self._awaiting is None:
            return
        code, values = self._awaiting
        self._awaiting = None
        inputs = self.state.inputs
        new = None if tokens is None else moved(tokens, self.mask.device)
        found = following(inputs["token_ids"], inputs["token_mask"], new)
        current = self.code, self.state.values, self.state.shapes
        self.code, self.state.values, self.state.shapes = code, values, code.sizes_of(self.state.sizes)
        self.state.inputs = {**inputs, "next_tokens": found}
        try:
            self.end()
        finally:
            self.code, self.state.values, self.state.shapes = current
        self._over(self.step - 1)

    def _over(self, step: int) -> None:
        """A step has done all that it does alone."""
        waiting = self._waiting
        if waiting is None:
            return
        waiting.add(step)
        window = next(segment.window for segment in self.segments if step in segment.window)
        if waiting.is_due(step) or step + 1 not in window:
            self.catch_up()

    def catch_up(self) -> None:
        """Does what steps have left for later."""
        waiting = self._waiting
        if waiting is None or not waiting.count:
            return
        state, tail = self.state, waiting.tail
        current = self.code, state.values, state.shapes, state.sizes, state.into
        try:
            for start, width, kept in waiting.take():
                self.code = tail.code
                state.values = [None] * tail.code.count
                state.sizes = {**self.sizes, "P": width}
                state.shapes = tail.code.sizes_of(state.sizes)
                state.constants.update(kept)
                state.into = self.gathering.open_several(
                    tail.plan, tail.code.devices, waiting.first, start, width
                )
                self.do_before()
        finally:
            self.code, state.values, state.shapes, state.sizes, state.into = current
            for key in [key for key in state.constants if key[0] in tail.places]:
                del state.constants[key]


def _inputs(ids: torch.Tensor, real: torch.Tensor) -> Mapping[str, torch.Tensor]:
    """What a pass is over: its tokens, where they stand in their texts, and which of them are no padding."""
    width = ids.shape[1]
    positions = (real.long().cumsum(-1) - 1).clamp(min=0)
    return {"token_ids": ids, "token_mask": real[:, -width:], "positions": positions[:, -width:]}
