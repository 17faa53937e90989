"""Functions along one axis: soft-max, sums so far, sorting, selecting; and those on the last axes."""

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
    carries,
    flag,
    has_positions,
    integer,
    integers,
    is_integer,
    rows_differ,
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
    else:
        axes = axes_of(given, value.ndim)
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
    **dict.fromkeys(("torch.nn.functional.layer_norm", "torch.nn.functional.rms_norm"), norm),
    "torch.nn.functional.embedding": embedding,
    "torch.nn.functional.cosine_similarity": cosine_similarity,
}
