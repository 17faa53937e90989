"""Which function is meant, and what comes out of it: the one file of this floor that imports torch.

Rules written by hand (:mod:`tracelens.ir.rules`) answer first; torch itself, on meta tensors, answers for everything
else and has the last word on every refusal. Answers are remembered.
"""

from __future__ import annotations

import importlib
import inspect
import math
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from types import EllipsisType
from typing import Any, cast

import torch

from tracelens import readout, readout_distance
from tracelens.errors import DtypeError, ForbiddenFunctionError, UnsupportedFunctionError
from tracelens.ir import calls, dims
from tracelens.ir.abstract import AbstractArg, AbstractKwargs, Inferred
from tracelens.ir.dims import Sizes, Sym
from tracelens.ir.functions import (
    COMPARISONS,
    CONVERSIONS,
    FUNCTIONS,
    OPERATORS,
    SYNONYMS,
    UNARY_OPERATORS,
    nearest,
)
from tracelens.ir.inference import Stuff, Typing
from tracelens.ir.misfit import Refused
from tracelens.ir.ops import Arg, Slice, Special
from tracelens.ir.refused import refusal
from tracelens.ir.rules_index import AbstractIndex, infer_index, infer_index_put
from tracelens.ir.types import DType, TensorType

__all__ = [
    "AbstractArg", "AbstractIndex", "AbstractKwargs", "Element", "Inferred", "canonical_call", "dtype_of", "infer_call",
    "infer_index", "infer_index_put", "memo_clear", "name_of", "on_elements", "refusal_of", "resolve",
    "static_argument", "torch_dtype",
]  # fmt: skip

# --- dtypes ------------------------------------------------------------------------------------------------------

_TORCH: dict[DType, torch.dtype] = {
    dtype: cast("torch.dtype", getattr(torch, dtype.value)) for dtype in DType
}
_OURS: dict[torch.dtype, DType] = {theirs: ours for ours, theirs in _TORCH.items()}


def torch_dtype(dtype: DType) -> torch.dtype:
    return _TORCH[dtype]


def dtype_of(dtype: torch.dtype) -> DType:
    """torch's dtype as a graph holds it; :class:`DtypeError` for one that no graph can hold."""
    found = _OURS.get(dtype)
    if found is None:
        raise DtypeError(
            f"a graph cannot hold {dtype}", instead="value.to(torch.float32), or another common dtype"
        )
    return found


# --- names and functions -----------------------------------------------------------------------------------------


def leaf(value: torch.Tensor) -> torch.Tensor:
    """The same numbers as a tensor of its own for autograd: below it nothing is differentiated unless it already was.

    A value that depends on another leaf still does, but what used it before does not use this one.
    """
    return value.view_as(value) if value.requires_grad else value.detach().requires_grad_()


