"""The block: ``with model.trace(prompt) as t: ...`` records on the way in, and runs on the way out."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self

from tracelens.advice import in_generation
from tracelens.backends.spread import Loading
from tracelens.compiled import Compiled
from tracelens.compiling import Compiler, owning
from tracelens.errors import (
    Blaming,
    NestedTraceError,
    NothingSavedError,
    NotRunYetError,
    OptionError,
    TracelensError,
)
from tracelens.explain import explain, explain_generation
from tracelens.generation_plan import CompiledGeneration
from tracelens.ir.dims import with_lengths
from tracelens.ir.graph import Graph
from tracelens.ir.retype import retype, site_types
from tracelens.ir.windows import DECODE, PREFILL, StepWindow
from tracelens.location import here
from tracelens.named import NamedConstants, with_values
from tracelens.open_recordings import enter, leave, open_recorder
from tracelens.plan import Plan
from tracelens.prompted import Prompt
from tracelens.prompts import Prompts, prompts_of
from tracelens.recorder import Recorder
from tracelens.refusing import failed_block, module_that_failed
from tracelens.report import RunReport
from tracelens.results import Results
from tracelens.reusable import Reusable, require_graph
from tracelens.scopes import GenerationSteps, StepScope
from tracelens.slices import require_rows, run_in_slices

if TYPE_CHECKING:
    from tracelens.model import Model


class Recording:
    """The base of all blocks: what was written inside becomes a graph."""

    _generating = False
    _most_steps: int | None = None
    """Of a generation: how many steps it has at most."""
    _prompts: Prompts | None = None

    def __init__(self, model: Model, prompt: Prompt | None) -> None:
        self._model = model
        self._compiler: Compiler = model._compiler
        self._prompt = prompt
        self._recorder: Recorder | None = None
        self._loading: Loading | None = None
        self._graph: Graph | None = None

    def _outer(self) -> Recorder | None:
        """The recording of the same model that is open already."""
        return open_recorder(self._model.anatomy)

    def __enter__(self) -> Self:
        outer = self._outer()
        if outer is not None:
            raise NestedTraceError(
                "a trace of this model is already open here",
                at=here(),
                also=(("it was opened at", outer.opened),),
                instead="end the first block before the second; what the first saved can be used in the second",
            )
        if self._recorder is not None:
            raise NestedTraceError(
                "this block has been entered before, and a block runs once",
                at=here(),
                also=(("it was entered at", self._recorder.opened),),
                instead="model.trace(prompt) for each block; model.compile for one graph on many prompts",
            )
        self._recorder = Recorder(
            self._model.anatomy,
            self._prompt,
            generating=self._generating,
            opened=here(),
            known=self._compiler.steps,
        )
        if keepers := self._model.anatomy.keepers:
            self._loading = Loading(keepers)
        enter(self._recorder)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        recorder = self._recorder
        assert recorder is not None
        leave(recorder)
        if error is not None:
            # The recording is discarded: nothing runs, and the user's own exception goes on.
            recorder.is_open = False
            recorder.failure = error
            if self._loading is not None:
                self._loading.remove()  # a module that was called on a value, and failed
            if isinstance(error, TracelensError):
                error.problem = with_lengths(error.problem, recorder.sizes)
                if recorder.generating:
                    in_generation(error)
            elif isinstance(error, Exception) and (module := module_that_failed(error)) is not None:
                raise module from error
            return
        try:
            self._graph = recorder.finish()
            self._end(recorder, self._graph)
        except BaseException as failure:
            if isinstance(failure, TracelensError) and failure.at is None:
                failure.at = recorder.opened
            recorder.failure = failure
            raise

    def _end(self, recorder: Recorder, graph: Graph) -> None:
        """What leaving the block does."""

    @property
    def graph(self) -> Graph:
        """What the block does, as data."""
        if self._graph is None:
            raise self._missing("graph", "the block has not ended yet")
        return self._graph

    if not TYPE_CHECKING:  # type checkers know the attributes that there are

        def __getattr__(self, name: str) -> NoReturn:
            raise AttributeError(
                f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self
            )

    def _missing(self, what: str, why: str) -> TracelensError:
        """The error for something that is there only after the block."""
        recorder = self._recorder
        if recorder is not None and recorder.failure is not None:
            return failed_block(recorder.failure, what)
        return NotRunYetError(
            f"there is no {what}: {why}", at=here(), instead=f"read the {what} after the block"
        )

    def _compiled(self) -> Compiled | CompiledGeneration:
        make = self._compiler.compile_generation if self._generating else self._compiler.compile
        return make(self.graph)

    @property
    def prompts(self) -> Prompts:
        """The prompts of the block, each for itself and without padding: ``t.prompts[1].layers[3].resid_post``.

        Sites of one prompt are [1, P_i, ...]; writing them changes its row alone; values flow between prompts. In a
        generation they are those of the step that is over the prompts. Raises
        :class:`~tracelens.errors.SymbolicSizeError` in a recording without a prompt.
        """
        if self._prompts is None:
            self._prompts = prompts_of(self._model.anatomy, self._prompt)
        return self._prompts

    # --- parts of a generation -----------------------------------------------------------------------------------

    @property
    def prefill(self) -> StepScope:
        """The step over the prompt, step 0 of a generation: its sites, read and written in no other step."""
        return self._scope("prefill", PREFILL)

    @property
    def decode(self) -> StepScope:
        """All steps but the prompt's, which have one new token each: their sites, read and written in these alone."""
        return self._scope("decode", DECODE)

    @property
    def steps(self) -> GenerationSteps:
        """The steps of a generation by number: ``t.steps[0]`` is the prompt's, and step k makes token k.

        ``t.steps[5:10]`` are five of them, ``t.steps[5:]`` all from the sixth on. Steps that a text does not come to
        are not made: what is saved of them ends where the text does.
        """
        self._scope("steps", DECODE)
        return GenerationSteps(self._model.anatomy)

    def _scope(self, name: str, steps: StepWindow) -> StepScope:
        if not self._generating:
            raise OptionError(
                f"t.{name} is a part of a generation, and this block has one forward pass",
                at=here(),
                instead="with model.generate(prompt, max_new_tokens=...) as t: ...",
            )
        return StepScope(self._model.anatomy, steps)

    def plan(self) -> PlanView:
        """Where the graph runs and how far the forward pass goes."""
        return PlanView(self)

    def explain(self) -> str:
        """The graph with its lines, the plan, and the program of each place."""
        compiled = self._compiled()
        if isinstance(compiled, CompiledGeneration):
            return explain_generation(
                self._model.describe(), self.graph, compiled, self._prompt, self._most_steps
            )
        return explain(self._model.describe(), self.graph, compiled, self._prompt)

    def _repr_html_(self) -> str:
        from tracelens.viz.html import recording_html

        return recording_html(self)


