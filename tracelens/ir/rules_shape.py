"""Functions that move elements: reshape, transpose, squeeze, expand and their like."""

from __future__ import annotations

from collections.abc import Sequence

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
    sizes_of,
    tensor,
    touching,
)
from tracelens.ir.dims import Dim, Sym
from tracelens.ir.rules_pointwise import Rule
from tracelens.ir.types import DType, TensorType

Args = tuple[AbstractArg, ...]
Shape = tuple[Dim, ...]


# --- reshape -----------------------------------------------------------------------------------------------------


def reshaped(sizing: Sizing, old: Shape, target: Sequence[Dim]) -> tuple[Shape, bool]:
    """The shape of a reshape and whether it mixes positions.  An axis that stays whole keeps its symbol."""
    new = _without_minus_one(sizing, old, target)
    if dims.product(old) != dims.product(new) and not sizing.equal(dims.product(old), dims.product(new)):
        raise Misfit
    segments = _segments(old, new)
    shape = list(new)
    mixes = False
    positional = any(_positional(dim) for dim in old)
    for own, made in segments:
        for before, after in _refined(sizing, old, new, own, made):
            if len(before) == 1 and len(after) == 1 and _same(old[before[0]], new[after[0]]):
                shape[after[0]] = old[before[0]]
                continue
            merged = [old[axis] for axis in before]
            if any(_positional(dim) or (positional and carries(dim, dims.BATCH)) for dim in merged):
                mixes = True
    return tuple(shape), mixes


def _same(left: Dim, right: Dim) -> bool:
    # Numbers differ here only beside an axis of size zero, where every product is the same.
    return left == right or not (isinstance(left, int) and isinstance(right, int))


def _positional(dim: Dim) -> bool:
    return carries(dim, dims.POSITION) or carries(dim, dims.KEY)


def _without_minus_one(sizing: Sizing, old: Shape, target: Sequence[Dim]) -> list[Dim]:
    new = list(target)
    if any(isinstance(dim, int) and dim < -1 for dim in new) or new.count(-1) > 1:
        raise Misfit
    if -1 not in new:
        return new
    place = new.index(-1)
    known = dims.product(dim for dim in new if dim != -1)
    total = dims.product(old)
    if known == 0 or total == 0:
        raise Defer
    rest = dims.divide(total, known)
    if rest is None:
        whole, part = sizing.number(total), sizing.number(known)
        if part == 0 or whole % part:
            raise Misfit
        rest = whole // part
    new[place] = rest
    return new


Axes = list[int]


def _segments(old: Shape, new: Sequence[Dim]) -> list[tuple[Axes, Axes]]:
    """The shortest runs of axes with equal products on both sides, for every prompt. Axes of size one are left out."""
    left = [axis for axis, dim in enumerate(old) if dim != 1]
    right = [axis for axis, dim in enumerate(new) if dim != 1]
    found: list[tuple[Axes, Axes]] = []
    i = j = 0
    while i < len(left) and j < len(right):
        # The nearest pair of ends at which the products agree.
        ends = _meet([old[axis] for axis in left[i:]], [new[axis] for axis in right[j:]])
        if ends is None:
            break
        found.append((left[i : i + ends[0]], right[j : j + ends[1]]))
        i, j = i + ends[0], j + ends[1]
    if i < len(left) or j < len(right):
        found.append((left[i:], right[j:]))
    return found


def _meet(left: Sequence[Dim], right: Sequence[Dim]) -> tuple[int, int] | None:
    ends: dict[Dim, int] = {}
    product: Dim = 1
    for count, dim in enumerate(right, 1):
        product = dims.multiply(product, dim)
        ends.setdefault(product, count)
    product = 1
    for count, dim in enumerate(left, 1):
        product = dims.multiply(product, dim)
        if product in ends:
            return count, ends[product]
    return None


