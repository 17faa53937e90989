"""Which function is meant, and what comes out of it: the one file of this floor that imports torch.

Rules written by hand (:mod:`tracelens.ir.rules`) answer first; torch itself, on meta tensors, answers for everything
else and has the last word on every refusal. Answers are remembered.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from types import EllipsisType
from typing import Any, cast

import torch

from tracelens.errors import (
    DtypeError,
    ForbiddenFunctionError,
    ShapeError,
    UnsupportedFunctionError,
)
from tracelens.ir import calls, dims, memo, rules
from tracelens.ir.abstract import (
    AbstractArg,
    AbstractKwargs,
    Defer,
    Inferred,
    Misfit,
    Sizing,
    Unsettled,
    tensors_in,
)
from tracelens.ir.dims import Sizes, Sym
from tracelens.ir.functions import (
    COMPARISONS,
    CONVERSIONS,
    FUNCTIONS,
    OPERATORS,
    SYNONYMS,
    UNARY_OPERATORS,
    Kind,
    nearest,
)
from tracelens.ir.misfit import Refused, call_text, named_error, speaks_of_dtypes
from tracelens.ir.ops import Arg, Slice, Special
from tracelens.ir.probe import probed
from tracelens.ir.refused import refusal
from tracelens.ir.rules_index import AbstractIndex, infer_index, infer_index_put
from tracelens.ir.types import DType, TensorType

__all__ = [
    "AbstractArg", "AbstractIndex", "AbstractKwargs", "Inferred", "canonical_call", "dtype_of", "infer_call",
    "infer_index", "infer_index_put", "memo_clear", "name_of", "refusal_of", "resolve", "static_argument",
    "torch_dtype",
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


def masked_mean(value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean over the positions where ``mask`` [B, P] is true: [B, P, ...] to [B, ...]; nan for a row without any."""
    chosen = mask.reshape(*mask.shape, *(1,) * (value.ndim - 2))
    # Where, not multiplication: what stands at padding may be infinite.
    kept = torch.where(chosen, value, torch.zeros((), dtype=value.dtype, device=value.device))
    wide = torch.promote_types(value.dtype, torch.float32)
    total = kept.sum(1, dtype=wide)
    return (total / chosen.sum(1).to(wide)).to(value.dtype)


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
    if name == "tracelens.masked_mean":
        return masked_mean
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
    found: dict[Any, str] = {masked_mean: "tracelens.masked_mean"}
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
    name = cast("Callable[[object], str | None]", torch.overrides.resolve_name)(function)
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
    raise UnsupportedFunctionError(
        f"a graph cannot hold an argument of type {type(cast('Any', arg)).__name__}", instead=hint
    )


# --- torch on meta tensors ---------------------------------------------------------------------------------------


def _concrete(arg: AbstractArg, sizes: Sizes, device: str, fill: Any) -> Any:
    if isinstance(arg, TensorType):
        return fill(arg.sizes(sizes), dtype=_TORCH[arg.dtype], device=device)
    if isinstance(arg, Sym):
        return dims.evaluate(arg, sizes)
    if isinstance(arg, DType):
        return _TORCH[arg]
    if isinstance(arg, Special):
        return -0.0
    if isinstance(arg, tuple):
        return tuple(_concrete(part, sizes, device, fill) for part in arg)
    if isinstance(arg, Slice):
        return slice(arg.start, arg.stop, arg.step)
    return arg


def _run(
    name: str,
    args: tuple[AbstractArg, ...],
    kwargs: AbstractKwargs,
    sizes: Sizes,
    device: str = "meta",
    fill: Any = torch.ones,
) -> tuple[tuple[TensorType, ...], bool]:
    """The results' types with numbers for sizes, and whether it is one tensor."""
    function = resolve(name)
    plain = [_concrete(arg, sizes, device, fill) for arg in args]
    named = {key: _concrete(value, sizes, device, fill) for key, value in kwargs}
    try:
        with torch.no_grad():
            result = function(*plain, **named)
    except (
        RuntimeError,
        IndexError,
        ValueError,
        TypeError,
        NotImplementedError,
        AssertionError,
        ArithmeticError,
    ) as error:
        raise Refused(error) from None
    parts = (result,) if isinstance(result, torch.Tensor) else result
    several = tuple(cast("Sequence[Any]", parts)) if isinstance(parts, list | tuple) else (None,)
    if not all(isinstance(part, torch.Tensor) for part in several):
        raise UnsupportedFunctionError(f"{name} does not give tensors with these arguments")
    types = tuple(TensorType(dtype_of(part.dtype), tuple(part.shape)) for part in several)
    return types, isinstance(result, torch.Tensor)


