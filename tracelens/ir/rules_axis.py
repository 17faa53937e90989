"""Functions along one axis: soft-max, sums so far, sorting; and those on the last axes."""

from __future__ import annotations

from tracelens.ir import dims
from tracelens.ir.abstract import (
    AbstractArg,
    AbstractKwargs,
    Defer,
    Inferred,
    Misfit,
    Sizing,
    axes_of,
    axis_of,
    bind,
    broadcast,
    flag,
    has_positions,
    integer,
    integers,
    is_integer,
    tensor,
    touching,
)
from tracelens.ir.dims import Dim
from tracelens.ir.functions import FUNCTIONS
from tracelens.ir.rules_pointwise import Rule
from tracelens.ir.types import DType, TensorType

Args = tuple[AbstractArg, ...]


def _float_dtype(value: TensorType, asked: AbstractArg) -> DType:
    """The input's dtype or the one asked for; anything but floating dtypes is torch's to judge."""
    if asked is None:
        asked = value.dtype
    if not value.dtype.is_floating or not isinstance(asked, DType) or not asked.is_floating:
        raise Defer
    return asked


# name -> signature; the default axis stands in _DEFAULT_AXIS
_KEEPING: dict[str, str] = {
    **dict.fromkeys(
        ("torch.softmax", "torch.log_softmax", "torch.special.softmax", "torch.special.log_softmax"),
        "input dim dtype",
    ),
    **dict.fromkeys(("torch.cumsum", "torch.cumprod"), "input dim * dtype"),
    "torch.logcumsumexp": "input dim",
    "torch.nn.functional.normalize": "input p dim eps",
}
_KEYS_ADD_UP = frozenset(
    {"torch.softmax", "torch.log_softmax", "torch.special.softmax", "torch.special.log_softmax"}
)


def keeping(sizing: Sizing, name: str, args: Args, kwargs: AbstractKwargs) -> Inferred:
    bound = bind(_KEEPING[name], args, kwargs)
    value = tensor(bound)
    dim = bound.get("dim", 1 if name == "torch.nn.functional.normalize" else None)
    axis = axis_of(dim, value.ndim)
    if name == "torch.nn.functional.normalize" and not isinstance(bound.get("p", 2.0), int | float):
        raise Defer
    dtype = _float_dtype(value, bound.get("dtype"))
    return sizing.done(TensorType(dtype, value.shape), touching(value.shape, (axis,), name in _KEYS_ADD_UP))


def cumulative_extreme(sizing: Sizing, name: str, args: Args, kwargs: AbstractKwargs) -> Inferred:
    bound = bind("input dim", args, kwargs)
    value = tensor(bound)
    axis = axis_of(bound.get("dim"), value.ndim)
    _require_real(value)
    types = (value, TensorType(DType.INT64, value.shape))
    return sizing.done(types, touching(value.shape, (axis,)), FUNCTIONS[name].results)


def _require_real(value: TensorType) -> None:
    if not (value.dtype.is_floating or is_integer(value.dtype)):
        raise Defer


def sort(sizing: Sizing, name: str, args: Args, kwargs: AbstractKwargs) -> Inferred:
    bound = bind("input" if name == "torch.msort" else "input dim descending * stable", args, kwargs)
    value = tensor(bound)
    _require_real(value)
    axis = axis_of(0 if name == "torch.msort" else bound.get("dim", -1), value.ndim)
    flag(bound, "descending")
    flag(bound, "stable")
    indices = TensorType(DType.INT64, value.shape)
    mixes = touching(value.shape, (axis,))
    if name == "torch.argsort":
        return sizing.done(indices, mixes)
    if name == "torch.msort":
        return sizing.done(value, mixes)
    return sizing.done((value, indices), mixes, FUNCTIONS[name].results)


def topk(sizing: Sizing, name: str, args: Args, kwargs: AbstractKwargs) -> Inferred:
    bound = bind("input k dim largest sorted", args, kwargs)
    value = tensor(bound)
    _require_real(value)
    k = integer(bound.get("k"))
    axis = axis_of(bound.get("dim", -1), value.ndim)
    for key in ("largest", "sorted"):
        flag(bound, key)
    if value.ndim == 0 or k < 0:
        raise Defer
    sizing.at_least(value.shape[axis], k)
    shape = _with(value.shape, axis, k)
    types = (TensorType(value.dtype, shape), TensorType(DType.INT64, shape))
    return sizing.done(types, touching(value.shape, (axis,)), FUNCTIONS[name].results)


def _with(shape: tuple[Dim, ...], axis: int, dim: Dim) -> tuple[Dim, ...]:
    return (*shape[:axis], dim, *shape[axis + 1 :])