def _refined(
    sizing: Sizing, old: Shape, new: Sequence[Dim], own: Axes, made: Axes
) -> list[tuple[Axes, Axes]]:
    """A run that holds symbols on one side and their numbers on the other, cut further by the numbers.

    ``(1, 7, 9, 64)`` for ``[B, P, 576]`` is what ``value.shape`` gave the user: the axes are still rows and positions.
    """
    symbols = [old[axis] for axis in own if isinstance(old[axis], Sym)] + [
        new[axis] for axis in made if isinstance(new[axis], Sym)
    ]
    known = frozenset[str]() if sizing.sizes is None else frozenset(sizing.sizes)
    if (
        (len(own) == 1 and len(made) == 1)
        or not symbols
        or not all(dims.symbols(dim) <= known for dim in symbols)
    ):
        return [(own, made)]
    if not any(_positional(old[axis]) or carries(old[axis], dims.BATCH) for axis in own):
        return [(own, made)]
    pins = set(sizing.pins)
    left = [(axis, sizing.number(old[axis])) for axis in own]
    right = [(axis, sizing.number(new[axis])) for axis in made]
    found: list[tuple[Axes, Axes]] = []
    i = j = 0
    while i < len(left) and j < len(right):
        ends = _meet([size for _, size in left[i:]], [size for _, size in right[j:]])
        if left[i][1] == 1 and right[j][1] != 1:
            # A batch of one beside a literal one: that is where the rows went, if anywhere.
            last = max([axis for _, axes in found for axis in axes], default=-1)
            ones = [axis for axis in range(last + 1, right[j][0]) if new[axis] == 1]
            found.append(([left[i][0]], ones[:1]))
            i += 1
            continue
        if ends is None:
            break
        found.append(
            ([axis for axis, _ in left[i : i + ends[0]]], [axis for axis, _ in right[j : j + ends[1]]])
        )
        i, j = i + ends[0], j + ends[1]
    if i < len(left) or j < len(right):
        found.append(([axis for axis, _ in left[i:]], [axis for axis, _ in right[j:]]))
    if len(found) <= 1:
        sizing.pins = pins
        return [(own, made)]
    return found


def reshape(sizing: Sizing, name: str, args: Args, kwargs: AbstractKwargs) -> Inferred:
    bound = bind(
        "input shape", args, tuple(("shape" if key == "size" else key, value) for key, value in kwargs)
    )
    value = tensor(bound)
    if isinstance(bound.get("shape"), DType):
        raise Defer  # view(dtype) reinterprets the bits
    shape, mixes = reshaped(sizing, value.shape, sizes_of(bound.get("shape")))
    return sizing.done(TensorType(value.dtype, shape), mixes)


def reshape_like(sizing: Sizing, name: str, args: Args, kwargs: AbstractKwargs) -> Inferred:
    bound = bind("input other", args, kwargs)
    value = tensor(bound)
    shape, mixes = reshaped(sizing, value.shape, tensor(bound, "other").shape)
    return sizing.done(TensorType(value.dtype, shape), mixes)


def flatten(sizing: Sizing, name: str, args: Args, kwargs: AbstractKwargs) -> Inferred:
    bound = bind("input" if name == "torch.ravel" else "input start_dim end_dim", args, kwargs)
    value = tensor(bound)
    start = axis_of(bound.get("start_dim", 0), value.ndim)
    end = axis_of(bound.get("end_dim", -1), value.ndim)
    if start > end:
        raise Misfit
    middle = dims.product(value.shape[start : end + 1])
    target = (*value.shape[:start], middle, *value.shape[end + 1 :])
    shape, mixes = reshaped(sizing, value.shape, target)
    return sizing.done(TensorType(value.dtype, shape), mixes)


def unflatten(sizing: Sizing, name: str, args: Args, kwargs: AbstractKwargs) -> Inferred:
    bound = bind("input dim sizes", args, kwargs)
    value = tensor(bound)
    if not value.ndim:
        raise Defer
    axis = axis_of(bound.get("dim"), value.ndim)
    parts, mixes = reshaped(sizing, (value.shape[axis],), sizes_of(bound.get("sizes")))
    if not parts:
        raise Misfit
    shape = (*value.shape[:axis], *parts, *value.shape[axis + 1 :])
    split_rows = len([part for part in parts if part != 1]) > 1 and touching(value.shape, (axis,))
    return sizing.done(TensorType(value.dtype, shape), mixes or split_rows)


