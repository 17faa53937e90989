"""Models whose parts lie on ranks that this process owns: blocks are recorded and planned here, and run there."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from time import perf_counter
from typing import Any, NoReturn

import torch

from tracelens.backends.anatomy import ModelAnatomy
from tracelens.backends.ranks.owner import Reply, Request
from tracelens.backends.ranks.pool import Ranks
from tracelens.collectives import journeys
from tracelens.compiled import Compiled, Ran, relocate
from tracelens.compiling import Compiler, check_constants
from tracelens.errors import (
    ModelClosedError,
    OptionError,
    RankFailedError,
    UntrustedApplyError,
)
from tracelens.fitting import check_fits
from tracelens.gathered import Generated, ends_of, has_file, missed
from tracelens.generation_plan import CompiledGeneration
from tracelens.ir.graph import Graph
from tracelens.ir.ops import Apply, Save
from tracelens.leaving import same, write_files
from tracelens.location import here
from tracelens.plan import Plan
from tracelens.program import Program
from tracelens.prompted import Prompt
from tracelens.remote import constants_data, prompt_header, prompt_tensors, results_from
from tracelens.report import RunReport
from tracelens.telling import StepMade, StepTold

_ids = itertools.count(1)
_KEPT = 256


class RankedCompiler(Compiler):
    """Plans blocks here and has them run by ranks, each of which makes its own program of the same plan."""

    def __init__(self, anatomy: ModelAnatomy, parts: Parts) -> None:
        super().__init__(anatomy)
        self._parts = parts
        self._ranks = parts.ranks
        self._model = parts.model
        self._compared: list[bool] | None = None
        self._told: set[str] = set()
        """The graphs that the ranks have been told of."""

    def _prepared(self, programs: tuple[Program, ...], plan: Plan) -> None:
        return None

    @contextmanager
    def comparing(self) -> Iterator[list[bool]]:
        """Runs within it have ranks compare what each of them has of a whole value that is saved, bit for bit.

        The list has an entry for each such value.
        """
        found: list[bool] = []
        self._compared = found
        try:
            yield found
        finally:
            self._compared = None

    def run(self, graph: Graph, compiled: Compiled, prompt: Prompt, *, measure: bool = False) -> Ran:
        """One forward pass on the ranks; gives what was saved, which has come back."""
        if measure:
            raise OptionError(
                "the peak of memory is that of this process, and the model is on ranks of their own",
                instead="t.report without measure=True, which tells what is planned for each place",
            )
        started = perf_counter()
        compared = self._compared
        replies = self._asked("run", graph, compiled, prompt, {} if compared is None else {"compare": True})
        if compared is not None:
            compared += _alike([reply.header for reply in replies])
        found: dict[str, Callable[[], Any]] = {
            name: partial(same, value)
            for name, value in results_from(replies[0].header, replies[0].tensors).items()
        }
        if any(save.to is not None for save in compiled.saves):
            write_files(compiled.saves, found)
        planned = partial(compiled.held, graph, prompt.sizes)
        travelled = journeys(compiled.plan, prompt.sizes)
        return Ran(found, RunReport(perf_counter() - started, travelled, planned, {}))

    def generate(
        self,
        graph: Graph,
        compiled: CompiledGeneration,
        prompt: Prompt,
        options: Mapping[str, Any],
        *,
        include_last: bool,
        seed: int | None,
    ) -> Generated:
        """New tokens and what was saved on the way, with each step's program in its pass."""
        started = perf_counter()
        seed = int(torch.randint(2**62, ()).item()) if seed is None else seed
        more = {"options": dict(options), "seed": seed, "include_last": include_last}
        reply = self._asked("generate", graph, compiled, prompt, more)[0]
        tokens, ends = reply.header["tokens"], ends_of(reply.header["tokens"])
        values = results_from(reply.header, reply.tensors)
        found: dict[str, Callable[[], Any]] = {}
        files: list[Save] = []
        for course in compiled.courses:
            name = course.save.name
            missing = missed(course, prompt, ends, include_last=include_last)
            found[name] = partial(same, values[name]) if missing is None else missing
            files += [course.save] * has_file(course, missing)
        write_files(files, found)
        return Generated(tokens, found, RunReport(perf_counter() - started, (), tuple, {}))

    def stream(
        self,
        graph: Graph,
        compiled: CompiledGeneration,
        prompt: Prompt,
        options: Mapping[str, Any],
        told: StepTold,
        *,
        seed: int | None,
    ) -> Generated:
        """A generation of which each step is told when the ranks have made it; they wait to hear whether to go on."""
        started = perf_counter()
        seed = int(torch.randint(2**62, ()).item()) if seed is None else seed
        more = {"options": dict(options), "seed": seed}
        reply = self._asked("stream", graph, compiled, prompt, more, told)[0]
        return Generated(reply.header["tokens"], {}, RunReport(perf_counter() - started, (), tuple, {}))

    def _asked(
        self,
        name: str,
        graph: Graph,
        compiled: Compiled | CompiledGeneration,
        prompt: Prompt,
        more: Mapping[str, Any],
        told: StepTold | None = None,
    ) -> list[Reply]:
        self._parts.require_open()
        _refuse_python(graph)
        check_fits(graph, compiled, prompt)
        check_constants(graph)
        names, constants = constants_data(graph)
        header: dict[str, Any] = {
            "model": self._model,
            "graph": compiled.digest,
            "plan": compiled.plan_digest,
            "constants": names,
            **prompt_header(prompt, tuple(selector for _, selector in compiled.selectors)),
            **more,
        }
        if compiled.digest not in self._told:
            header["document"] = compiled.document
        tensors = {**prompt_tensors(prompt), **constants}
        asking = partial(
            self._ranks.ask,
            model=self._model,
            timeout=self._parts.timeout,
            told=None if told is None else partial(_pass_on, told),
            waiting=frozenset() if told is None else told.waiting,
        )
        try:
            replies = asking(name, header, tensors)
            if replies[0].header.get("unknown"):  # they were started anew since, or have forgotten it
                header["document"] = compiled.document
                replies = asking(name, header, tensors)
        except RankFailedError as failed:
            _blame(failed, graph)
        if len(self._told) >= _KEPT:
            self._told.clear()
        self._told.add(compiled.digest)
        return replies