_asked: dict[memo.Key, tuple[TensorType, ...]] = {}


# What numbers these are given has no say in the type. (Some others refuse numbers that an integer cannot hold.)
_NUMBERS_COUNT = ("torch.masked_fill", "torch.full_like", "torch.threshold", "torch.nn.functional.threshold")
_ANY_NUMBER = frozenset(
    function.name
    for function in FUNCTIONS.values()
    if function.kind is Kind.POINTWISE and function.name not in _NUMBERS_COUNT
)
_HALVES = (DType.FLOAT16, DType.BFLOAT16)


def _ask(name: str, args: tuple[AbstractArg, ...], kwargs: AbstractKwargs) -> tuple[TensorType, ...]:
    """torch's word on the dtypes of a tiny call.

    Meta tensors let many dtypes pass for which no device has a kernel, so it is real numbers that are tried. Halves are
    tried on meta tensors too: what a CPU lacks for them, a GPU may have.
    """
    key = (
        torch.get_default_dtype(),
        *memo.key_of(name, args, kwargs, name in _ANY_NUMBER),
    )
    found = _asked.get(key)
    if found is None:
        values = tensors_in((*args, *(value for _, value in kwargs)))
        if len(_asked) > _FULL:
            _asked.clear()
        try:
            found = _run(name, args, kwargs, {}, "cpu")[0]
        except Refused:
            if not any(value.dtype in _HALVES for value in values):
                raise
            found = _run(name, args, kwargs, {})[0]
        _asked[key] = found
    return found


def _by_meta(
    name: str, args: tuple[AbstractArg, ...], kwargs: AbstractKwargs, sizes: Sizes | None, real: Sizes | None
) -> _Entry:
    function = FUNCTIONS[name]
    everything = (*args, *(value for _, value in kwargs))
    shapes = [type_.shape for type_ in tensors_in(everything)]
    single = True

    def run(at: Sizes) -> tuple[TensorType, ...]:
        nonlocal single
        types, single = _run(name, args, kwargs, at)
        return types

    found = probed(run, shapes, _symbols_in(everything), sizes)
    _confirm(name, args, kwargs, found.types, real)
    names = function.results if function.results and len(function.results) == len(found.types) else ()
    mixes = rules.mixes(function, args, kwargs) or bool(found.pins & {dims.POSITION, dims.KEY})
    return _Entry(Inferred(found.types, None if single else names, found.pins, mixes), (), found.limited)


_SMALL = {dims.BATCH: 2, dims.POSITION: 3, dims.KEY: 3}
_FEW = 1 << 18


def _confirm(
    name: str,
    args: tuple[AbstractArg, ...],
    kwargs: AbstractKwargs,
    types: tuple[TensorType, ...],
    real: Sizes | None,
) -> None:
    """Tries the call on real numbers, where those are few: meta tensors let much pass that no device computes."""
    at = real or _SMALL
    values = tensors_in((*args, *(value for _, value in kwargs)))
    if any(value.dtype in _HALVES or math.prod(value.sizes(at)) > _FEW for value in values):
        return
    try:
        try:
            said = _run(name, args, kwargs, at, "cpu")[0]
        except Refused:
            # No index is too large among zeros, and no divisor is zero among ones.
            said = _run(name, args, kwargs, at, "cpu", torch.zeros)[0]
    except Refused as error:
        singular = isinstance(error.error, torch.linalg.LinAlgError)
        if not singular and (
            real is not None or isinstance(error.error, TypeError) or speaks_of_dtypes(str(error))
        ):
            raise
        return
    if said != tuple(TensorType(type_.dtype, type_.sizes(at)) for type_ in types) and real is not None:
        raise UnsupportedFunctionError(
            f"{call_text(name, args, kwargs)}: torch gives another type for these arguments than it promises"
        )