# --- the order of axes -------------------------------------------------------------------------------------------


def transpose(sizing: Sizing, name: str, args: Args, kwargs: AbstractKwargs) -> Inferred:
    renamed = {"axis0": "dim0", "axis1": "dim1"}
    bound = bind("input dim0 dim1", args, tuple((renamed.get(key, key), value) for key, value in kwargs))
    value = tensor(bound)
    one, two = axis_of(bound.get("dim0"), value.ndim), axis_of(bound.get("dim1"), value.ndim)
    return _permuted(sizing, value, _swapped(value.ndim, one, two))


def _swapped(ndim: int, one: int, two: int) -> list[int]:
    order = list(range(ndim))
    if ndim:
        order[one], order[two] = order[two], order[one]
    return order


def _permuted(sizing: Sizing, value: TensorType, order: Sequence[int]) -> Inferred:
    return sizing.done(TensorType(value.dtype, tuple(value.shape[axis] for axis in order)), False)


def t(sizing: Sizing, name: str, args: Args, kwargs: AbstractKwargs) -> Inferred:
    value = tensor(bind("input", args, kwargs))
    if name == "torch.adjoint":
        if value.ndim < 2:
            raise Misfit
        return _permuted(sizing, value, _swapped(value.ndim, value.ndim - 2, value.ndim - 1))
    if value.ndim > 2:
        raise Misfit
    return _permuted(sizing, value, list(range(value.ndim))[::-1])


def permute(sizing: Sizing, name: str, args: Args, kwargs: AbstractKwargs) -> Inferred:
    bound = bind("input dims", args, kwargs)
    value = tensor(bound)
    order = axes_of(bound.get("dims"), value.ndim)
    if len(order) != value.ndim:
        raise Misfit
    return _permuted(sizing, value, order)


def movedim(sizing: Sizing, name: str, args: Args, kwargs: AbstractKwargs) -> Inferred:
    bound = bind("input source destination", args, kwargs)
    value = tensor(bound)
    source, destination = (
        axes_of(bound.get("source"), value.ndim),
        axes_of(bound.get("destination"), value.ndim),
    )
    if len(source) != len(destination):
        raise Misfit
    if not value.ndim:
        return sizing.done(value, False)
    rest = [axis for axis in range(value.ndim) if axis not in source]
    placed = dict(zip(destination, source, strict=True))
    order = [placed[axis] if axis in placed else rest.pop(0) for axis in range(value.ndim)]
    return _permuted(sizing, value, order)


# --- axes of size one --------------------------------------------------------------------------------------------


def unsqueeze(sizing: Sizing, name: str, args: Args, kwargs: AbstractKwargs) -> Inferred:
    bound = bind("input dim", args, kwargs)
    value = tensor(bound)
    axis = axis_of(bound.get("dim"), value.ndim + 1)
    return sizing.done(TensorType(value.dtype, (*value.shape[:axis], 1, *value.shape[axis:])), False)


def squeeze(sizing: Sizing, name: str, args: Args, kwargs: AbstractKwargs) -> Inferred:
    bound = bind("input dim", args, kwargs)
    value = tensor(bound)
    if "dim" in bound and bound["dim"] is None:
        raise Defer
    axes = axes_of(bound["dim"], value.ndim) if "dim" in bound else tuple(range(value.ndim))
    gone = {axis for axis in axes if axis < value.ndim and sizing.equal(value.shape[axis], 1)}
    shape = tuple(dim for axis, dim in enumerate(value.shape) if axis not in gone)
    return sizing.done(TensorType(value.dtype, shape), touching(value.shape, gone))


def atleast(sizing: Sizing, name: str, args: Args, kwargs: AbstractKwargs) -> Inferred:
    if kwargs or len(args) != 1 or not isinstance(args[0], TensorType):
        raise Defer
    value = args[0]
    least = int(name[-2])
    shape = value.shape
    if value.ndim < least:
        if least == 3 and value.ndim == 2:
            shape = (*shape, 1)
        elif value.ndim == 1:
            shape = (1, *shape, 1)[:least]
        else:
            shape = (1,) * least
    return sizing.done(TensorType(value.dtype, shape), False)