class PlanView:
    """The plan of a block, for looking at."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording

    @property
    def plan(self) -> Plan:
        """The plan; of a generation, that of its first steps."""
        return self._recording._compiled().plan

    def explain(self) -> str:
        """The plan as text."""
        return self._recording.explain()

    def __str__(self) -> str:
        return self.explain()

    def __repr__(self) -> str:
        return self.explain()

    def _repr_html_(self) -> str:
        from tracelens.viz.html import recording_html

        return recording_html(self._recording)


class Trace(Recording):
    """A block that runs the model once, when it ends. ``t["name"]`` and ``t.results`` hold what was saved."""

    _most: int | None = None
    _measure = False
    _batch_size: int | None = None
    _report: RunReport | None = None
    _results: Results | None = None

    def __init__(
        self,
        model: Model,
        prompt: Prompt,
        most: int | None = None,
        *,
        measure: bool = False,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(model, prompt)
        self._most = most
        self._measure = measure
        self._batch_size = batch_size

    def _end(self, recorder: Recorder, graph: Graph) -> None:
        assert self._prompt is not None
        if not graph.saves and not graph.applies:
            if graph.writes:
                raise nothing_saved(graph)
            self._results = Results((), {})
            return
        compiled = self._compiler.compile(graph)
        prompt, size = self._prompt, self._batch_size
        if size is not None and size < prompt.sizes["B"]:
            ran = run_in_slices(
                self._compiler, graph, compiled, prompt, size, most=self._most, measure=self._measure
            )
        else:
            if self._most is not None:
                compiled.require_room(graph, prompt.sizes, self._most)
            ran = self._compiler.run(graph, compiled, prompt, measure=self._measure)
        recorder.deliver(ran.tensors)
        self._results = compiled.results(ran.tensors)
        self._report = ran.report

    @property
    def results(self) -> Results:
        """The saved tensors by name."""
        if self._results is None:
            raise self._missing("result", "the model has not run yet")
        return self._results

    @property
    def report(self) -> RunReport:
        """What the run has cost: what the block sent between devices, what it held on each, and how long it took."""
        if self._report is None:
            raise self._missing("report", "the model has not run")
        return self._report

    def __getitem__(self, name: str) -> Any:
        return self.results[name]

    def __repr__(self) -> str:
        return repr(self._results) if self._results is not None else f"<trace over {self._prompt}>"


def nothing_saved(graph: Graph) -> NothingSavedError:
    """The error for a block that only writes."""
    number = next(number for number, op in enumerate(graph.ops) if op is graph.writes[-1])
    return NothingSavedError(
        "the block writes to the model but saves nothing, so nobody could see what the write did",
        at=graph.location(number),
        instead="save something that the write changes: model.logits.save(); or use model.generate for steered text",
    )


class Record(Recording):
    """A block that only records: ``r.graph`` for analysis, ``model.compile(r.graph)`` to run it on many prompts."""

    def __init__(self, model: Model, prompt: Prompt | None, *, generation: bool = False) -> None:
        super().__init__(model, prompt)
        self._generating = generation

    def __repr__(self) -> str:
        from tracelens.ir.text import text

        return text(self._graph) if self._graph is not None else "<recording>"


class Program(Reusable):
    """A compiled graph: call it on as many prompts as you like, without recording again.

    It owns copies of the graph's constants, so changing the original tensors later has no effect on it.
    """

    def __init__(self, model: Model, graph: Graph, most: int | None = None) -> None:
        self._most = most
        require_graph(graph, "model.record()")
        self._model = model
        self._compiler: Compiler = model._compiler
        with Blaming(here()):
            object.__setattr__(self, "graph", owning(graph))
        if not graph.saves and not graph.applies:
            raise (
                nothing_saved(graph)
                if graph.writes
                else NothingSavedError(
                    "the graph saves nothing, so that running it has no result",
                    at=here(),
                    instead="value.save() in the recording",
                )
            )
        with Blaming(here()):
            self._compiled = self._compiler.compile(self.graph)
        self._constants = NamedConstants(self.graph)
        self._fitting: set[tuple[tuple[str, int], ...]] = set()

    def __call__(self, prompt: Any, *, batch_size: int | None = None, **constants: Any) -> Results:
        """The results for one prompt (or one batch of prompts).

        ``batch_size``: how many prompts run together at most; the results are those of all together, as for
        :meth:`tracelens.model.Model.trace`.

        ``constants`` are other values for constants that were given a name (:func:`tracelens.constant`), for this call
        alone: ``program(prompt, v=another, strength=2.0)``. Each must have the shape of what it replaces; floating
        dtypes are cast to its dtype. Raises :class:`~tracelens.errors.UnknownConstantError`,
        :class:`~tracelens.errors.ShapeError` and :class:`~tracelens.errors.DtypeError` before the model runs.
        """
        size = require_rows(batch_size)
        graph = self.graph
        if constants:
            with Blaming(here()):
                graph = with_values(graph, self._constants, constants)
        prepared = self._model.prepare(prompt)
        self._require_fit(prepared)
        with Blaming(here()):
            if size is not None and size < prepared.sizes["B"]:
                ran = run_in_slices(self._compiler, graph, self._compiled, prepared, size, most=self._most)
                return self._compiled.results(ran.tensors)
            if self._most is not None:
                self._compiled.require_room(graph, prepared.sizes, self._most)
            return self._compiled.results(self._compiler.run(graph, self._compiled, prepared).tensors)

    @property
    def constants(self) -> NamedConstants:
        """The constants that a call can give other values for: name, shape, dtype, and what each is by default."""
        return self._constants

    def _require_fit(self, prompt: Prompt) -> None:
        """Raises what recording on a prompt of these sizes would have raised, before the model runs."""
        key = tuple(sorted(prompt.sizes.items()))
        if key in self._fitting or self.graph.pins:
            return  # a graph with pins is held to its own sizes elsewhere
        sites = site_types(self.graph)
        for number, op in enumerate(self.graph.ops):
            try:
                retype(op, self.graph.types, prompt.sizes, sites)
            except TracelensError as error:
                raise self.graph.blame(error, number) from None
        self._fitting.add(key)

    def explain(self) -> str:
        """The graph with its lines, the plan, and the program of each place."""
        return explain(self._model.describe(), self.graph, self._compiled, None)