def _symbols_in(args: Sequence[AbstractArg]) -> list[Sym]:
    found: list[Sym] = []
    for arg in args:
        if isinstance(arg, Sym):
            found.append(arg)
        elif isinstance(arg, tuple):
            found += _symbols_in(arg)
    return found


# --- calls -------------------------------------------------------------------------------------------------------


class _Entry:
    """An answer in the memo, with what must hold of the real sizes for it."""

    __slots__ = ("inferred", "least", "limited")

    def __init__(self, inferred: Inferred, least: tuple[tuple[Sym, int], ...], limited: bool) -> None:
        self.inferred = inferred
        self.least = least
        self.limited = limited


_FULL = 100_000
_memo: dict[object, _Entry | None] = {}
_memo_sized: dict[tuple[object, tuple[tuple[str, int], ...]], Inferred] = {}


def memo_clear() -> None:
    """Forgets all answers."""
    _memo.clear()
    _memo_sized.clear()
    _asked.clear()
    memo.forget()


def infer_call(
    name: str, args: tuple[AbstractArg, ...], kwargs: AbstractKwargs = (), sizes: Sizes | None = None
) -> Inferred:
    """The types of a call's results.

    ``sizes`` are the numbers of the symbols where they are known. Raises :class:`ShapeError`, :class:`DtypeError` or
    the named error of what a graph cannot hold.
    """
    if name not in FUNCTIONS:
        raise calls.refused(name)
    key = (torch.get_default_dtype(), memo.key_of(name, args, kwargs, name in _ANY_NUMBER))
    entry = _memo.get(key, ...)
    if isinstance(entry, _Entry) and (sizes is None or not (entry.least or entry.limited)):
        return entry.inferred
    if sizes is not None:
        sized = (key, tuple(sorted(sizes.items())))
        known = _memo_sized.get(sized)
        if known is not None:
            return known
    if len(_memo) + len(_memo_sized) > _FULL:
        memo_clear()
        return infer_call(name, args, kwargs, sizes)
    calls.refuse_arguments(name, args, dict(kwargs))
    if entry is ...:
        # First without sizes, so that the answer serves every prompt.
        entry = _memo[key] = _settle(name, args, kwargs, None, sizes)
        if entry is not None and (sizes is None or not (entry.least or entry.limited)):
            return entry.inferred
    settled = _settle(name, args, kwargs, sizes, sizes, final=True)
    assert settled is not None
    if sizes is not None:
        _memo_sized[(key, tuple(sorted(sizes.items())))] = settled.inferred
    return settled.inferred


def _settle(
    name: str,
    args: tuple[AbstractArg, ...],
    kwargs: AbstractKwargs,
    sizes: Sizes | None,
    real: Sizes | None,
    final: bool = False,
) -> _Entry | None:
    """The answer from what ``sizes`` says; ``real`` are the sizes to try it at. Unless ``final``, ``None`` for none."""
    try:
        return _by_rule(name, args, kwargs, sizes, real)
    except (Unsettled, Misfit) as error:
        if not final:
            return None
        if isinstance(error, Unsettled):
            raise ShapeError(
                f"{call_text(name, args, kwargs)}: {error}",
                instead="an axis of the same symbol, or of size one; or record with a prompt",
            ) from None

        def trial(other: tuple[AbstractArg, ...], named: AbstractKwargs) -> object:
            return _by_meta(name, other, named, sizes, real)

        raise named_error(name, args, kwargs, sizes, error, trial) from None


def _by_rule(
    name: str, args: tuple[AbstractArg, ...], kwargs: AbstractKwargs, sizes: Sizes | None, real: Sizes | None
) -> _Entry:
    rule = rules.rule_for(FUNCTIONS[name])
    if rule is not None:
        sizing = Sizing(sizes, dtype_of(torch.get_default_dtype()), _ask)
        try:
            return _Entry(rule(sizing, name, args, kwargs), tuple(sizing.least), False)
        except (Misfit, Defer) as error:
            if isinstance(error, Refused) and FUNCTIONS[name].kind is Kind.POINTWISE:
                raise  # what one element cannot do, many cannot
            # Otherwise torch has the last word, and better ones.
    return _by_meta(name, args, kwargs, sizes, real)