def reorder(sizing: Sizing, name: str, args: Args, kwargs: AbstractKwargs) -> Inferred:
    """``flip`` and ``roll``."""
    bound = bind("input dims" if name == "torch.flip" else "input shifts dims", args, kwargs)
    value = tensor(bound)
    given = bound.get("dims")
    if name == "torch.roll":
        shifts = integers(bound.get("shifts"))
        if given is None or given == ():
            if len(shifts) != 1:
                raise Misfit
            return sizing.done(value, touching(value.shape, range(value.ndim)))
        if len(shifts) != len(integers(given)) or value.ndim == 0:
            raise Defer
        axes = tuple(axis_of(part, value.ndim) for part in integers(given))
    elif isinstance(given, tuple):
        axes = axes_of(given, value.ndim)
    else:
        raise Defer
    return sizing.done(value, touching(value.shape, axes))


def flip_fixed(sizing: Sizing, name: str, args: Args, kwargs: AbstractKwargs) -> Inferred:
    value = tensor(bind("input", args, kwargs))
    axis = {"torch.flipud": 0, "torch.fliplr": 1}[name]
    if value.ndim <= axis:
        raise Misfit
    return sizing.done(value, touching(value.shape, (axis,)))


def glu(sizing: Sizing, name: str, args: Args, kwargs: AbstractKwargs) -> Inferred:
    bound = bind("input dim", args, kwargs)
    value = tensor(bound)
    axis = axis_of(bound.get("dim", -1), value.ndim)
    half = dims.divide(value.shape[axis], 2) if value.ndim else None
    if half is None:
        raise Defer
    shape = _with(value.shape, axis, half)
    return sizing.done(TensorType(_float_dtype(value, None), shape), touching(value.shape, (axis,)))


# --- the last axes -----------------------------------------------------------------------------------------------


def norm(sizing: Sizing, name: str, args: Args, kwargs: AbstractKwargs) -> Inferred:
    """``layer_norm`` and ``rms_norm``."""
    signature = (
        "input normalized_shape weight bias eps"
        if name.endswith("layer_norm")
        else "input normalized_shape weight eps"
    )
    bound = bind(signature, args, kwargs)
    value = tensor(bound)
    wanted = integers(bound.get("normalized_shape"))
    for key in ("weight", "bias"):
        part = bound.get(key)
        if part is None:
            continue
        if not isinstance(part, TensorType) or part.dtype is not value.dtype:
            raise Defer
        if part.shape != wanted:
            raise Misfit
    if not wanted or len(wanted) > value.ndim:
        raise Misfit
    start = value.ndim - len(wanted)
    for dim, size in zip(value.shape[start:], wanted, strict=True):
        if not sizing.equal(dim, size):
            raise Misfit
    dtype = _float_dtype(value, None)
    return sizing.done(TensorType(dtype, value.shape), touching(value.shape, range(start, value.ndim)))


def embedding(sizing: Sizing, name: str, args: Args, kwargs: AbstractKwargs) -> Inferred:
    bound = bind("input weight padding_idx", args, kwargs)
    tokens, weight = tensor(bound), tensor(bound, "weight")
    if tokens.dtype not in (DType.INT64, DType.INT32) or weight.ndim != 2:
        raise Defer
    mixes = has_positions([weight])
    return sizing.done(TensorType(weight.dtype, (*tokens.shape, weight.shape[1])), mixes)


def cosine_similarity(sizing: Sizing, name: str, args: Args, kwargs: AbstractKwargs) -> Inferred:
    bound = bind("x1 x2 dim eps", args, kwargs)
    one, two = tensor(bound, "x1"), tensor(bound, "x2")
    if one.dtype is not two.dtype:
        raise Defer
    dtype = _float_dtype(one, None)
    shape, mixes = broadcast(sizing, [one, two])
    axis = axis_of(bound.get("dim", 1), len(shape))
    if not shape:
        raise Defer
    return sizing.done(
        TensorType(dtype, (*shape[:axis], *shape[axis + 1 :])), mixes or touching(shape, (axis,))
    )


RULES: dict[str, Rule] = {
    **dict.fromkeys(_KEEPING, keeping),
    **dict.fromkeys(("torch.cummax", "torch.cummin"), cumulative_extreme),
    **dict.fromkeys(("torch.sort", "torch.argsort", "torch.msort"), sort),
    "torch.topk": topk,
    **dict.fromkeys(("torch.flip", "torch.roll"), reorder),
    **dict.fromkeys(("torch.flipud", "torch.fliplr"), flip_fixed),
    "torch.nn.functional.glu": glu,
    **dict.fromkeys(("torch.nn.functional.layer_norm", "torch.nn.functional.rms_norm"), norm),
    "torch.nn.functional.embedding": embedding,
    "torch.nn.functional.cosine_similarity": cosine_similarity,
}
