"""Functions that join tensors, cut them, and select along an axis."""

from __future__ import annotations

from tracelens.ir import dims
from tracelens.ir.abstract import (
    AbstractArg,
    AbstractKwargs,
    Defer,
    Inferred,
    Misfit,
    Sizing,
    axis_of,
    bind,
    carries,
    flag,
    has_positions,
    integer,
    integers,
    rows_differ,
    tensor,
    touching,
)
from tracelens.ir.dims import Dim
from tracelens.ir.rules_pointwise import Rule
from tracelens.ir.types import DType, TensorType

Args = tuple[AbstractArg, ...]


def _with(shape: tuple[Dim, ...], axis: int, dim: Dim) -> tuple[Dim, ...]:
    return (*shape[:axis], dim, *shape[axis + 1 :])


# --- joining and cutting -----------------------------------------------------------------------------------------


def cat(sizing: Sizing, name: str, args: Args, kwargs: AbstractKwargs) -> Inferred:
    bound = bind("tensors dim", args, kwargs)
    parts = bound.get("tensors")
    if not isinstance(parts, tuple) or not parts:
        raise Defer
    values = [part for part in parts if isinstance(part, TensorType)]
    # torch lets an empty vector pass among tensors of any shape; that is left to it.
    if len(values) != len(parts) or any(value.shape == (0,) or not value.shape for value in values):
        raise Defer
    if len({value.ndim for value in values}) != 1:
        raise Misfit
    first = values[0]
    axis = axis_of(bound.get("dim", 0), first.ndim)
    shape = list(first.shape)
    by_number = False
    for value in values[1:]:
        for other, dim in enumerate(value.shape):
            if other == axis:
                shape[axis] = dims.add(shape[axis], dim)
            else:
                shape[other], one = _common(sizing, shape[other], dim)
                by_number = by_number or one
    dtype = _common_dtype(sizing, name, values)
    labelled = [(value, range(value.ndim)) for value in values]
    mixes = by_number or rows_differ(labelled) or (len(values) > 1 and _joins_rows(values, axis))
    return sizing.done(TensorType(dtype, tuple(shape)), mixes)


def _joins_rows(values: list[TensorType], axis: int) -> bool:
    return any(touching(value.shape, (axis,)) for value in values)


def _common(sizing: Sizing, left: Dim, right: Dim) -> tuple[Dim, bool]:
    """Two sizes that must be the same; of a number and a symbol the symbol is kept."""
    if left == right:
        return left, False
    if not sizing.equal(left, right):
        raise Misfit
    by_number = any(carries(dim, symbol) for dim in (left, right) for symbol in (dims.POSITION, dims.KEY))
    return (right if isinstance(left, int) else left), by_number


def _common_dtype(sizing: Sizing, name: str, values: list[TensorType]) -> DType:
    dtype = values[0].dtype
    if all(value.dtype is dtype for value in values):
        return dtype
    small: Args = tuple(TensorType(value.dtype, (1,) if value.shape else ()) for value in values)
    return sizing.ask(name, (small,), ())[0].dtype


def stack(sizing: Sizing, name: str, args: Args, kwargs: AbstractKwargs) -> Inferred:
    bound = bind("tensors dim", args, kwargs)
    parts = bound.get("tensors")
    if not isinstance(parts, tuple) or not parts:
        raise Defer
    values = [part for part in parts if isinstance(part, TensorType)]
    if len(values) != len(parts) or len({value.ndim for value in values}) != 1:
        raise Misfit
    first = values[0]
    axis = axis_of(bound.get("dim", 0), first.ndim + 1)
    shape = list(first.shape)
    by_number = False
    for value in values[1:]:
        for other, dim in enumerate(value.shape):
            shape[other], one = _common(sizing, shape[other], dim)
            by_number = by_number or one
    shape.insert(axis, len(values))
    dtype = _common_dtype(sizing, name, values)
    return sizing.done(
        TensorType(dtype, tuple(shape)), by_number or rows_differ([(v, range(v.ndim)) for v in values])
    )


def unbind(sizing: Sizing, name: str, args: Args, kwargs: AbstractKwargs) -> Inferred:
    bound = bind("input dim", args, kwargs)
    value = tensor(bound)
    axis = axis_of(bound.get("dim", 0), value.ndim)
    if not value.ndim:
        raise Misfit
    part = TensorType(value.dtype, (*value.shape[:axis], *value.shape[axis + 1 :]))
    return sizing.done((part,) * sizing.number(value.shape[axis]), touching(value.shape, (axis,)), ())


