"""``tl.sweep``: one program at many points, several of them in one batch where that is the same."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tracelens.compiled import Compiled
from tracelens.compiling import Compiler
from tracelens.constants import Captured
from tracelens.errors import Blaming, OptionError, SweepError, TracelensError, UnknownConstantError
from tracelens.inputs import Inputs
from tracelens.ir.graph import Graph
from tracelens.ir.ops import Apply, Const, Keep, Save, Write, operands, results
from tracelens.ir.passes.lift_constants import Lifted, Unliftable, lift_constants
from tracelens.ir.types import TensorType
from tracelens.location import here
from tracelens.named import NamedConstant, fitted
from tracelens.operand import Operand
from tracelens.plain_model import PlainProgram
from tracelens.progress import watched
from tracelens.prompted import Prompt
from tracelens.results import Results, SavedTensor
from tracelens.tracing import Program
from tracelens.view import Line, Stack, View

if TYPE_CHECKING:
    import pandas

Point = Mapping[str, Captured]

# What one batch holds by default: enough to keep a device busy, little enough for its logits to stay small.
_TOKENS = 1024
_POINTS = 64


class _Swept(dict[str, torch.Tensor]):
    """What was swept, by name."""

    def __missing__(self, name: str) -> torch.Tensor:
        raise UnknownConstantError(
            f"{name!r} was not swept; swept: {', '.join(map(repr, self))}",
            at=here(),
            instead=f"sweep.swept[{next(iter(self))!r}]; what was saved is sweep[name]",
        )


class Sweep(Results):
    """What a program saved at every point of a sweep, by name.

    ``sweep["logits"]`` has a first axis ``point``, then the axes that one run gives; for prompts of different lengths
    it is a list with such a tensor for each prompt. ``sweep.swept["v"]`` holds what was swept, a point a row.
    """

    def __init__(
        self,
        described: Sequence[SavedTensor],
        tensors: Mapping[str, Callable[[], Any]],
        values: Mapping[str, torch.Tensor],
        runs: int,
        one_by_one: str | None,
    ) -> None:
        super().__init__(described, tensors)
        self.swept: Mapping[str, torch.Tensor] = _Swept(values)
        """What each constant was at each point: a tensor with the points as its first axis."""
        self.runs = runs
        """How often the model ran."""
        self.one_by_one = one_by_one
        """Why the points ran one by one; ``None`` where several ran together."""

    @property
    def points(self) -> int:
        """How many points there are."""
        return len(next(iter(self.swept.values())))

    def to_pandas(self, name: str | None = None) -> pandas.DataFrame:
        """A table: with ``name`` one row per number of that tensor, its axes and the swept numbers as columns.

        Swept tensors have no column of their own: ``point`` is their place in :attr:`swept`. Without a name, one
        row per tensor.
        """
        frame = super().to_pandas(name)
        if name is None:
            return frame
        place = list(frame.columns).index("point")
        for key, tensor in self.swept.items():
            if tensor.ndim == 1:
                place += 1
                frame.insert(place, key, tensor.numpy()[frame["point"].to_numpy()])
        return frame

    def _view(self) -> View:
        swept = ", ".join(f"{name} {_span(tensor)}" for name, tensor in self.swept.items())
        runs = f"{self.runs} run{'s' if self.runs != 1 else ''}"
        why = f" ({self.one_by_one})" if self.one_by_one else ""
        return Stack((Line(f"sweep of {self.points} points in {runs}{why}: {swept}"), super()._view()))


def _span(tensor: torch.Tensor) -> str:
    if tensor.ndim > 1 or not tensor.is_floating_point():
        return str(list(tensor.shape[1:])) if tensor.ndim > 1 else f"[{len(tensor)}]"
    low, high = (bound.item() for bound in tensor.aminmax())
    return f"{low:g} to {high:g}"


def sweep(
    program: Program | PlainProgram,
    prompts: Any,
    *,
    product: bool = False,
    batch_size: int | None = None,
    progress: bool | None = None,
    **values: Any,
) -> Sweep:
    """Runs a program at many points: ``tl.sweep(program, prompt, strength=[0.0, 1.0, 2.0])``.

    ``values``: for each named constant of the program a list of values, or a tensor with a value in each row; a single
    value holds at all points. Lists go together, point by point; ``product=True`` makes every combination, the first
    name slowest. ``prompts``: what the program takes, one prompt or a list of them; for a program of a plain model
    (:func:`tracelens.wrap`) the argument of its forward, a tuple of several, or a dict by name. ``batch_size``: how
    many points run together at most; by default as many as make 1024 tokens, and 64 at most. ``progress``: a bar on the
    terminal or in the notebook; by default where there is one.

    Points run together where no operation lets the rows of a batch meet and the swept constants take part element by
    element; else, and for plain models, one by one, and ``sweep.one_by_one`` says why. One by one the results are those
    of ``program(prompts, **point)`` to the last bit. Together they are the same up to the rounding of larger matrix
    products: about 1e-5 of the largest number of a tensor in float32, 1e-2 in bfloat16.

    Raises :class:`~tracelens.errors.SweepError` for lists of different lengths, for nothing to sweep, and for constants
    that take part in nothing; :class:`~tracelens.errors.UnknownConstantError`,
    :class:`~tracelens.errors.ShapeError` and :class:`~tracelens.errors.DtypeError` for values that fit no constant, all
    before the model runs.

    >>> results = tl.sweep(program, "The capital of France is", strength=[0.0, 1.0, 2.0])     # doctest: +SKIP
    >>> results["logits"].shape                                                               # doctest: +SKIP
    torch.Size([3, 1, 49152])
    """
    inputs: Inputs | None = None
    if isinstance(program, PlainProgram):
        program, inputs = program._swept(prompts)
    if not isinstance(program, Program):  # pyright: ignore[reportUnnecessaryIsInstance]  # users may not be typed
        raise OptionError(
            f"tl.sweep takes a program, not a {type(program).__name__}",
            at=here(),
            instead="tl.sweep(model.compile(r), prompt, v=[...])",
        )
    if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
        raise OptionError(
            f"batch_size={batch_size!r} is not a positive whole number of points",
            at=here(),
            instead="batch_size=8, or nothing",
        )
    with Blaming(here()):
        points = _points(program, values, product=product)
        for save in program.graph.saves:
            if save.to is not None:
                raise SweepError(
                    f"the program writes {save.name!r} to a file, which each point would write again",
                    instead='value.save("name") without to=, and sweep.to_safetensors(path)',
                )
        one_by_one = "batch_size=1" if batch_size == 1 else None
        if inputs is not None:
            prompt: Any = inputs
            size, one_by_one = 1, one_by_one or "inputs of a plain model have no rows that are known"
        else:
            prompt = program._model.prepare(prompts)
            program._require_fit(prompt)
            size = batch_size or max(1, min(_POINTS, _TOKENS // (prompt.sizes["B"] * prompt.sizes["P"])))
            size = min(size, len(points))
        _require_effect(program, values)
        lifted = lift_constants(program.graph, frozenset(points[0])) if size > 1 else None
        if isinstance(lifted, Unliftable):
            one_by_one, lifted = lifted.reason, None
        compiler: Compiler = program._compiler
        if lifted is None:
            size = 1
            run = partial(_alone, program, compiler, prompt)
        else:
            run = _Together(program, compiler, lifted, prompt)
        chunks = [points[start : start + size] for start in range(0, len(points), size)]
        parts = [run(chunk) for chunk in watched(chunks, list(map(len, chunks)), "point", progress)]
    tensors = {save.name: _joined([part[save.name] for part in parts]) for save in program.graph.saves}
    described = tuple(
        replace(
            saved,
            axes=("point", *saved.axes),
            type=TensorType(saved.type.dtype, (len(points), *saved.type.shape)),
        )
        for saved in program._compiled.described
    )
    swept = {name: torch.stack([point[name].tensor.detach().cpu() for point in points]) for name in points[0]}
    fetch = {name: partial(_same, tensor) for name, tensor in tensors.items()}
    return Sweep(described, fetch, swept, len(chunks), one_by_one)


def _require_effect(program: Program, values: Mapping[str, Any]) -> None:
    """Refuses a sweep none of whose lists can change anything: nothing that is saved or written is made of them."""
    graph = program.graph
    needed: set[int] = set()
    for op in reversed(graph.ops):
        if isinstance(op, Save | Write | Apply) or any(value in needed for value, _ in results(op)):
            needed.update(operands(op))
    used = {op.name for op in graph.ops if isinstance(op, Const) and op.out in needed}
    listed = [name for name in values if _several(program.constants[name], values[name]) is not None]
    if used & set(listed):
        return
    idle = listed[0]
    at = next(number for number, op in enumerate(graph.ops) if isinstance(op, Const) and op.name == idle)
    raise graph.blame(
        SweepError(
            f"the constant {idle!r} takes part in nothing that the program saves or writes, so every point would be "
            "the same",
            instead=f"{idle} in an operation of the recording: model.layers[i].resid_post += {idle}",
        ),
        at,
    )


def _same(value: Any) -> Any:
    return value


# --- points ----------------------------------------------------------------------------------------------------------


def _points(program: Program, values: Mapping[str, Any], *, product: bool) -> list[Point]:
    """The points as the user means them: each name with the tensor that it has there."""
    lists: dict[str, list[Captured]] = {}
    held: dict[str, Captured] = {}
    for name, value in values.items():
        entry = program.constants[name]
        several = _several(entry, value)
        if several is None:
            held[name] = fitted(entry, value)
            continue
        if not several:
            raise SweepError(
                f"the list of values for {name!r} is empty", instead=f"{name}=[...] with a value"
            )
        lists[name] = [_fitted_at(entry, number, part) for number, part in enumerate(several)]
    if not lists:
        known = ", ".join(f"{name}=[...]" for name in program.constants)
        raise SweepError(
            "there is nothing to sweep: no constant was given several values",
            instead=f"tl.sweep(program, prompt, {known})"
            if known
            else 'v = tl.constant(tensor, name="v") in the recording, and tl.sweep(program, prompt, v=[...])',
        )
    lengths = {name: len(found) for name, found in lists.items()}
    if not product and len(set(lengths.values())) > 1:
        said = ", ".join(f"{length} values for {name!r}" for name, length in lengths.items())
        raise SweepError(
            f"lists of different lengths make no points: {said}",
            instead="lists of one length; or product=True for every combination",
        )
    rows: Iterable[tuple[Captured, ...]] = (
        itertools.product(*lists.values()) if product else zip(*lists.values(), strict=True)
    )
    return [{**dict(zip(lists, row, strict=True)), **held} for row in rows]


def _several(entry: NamedConstant, value: Any) -> Sequence[Any] | None:
    """The values in a list or in the rows of a tensor; ``None`` for a single value."""
    if isinstance(value, Operand) and not value._is_recording():
        value = value._result()
    if isinstance(value, list | tuple | range):
        return list(value)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]  # of anything
    if isinstance(value, Iterator):
        return list(value)
    if isinstance(value, torch.Tensor | np.ndarray) and value.ndim == len(entry.shape) + 1:
        return list(value)
    return None


def _fitted_at(entry: NamedConstant, number: int, value: Any) -> Captured:
    try:
        return fitted(entry, value)
    except TracelensError as error:
        error.problem = f"value {number} of the sweep: {error.problem}"
        raise


# --- runs ------------------------------------------------------------------------------------------------------------


def _at(graph: Graph, constants: Mapping[int, Captured]) -> Graph:
    """The graph with other constants at some places."""
    held = list(graph.constants)
    for index, captured in constants.items():
        held[index : index + 1] = [captured]
    return replace(graph, constants=tuple(held))


def _numbered(program: Program, point: Point) -> dict[int, Captured]:
    return {program.constants[name].index: captured for name, captured in point.items()}


def _alone(program: Program, compiler: Compiler, prompt: Prompt, points: Sequence[Point]) -> dict[str, Any]:
    """A single point, as the program runs it; every tensor with a first axis of one point."""
    (point,) = points
    found = compiler.run(_at(program.graph, _numbered(program, point)), program._compiled, prompt).tensors
    return {name: _with_axis(fetch()) for name, fetch in found.items()}


def _with_axis(tensor: Any) -> Any:
    return tensor[None] if isinstance(tensor, torch.Tensor) else [part[None] for part in tensor]


@dataclass
class _Together:
    """Several points in one batch, each with all the rows of the prompt."""

    program: Program
    compiler: Compiler
    lifted: Lifted
    prompt: Prompt

    def __post_init__(self) -> None:
        held = self.program.graph.constants
        before = self.lifted.before
        if self.compiler.anatomy.elsewhere is not None:
            before = _handed_over(before, self.lifted.rows)
        self.before = replace(before, constants=held)
        self.graph = self.lifted.graph
        self.compiled_before = self._compile(self.before) if self.before.saves else None
        self.compiled = self._compile(self.graph) if self.graph.saves else None
        self.repeated: dict[int, Prompt] = {}

    def _compile(self, graph: Graph) -> Compiled:
        return self.compiler.compile(replace(graph, constants=()))

    def __call__(self, points: Sequence[Point]) -> dict[str, Any]:
        differing = [self._before(point) for point in points]
        found: dict[str, Any] = {
            name: _joined([_with_axis(values[name]) for values in differing]) for name in self.lifted.own
        }
        if self.compiled is None:
            return found
        constants = list(self.program.graph.constants[: self.lifted.first])
        rows = self.prompt.sizes["B"]
        for name, type_ in self.lifted.rows.items():
            tensor = torch.stack([values[name] for values in differing]).repeat_interleave(rows, 0)
            constants.append(Captured(tensor, type_, tensor._version))
        prompt = self._prompt(len(points))
        graph = replace(self.graph, constants=tuple(constants))
        for name, fetch in self.compiler.run(graph, self.compiled, prompt).tensors.items():
            save = next(save for save in self.graph.saves if save.name == name)
            found[name] = _apart(fetch(), len(points), rows, save)
        return found

    def _before(self, point: Point) -> dict[str, Any]:
        if self.compiled_before is None:
            return {}
        graph = _at(self.before, _numbered(self.program, point))
        found = self.compiler.run(graph, self.compiled_before, self.prompt).tensors
        return {name: fetch() for name, fetch in found.items()}

    def _prompt(self, times: int) -> Prompt:
        known = self.repeated.get(times)
        if known is None:
            own = self.prompt
            known = self.repeated[times] = Prompt(own.batch.repeated(times), own.tokenizer, own.owner)
        return known


def _handed_over(graph: Graph, names: Collection[str]) -> Graph:
    """The graph with what its runs hand on coming here: ranks keep nothing between runs."""
    ops = tuple(
        replace(op, keep=Keep.CPU) if isinstance(op, Save) and op.name in names else op for op in graph.ops
    )
    return replace(graph, ops=ops)


def _apart(tensor: Any, points: int, rows: int, save: Save) -> Any:
    """What a batch saved, with the points as a first axis of its own."""
    if not isinstance(tensor, torch.Tensor):  # a list with one tensor for each row
        parts = [[tensor[point * rows + row] for point in range(points)] for row in range(rows)]
        return [torch.stack(part) for part in parts]
    axis = 1 if save.stacked else 0
    shape = (*tensor.shape[:axis], points, rows, *tensor.shape[axis + 1 :])
    return tensor.reshape(shape).movedim(axis, 0).contiguous()


def _joined(parts: Sequence[Any]) -> Any:
    """Tensors with points as their first axis, one after the other."""
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(list(parts)) if len(parts) > 1 else parts[0]
    return [_joined([part[row] for part in parts]) for row in range(len(parts[0]))]
