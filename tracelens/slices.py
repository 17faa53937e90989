"""Batches larger than memory: ``batch_size=`` runs a batch in slices of its rows, and puts together what they give."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import torch

from tracelens.backends.gathering import Course
from tracelens.backends.generation_options import require_plain, resolved
from tracelens.compiled import Compiled, Ran
from tracelens.compiling import Compiler, check_constants
from tracelens.constants import Captured
from tracelens.errors import OptionError, RowsMeetError
from tracelens.fitting import check_fits
from tracelens.gathered import Ends, Generated, ends_of, has_file, missed, missing_number
from tracelens.generating import generate
from tracelens.generation_plan import CompiledGeneration
from tracelens.ir.graph import Graph
from tracelens.ir.passes.slice_rows import slice_rows
from tracelens.leaving import same, write_files
from tracelens.location import here
from tracelens.progress import watched
from tracelens.prompted import Prompt
from tracelens.report import added_up

if TYPE_CHECKING:
    from tracelens.model import Model

Fetch = Callable[[], Any]
_Made = TypeVar("_Made", Compiled, CompiledGeneration)
_Ran = TypeVar("_Ran")

_OF_ALL_ROWS = ("logits_processor", "prefix_allowed_tokens_fn", "stopping_criteria", "max_time")
"""Options of a generation that see all rows at once, or the time that all of them take."""


def require_rows(batch_size: object) -> int | None:
    """Raises :class:`~tracelens.errors.OptionError` for what is no number of rows."""
    if batch_size is None or (type(batch_size) is int and batch_size >= 1):
        return batch_size
    raise OptionError(
        f"batch_size={batch_size!r} is not a positive whole number of rows",
        at=here(),
        instead="batch_size=8, or nothing for all rows at once",
    )


def run_in_slices(
    compiler: Compiler,
    graph: Graph,
    compiled: Compiled,
    prompt: Prompt,
    batch_size: int,
    *,
    most: int | None = None,
    measure: bool = False,
) -> Ran:
    """What one forward pass over ``prompt`` gives, by passes over ``batch_size`` rows at a time.

    ``most``: how many bytes a slice may hold beside the model.
    """
    slices = _Slices(compiler, graph, compiled, prompt, batch_size, compiler.compile)
    if most is not None:
        for part in slices.prompts:
            slices.compiled.require_room(slices.graph, part.sizes, most)
    ran = slices.each(lambda own, part: compiler.run(own, slices.compiled, part, measure=measure))
    found: dict[str, Fetch] = {}
    for save in graph.saves:
        axis = slices.axes[save.name]
        fetches = [one.tensors.pop(save.name) for one in ran]
        if axis is None or not slices.has_results:
            found[save.name] = fetches[0]
            continue
        by_row = prompt.ragged and bool(graph.types[save.values[0]].padded_axes)
        found[save.name] = partial(same, _joined([fetch() for fetch in fetches], axis, by_row=by_row))
    if slices.has_results:
        write_files(graph.saves, found)
    return Ran(found, added_up([one.report for one in ran]))


def generate_in_slices(
    model: Model,
    compiler: Compiler,
    graph: Graph,
    compiled: CompiledGeneration,
    prompt: Prompt,
    options: Mapping[str, Any],
    batch_size: int,
    *,
    include_last: bool = False,
    seed: int | None = None,
    most: int | None = None,
) -> Generated:
    """What one generation from ``prompt`` gives, by generations from ``batch_size`` rows at a time.

    ``seed``: of the first slice; the later ones have seeds that follow from it.
    """
    for name in _OF_ALL_ROWS:
        if options.get(name) is not None:
            raise OptionError(
                f"{name}= is about all rows of a generation together, and batch_size= runs some of them at a time",
                instead=f"without batch_size=, or without {name}=",
            )
    if not compiled.any_passes:
        require_plain(resolved(compiler.anatomy.model, options), options)
    slices = _Slices(compiler, graph, compiled, prompt, batch_size, compiler.compile_generation)
    if most is not None:
        steps = max(1, options["max_new_tokens"])
        for part in slices.prompts:
            slices.compiled.require_room(slices.graph, part.sizes, steps, most, include_last=include_last)
    seeds = iter(_seeds(seed, len(slices.prompts)))
    made = slices.each(
        lambda own, part: generate(
            model,
            compiler,
            own,
            slices.compiled,
            part,
            options,
            include_last=include_last,
            seed=next(seeds),
        )
    )
    tokens = [row for one in made for row in one.tokens]
    found: dict[str, Fetch] = {}
    if not slices.has_results:
        found = made[0].tensors
    else:
        joining = _Trajectories(
            prompt, slices.prompts, [ends_of(one.tokens) for one in made], include_last=include_last
        )
        for course in compiled.courses:
            name = course.save.name
            fetches = [one.tensors.pop(name) for one in made]
            found[name] = joining.joined(course, slices.axes[name], fetches)
        files = [one.save for one in compiled.courses if has_file(one, joining.missed(one))]
        write_files(files, found)
    return Generated(tokens, found, added_up([one.report for one in made]))


def _seeds(seed: int | None, count: int) -> list[int | None]:
    """A seed for each slice, so that no two of them draw the same numbers."""
    if seed is None:
        return [None] * count
    drawn = torch.randint(2**62, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [seed, *drawn[1:]]


class _Slices(Generic[_Made]):
    """A batch cut into slices of rows, with the graph that each of them runs; all is looked at before any runs."""

    def __init__(
        self,
        compiler: Compiler,
        graph: Graph,
        compiled: _Made,
        prompt: Prompt,
        batch_size: int,
        make: Callable[[Graph], _Made],
    ) -> None:
        anatomy = compiler.anatomy
        self.compiler = compiler
        self.rows = prompt.sizes["B"]
        self.has_results = anatomy.mesh is None or anatomy.mesh.has_results
        check_fits(graph, compiled, prompt)
        check_constants(graph)
        sliced = slice_rows(graph, prompt.sizes, ragged=prompt.ragged, type_of=anatomy.type_of)
        self.axes = sliced.axes
        self.row_constants = sliced.rows
        starts = range(0, self.rows, batch_size)
        self.bounds = [(start, min(start + batch_size, self.rows)) for start in starts]
        self.prompts = [prompt.rows(*bounds) for bounds in self.bounds]
        # Constants with rows stand behind those that were recorded, and have other numbers in each slice.
        self.constants = graph.constants
        self.compiled: _Made = make(sliced.graph)
        self.graph = sliced.graph
        for bounds, part in zip(self.bounds, self.prompts, strict=True):
            with self._naming(*bounds):
                check_fits(self.graph, self.compiled, part)
        if sliced.before is not None and anatomy.mesh is not None:
            raise graph.blame(
                RowsMeetError(
                    "with batch_size=, what each row has of a constant is cut from tensors that are there before the "
                    "run, and here it is computed on ranks",
                    instead="compute it before the block",
                ),
                0,
            )
        self.computed = {} if sliced.before is None else self._run_before(sliced.before)

    def _run_before(self, before: Graph) -> Mapping[str, torch.Tensor]:
        compiled = self.compiler.compile(before)
        whole = replace(before, constants=self.constants)
        found = self.compiler.run(whole, compiled, self.prompts[0]).tensors
        return {name: fetch() for name, fetch in found.items()}

    def each(self, run: Callable[[Graph, Prompt], _Ran]) -> list[_Ran]:
        """What running each slice's graph on its prompt gives, with a bar where somebody is looking."""
        sizes = [stop - start for start, stop in self.bounds]
        found: list[_Ran] = []
        for bounds, part in watched(list(zip(self.bounds, self.prompts, strict=True)), sizes, "row"):
            with self._naming(*bounds):
                found.append(run(self._graph_of(*bounds), part))
        return found

    def _graph_of(self, start: int, stop: int) -> Graph:
        if not self.row_constants:
            return replace(self.graph, constants=self.constants)
        own: list[Captured] = []
        for constant in self.row_constants:
            if constant.source is None:
                tensor, version = self.computed[constant.name], None
            else:
                captured = cast(Captured, self.constants[constant.source])
                tensor, version = captured.tensor, captured.version
            cut = tensor.narrow(constant.axis, start, stop - start)
            own.append(Captured(cut, constant.type, version))
        return replace(self.graph, constants=(*self.constants, *own))

    @contextmanager
    def _naming(self, start: int, stop: int) -> Iterator[None]:
        """Adds to what goes wrong which rows it went wrong with."""
        try:
            yield
        except Exception as error:
            rows = f"rows {start} to {stop - 1}" if stop - start > 1 else f"row {start}"
            error.add_note(f"It went wrong in {rows} of {self.rows}.")
            raise


