"""Compiles recorded graphs for a model, and runs them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from time import perf_counter
from types import MappingProxyType
from typing import Any, TypeVar, cast

import torch

from tracelens.agreeing import refuse_on_ranks, require_agreement, require_success
from tracelens.backends.anatomy import ModelAnatomy
from tracelens.backends.autograd_mode import outside_inference
from tracelens.backends.base import inside
from tracelens.backends.departing import Departures, Peaks
from tracelens.backends.differentiate import require_differentiable, usable
from tracelens.backends.enduring import remember
from tracelens.backends.execute import Journey, State
from tracelens.backends.generation_options import keeps_logits
from tracelens.backends.local import LocalCode, Run, prepare
from tracelens.backends.mesh import Mesh
from tracelens.backends.places import placement
from tracelens.backends.ranks.instep import InStepError
from tracelens.backends.ready import running_device
from tracelens.backends.replacing import at_home
from tracelens.backends.transfer import ConstantCache, arguments_on, following, inputs_on, moved
from tracelens.checking import check
from tracelens.compiled import Compiled, Ran, numbered, relocate
from tracelens.constants import Captured, from_payload
from tracelens.errors import (
    LayerRangeError,
    ModelMovedError,
    TracelensError,
    VerificationError,
    WriteTargetError,
)
from tracelens.fitting import check_fits
from tracelens.generation_plan import CompiledGeneration, Deferring, compile_steps, nothing_waits
from tracelens.inputs import Inputs
from tracelens.ir.graph import Graph
from tracelens.ir.ops import (
    Apply,
    Const,
    Param,
    Read,
    Write,
)
from tracelens.ir.passes.at_steps import in_steps
from tracelens.ir.passes.defer_lenses import defer_lenses
from tracelens.ir.passes.newest_logits import newest_logits
from tracelens.ir.retype import retype, sizes_of
from tracelens.ir.step_flow import names_steps
from tracelens.ir.verify import verify, verify_steps
from tracelens.leaving import Copies, Members, collect, copies_of, elsewhere, leave
from tracelens.plan import Plan, make_plan
from tracelens.program import Program, lower
from tracelens.prompted import Prompt
from tracelens.report import RunReport
from tracelens.skipping import refuse_unseen_in
from tracelens.steps import Steps

_KEPT_PROGRAMS = 256
_Made = TypeVar("_Made", Compiled, CompiledGeneration)


class Compiler:
    """Compiles graphs for one model; graphs of the same structure are compiled once."""

    def __init__(self, anatomy: ModelAnatomy) -> None:
        self.anatomy = anatomy
        self.owned = False
        self.constants = ConstantCache()
        self.steps = Steps()
        self._known: OrderedDict[Hashable, Compiled | CompiledGeneration] = OrderedDict()
        # By the identity of a recording's operations, which are kept here so that no others can take it.
        self._recent: dict[int, tuple[Hashable, Compiled | CompiledGeneration]] = {}

    def compile(self, graph: Graph) -> Compiled:
        """The programs for a graph; verified when they are made, and then kept by the graph's structure."""
        return self._kept(graph, self._compiled)

    def compile_generation(self, graph: Graph) -> CompiledGeneration:
        """The programs for a graph that text is generated with: one for each run of steps that do the same."""
        return self._kept(graph, self._compiled_generation)

    def compile_stream(self, graph: Graph) -> CompiledGeneration:
        """The same for a generation of which each step is told when it is made: nothing waits for other steps."""
        return self._kept(graph, self._compiled_stream)

    def _kept(self, graph: Graph, make: Callable[[Graph], _Made]) -> _Made:
        anatomy = self.anatomy
        key = (graph.ops, graph.pins, make.__name__, anatomy.dtype, anatomy.spread.key)
        recent = self._recent.get(id(graph.ops))
        if recent is not None and recent[0] == key:  # the same objects: nothing is compared in depth
            return cast(_Made, recent[1])
        compiled = cast("_Made | None", self._known.get(key))
        if compiled is None:
            try:
                compiled = self._known[key] = make(graph)
            except TracelensError as error:
                raise relocate(error, graph) from error.__cause__
            while len(self._known) > _KEPT_PROGRAMS:
                self._known.popitem(last=False)
        else:
            with suppress(KeyError):  # another thread may have dropped it just now
                self._known.move_to_end(key)
        if len(self._recent) >= _KEPT_PROGRAMS:
            self._recent.clear()
        self._recent[id(graph.ops)] = (key, compiled)
        return compiled

    def _compiled(self, graph: Graph) -> Compiled:
        if names_steps(graph):
            raise VerificationError(
                "the graph is for a generation: it names steps, and a trace has one forward pass",
                instead="model.stream(prompt, graph, max_new_tokens=...); or the graph without t.prefill, t.decode and "
                "t.steps",
            )
        return self._planned(self._at_home(graph, generating=False), generating=False)

    def _compiled_generation(self, graph: Graph) -> CompiledGeneration:
        there = placement(self.anatomy).places
        spread = len(there) > 1 or any(place.ranks > 1 for place in there)
        return self._compiled_stream(graph, partial(defer_lenses, spread=spread))

    def _compiled_stream(self, graph: Graph, defer: Deferring = nothing_waits) -> CompiledGeneration:
        anatomy = self.anatomy
        recorded = self._at_home(graph, generating=True)
        verify_steps(recorded)
        planned = newest_logits(recorded) if keeps_logits(anatomy.model) else recorded
        compiled = compile_steps(in_steps(planned), partial(self._planned, generating=True), defer)
        return replace(compiled, recorded=recorded)  # ranks are told what was recorded

    def _at_home(self, graph: Graph, *, generating: bool) -> Graph:
        """A graph that has been verified, for this model, with the numbers of its operations for lines.

        Lines differ between recordings of one structure: the recording that runs turns the numbers into its own.
        """
        anatomy = self.anatomy
        verify(graph)
        self._check_layers(graph)
        own = at_home(anatomy, graph)
        if own.ops != graph.ops:  # it was recorded for another model
            verify(own)
            graph = own
        self._check_sites(graph, generating)
        refuse_unseen_in(graph, anatomy)
        if anatomy.mesh is not None or anatomy.elsewhere is not None:
            refuse_on_ranks(graph, placement(anatomy), generating=generating)
        return replace(numbered(graph), constants=(), functions=())

    def _planned(
        self,
        recorded: Graph,
        settled: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
        afterwards: bool = False,
        *,
        generating: bool,
    ) -> Compiled:
        """The programs of one forward pass; ``settled``: the places from which some saves leave, whole.

        ``afterwards``: of what is done when some passes are over.
        """
        anatomy, there = self.anatomy, placement(self.anatomy)
        plan = make_plan(
            recorded,
            there,
            carries=anatomy.family.carries,
            type_of=anatomy.type_of,
            generating=generating,
            afterwards=afterwards,
            reached=anatomy.family.reached,
            settled=settled,
        )
        programs = lower(plan)
        if len(programs) > 1:
            check(programs, plan.placement)
        planned = {save.name: save for save in plan.graph.saves}
        saves = tuple(planned[save.name] for save in recorded.saves)
        return Compiled(recorded, plan, programs, self._prepared(programs, plan), saves, anatomy.spread.key)

    def _prepared(self, programs: tuple[Program, ...], plan: Plan) -> LocalCode | None:
        """The programs as code for this process."""
        return prepare(programs, plan, self.anatomy)

    def _check_layers(self, graph: Graph) -> None:
        for number, op in enumerate(graph.ops):
            if (
                isinstance(op, Read | Write)
                and op.site.layer is not None
                and op.site.layer >= self.anatomy.n_layers
            ):
                error = LayerRangeError(
                    f"the graph names {op.site}; the model has {self.anatomy.n_layers} layers"
                )
                raise graph.blame(error, number)

    def _check_sites(self, graph: Graph, generating: bool) -> None:
        """A graph from elsewhere may name sites or types that this model does not have."""
        sizes, pinned = sizes_of(graph), {pin.symbol for pin in graph.pins}
        for number, op in enumerate(graph.ops):
            try:
                if isinstance(op, Read | Write):
                    if (
                        generating
                        and op.site.name in ("k_rot", "v")
                        and inside(self.anatomy.family, op.site.name)
                    ):
                        before = (
                            "k, which stands before the cache, or " if self.anatomy.layers_with("k") else ""
                        )
                        raise WriteTargetError(
                            f"{op.site} cannot be used in a generation: behind it stands the cache, which keeps the "
                            "keys as the model made them, so that a change would hold for one step",
                            instead=f"{before}scores",
                        )
                    own = self.anatomy.type_of(op.site)
                    if isinstance(op, Read) and op.type != own:
                        raise VerificationError(
                            f"{op.site} is {own} in this model; the graph was recorded for {op.type}"
                        )
                    # The verifier knows the types of the sites that the graph reads, and only those.
                    fits = retype(op, graph.types, sizes, {op.site.always: own})
                    if fits is not None and not fits.pins <= pinned:
                        raise VerificationError(f"what is written to {op.site} fits prompts of one size only")
                elif isinstance(op, Param):
                    own = self.anatomy.parameter_type(op.path)
                    if op.type != own:
                        raise VerificationError(
                            f"{op.path!r} is {own} in this model; the graph has {op.type}"
                        )
            except TracelensError as error:
                raise graph.blame(error, number) from None

    # --- running -------------------------------------------------------------------------------------------------

    def state(self, graph: Graph, compiled: Compiled | CompiledGeneration, prompt: Prompt) -> State:
        """A fresh run state, with the constants checked and in place."""
        tensors: dict[tuple[int, int], torch.Tensor] = {}
        traffic: list[Journey] = []
        mesh = self.anatomy.mesh
        lacking: Exception | None = None
        for index, place in compiled.used:
            if mesh is not None and place != mesh.stage:
                continue
            constant = cast(Captured, graph.constants[index])
            try:
                constant.check(None)
                where = compiled.code.devices.places[place]
                tensors[index, place] = self.constants.place(constant, where, traffic)
            except Exception as error:
                if isinstance(error, TracelensError):
                    error = graph.blame(error, _capturing(graph, index))
                if mesh is None:
                    raise error from error.__cause__
                lacking = error
                break
        pads = prompt.batch.pads if prompt.ragged else None
        code, weight = compiled.code, self.anatomy.weight
        departures = Departures(compiled.plan.graph.types, prompt.sizes) if code.devices.departing else None
        state = State(code.count, tensors, graph.functions, weight, prompt.select, pads, departures)
        state.traffic += traffic
        if lacking is not None:
            state.sizes = prompt.sizes
            remember(state, lacking)
        return state

    def run(self, graph: Graph, compiled: Compiled, prompt: Prompt, *, measure: bool = False) -> Ran:
        """One forward pass over ``prompt``; gives the saved tensors by name, and what it has cost."""
        peaks = Peaks(compiled.code.devices.places if measure else ())
        started = perf_counter()
        if not compiled.code.differentiates:
            tensors, traffic, copies = self._run(graph, compiled, prompt)
        else:
            with outside_inference():
                tensors, traffic, copies = self._run(graph, compiled, prompt)
        planned = partial(compiled.held, graph, prompt.sizes)
        return Ran(tensors, RunReport(perf_counter() - started, traffic, planned, peaks.found()), copies)

    def _run(
        self, graph: Graph, compiled: Compiled, prompt: Prompt
    ) -> tuple[dict[str, Callable[[], Any]], list[Journey], Callable[[], Copies]]:
        device = running_device(self.anatomy)
        if compiled.spread != self.anatomy.spread.key:
            raise ModelMovedError(
                f"the model was moved after the program had been compiled: it is on {self.anatomy.spread} now",
                instead="program = model.compile(program.graph)",
            )
        check_fits(graph, compiled, prompt)
        if self.anatomy.mesh is not None and not self.owned:
            require_agreement(self.anatomy.mesh, compiled, graph, prompt)
        state = self.state(graph, compiled, prompt)
        real = moved(prompt.batch.mask, device) if prompt.ragged else None
        run = Run(self.anatomy.model, compiled.code, state, real)
        if compiled.inputs:
            state.inputs = _inputs(prompt, compiled.inputs, device)
        try:
            plan = compiled.plan
            pipeline = None if self.anatomy.mesh is None else self.anatomy.mesh.pipeline
            stop = plan.stop
            if stop is None:
                run.before_only(prompt.sizes)
            else:
                args, inputs = _arguments(prompt, device)
                model: Any = self.anatomy.model
                if compiled.code.differentiates:
                    require_differentiable(model)
                    args = tuple(usable(value) for value in args)
                    inputs = {name: usable(value) for name, value in inputs.items()}
                    state.constants = {key: usable(value) for key, value in state.constants.items()}
                    state.inputs = {name: usable(value) for name, value in state.inputs.items()}

                def forward() -> None:
                    run.begin(prompt.sizes)
                    if pipeline is None:
                        model(*args, **inputs)
                    else:
                        pipeline.forward(inputs, plan.placement.place_of(stop).index)

                run.execute(forward)
            run.finish()
            run.end()
            members: Mapping[str, Members] = state.saved
            mesh = self.anatomy.mesh
            copies: Callable[[], Copies] = dict
            if mesh is not None:
                copies = partial(copies_of, compiled.saves, compiled.plan, state, mesh)
                members = collect(compiled.saves, compiled.plan, state, compiled.code.devices, mesh)
                self.report(graph, run, mesh)
                if not mesh.has_results:
                    absent = {save.name: partial(elsewhere, save.name) for save in compiled.saves}
                    return absent, state.traffic, copies
            held = state.foreign, state.departures, state.stacks
            try:
                saved = leave(compiled.saves, compiled.plan.graph, members, prompt, *held)
            except Exception as error:
                if self.anatomy.mesh is None or not self.owned:
                    raise
                # The others have nothing more to do.
                raise InStepError from relocate(error, graph) if isinstance(error, TracelensError) else error
            return saved, state.traffic, copies
        except TracelensError as error:
            raise relocate(error, graph) from error.__cause__

    def report(self, graph: Graph, run: Run, mesh: Mesh) -> None:
        """Raises what went wrong in a run that all ranks have taken part in to the end."""
        error = run.error
        if error is not None:
            error = relocate(error, graph)
        if not self.owned:
            require_success(mesh, error, graph)
        elif (failure := run.state.failure) is not None:
            # Of a failure elsewhere the owner hears from that rank.
            raise InStepError(failure.when) from error