def split(sizing: Sizing, name: str, args: Args, kwargs: AbstractKwargs) -> Inferred:
    """``split``, ``split_with_sizes``, ``chunk`` and their unsafe twins."""
    bound = bind("input split dim", args, _renamed(kwargs))
    value = tensor(bound)
    if not value.ndim:
        raise Defer
    axis = axis_of(bound.get("dim", 0), value.ndim)
    given = bound.get("split")
    whole = value.shape[axis]
    lengths: list[Dim]
    if isinstance(given, tuple):
        if name.endswith("chunk"):
            raise Defer
        lengths = list(integers(given))
        if any(isinstance(length, int) and length < 0 for length in lengths):
            raise Misfit
        if not sizing.equal(whole, sum(integers(given))):
            raise Misfit
    else:
        count = integer(given)
        if count <= 0 or name.endswith("with_sizes"):
            raise Defer
        total = sizing.number(whole)
        step = -(-total // count) if name.endswith("chunk") else count
        if total == 0 or step == 0:
            raise Defer
        lengths = [min(step, total - start) for start in range(0, total, step)]
    if len(lengths) == 1:
        lengths = [whole]  # one part is the axis itself
    types = [TensorType(value.dtype, _with(value.shape, axis, length)) for length in lengths]
    return sizing.done(types, touching(value.shape, (axis,)), ())


def _renamed(kwargs: AbstractKwargs) -> AbstractKwargs:
    names = {
        "split_size_or_sections": "split",
        "split_size": "split",
        "split_sizes": "split",
        "chunks": "split",
    }
    return tuple((names.get(key, key), value) for key, value in kwargs)


# --- selecting ---------------------------------------------------------------------------------------------------


def gather(sizing: Sizing, name: str, args: Args, kwargs: AbstractKwargs) -> Inferred:
    bound = bind("input dim index * sparse_grad", args, kwargs)
    value, index = tensor(bound), tensor(bound, "index")
    if (
        index.dtype is not DType.INT64
        or flag(bound, "sparse_grad")
        or index.ndim != value.ndim
        or not value.ndim
    ):
        raise Defer
    axis = axis_of(bound.get("dim"), value.ndim)
    for other, (dim, wanted) in enumerate(zip(value.shape, index.shape, strict=True)):
        # The index may be shorter than the value on the other axes; where symbols are, that is for meta to say.
        if (
            other != axis
            and dim != wanted
            and not (isinstance(dim, int) and isinstance(wanted, int) and wanted <= dim)
        ):
            raise Defer
    mixes = touching(value.shape, (axis,)) or has_positions([TensorType(index.dtype, (index.shape[axis],))])
    return sizing.done(TensorType(value.dtype, index.shape), mixes)


def index_select(sizing: Sizing, name: str, args: Args, kwargs: AbstractKwargs) -> Inferred:
    bound = bind("input dim index", args, kwargs)
    value, index = tensor(bound), tensor(bound, "index")
    if index.dtype not in (DType.INT64, DType.INT32) or index.ndim != 1 or not value.ndim:
        raise Defer
    axis = axis_of(bound.get("dim"), value.ndim)
    shape = _with(value.shape, axis, index.shape[0])
    mixes = touching(value.shape, (axis,)) or has_positions([index])
    return sizing.done(TensorType(value.dtype, shape), mixes)


def select(sizing: Sizing, name: str, args: Args, kwargs: AbstractKwargs) -> Inferred:
    bound = bind("input dim index", args, kwargs)
    value = tensor(bound)
    if not value.ndim:
        raise Misfit
    axis = axis_of(bound.get("dim"), value.ndim)
    at = integer(bound.get("index"))
    sizing.at_least(value.shape[axis], at + 1 if at >= 0 else -at)
    shape = (*value.shape[:axis], *value.shape[axis + 1 :])
    # The last position is the last real token of every row: padding is on the left.
    last = at == -1 and value.shape[axis] in (dims.P, dims.S)
    return sizing.done(TensorType(value.dtype, shape), not last and touching(value.shape, (axis,)))


def narrow(sizing: Sizing, name: str, args: Args, kwargs: AbstractKwargs) -> Inferred:
    bound = bind("input dim start length", args, kwargs)
    value = tensor(bound)
    if not value.ndim:
        raise Misfit
    axis = axis_of(bound.get("dim"), value.ndim)
    start, length = integer(bound.get("start")), integer(bound.get("length"))
    if length < 0:
        raise Misfit
    # A negative start counts from the end.
    sizing.at_least(value.shape[axis], start + length if start >= 0 else max(-start, length))
    if start < 0 and start + length > 0:
        raise Misfit
    mixes = touching(value.shape, (axis,)) and not (
        start == -1 and length == 1 and value.shape[axis] in (dims.P, dims.S)
    )
    return sizing.done(TensorType(value.dtype, _with(value.shape, axis, length)), mixes)


RULES: dict[str, Rule] = {
    "torch.cat": cat,
    "torch.stack": stack,
    "torch.unbind": unbind,
    **{
        f"torch.{prefix}{name}": split
        for prefix in ("", "unsafe_")
        for name in ("split", "split_with_sizes", "chunk")
    },
    "torch.gather": gather,
    "torch.index_select": index_select,
    "torch.select": select,
    **dict.fromkeys(("torch.narrow", "torch.narrow_copy"), narrow),
}
