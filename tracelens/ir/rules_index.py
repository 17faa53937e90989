"""Indexing: basic, by integer tensors with torch's rules, and by real tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tracelens.errors import (
    DtypeError,
    DynamicShapeError,
    ShapeError,
    SpecialisedGraphError,
    SymbolicSizeError,
)
from tracelens.ir import dims
from tracelens.ir.abstract import (
    Defer,
    Inferred,
    Misfit,
    Sizing,
    Unsettled,
    broadcast,
    carries,
    has_positions,
    merge,
    rows_differ,
)
from tracelens.ir.dims import Dim, Sizes, bounds_text
from tracelens.ir.ops import (
    OwnTokens,
    PromptRow,
    PromptTokens,
    Scalar,
    Slice,
    TokenChars,
    TokenId,
    TokenList,
    TokenSelector,
    TokenSlice,
    TokenText,
    drops_axis,
)
from tracelens.ir.types import DType, TensorType

_STRETCHED = "a value of that shape; axes of size one, and axes missing in front, are stretched"

AbstractItem = int | Slice | TensorType | TokenSelector | PromptRow | PromptTokens | OwnTokens | None
AbstractIndex = tuple[AbstractItem, ...]


@dataclass(slots=True)
class _Axis:
    """One axis of the result so far; ``by``: the index tensor that stands here instead."""

    dim: Dim
    by: TensorType | None = None


def index_text(index: AbstractIndex) -> str:
    """The index as the user wrote it, for messages."""
    return f"[{', '.join(_item_text(item) for item in index)}]"


def _item_text(item: AbstractItem) -> str:
    match item:
        case Slice():
            return bounds_text(item.start, item.stop, item.step)
        case TokenSlice():
            return f"tok({bounds_text(item.start, item.stop, item.step)})"
        case TokenText():
            return f'tok("{item.text}")'
        case TokenId():
            return f"tok(token_id({item.id}))"
        case TokenChars():
            return f"tok(chars({item.start}, {item.stop}))"
        case PromptRow() | PromptTokens():
            return f"prompt({item.row})"
        case OwnTokens():
            return _item_text(item.selector)
        case _:
            return str(item)


def _fail(base: TensorType, index: AbstractIndex, problem: str, instead: str | None = None) -> ShapeError:
    where = f"{base}{index_text(index)}: " if index else ""
    return ShapeError(f"{where}{problem}", instead=instead)


def _axes(sizing: Sizing, base: TensorType, index: AbstractIndex) -> tuple[list[_Axis], bool, bool]:
    """The axes after everything but the index tensors; whether positions are indexed, and whether rows are."""
    taking = sum(item is not None for item in index)
    if taking > base.ndim:
        raise _fail(base, index, f"{taking} indices for a tensor of {base.ndim} axes")
    axes: list[_Axis] = []
    positions = rows = False
    at = 0
    for item in index:
        if item is None:
            axes.append(_Axis(1))
            continue
        dim = base.shape[at]
        at += 1
        match item:
            case int():
                least = item + 1 if item >= 0 else -item
                try:
                    sizing.at_least(dim, least)
                except Misfit:
                    size = dim if isinstance(dim, int) else dims.evaluate(dim, sizing.sizes or {})
                    instead = f"a number from {-size} to {size - 1}" if size else None
                    raise _fail(base, index, f"{item} is outside an axis of size {size}", instead) from None
                touched = not (item == -1 and dim in (dims.P, dims.S))
            case Slice():
                if item.step is not None and item.step <= 0:
                    raise _fail(base, index, "a slice's step must be positive", "value.flip(axis)")
                length = dims.sliced(dim, item.start, item.stop, item.step)
                axes.append(_Axis(length))
                last = item.start == -1 and item.stop is None and item.step in (None, 1)
                touched = length != dim and not (last and dim in (dims.P, dims.S))
            case TensorType():
                _check_index_tensor(base, index, item)
                if item.ndim:
                    axes.append(_Axis(dim, item))
                touched = True
            case PromptRow():
                if dim != dims.B or item.row < 0:
                    raise _fail(
                        base, index, f"a prompt is chosen on the axis of rows, and this axis is {dim}"
                    )
                _require(sizing, item.row, dim, item.row + 1)
                axes.append(_Axis(1))
                continue
            case PromptTokens():
                if dim not in (dims.P, dims.S) or item.length < 1:
                    raise _fail(
                        base, index, f"a prompt's tokens stand on an axis P or S, and this axis is {dim}"
                    )
                _require(sizing, item.row, dim, item.length)
                axes.append(_Axis(item.length))
                continue
            case OwnTokens():
                if dim != item.length:
                    raise _fail(
                        base,
                        index,
                        f"a prompt of {item.length} tokens has them on an axis of as many, not of {dim}",
                    )
                if not drops_axis(item):
                    axes.append(_Axis(_width(base, index, item.selector)))
                continue
            case _:
                if dim != dims.P:
                    raise _fail(
                        base, index, f"tokens can be selected on a position axis only, and this axis is {dim}",
                        "a value with an axis P; value.tok[...] stands for that axis",
                    )  # fmt: skip
                if base.batch_axis is None:
                    raise _fail(
                        base, index, "tokens are selected row by row, and this value has no batch axis B"
                    )
                if not drops_axis(item):
                    axes.append(_Axis(_width(base, index, item)))
                continue
        if touched:
            positions = positions or carries(dim, dims.POSITION) or carries(dim, dims.KEY)
            rows = rows or carries(dim, dims.BATCH)
    axes += [_Axis(dim) for dim in base.shape[at:]]
    _check_prompt(base, index, axes)
    return axes, positions, rows


def _require(sizing: Sizing, row: int, dim: Dim, least: int) -> None:
    try:
        sizing.at_least(dim, least)
    except Misfit:
        there = f"are fewer than {least} prompts" if dim == dims.B else f"is no prompt of {least} tokens"
        raise SpecialisedGraphError(
            f"the graph is about t.prompts[{row}], and here {there}",
            instead="prompts like those that it was recorded with, or record again for these",
        ) from None


def _check_prompt(base: TensorType, index: AbstractIndex, axes: Sequence[_Axis]) -> None:
    """One prompt's row and its own tokens go together: another row's would be padding, or cut off."""
    rows = {item.row for item in index if isinstance(item, PromptRow)}
    of = {item.row for item in index if isinstance(item, PromptTokens)}
    if not rows and not of:
        return
    padded = any(carries(axis.dim, dims.POSITION) or carries(axis.dim, dims.KEY) for axis in axes)
    if len(rows) != 1 or of != rows or padded:
        raise _fail(
            base, index, "a prompt is chosen by its row and its own tokens, on all axes that have them"
        )


def _width(base: TensorType, index: AbstractIndex, item: TokenSelector) -> int:
    width = len(item.indices) if isinstance(item, TokenList) else getattr(item, "width", None)
    if width is None:
        raise SymbolicSizeError(
            f"{base}{index_text(index)}: how many tokens that selects is not known without a prompt",
            instead=(
                f'one token of it, .tok["{item.text}", -1]; or record with a prompt'
                if isinstance(item, TokenText)
                else "a list of tokens, .tok[[0, 1, 2]]; or record with a prompt"
            ),
        )
    return width


def _check_index_tensor(base: TensorType, index: AbstractIndex, item: TensorType) -> None:
    if item.dtype in (DType.BOOL, DType.UINT8):
        raise DynamicShapeError(
            f"{base}{index_text(index)}: how many elements a mask selects depends on the data",
            instead="site = tl.where(mask, new, site) to write where the mask holds; or a concrete mask",
        )
    if item.dtype not in (DType.INT64, DType.INT32):
        raise DtypeError(
            f"{base}{index_text(index)}: an index must be int64 or int32", instead="index.to(torch.int64)"
        )


def _shape(sizing: Sizing, base: TensorType, index: AbstractIndex) -> tuple[tuple[Dim, ...], bool, bool]:
    axes, positions, rows = _axes(sizing, base, index)
    places = [number for number, axis in enumerate(axes) if axis.by is not None]
    if not places:
        return tuple(axis.dim for axis in axes), positions, rows
    tensors = [axis.by for axis in axes if axis.by is not None]
    try:
        selected, by_number = broadcast(sizing, tensors)
    except Misfit:
        shapes = " and ".join(str(tensor) for tensor in tensors)
        raise _fail(base, index, f"the index tensors {shapes} do not broadcast") from None
    rest = [axis.dim for axis in axes if axis.by is None]
    # torch: neighbours leave their axes in place, all others go to the front.
    together = places[-1] - places[0] + 1 == len(places)
    start = places[0] if together else 0
    # A table looked up for every position keeps positions apart; positions picked by positions do not.
    carried = has_positions(tensors) and has_positions([base])
    return (*rest[:start], *selected, *rest[start:]), positions or by_number or carried, rows


def _index(sizing: Sizing, base: TensorType, item: AbstractIndex) -> Inferred:
    shape, positions, rows = _shape(sizing, base, item)
    stay = any(carries(dim, dims.POSITION) or carries(dim, dims.KEY) for dim in shape)
    return sizing.done(TensorType(base.dtype, shape), positions or (rows and stay))


def _index_put(sizing: Sizing, base: TensorType, item: AbstractIndex, value: TensorType | Scalar) -> Inferred:
    _check_dtype(base, value)
    shape, positions, rows = _shape(sizing, base, item)
    if not isinstance(value, TensorType):
        return sizing.done(base, positions)
    own = value.shape
    while len(own) > len(shape) and own[0] == 1:
        own = own[1:]
    problem = f"{value} does not broadcast to {TensorType(base.dtype, shape)}"
    if len(own) > len(shape):
        raise _fail(base, item, problem, _STRETCHED)
    mixes = positions
    start = len(shape) - len(own)
    for axis, dim in enumerate(own):
        target = shape[start + axis]
        try:
            common, by_number = merge(sizing, target, dim)
        except Misfit:
            raise _fail(base, item, problem, _STRETCHED) from None
        # The value may be stretched, the place it goes to may not.
        if common != target and sizing.number(target) != sizing.number(dim):
            raise _fail(base, item, problem, _STRETCHED)
        mixes = mixes or by_number
    fitted = TensorType(value.dtype, own)
    target_type = TensorType(base.dtype, shape)
    labelled = [(target_type, range(len(shape))), (fitted, range(start, len(shape)))]
    if rows and any(carries(dim, dims.POSITION) for dim in own):
        mixes = True  # the value's positions are those of other rows
    return sizing.done(base, mixes or rows_differ(labelled))


def _category(dtype: DType) -> str:
    if dtype.is_floating:
        return "floating"
    return "complex" if dtype.is_complex else "bool" if dtype is DType.BOOL else "integer"


def _check_dtype(base: TensorType, value: TensorType | Scalar) -> None:
    want = _category(base.dtype)
    if isinstance(value, TensorType):
        have = _category(value.dtype)
        if have != want:
            raise DtypeError(
                f"{have} values ({value}) cannot be written into {want} ones ({base})",
                instead=f"convert on purpose: value.to(torch.{base.dtype.value})",
            )
        return
    allowed: dict[str, tuple[type, ...]] = {
        "bool": (bool,),
        "integer": (bool, int),
        "complex": (bool, int, float, complex),
    }
    # A graph holds -0.0 as a special number of its own, which is a float.
    is_complex = isinstance(value, complex)
    fits = not is_complex if want == "floating" else isinstance(value, allowed[want])
    if not fits:
        raise DtypeError(f"{value} cannot be written into {want} values ({base})")


# --- the questions -----------------------------------------------------------------------------------------------


def _never(*_: object) -> tuple[TensorType, ...]:
    raise Defer  # indexing needs no word of torch's


def infer_index(base: TensorType, index: AbstractIndex, sizes: Sizes | None = None) -> Inferred:
    """The type of ``base[index]``; the index is as in :class:`~tracelens.ir.ops.Index`, with types for values."""
    try:
        return _index(Sizing(sizes, DType.FLOAT32, _never), base, index)
    except Unsettled as error:
        raise _fail(base, index, str(error), "record with a prompt") from None


def infer_index_put(
    base: TensorType, index: AbstractIndex, value: TensorType | Scalar, sizes: Sizes | None = None
) -> Inferred:
    """The type of a copy of ``base`` in which ``base[index]`` is ``value``: that of ``base``.

    The value broadcasts to the indexed shape and is cast, float to float only. Raises :class:`ShapeError` and
    :class:`DtypeError`.
    """
    try:
        return _index_put(Sizing(sizes, DType.FLOAT32, _never), base, index, value)
    except Unsettled as error:
        raise _fail(
            base, index, f"{value} may not fit: {error}",
            "a value with an axis of the same symbol, or of size one; or record with a prompt",
        ) from None  # fmt: skip
