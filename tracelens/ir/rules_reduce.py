"""Functions that reduce axes."""

from __future__ import annotations

from tracelens.errors import UnsupportedFunctionError
from tracelens.ir.abstract import (
    AbstractArg,
    AbstractKwargs,
    Bound,
    Defer,
    Inferred,
    Sizing,
    axes_of,
    axis_of,
    bind,
    flag,
    integer,
    is_float,
    is_integer,
    tensor,
    touching,
)
from tracelens.ir.dims import Dim
from tracelens.ir.functions import FUNCTIONS
from tracelens.ir.rules_pointwise import Rule, pointwise
from tracelens.ir.types import DType, TensorType

_PLAIN = "input dim keepdim * dtype"
_SIGNATURES: dict[str, str] = {
    **dict.fromkeys(("torch.sum", "torch.mean", "torch.nansum", "torch.nanmean", "torch.prod"), _PLAIN),
    **dict.fromkeys(("torch.amax", "torch.amin", "torch.all", "torch.any"), "input dim keepdim"),
    **dict.fromkeys(("torch.argmax", "torch.argmin"), "input dim keepdim"),
    **dict.fromkeys(("torch.logsumexp", "torch.special.logsumexp"), "input dim keepdim"),
    **dict.fromkeys(
        ("torch.std", "torch.var", "torch.std_mean", "torch.var_mean"),
        "input dim unbiased keepdim * correction",
    ),
    "torch.count_nonzero": "input dim",
    "torch.norm": "input p dim keepdim * dtype",
    "torch.linalg.vector_norm": "input ord dim keepdim * dtype",
    "torch.aminmax": "input * dim keepdim",
    "torch.quantile": "input q dim keepdim * interpolation",
    "torch.nanquantile": "input q dim keepdim * interpolation",
}
_ONE_AXIS = frozenset(
    {"torch.prod", "torch.argmax", "torch.argmin", "torch.aminmax", "torch.quantile", "torch.nanquantile"}
)
_NEEDS_AXIS = frozenset({"torch.logsumexp", "torch.special.logsumexp"})
# Where keys that are padding have no weight, these are over the real ones; tracelens.ir.keys knows where.
_KEYS_ADD_UP = frozenset(
    {"torch.sum", "torch.nansum", "torch.amax", "torch.logsumexp", "torch.special.logsumexp", "torch.any"}
)


def _reduced(shape: tuple[Dim, ...], axes: tuple[int, ...], keep: bool) -> tuple[Dim, ...]:
    if keep:
        return tuple(1 if axis in axes else dim for axis, dim in enumerate(shape))
    return tuple(dim for axis, dim in enumerate(shape) if axis not in axes)


def _axes(name: str, bound: Bound, value: TensorType) -> tuple[int, ...]:
    dim = bound.get("dim")
    if dim is None:
        if name in _NEEDS_AXIS:
            raise Defer
        return tuple(range(value.ndim))
    if dim == ():
        raise UnsupportedFunctionError(
            f"{name}(dim=()) means all axes for some functions and none for others",
            instead="dim=None for all axes",
        )
    if isinstance(dim, tuple) and name in _ONE_AXIS:
        raise Defer
    return tuple(axis for axis in axes_of(dim, value.ndim) if axis < value.ndim)


def _dtype(name: str, value: TensorType, bound: Bound) -> DType:
    asked = bound.get("dtype")
    dtype = value.dtype
    if asked is not None:
        if (
            name in ("torch.sum", "torch.prod")
            and isinstance(asked, DType)
            and asked.is_floating
            and dtype.is_floating
        ):
            return asked
        raise Defer
    if name in ("torch.all", "torch.any") and dtype is not DType.UINT8:
        return DType.BOOL
    if name in ("torch.argmax", "torch.argmin") and (dtype.is_floating or is_integer(dtype)):
        return DType.INT64
    if name == "torch.count_nonzero":
        return DType.INT64
    if name in ("torch.sum", "torch.prod", "torch.nansum") and (is_integer(dtype) or dtype is DType.BOOL):
        return DType.INT64
    if name in ("torch.amax", "torch.amin", "torch.aminmax") and is_integer(dtype):
        return dtype
    if not dtype.is_floating:
        raise Defer
    return dtype


