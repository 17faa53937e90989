"""What the typing rules reason with: abstract arguments, sizes that may be unknown, broadcasting, dtype promotion.

A rule ends in one of four ways: it returns an :class:`Inferred`; it raises :class:`Misfit` (torch would refuse the
call), :class:`Unsettled` (that depends on a size that is a symbol here) or :class:`Defer` (the rule does not cover
this call). The caller turns the last three into torch's own answer on meta tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import TypeVar, cast

from tracelens.ir import dims
from tracelens.ir.dims import Dim, Sizes, Sym
from tracelens.ir.ops import Scalar, Slice, Special
from tracelens.ir.types import DType, TensorType

AbstractArg = (
    None | Scalar | str | DType | EllipsisType | Sym | Slice | TensorType | tuple["AbstractArg", ...]
)
"""An argument of a call in which every value is replaced by its type."""

AbstractKwargs = tuple[tuple[str, AbstractArg], ...]


@dataclass(frozen=True, slots=True)
class Inferred:
    """What is known of a call's result.

    ``fields``: ``None`` for a single tensor, ``()`` for a plain tuple, names for a namedtuple. ``pins``: the sizes
    whose numbers decided; the answer is only right for those. ``mixes``: positions do not stay apart and whole.
    """

    types: tuple[TensorType, ...]
    fields: tuple[str, ...] | None = None
    pins: frozenset[str] = frozenset()
    mixes: bool = False


class Misfit(Exception):
    """torch would refuse the call."""


class Unsettled(Exception):
    """Whether the call fits depends on the number of a size that is a symbol here."""


class Defer(Exception):
    """The rule does not cover this call."""


Ask = Callable[[str, tuple[AbstractArg, ...], AbstractKwargs], tuple[TensorType, ...]]


class Sizing:
    """The sizes of one call: known or not, and which of them have been decisive so far."""

    def __init__(self, sizes: Sizes | None, default: DType, ask: Ask) -> None:
        self.sizes = sizes
        self.default = default
        self.ask = ask
        self.pins: set[str] = set()
        self.least: list[tuple[Sym, int]] = []

    def number(self, dim: Dim) -> int:
        """The number that ``dim`` is, which pins its symbols."""
        if isinstance(dim, int):
            return dim
        symbols = dims.symbols(dim)
        if self.sizes is None or not symbols <= self.sizes.keys():
            raise Unsettled(f"it depends on the size {dim}, which is a symbol: this recording has no prompt")
        self.pins |= symbols
        return dims.evaluate(dim, self.sizes)

    def equal(self, left: Dim, right: Dim) -> bool:
        """Are the two sizes the same? Pins symbols only where the answer is not clear for every prompt."""
        if left == right or (isinstance(left, int) and isinstance(right, int)):
            return left == right
        return self.number(left) == self.number(right)

    def at_least(self, dim: Dim, size: int) -> None:
        """``dim`` must be ``size`` or more. Nothing is pinned: too small a size gives an error, not another result."""
        if isinstance(dim, Sym):
            self.least.append((dim, size))
            if self.sizes is None or not dims.symbols(dim) <= self.sizes.keys():
                return
            dim = dims.evaluate(dim, self.sizes)
        if dim < size:
            raise Misfit

    def done(
        self,
        types: TensorType | Sequence[TensorType],
        mixes: bool,
        fields: tuple[str, ...] | None = None,
    ) -> Inferred:
        several = (types,) if isinstance(types, TensorType) else tuple(types)
        return Inferred(several, fields, frozenset(self.pins), mixes)


# --- arguments ---------------------------------------------------------------------------------------------------

_NUMPY_NAMES = {"axis": "dim", "keepdims": "keepdim", "x": "input", "self": "input"}

Bound = dict[str, AbstractArg]


Given = TypeVar("Given")


def bind(signature: str, args: Sequence[Given], kwargs: Sequence[tuple[str, Given]]) -> dict[str, Given]:
    """Arguments by name; names after ``*`` are keyword-only. Calls that do not fit the signature are deferred."""
    names = signature.split()
    positional = names[: names.index("*")] if "*" in names else names
    if len(args) > len(positional):
        raise Defer
    bound = dict(zip(positional, args, strict=False))
    for key, value in kwargs:
        name = key if key in names else _NUMPY_NAMES.get(key, key)
        if name not in names or name in bound:
            raise Defer
        bound[name] = value
    return bound


def tensor(bound: Bound, name: str = "input") -> TensorType:
    found = bound.get(name)
    if not isinstance(found, TensorType):
        raise Defer
    return found


def flag(bound: Bound, name: str) -> bool:
    found = bound.get(name, False)
    if not isinstance(found, bool):
        raise Defer
    return found


def integer(arg: AbstractArg) -> int:
    if not isinstance(arg, int) or isinstance(arg, bool):
        raise Defer
    return arg


def integers(arg: AbstractArg) -> tuple[int, ...]:
    """One number or a tuple of numbers, as a tuple."""
    return tuple(integer(part) for part in arg) if isinstance(arg, tuple) else (integer(arg),)


def sizes_of(arg: AbstractArg) -> tuple[Dim, ...]:
    """A shape argument: numbers and symbols."""
    parts = arg if isinstance(arg, tuple) else (arg,)
    return tuple(part if isinstance(part, Sym) else integer(part) for part in parts)


def axis_of(arg: AbstractArg, ndim: int) -> int:
    """An axis counted from the front. A tensor without axes takes 0 and -1, as in torch."""
    axis = integer(arg)
    room = max(ndim, 1)
    if not -room <= axis < room:
        raise Misfit
    return axis % room


def axes_of(arg: AbstractArg, ndim: int) -> tuple[int, ...]:
    found = tuple(axis_of(part, ndim) for part in integers(arg))
    if len(set(found)) != len(found):
        raise Misfit
    return found


def tensors_in(args: Iterable[AbstractArg]) -> list[TensorType]:
    """All tensors among the arguments, nested ones too, in order."""
    found: list[TensorType] = []
    for arg in args:
        if isinstance(arg, TensorType):
            found.append(arg)
        elif isinstance(arg, tuple):
            found += tensors_in(arg)
    return found


def replace_tensors(
    args: tuple[AbstractArg, ...], new: Callable[[TensorType], AbstractArg]
) -> tuple[AbstractArg, ...]:
    return tuple(
        new(arg)
        if isinstance(arg, TensorType)
        else replace_tensors(arg, new)
        if isinstance(arg, tuple)
        else arg
        for arg in args
    )


# --- positions ---------------------------------------------------------------------------------------------------


def carries(dim: Dim, symbol: str) -> bool:
    return not isinstance(dim, int) and symbol in dims.symbols(dim)


def has_positions(types: Iterable[TensorType]) -> bool:
    """Does any axis carry positions: the prompt's own, or those of the keys that attention looks at?"""
    return any(
        carries(dim, dims.POSITION) or carries(dim, dims.KEY) for type_ in types for dim in type_.shape
    )


