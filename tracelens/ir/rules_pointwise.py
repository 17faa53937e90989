"""Pointwise functions: shapes broadcast; dtypes promote as in torch, by hand where that is simple."""

from __future__ import annotations

from collections.abc import Callable

from tracelens.ir import dims
from tracelens.ir.abstract import (
    AbstractArg,
    AbstractKwargs,
    Defer,
    Inferred,
    Misfit,
    Sizing,
    bind,
    broadcast,
    carries,
    has_positions,
    is_float,
    is_integer,
    replace_tensors,
    result_dtype,
    tensors_in,
)
from tracelens.ir.dims import Sym
from tracelens.ir.functions import FUNCTIONS
from tracelens.ir.types import DType, TensorType

_ARITHMETIC = frozenset({"add", "sub", "mul", "div", "pow", "remainder", "fmod", "floor_divide"})
_EXACT_ON_INTEGERS = frozenset({"add", "sub", "mul"})
_OF_TWO_TENSORS = frozenset(
    {"maximum", "minimum", "fmax", "fmin", "atan2", "hypot", "logaddexp", "logaddexp2"}
)
_COMPARISONS = frozenset({"eq", "ne", "lt", "le", "gt", "ge"})
_LOGICAL = frozenset({"logical_and", "logical_or", "logical_xor", "logical_not"})
_TESTS = frozenset({"isfinite", "isinf", "isnan", "signbit", "isneginf", "isposinf", "isreal"})
_COPIES = frozenset({"clone", "contiguous", "detach", "zeros_like", "ones_like"})
_UNARY = """
    abs acos acosh asin asinh atan atanh ceil celu cos cosh deg2rad digamma elu erf erfc erfinv exp exp2 expm1 floor
    frac gelu hardshrink hardsigmoid hardswish hardtanh i0 leaky_relu lgamma log log10 log1p log2 logit logsigmoid
    mish nan_to_num neg positive rad2deg reciprocal relu relu6 round rsqrt selu sgn sigmoid sign silu sin sinc sinh
    softplus softshrink softsign sqrt square tan tanh tanhshrink trunc"""
_KEEP_FLOATS = frozenset(_UNARY.split())


def _short(name: str) -> str:
    prefix, _, last = name.rpartition(".")
    return last if prefix != "torch.special" else name


def _number(arg: AbstractArg) -> bool:
    return is_float(arg) or isinstance(arg, int)


def _known_dtype(
    sizing: Sizing, name: str, args: tuple[AbstractArg, ...], kwargs: AbstractKwargs
) -> DType | None:
    """The result's dtype by hand, or ``None`` where torch is to be asked."""
    short = _short(name)
    first = args[0] if args else None
    if kwargs and short != "clamp":
        return None
    if short in _COPIES and len(args) == 1 and isinstance(first, TensorType):
        return first.dtype
    if short in _KEEP_FLOATS or short in _TESTS or short == "logical_not":
        if len(args) != 1 or not isinstance(first, TensorType) or not first.dtype.is_floating:
            return None
        return first.dtype if short in _KEEP_FLOATS else DType.BOOL
    if short in _ARITHMETIC or short in _COMPARISONS or short in _LOGICAL or short in _OF_TWO_TENSORS:
        return _binary(sizing, short, args)
    if short == "to" and len(args) == 2 and isinstance(first, TensorType) and isinstance(args[1], DType):
        return args[1]
    if short == "where" and len(args) == 3 and isinstance(first, TensorType) and first.dtype is DType.BOOL:
        return result_dtype(sizing, args[1:]) if all(_is_operand(arg) for arg in args[1:]) else None
    if (
        short == "masked_fill"
        and len(args) == 3
        and isinstance(first, TensorType)
        and first.dtype.is_floating
    ):
        mask = args[1]
        is_mask = isinstance(mask, TensorType) and mask.dtype is DType.BOOL
        return first.dtype if is_mask and _number(args[2]) else None
    if short == "clamp" and isinstance(first, TensorType) and first.dtype.is_floating:
        bounds = bind("input min max", args, kwargs)
        limits = [bounds[key] for key in ("min", "max") if bounds.get(key) is not None]
        return first.dtype if limits and all(_number(limit) for limit in limits) else None
    return None


def _is_operand(arg: AbstractArg) -> bool:
    return isinstance(arg, TensorType) or _number(arg)