# --- one result of many ----------------------------------------------------------------------------------------------


def _joined(parts: Sequence[Any], axis: int, *, by_row: bool) -> Any:
    """What slices saved as what the batch would have: a list with one tensor for each row, or one tensor."""
    if not by_row:
        return torch.cat(list(parts), axis)
    return [row for part in parts for row in _rows(part, axis)]


def _rows(part: Any, axis: int) -> list[torch.Tensor]:
    """The rows of a slice, each as a tensor of its own."""
    if not isinstance(part, torch.Tensor):
        return list(part)
    return [
        part.narrow(axis, row, 1).clone(memory_format=torch.contiguous_format)
        for row in range(part.shape[axis])
    ]


class _Trajectories:
    """Puts together what slices of a generation saved, whose rows end at different steps."""

    def __init__(
        self, prompt: Prompt, prompts: Sequence[Prompt], ends: Sequence[Ends], *, include_last: bool
    ) -> None:
        self.prompt, self.prompts = prompt, prompts
        self.include_last = include_last
        self.each = ends
        self.ends = Ends(tuple(steps for one in ends for steps in one.steps))

    def missed(self, course: Course) -> Fetch | None:
        """What reading a save does that no row came to."""
        return missed(course, self.prompt, self.ends, include_last=self.include_last)

    def joined(self, course: Course, axis: int | None, fetches: Sequence[Fetch]) -> Fetch:
        """A save over all rows."""
        absent = self.missed(course)
        if absent is not None:
            return absent
        if axis is None:
            return fetches[0]
        if course.once:
            value = self._once(course, axis, fetches)
        elif course.axis is not None:
            value = self._along_positions(course, axis, [fetch() for fetch in fetches])
        else:
            value = self._over_steps(course, axis + 1, [fetch() for fetch in fetches])
        return partial(same, value)

    def _once(self, course: Course, axis: int, fetches: Sequence[Fetch]) -> Any:
        """A save of one step, to which not every slice may have come."""
        assert course.window is not None
        start, type_ = course.window.start, course.type
        axes = [place for place in type_.padded_axes if start == 0 or place not in type_.position_axes]
        by_row = self.prompt.ragged and bool(axes)
        parts = [
            None if missed(course, part, ends) is not None else fetch()
            for part, ends, fetch in zip(self.prompts, self.each, fetches, strict=True)
        ]
        if any(part is None for part in parts):
            at = next(number for number, part in enumerate(parts) if part is not None)
            known, length = _rows(parts[at], axis)[0], self.prompts[at].lengths[0]
            shifted = [place + course.save.stacked for place in axes]
            for number, part in enumerate(self.prompts):
                if parts[number] is None:
                    lacking = [_lacking(known, shifted, own - length) for own in part.lengths]
                    parts[number] = lacking if by_row else torch.cat(lacking, axis)
        return _joined(parts, axis, by_row=by_row)

    def _along_positions(self, course: Course, axis: int, parts: Sequence[Any]) -> Any:
        """Positions go on from step to step: one tensor where all rows have as many, else one for each row."""
        assert course.window is not None
        assert course.axis is not None
        along = course.axis + course.save.stacked
        lengths = {
            tensor.shape[along] for part in parts for tensor in ([part] if torch.is_tensor(part) else part)
        }
        padded = course.window.start == 0 and self.prompt.ragged
        return _joined(parts, axis, by_row=padded or len(lengths) > 1)

    def _over_steps(self, course: Course, axis: int, parts: Sequence[torch.Tensor]) -> Any:
        """Steps have an axis of their own, as long as the longest row's."""
        most = max(part.shape[0] for part in parts)
        whole: list[torch.Tensor] = []
        for part in parts:
            if part.shape[0] < most:
                rest = part.new_full((most - part.shape[0], *part.shape[1:]), missing_number(part.dtype))
                part = torch.cat([part, rest])
            whole.append(part)
        return torch.cat(whole, axis)


def _lacking(known: torch.Tensor, axes: Sequence[int], more: int) -> torch.Tensor:
    """What a row has of a step to which it did not come: a row of another length that did is ``known``."""
    shape = list(known.shape)
    for axis in axes:
        shape[axis] += more
    return known.new_full(shape, missing_number(known.dtype))