def masked_mean(value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean over the positions where ``mask`` [B, P] is true: [B, P, ...] to [B, ...]; nan for a row without any."""
    chosen = mask.reshape(*mask.shape, *(1,) * (value.ndim - 2))
    # Where, not multiplication: what stands at padding may be infinite.
    kept = torch.where(chosen, value, torch.zeros((), dtype=value.dtype, device=value.device))
    wide = torch.promote_types(value.dtype, torch.float32)
    total = kept.sum(1, dtype=wide)
    return (total / chosen.sum(1).to(wide)).to(value.dtype)


_OURS_BY_NAME: Mapping[str, Callable[..., Any]] = {
    "tracelens.leaf": leaf,
    "tracelens.masked_mean": masked_mean,
    **{
        f"tracelens.{one.__name__}": one
        for one in (
            readout.lens,
            readout.lens_targets,
            readout.lens_part,
            readout.lens_joined,
            readout_distance.lens_distance,
        )
    },
}


def _einops(name: str) -> Callable[..., Any]:
    function = getattr(importlib.import_module("einops"), name)

    def call(first: Any, *rest: Any, **named: Any) -> Any:
        # einops takes several tensors as a list, a graph holds them as a tuple.
        several = isinstance(first, tuple)
        return function(list(cast("tuple[Any, ...]", first)) if several else first, *rest, **named)

    return call


def _attribute(name: str) -> Any:
    found: Any = torch
    for part in name.split(".")[1:]:
        found = getattr(found, part)
    return found


@cache
def resolve(name: str) -> Callable[..., Any]:
    """The function of the catalogue with that name; :class:`ForbiddenFunctionError` for any other."""
    if name not in FUNCTIONS:
        near = ", ".join(nearest(name))
        raise ForbiddenFunctionError(
            f"{name} is not a function that a graph can hold",
            instead=f"did you mean {near}?" if near else None,
        )
    if name.startswith("tracelens."):
        return _OURS_BY_NAME[name]
    if name.startswith("einops."):
        return _einops(name.removeprefix("einops."))
    try:
        return _attribute(name)
    except AttributeError:
        raise ForbiddenFunctionError(f"this torch ({torch.__version__}) has no {name}") from None


def _spellings() -> list[str]:
    names = [*FUNCTIONS, *SYNONYMS, *sorted(calls.DROPOUTS)]
    methods = [name.removeprefix("torch.") for name in names if name.count(".") == 1] + list(CONVERSIONS)
    words = [*OPERATORS, *(f"r{word}" for word in OPERATORS), *UNARY_OPERATORS, *COMPARISONS]
    getters = [f"torch.Tensor.{getter}.__get__" for getter in calls.GETTERS]
    return [
        *names,
        *(f"torch.Tensor.{m}" for m in methods),
        *(f"torch.Tensor.__{w}__" for w in words),
        *getters,
    ]


@lru_cache(maxsize=1)
def _spelling_of() -> Mapping[Any, str]:
    """Every function and method that can be recorded, with how it is spelt."""
    found: dict[Any, str] = {function: name for name, function in _OURS_BY_NAME.items()}
    for spelling in _spellings():
        if spelling.startswith("tracelens."):
            continue
        try:
            if spelling.startswith("einops."):
                function = getattr(importlib.import_module("einops"), spelling.removeprefix("einops."))
            else:
                function = _attribute(spelling)
        except AttributeError:
            continue
        # Some functions are found under two names; the one in the catalogue counts.
        found.setdefault(function, spelling)
    return found


def _spelling(function: object) -> str | None:
    try:
        return _spelling_of().get(function)
    except TypeError:  # not hashable, so none of ours
        return None


def name_of(function: object) -> str | None:
    """The catalogue's name for a callable, as it arrives in ``__torch_function__``; ``None`` if it has none."""
    spelling = _spelling(function)
    return None if spelling is None else calls.supported_spelling(spelling)


@lru_cache(maxsize=4096)
def _public_name(function: Any) -> str | None:
    name = cast("str | None", cast("Any", torch.overrides).resolve_name(function))
    if name is None:
        module = getattr(function, "__module__", None) or ""
        short = getattr(function, "__name__", "")
        plain = f"torch.{short}"
        name = plain if getattr(torch, short or "_", None) is function else f"{module}.{short}"
    return name.replace("torch.functional.", "torch.")


def refusal_of(function: object) -> tuple[Any, str, str | None] | None:
    """Why a callable is refused: the reason, its words, and what to write instead; ``None`` if that is not known."""
    try:
        name = _public_name(function)
    except TypeError:
        return None
    found = None if name is None else refusal(name)
    return None if found is None else (found[0], found[0].value, found[1])


@lru_cache(maxsize=4096)
def _defaults(function: Any) -> Mapping[str, object]:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # most of torch is built in and has no signature
        return dict[str, object]()
    return {name: parameter.default for name, parameter in parameters.items()}


def canonical_call(
    function: object, args: tuple[object, ...], kwargs: Mapping[str, object]
) -> tuple[str, tuple[object, ...], dict[str, object]]:
    """The one spelling of a call: its name in the catalogue, its arguments in that function's order.

    Raises the named error of whatever makes the call one that a graph cannot hold.
    """
    spelling = _spelling(function)
    if spelling is None:
        raise calls.refused(_public_name(function) or repr(function))
    defaults: Mapping[str, object] = _defaults(function) if kwargs else {}
    named = {
        key: _plain(value) for key, value in kwargs.items() if not _is_default(value, defaults.get(key, ...))
    }
    return calls.spelt(spelling, tuple(_plain(arg) for arg in args), named)


def _plain(arg: object) -> object:
    return dtype_of(arg) if isinstance(arg, torch.dtype) else arg


def _is_default(value: object, default: object) -> bool:
    return value is default or (
        isinstance(value, bool | int | float | str) and type(value) is type(default) and value == default
    )


def static_argument(arg: object) -> Arg:
    """A Python argument that is no tensor, as the graph holds it."""
    if arg is None or isinstance(arg, str | DType | EllipsisType | Sym | Slice | Special | complex):
        return arg
    if isinstance(arg, bool):
        return arg
    if isinstance(arg, int):
        return int(arg)
    if isinstance(arg, float):
        if math.isnan(arg):
            return Special.NAN
        return Special.NEGATIVE_ZERO if arg == 0.0 and math.copysign(1, arg) < 0 else float(arg)
    if isinstance(arg, torch.dtype):
        return dtype_of(arg)
    if isinstance(arg, slice):
        cut = cast("slice[object, object, object]", arg)
        bounds = (cut.start, cut.stop, cut.step)
        if all(bound is None or isinstance(bound, int) for bound in bounds):
            return Slice(*(int(bound) if isinstance(bound, int) else None for bound in bounds))
    if isinstance(arg, list | tuple):
        return tuple(static_argument(part) for part in cast("Sequence[object]", arg))
    if isinstance(dim := getattr(cast("Any", arg), "dim", None), Sym):
        return dim  # the size of an axis in a recording without a prompt
    hint = "leave devices out: the plan decides where values live" if isinstance(arg, torch.device) else None
    given = cast("Any", arg)
    if callable(given) and not isinstance(given, type):
        name: str = (
            type(given).__name__ if isinstance(given, torch.nn.Module) else getattr(given, "__name__", "f")
        )
        hint = f"what it gives for a value: {name}(model.layers[i].mlp_in); tl.apply runs any function on real tensors"
    raise UnsupportedFunctionError(
        f"a graph cannot hold an argument of type {type(cast('Any', arg)).__name__}", instead=hint
    )


# --- torch on meta tensors ---------------------------------------------------------------------------------------


def _regular(shape: tuple[int, ...], *, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Ones, and twos on the diagonal of square matrices, so that they have an inverse."""
    value = torch.ones(shape, dtype=dtype, device=device)
    *_, rows, columns = (0, 0, *shape)
    square = len(shape) >= 2 and rows == columns > 1
    return value + torch.eye(rows, dtype=dtype) if square and dtype.is_floating_point else value


def _concrete(arg: AbstractArg, sizes: Sizes, stuff: Stuff) -> Any:
    if isinstance(arg, TensorType):
        fill, device = _STUFF[stuff]
        return fill(arg.sizes(sizes), dtype=_TORCH[arg.dtype], device=device)
    if isinstance(arg, Sym):
        return dims.evaluate(arg, sizes)
    if isinstance(arg, DType):
        return _TORCH[arg]
    if isinstance(arg, Special):
        return arg.number
    if isinstance(arg, tuple):
        return tuple(_concrete(part, sizes, stuff) for part in arg)
    if isinstance(arg, Slice):
        return slice(arg.start, arg.stop, arg.step)
    return arg


# The filters of warnings belong to all threads, so that only one may change them at a time.
_ONE_AT_A_TIME = threading.Lock()
_LINALG_ERROR = cast("type[Exception]", cast("Any", torch.linalg).LinAlgError)
_STUFF: Mapping[Stuff, tuple[Callable[..., torch.Tensor], str]] = {
    Stuff.META: (torch.empty, "meta"),
    Stuff.ONES: (_regular, "cpu"),
    Stuff.ZEROS: (torch.zeros, "cpu"),
}


def _run(
    name: str, args: tuple[AbstractArg, ...], kwargs: AbstractKwargs, sizes: Sizes, stuff: Stuff
) -> tuple[tuple[TensorType, ...], bool]:
    function = resolve(name)
    try:
        # A size that no operand has cannot be made a number.
        plain = [_concrete(arg, sizes, stuff) for arg in args]
        named = {key: _concrete(value, sizes, stuff) for key, value in kwargs}
        with torch.no_grad(), _ONE_AT_A_TIME, warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # about sizes that may be ours alone; the real run says what there is to say
            result = function(*plain, **named)
    except (
        RuntimeError, LookupError, ValueError, TypeError, AttributeError, AssertionError, ArithmeticError,
    ) as error:  # fmt: skip
        raise Refused(error, of_numbers=isinstance(error, _LINALG_ERROR)) from None
    parts = (result,) if isinstance(result, torch.Tensor) else result
    several: tuple[Any, ...] = (
        tuple(cast("Sequence[Any]", parts)) if isinstance(parts, list | tuple) else (None,)
    )
    if not all(isinstance(part, torch.Tensor) for part in several):
        raise UnsupportedFunctionError(f"{name} does not give tensors with these arguments")
    types = tuple(TensorType(dtype_of(part.dtype), tuple(part.shape)) for part in several)
    return types, isinstance(result, torch.Tensor)


_typing = Typing(_run, torch.get_default_dtype, lambda: dtype_of(torch.get_default_dtype()))


def infer_call(
    name: str, args: tuple[AbstractArg, ...], kwargs: AbstractKwargs = (), sizes: Sizes | None = None
) -> Inferred:
    """The types of a call's results.

    ``sizes`` are the numbers of the symbols where they are known. Raises :class:`ShapeError`, :class:`DtypeError` or
    the named error of what a graph cannot hold.
    """
    return _typing.infer(name, args, kwargs, sizes)


@dataclass(frozen=True, slots=True)
class Element:
    """One number of a tensor."""

    number: bool | int | float
    dtype: DType


def on_elements(
    name: str, args: Sequence[Arg | Element], kwargs: Mapping[str, Arg | Element]
) -> tuple[bool | int | float, ...] | None:
    """What an element-by-element function makes of single numbers; ``None`` where that is no real number."""

    def given(arg: Arg | Element) -> Any:
        if isinstance(arg, Element):
            return torch.tensor([arg.number], dtype=_TORCH[arg.dtype])
        return _concrete(cast("AbstractArg", arg), {}, Stuff.META)

    try:
        with torch.no_grad():
            made = resolve(name)(*map(given, args), **{key: given(arg) for key, arg in kwargs.items()})
    except (RuntimeError, LookupError, ValueError, TypeError):
        return None
    parts: tuple[Any, ...] = (made,) if isinstance(made, torch.Tensor) else tuple(made)
    if not all(
        isinstance(part, torch.Tensor) and part.numel() == 1 and not part.is_complex() for part in parts
    ):
        return None
    return tuple(part.item() for part in parts)


def memo_clear() -> None:
    """Forgets all answers."""
    _typing.forget()