def reduction(sizing: Sizing, name: str, args: tuple[AbstractArg, ...], kwargs: AbstractKwargs) -> Inferred:
    bound = bind(_SIGNATURES[name], args, kwargs)
    value = tensor(bound)
    if isinstance(bound.get("dim"), bool):
        if "unbiased" not in _SIGNATURES[name]:
            raise Defer  # no axis, whatever Python says of True and 1
        bound["unbiased"] = bound.pop("dim")  # std(x, False)
    if "keepdim" in bound and "dim" not in bound:
        raise Defer  # which some functions allow and others do not
    axes = _axes(name, bound, value)
    keep = flag(bound, "keepdim")
    if not isinstance(bound.get("correction"), bool | int | float | None) or not isinstance(
        bound.get("unbiased"), bool | None
    ):
        raise Defer
    # An empty axis has no largest element; which functions mind is torch's to say. (A size is never below one.)
    if any(value.shape[axis] == 0 for axis in axes):
        raise Defer
    dtype = _dtype(name, value, bound)
    prefix: tuple[Dim, ...] = ()
    if "quantile" in name:
        prefix = _quantiles(bound, value)
    elif "norm" in name:
        _order(bound)
        if name == "torch.norm" and bound.get("dim") is not None and len(axes) > 2:
            raise Defer  # which of the norms takes so many axes is torch's to say
    shape = (*prefix, *_reduced(value.shape, axes, keep))
    mixes = touching(value.shape, axes, name in _KEYS_ADD_UP)
    fields = FUNCTIONS[name].results
    if name in ("torch.std_mean", "torch.var_mean"):
        fields = ()
    if fields is not None:
        return sizing.done([TensorType(dtype, shape)] * 2, mixes, fields)
    return sizing.done(TensorType(dtype, shape), mixes)


def _quantiles(bound: Bound, value: TensorType) -> tuple[Dim, ...]:
    if value.dtype not in (DType.FLOAT32, DType.FLOAT64) or bound.get("interpolation", "linear") != "linear":
        raise Defer
    q = bound.get("q")
    if isinstance(q, TensorType):
        if q.dtype is not value.dtype or q.ndim > 1:
            raise Defer
        return q.shape
    if not isinstance(q, float) or not 0 <= q <= 1:
        raise Defer
    return ()


def _order(bound: Bound) -> None:
    for key in ("p", "ord"):
        order = bound.get(key, 2)
        if order not in ("fro", None) and not is_float(order):
            integer(order)
        if order in ("fro", None) and key == "ord":
            raise Defer


def _values_and_indices(
    sizing: Sizing, name: str, value: TensorType, dim: AbstractArg, keep: bool, fields: tuple[str, ...] | None
) -> Inferred:
    if not (value.dtype.is_floating or is_integer(value.dtype)):
        raise Defer
    axes = tuple(axis for axis in (axis_of(dim, value.ndim),) if axis < value.ndim)
    if any(value.shape[axis] == 0 for axis in axes):
        raise Defer
    shape = _reduced(value.shape, axes, keep)
    types = (TensorType(value.dtype, shape), TensorType(DType.INT64, shape))
    return sizing.done(types, touching(value.shape, axes), fields)


def largest(sizing: Sizing, name: str, args: tuple[AbstractArg, ...], kwargs: AbstractKwargs) -> Inferred:
    """``max`` and ``min``: of everything, along an axis, or of two tensors."""
    if len(args) == 2 and isinstance(args[1], TensorType) and not kwargs:
        return pointwise(
            sizing, {"torch.max": "torch.maximum", "torch.min": "torch.minimum"}[name], args, kwargs
        )
    return middle(sizing, name, args, kwargs)


def middle(sizing: Sizing, name: str, args: tuple[AbstractArg, ...], kwargs: AbstractKwargs) -> Inferred:
    """``median`` and its like: of everything, or values and indices along an axis."""
    bound = bind("input dim keepdim", args, kwargs)
    value = tensor(bound)
    dim = bound.get("dim")
    if dim is not None:
        return _values_and_indices(sizing, name, value, dim, flag(bound, "keepdim"), FUNCTIONS[name].results)
    if "keepdim" in bound or "dim" in bound or not (value.dtype.is_floating or is_integer(value.dtype)):
        raise Defer
    if any(size == 0 for size in value.shape):
        raise Defer
    return sizing.done(TensorType(value.dtype, ()), touching(value.shape, range(value.ndim)))


def kth(sizing: Sizing, name: str, args: tuple[AbstractArg, ...], kwargs: AbstractKwargs) -> Inferred:
    bound = bind("input k dim keepdim", args, kwargs)
    value = tensor(bound)
    k = integer(bound.get("k"))
    dim = bound.get("dim", -1)
    axis = axis_of(dim, value.ndim)
    if value.ndim == 0 or k < 1:
        raise Defer
    sizing.at_least(value.shape[axis], k)
    return _values_and_indices(sizing, name, value, dim, flag(bound, "keepdim"), FUNCTIONS[name].results)


def mode(sizing: Sizing, name: str, args: tuple[AbstractArg, ...], kwargs: AbstractKwargs) -> Inferred:
    bound = bind("input dim keepdim", args, kwargs)
    return _values_and_indices(
        sizing, name, tensor(bound), bound.get("dim", -1), flag(bound, "keepdim"), FUNCTIONS[name].results
    )


RULES: dict[str, Rule] = {
    **dict.fromkeys(_SIGNATURES, reduction),
    "torch.max": largest,
    "torch.min": largest,
    "torch.median": middle,
    "torch.nanmedian": middle,
    "torch.kthvalue": kth,
    "torch.mode": mode,
}