# --- repetition --------------------------------------------------------------------------------------------------


def expand(sizing: Sizing, name: str, args: Args, kwargs: AbstractKwargs) -> Inferred:
    bound = bind("input size", args, kwargs)
    value = tensor(bound)
    return _expanded(sizing, value, sizes_of(bound.get("size")))


def _expanded(sizing: Sizing, value: TensorType, target: Sequence[Dim]) -> Inferred:
    new = len(target) - value.ndim
    if new < 0:
        raise Misfit
    shape: list[Dim] = []
    mixes = False
    for axis, wanted in enumerate(target):
        if isinstance(wanted, int) and wanted < (0 if axis < new else -1):
            raise Misfit
        own = value.shape[axis - new] if axis >= new else 1
        if wanted == -1 or wanted == own:
            shape.append(own)
        elif own == 1:
            shape.append(wanted)
        elif sizing.equal(own, wanted):
            shape.append(own if isinstance(own, Sym) else wanted)
        elif sizing.number(own) == 1:
            mixes = mixes or touching(value.shape, (axis - new,))
            shape.append(wanted)
        else:
            raise Misfit
    return sizing.done(TensorType(value.dtype, tuple(shape)), mixes)


def expand_as(sizing: Sizing, name: str, args: Args, kwargs: AbstractKwargs) -> Inferred:
    bound = bind("input other", args, kwargs)
    return _expanded(sizing, tensor(bound), tensor(bound, "other").shape)


def broadcast_tensors(sizing: Sizing, name: str, args: Args, kwargs: AbstractKwargs) -> Inferred:
    values = [arg for arg in args if isinstance(arg, TensorType)]
    if kwargs or not values or len(values) != len(args):
        raise Defer
    shape, mixes = broadcast(sizing, values)
    return sizing.done([TensorType(value.dtype, shape) for value in values], mixes, ())


def repeat(sizing: Sizing, name: str, args: Args, kwargs: AbstractKwargs) -> Inferred:
    """``repeat`` and ``tile``: the shape multiplied axis by axis, new axes in front."""
    bound = bind(
        "input dims", args, tuple(("dims" if key == "repeats" else key, value) for key, value in kwargs)
    )
    value = tensor(bound)
    times = list(sizes_of(bound.get("dims")))
    if name == "torch.tile":
        times = [1] * (value.ndim - len(times)) + times
    new = len(times) - value.ndim
    if new < 0 or any(isinstance(count, int) and count < 0 for count in times):
        raise Misfit
    whole = (*(1,) * new, *value.shape)
    shape = tuple(dims.multiply(dim, count) for dim, count in zip(whole, times, strict=True))
    touched = [axis for axis, count in enumerate(times) if count != 1]
    return sizing.done(TensorType(value.dtype, shape), touching(whole, touched))


RULES: dict[str, Rule] = {
    **dict.fromkeys(("torch.reshape", "torch.Tensor.view"), reshape),
    **dict.fromkeys(("torch.Tensor.reshape_as", "torch.Tensor.view_as"), reshape_like),
    **dict.fromkeys(("torch.flatten", "torch.ravel"), flatten),
    "torch.unflatten": unflatten,
    "torch.transpose": transpose,
    **dict.fromkeys(("torch.t", "torch.adjoint"), t),
    "torch.permute": permute,
    "torch.movedim": movedim,
    "torch.unsqueeze": unsqueeze,
    "torch.squeeze": squeeze,
    **dict.fromkeys(("torch.atleast_1d", "torch.atleast_2d", "torch.atleast_3d"), atleast),
    **dict.fromkeys(("torch.Tensor.expand", "torch.broadcast_to"), expand),
    "torch.Tensor.expand_as": expand_as,
    "torch.broadcast_tensors": broadcast_tensors,
    **dict.fromkeys(("torch.Tensor.repeat", "torch.tile"), repeat),
}