def _is_boolean(arg: AbstractArg) -> bool:
    return arg.dtype is DType.BOOL if isinstance(arg, TensorType) else isinstance(arg, bool)


def _binary(sizing: Sizing, short: str, args: tuple[AbstractArg, ...]) -> DType | None:
    if len(args) != 2 or not all(_is_operand(arg) for arg in args):
        return None
    if not all(isinstance(arg, TensorType) for arg in args) and (
        short in _OF_TWO_TENSORS or short in _LOGICAL or not isinstance(args[0], TensorType)
    ):
        return None
    if short == "sub" and any(_is_boolean(arg) for arg in args):
        return None  # torch refuses to subtract booleans, whatever they are subtracted from
    dtype = result_dtype(sizing, args)
    if dtype.is_floating:
        return DType.BOOL if short in _COMPARISONS or short in _LOGICAL else dtype
    # torch refuses numbers that the integer dtype cannot hold, so those are left to torch itself.
    if is_integer(dtype) and all(isinstance(arg, TensorType) for arg in args):
        if short in _COMPARISONS or short in _LOGICAL:
            return DType.BOOL
        if short == "div":
            return sizing.default
        return dtype if short in _EXACT_ON_INTEGERS else None
    return None


def pointwise(sizing: Sizing, name: str, args: tuple[AbstractArg, ...], kwargs: AbstractKwargs) -> Inferred:
    operands = tensors_in((*args, *(value for _, value in kwargs)))
    if not operands:
        raise Defer
    shape, mixes = broadcast(sizing, operands)
    dtype = _known_dtype(sizing, name, args, kwargs)
    if dtype is not None:
        return sizing.done(TensorType(dtype, shape), mixes)
    # Whether the dtypes fit does not depend on sizes: one element, or none of the axes, says it all.
    found = sizing.ask(
        name, tuple(_one_in(arg) for arg in args), tuple((key, _one_in(value)) for key, value in kwargs)
    )
    if any(type_.ndim > 1 for type_ in found):
        raise Defer
    # How many positions there are is not the same for every row where rows differ in length.
    mixes = mixes or any(
        isinstance(arg, Sym) and (carries(arg, dims.POSITION) or carries(arg, dims.KEY))
        for arg in (*args, *(value for _, value in kwargs))
    )
    types = [TensorType(type_.dtype, shape) for type_ in found]
    return sizing.done(types, mixes, FUNCTIONS[name].results)


def _one(type_: TensorType) -> TensorType:
    return TensorType(type_.dtype, (1,) if type_.shape else ())


def _one_in(arg: AbstractArg) -> AbstractArg:
    # A size as a number: which one has no influence on the dtype.
    return 1 if isinstance(arg, Sym) else replace_tensors((arg,), _one)[0]


def type_as(sizing: Sizing, name: str, args: tuple[AbstractArg, ...], kwargs: AbstractKwargs) -> Inferred:
    match args:
        case (TensorType() as value, TensorType() as other) if not kwargs:
            return sizing.done(TensorType(other.dtype, value.shape), False)
        case _:
            raise Defer


def like_the_first(
    sizing: Sizing, name: str, args: tuple[AbstractArg, ...], kwargs: AbstractKwargs
) -> Inferred:
    """``isin``, ``bucketize``: every element of the first operand against all of the second."""
    bound = bind(_LIKE_THE_FIRST[name], args, kwargs)
    first, other = (bound.get(key) for key in _LIKE_THE_FIRST[name].split()[:2])
    if not isinstance(first, TensorType):
        raise Defer
    others = [other] if isinstance(other, TensorType) else []
    found = sizing.ask(
        name, replace_tensors(args, _one), tuple((key, _one_in(value)) for key, value in kwargs)
    )
    if len(found) != 1:
        raise Misfit
    return sizing.done(TensorType(found[0].dtype, first.shape), has_positions(others))


_LIKE_THE_FIRST = {
    "torch.isin": "elements test_elements * assume_unique invert",
    "torch.bucketize": "input boundaries * out_int32 right",
}

Rule = Callable[[Sizing, str, tuple[AbstractArg, ...], AbstractKwargs], Inferred]

RULES: dict[str, Rule] = {"torch.Tensor.type_as": type_as, **dict.fromkeys(_LIKE_THE_FIRST, like_the_first)}