def touching(shape: Sequence[Dim], touched: Iterable[int], keys_add_up: bool = False) -> bool:
    """Does working along, reducing or indexing the axes ``touched`` mix positions?

    It does on a position axis, and on the batch axis where positions stay: the rows' positions do not line up. Keys
    are positions too, except where they only ``add up``: whether padding has weight there is another question
    (:mod:`tracelens.ir.keys`).
    """
    axes = set(touched)
    rest = [dim for axis, dim in enumerate(shape) if axis not in axes]
    for axis in axes:
        if axis >= len(shape):
            continue
        dim = shape[axis]
        if carries(dim, dims.POSITION) or (carries(dim, dims.KEY) and not keys_add_up):
            return True
        if carries(dim, dims.BATCH) and any(carries(d, dims.POSITION) or carries(d, dims.KEY) for d in rest):
            return True
    return False


# --- broadcasting ------------------------------------------------------------------------------------------------

_RANK = {dims.P: 0, dims.B: 1, dims.S: 2}


def merge(sizing: Sizing, left: Dim, right: Dim) -> tuple[Dim, bool]:
    """The common size of two aligned axes, and whether positions had to be taken by number for it."""
    if left == right or right == 1:
        return left, False
    if left == 1:
        return right, False
    if isinstance(left, int) and isinstance(right, int):
        raise Misfit
    by_number = any(carries(dim, symbol) for dim in (left, right) for symbol in (dims.POSITION, dims.KEY))
    # Only what decides is pinned: a batch of one fits any other size.
    for one, other in ((left, right), (right, left)):
        if isinstance(one, Sym) and _is_one(sizing, one):
            sizing.number(one)
            return other, carries(one, dims.POSITION) or carries(one, dims.KEY)
    if sizing.number(left) != sizing.number(right):
        raise Misfit
    both = [dim for dim in (left, right) if isinstance(dim, Sym)]
    return min(both, key=lambda dim: _RANK.get(dim, 3)), by_number


def _is_one(sizing: Sizing, dim: Sym) -> bool:
    known = sizing.sizes
    return known is not None and dims.symbols(dim) <= known.keys() and dims.evaluate(dim, known) == 1