def _inputs(prompt: Prompt, wanted: Collection[str], device: torch.device) -> dict[str, torch.Tensor]:
    """What the pass is over, as the sites of that; inputs that are no prompt have none."""
    batch = prompt.batch
    found = {
        "token_ids": batch.input_ids,
        "token_mask": batch.mask,
        "positions": batch.position_ids,
        "next_tokens": following(batch.input_ids, batch.followed),
    }
    return {name: moved(found[name], device) for name in wanted}


def _arguments(prompt: Prompt, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the model's forward is called with."""
    if isinstance(prompt, Inputs):
        return arguments_on(prompt.args, device), arguments_on(prompt.kwargs, device)
    return (), {**inputs_on(prompt.batch.model_inputs(), device), "use_cache": False}


def owning(graph: Graph) -> Graph:
    """The graph with constants of its own: copies of captured tensors, tensors made of those from files."""
    for number, op in enumerate(graph.ops):
        there = graph.constants if isinstance(op, Const) else graph.functions
        if isinstance(op, Const | Apply) and op.index >= len(there):
            what = "constants" if isinstance(op, Const) else "functions"
            error = VerificationError(
                f"the graph has lost its {what}, which its text form does not hold",
                instead="graph.to_json(path) and tl.Graph.from_json(path), which keep them",
            )
            raise graph.blame(error, number)
    constants: list[Captured] = []
    for index, constant in enumerate(graph.constants):
        if not isinstance(constant, Captured):
            constants.append(from_payload(constant.payload(), constant.type, constant.name))
            continue
        try:
            constant.check(None)
        except TracelensError as error:
            raise graph.blame(error, _capturing(graph, index)) from None
        constants.append(constant.owned())
    return replace(graph, constants=tuple(constants))


def check_constants(graph: Graph) -> None:
    """Raises :class:`~tracelens.errors.ConstantChangedError` for a tensor that was changed since it was captured."""
    for index, constant in enumerate(graph.constants):
        if isinstance(constant, Captured):
            try:
                constant.check(None)
            except TracelensError as error:
                raise graph.blame(error, _capturing(graph, index)) from None


def _capturing(graph: Graph, index: int) -> int:
    """The operation that captured constant number ``index``."""
    return next(number for number, op in enumerate(graph.ops) if isinstance(op, Const) and op.index == index)