def _pass_on(told: StepTold, reply: Reply) -> bool:
    """Tells of a step that the ranks have made; is another one wanted?"""
    header = reply.header
    return not told.tell(
        StepMade(header["step"], tuple(header["tokens"]), results_from(header, reply.tensors))
    )


def _alike(replies: Sequence[Mapping[str, Any]]) -> list[bool]:
    """For each value that several ranks have whole: is it the same on all of them?"""
    found: list[bool] = []
    for stage in sorted({reply["stage"] for reply in replies}):
        ranks = [reply["copies"] for reply in replies if reply["stage"] == stage]
        if len(ranks) > 1:
            found += [
                all(rank[name][part] == digest for rank in ranks)
                for name, digests in ranks[0].items()
                for part, digest in enumerate(digests)
            ]
    return found


def _blame(failed: RankFailedError, graph: Graph) -> NoReturn:
    """The named error that a rank raised, at the user's own line; any other one as it came."""
    if failed.original is None:
        raise failed
    error = relocate(failed.original, graph)
    if failed.rank is not None and failed.alone:
        error.add_note(f"It went wrong on rank {failed.rank}, and not on all of them.")
    raise error from failed


def _refuse_python(graph: Graph) -> None:
    for number, op in enumerate(graph.ops):
        if isinstance(op, Apply):
            raise graph.blame(
                UntrustedApplyError(
                    "tl.apply runs Python of yours, which the ranks are not sent: they get graphs, which are data",
                    instead="torch functions on values; or the script under torchrun, where every rank has it",
                ),
                number,
            )


class Parts:
    """A model's parts on ranks: let go of at the end, with the ranks themselves if they were started for it."""

    def __init__(self, ranks: Ranks, *, owns: bool, timeout: float | None = None) -> None:
        self.ranks = ranks
        self.timeout = timeout
        """Seconds that a run may take; without it, what the ranks say."""
        self.model = f"model-{next(_ids)}"
        self._end = weakref.finalize(self, _let_go, ranks, self.model, owns)
        self.source = ""
        self.options: Mapping[str, Any] = {}
        self.bytes: tuple[int, ...] = ()
        """Of weights, on each rank."""

    def load(
        self,
        source: str,
        sizes: Mapping[str, int],
        dtype: str,
        options: Mapping[str, Any],
        parallelize: str | None = None,
        families: Sequence[Sequence[str]] = (),
    ) -> Mapping[str, Any]:
        """Has every rank load its part; gives what the first one said of the whole."""
        self.source, self.options = source, options
        header = {
            "model": self.model,
            "source": source,
            **sizes,
            "dtype": dtype,
            "options": dict(options),
            "parallelize": parallelize,
            "families": families,
        }
        try:
            replies = self.ranks.load(self.model, Request("load", header))
        except RankFailedError as failed:
            self.close()
            if failed.original is not None:
                failed.original.at = None  # a line of the rank's: the user's own is where this was called
                raise failed.original from failed
            raise
        self.bytes = tuple(int(reply.header["bytes"]) for reply in replies)
        return replies[0].header

    def close(self) -> None:
        """Lets go of the parts. Again: does nothing."""
        self._end()

    def require_open(self) -> None:
        """Raises :class:`~tracelens.errors.ModelClosedError` after :meth:`close`."""
        if not self._end.alive:
            raise ModelClosedError(
                "this model was closed: its parts are gone from the ranks",
                instead="tl.load(...) again",
            )

    def refuse_copies(self) -> NoReturn:
        """What copying the model does: there is nothing of it here to copy."""
        raise OptionError(
            "a model on ranks cannot be copied: its weights are in other processes",
            at=here(),
            instead="tl.load(...) once more; it may have the same ranks: ranks=model.ranks",
        )


def _let_go(ranks: Ranks, model: str, owns: bool) -> None:
    if owns:
        ranks.close()
    else:
        ranks.drop(model)