def broadcast(sizing: Sizing, types: Sequence[TensorType]) -> tuple[tuple[Dim, ...], bool]:
    """The shape that the operands broadcast to, and whether that mixes positions."""
    if len(types) == 1:
        return types[0].shape, False
    first = types[0].shape
    if all(type_.shape == first for type_ in types):
        return first, False
    ndim = max(type_.ndim for type_ in types)
    shape: list[Dim] = [1] * ndim
    mixes = False
    for type_ in types:
        start = ndim - type_.ndim
        for axis, dim in enumerate(type_.shape):
            shape[start + axis], by_number = merge(sizing, shape[start + axis], dim)
            mixes = mixes or by_number
    labelled = [(type_, tuple(range(ndim - type_.ndim, ndim))) for type_ in types]
    return tuple(shape), mixes or rows_differ(labelled)


def rows_differ(operands: Sequence[tuple[TensorType, Sequence[object]]]) -> bool:
    """Do positions of one row meet positions of another?  Axes with the same label belong together."""
    rows: dict[object, set[object]] = {}
    for type_, labels in operands:
        own = frozenset(
            label for label, dim in zip(labels, type_.shape, strict=True) if carries(dim, dims.BATCH)
        )
        if own:
            for label, dim in zip(labels, type_.shape, strict=True):
                if carries(dim, dims.POSITION) or carries(dim, dims.KEY):
                    rows.setdefault(label, set()).add(own)
    return any(len(different) > 1 for different in rows.values())


# --- dtypes ------------------------------------------------------------------------------------------------------

_ORDER = (DType.FLOAT16, DType.BFLOAT16, DType.FLOAT32, DType.FLOAT64)
_COMPLEX_OF = {DType.FLOAT64: DType.COMPLEX128, DType.FLOAT32: DType.COMPLEX64}
_INTEGERS = (DType.UINT8, DType.INT8, DType.INT16, DType.INT32, DType.INT64)


def is_integer(dtype: DType) -> bool:
    return dtype in _INTEGERS


def _category(dtype: DType) -> int:
    return 3 if dtype.is_complex else 2 if dtype.is_floating else 0 if dtype is DType.BOOL else 1


def promote(left: DType, right: DType) -> DType:
    """torch's promotion of two dtypes of equal priority."""
    if left is right:
        return left
    low, high = sorted((left, right), key=_category)
    if _category(low) != _category(high):
        if _category(high) == 3:
            return DType.COMPLEX128 if low is DType.FLOAT64 else high
        return high
    if _category(low) == 3:
        return DType.COMPLEX128
    if _category(low) == 2:
        if {low, high} == {DType.FLOAT16, DType.BFLOAT16}:
            return DType.FLOAT32
        return max(low, high, key=_ORDER.index)
    if {low, high} == {DType.UINT8, DType.INT8}:
        return DType.INT16
    return max(low, high, key=_INTEGERS.index)


def _over(higher: DType | None, lower: DType | None) -> DType | None:
    """What a group of higher priority makes of one of lower: only a higher category counts."""
    if higher is None or lower is None:
        return higher or lower
    if higher.is_complex:
        return higher
    if higher.is_floating:
        if lower.is_complex:
            if higher not in _COMPLEX_OF:
                raise Defer  # torch has a complex half for this, which no graph can hold
            return _COMPLEX_OF[higher]
        return higher
    if higher is DType.BOOL or lower.is_floating or lower.is_complex:
        return promote(higher, lower)
    return higher


def result_dtype(sizing: Sizing, operands: Iterable[AbstractArg]) -> DType:
    """torch's ``result_type``: tensors with axes first, then tensors without, then Python numbers."""
    groups: list[DType | None] = [None, None, None]
    for operand in operands:
        if isinstance(operand, TensorType):
            group, dtype = (0 if operand.shape else 1), operand.dtype
        else:
            group, dtype = 2, _of_number(sizing, operand)
        known = groups[group]
        groups[group] = dtype if known is None else promote(known, dtype)
    return cast("DType", _over(groups[0], _over(groups[1], groups[2])))


def _of_number(sizing: Sizing, number: AbstractArg) -> DType:
    if isinstance(number, bool):
        return DType.BOOL
    if isinstance(number, int):
        return DType.INT64
    if is_float(number):
        return sizing.default
    raise Defer


def is_float(arg: AbstractArg) -> bool:
    """A Python float, in the form in which a graph holds it."""
    return isinstance(arg, float | Special)
