"""In which generation steps the values of a graph are there, and what that does not allow.

The rules hold for graphs of generations. In a single forward pass there is one step, and nothing of this matters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from tracelens.ir import dims
from tracelens.ir.dims import BATCH, KEY, POSITION
from tracelens.ir.graph import Graph
from tracelens.ir.ops import (
    Apply,
    Call,
    Const,
    Index,
    IndexPut,
    Op,
    Param,
    Read,
    Ref,
    Save,
    Selector,
    Transfer,
    Write,
    operands,
    results,
)
from tracelens.ir.sites import Site
from tracelens.ir.types import TensorType
from tracelens.ir.windows import EVERY_STEP, PREFILL, ApartError, StepWindow, together

WindowOf = Callable[[int], StepWindow | None]


def steps_of(site: Site) -> StepWindow:
    """The steps in which a site of a generation is meant."""
    return EVERY_STEP if site.steps is None else site.steps


def made_in(op: Op, window_of: WindowOf, types: Mapping[int, TensorType]) -> StepWindow | None:
    """In which steps an operation is done; ``None`` where no site has a part in it.

    Raises :class:`~tracelens.ir.windows.ApartError` where its operands are in no step there together.
    """
    match op:
        case Const() | Param():
            return None
        case Read():
            return steps_of(op.site)
        case Write():
            window = steps_of(op.site)
            if isinstance(op.value, Ref):
                _require_written(op.site, window, window_of(op.value.id))
                _require_positions(window, (op.value.id,), window_of, types)
            return window
        case _:
            used = operands(op)
            window = together(found for value in used if (found := window_of(value)) is not None)
            if isinstance(op, Index | IndexPut) and any(isinstance(item, Selector) for item in op.index):
                # Tokens are those of the prompt, which one step is over.
                if window is not None and not PREFILL.within(window):
                    raise ApartError(f"tokens of the prompt are asked of a value of {window.words}")
                window = PREFILL
            if window is not None:
                _require_positions(window, used, window_of, types)
            return window


def _require_written(site: Site, window: StepWindow, made: StepWindow | None) -> None:
    if made is None or window.within(made):
        return
    if made.single:
        if made.start <= window.start:
            return
        raise ApartError(f"{site.always} is written in {window.words} with a value of {made.words}")
    raise ApartError(
        f"{site.always} is written in {window.words} with a value that is there in {made.words} only"
    )


def _require_positions(
    window: StepWindow, used: tuple[int, ...], window_of: WindowOf, types: Mapping[int, TensorType]
) -> None:
    """Positions of one step are no positions of another."""
    for value in used:
        made = window_of(value)
        if made is not None and made.single and made != window and types[value].symbols & {POSITION, KEY}:
            raise ApartError(
                f"%{value} : {types[value]} holds the positions of {made.words}, and is used in {window.words}"
            )


def complaints_about_steps(graph: Graph) -> Iterator[tuple[int, str]]:
    """What is wrong with a graph as one for generation: the operation, and the problem."""
    found: dict[int, StepWindow | None] = {}
    for number, op in enumerate(graph.ops):
        try:
            window = made_in(op, found.__getitem__, graph.types)
        except ApartError as error:
            yield number, str(error)
            return
        if isinstance(op, Save):
            if len({found[value] for value in op.values}) > 1:
                yield number, "values of different steps cannot be stacked"
            elif problem := unsavable(graph.types[op.values[0]], window):
                yield number, problem
        found.update(dict.fromkeys((value for value, _ in results(op)), window))


def unsavable(type_: TensorType, window: StepWindow | None, *, rows: int = 1) -> str | None:
    """Why the values that a generation of so many rows makes of this type cannot be put together, if they cannot."""
    if window is None or window.single:
        return None
    if KEY in type_.symbols:
        return f"{type_} has an axis of keys, of which there are more in every step"
    if [dim for dim in type_.shape if POSITION in dims.symbols(dim)] not in ([], [dims.P]):
        return f"{type_} holds the positions of a step in a way that cannot be continued"
    if rows > 1 and [dim for dim in type_.shape if BATCH in dims.symbols(dim)] != [dims.B]:
        return f"{type_} is made of several rows, of which some may have ended before others"
    return None


def names_steps(graph: Graph) -> bool:
    """Is the graph about some steps of a generation?"""
    return any(isinstance(op, Read | Write) and op.site.steps is not None for op in graph.ops)


def uncapturable(graph: Graph) -> tuple[str, ...]:
    """What of a planned graph cannot be captured in a CUDA graph: what waits for the host, or for another device."""
    found: dict[str, None] = {}
    for op in graph.ops:
        match op:
            case Apply():
                found["tl.apply runs Python"] = None
            case Transfer():
                found["values go from device to device"] = None
            case Call() if op.function.startswith("torch.linalg."):
                found[f"{op.function} asks the device whether it succeeded"] = None
            case _:
                pass
    return tuple(found)
