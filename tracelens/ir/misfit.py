"""Why a call does not fit, in words: what torch says, in short, with the types and the numbers beside it."""

from __future__ import annotations

import re
from collections.abc import Callable

from tracelens.errors import (
    DtypeError,
    DynamicShapeError,
    ShapeError,
    TracelensError,
    UnsupportedFunctionError,
)
from tracelens.ir.abstract import AbstractArg, AbstractKwargs, Misfit, Unsettled, replace_tensors, tensors_in
from tracelens.ir.dims import Sizes
from tracelens.ir.probe import by_name
from tracelens.ir.types import DType, TensorType

Trial = Callable[[tuple[AbstractArg, ...], AbstractKwargs], object]

_SPEAKS_OF_DTYPES = re.compile(
    r"dtype|scalar type|data type|not implemented for|not supported for|floating|integral|complex|bool|Byte|Long|Half"
)
_SPEAKS_OF_DATA = re.compile(r"output_size|data-dependent|nonzero|masked_select")


def speaks_of_dtypes(words: str) -> bool:
    """Is it the dtypes that torch complains of?"""
    return _SPEAKS_OF_DTYPES.search(words) is not None


def of_no_size(words: str) -> bool:
    """Would torch complain of that whatever the sizes?"""
    return speaks_of_dtypes(words) or "Dimension out of range" in words


_LACKS_HALVES = re.compile(r"not implemented for '(Half|BFloat16)'|[Uu]nsupported dtype (Half|BFloat16)")


def lacks_halves(words: str) -> bool:
    """Is it only that this device cannot compute with halves?"""
    return _LACKS_HALVES.search(words) is not None


class Refused(Misfit):
    """What torch said.  ``of_numbers``: it is the numbers in the tensors that it minds."""

    def __init__(self, error: Exception, of_numbers: bool = False) -> None:
        super().__init__(str(error))
        self.of_numbers = of_numbers
        self.error = error


def _text(arg: AbstractArg) -> str:
    if isinstance(arg, tuple):
        return "(" + ", ".join(_text(part) for part in arg) + ")"
    return f"torch.{arg.value}" if isinstance(arg, DType) else str(arg)


def call_text(name: str, args: tuple[AbstractArg, ...], kwargs: AbstractKwargs) -> str:
    """``add(f32[B,P,576], f32[64], alpha=2)``"""
    parts = [_text(arg) for arg in args] + [f"{key}={_text(value)}" for key, value in kwargs]
    return f"{name.removeprefix('torch.').removeprefix('nn.functional.')}({', '.join(parts)})"


def _broadcast(found: re.Match[str]) -> str:
    length, axis, shape = found[1], int(found[2]), found[3].split(", ")
    other = shape[axis] if -len(shape) <= axis < len(shape) else "?"
    return f"lengths {other} and {length} do not broadcast, at axis {axis}"


# What torch says at length, and what it comes to. Words that are not in the list are shown as they are.
_SHORT: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (
        r"Attempting to broadcast a dimension of length (\w+) at (-?\d+)!.* broadcastable to \[(.*?)\].*",
        _broadcast,
    ),
    (
        r"The size of tensor a \((\w+)\) must match the size of tensor b \((\w+)\) at non-singleton dimension (-?\d+)",
        r"lengths \1 and \2 do not broadcast, at axis \3",
    ),
    (
        r"The expanded size of the tensor \((\w+)\) must match the existing size \((\w+)\) at .*",
        r"an axis of length \2 cannot be stretched to \1",
    ),
    (
        r"expand\(.*\): the number of sizes provided \((\d+)\) must be greater .* in the tensor \((\d+)\)",
        r"sizes for \1 of the tensor's \2 axes",
    ),
    (
        r"a and b must have same reduction dim, but got \[\w+, (\w+)\] X \[(\w+), \w+\]",
        r"a matrix product sums over axes of one length, and here they have \1 and \2",
    ),
    (
        r"mat1 and mat2 shapes cannot be multiplied \([^x ]+x(\w+) and (\w+)x\w+\)",
        r"a matrix product sums over axes of one length, and here they have \1 and \2",
    ),
    (
        r"Dimension out of range \(expected to be in range of \[(-?\d+), (-?\d+)\], but got (-?\d+)\)",
        r"there is no axis \3, only \1 to \2",
    ),
    (
        r"permute\(.*?\): .* input\.dim\(\) = (\d+) is not equal to len\(dims\) = (\d+)",
        r"an order of \2 axes for a tensor of \1",
    ),
    (r"shape '(\[.*?\])' is invalid for input of size (\w+)", r"\1 does not hold the \2 elements"),
    (
        r"\w+\(\) received an invalid combination of arguments - got (\(.*?\)),? but expected .*",
        r"it does not take \1",
    ),
)


def _in_short(name: str, words: str) -> str:
    """torch's words in one line, without its signatures and without the function's name, which stands there already."""
    first = (words.splitlines() or [""])[0].strip().removesuffix(".")
    for long, short in _SHORT:
        said, count = re.subn(long, short, first)
        if count:
            return said
    own = name.removeprefix("torch.")
    for prefix in (f"{own}(): ", f"{own}: "):
        first = first.removeprefix(prefix)
    return re.sub(r"torch\.Size\((\[.*?\])\)", r"\1", first)


def named_error(
    name: str,
    args: tuple[AbstractArg, ...],
    kwargs: AbstractKwargs,
    sizes: Sizes | None,
    said: Misfit,
    trial: Trial,
) -> TracelensError:
    """The error for a call that torch refuses.  ``trial`` says whether another call would fit, by raising or not."""
    error = said.error if isinstance(said, Refused) else None
    words = by_name(str(said).strip())
    short = _in_short(name, words) or "these arguments do not fit"
    values = tensors_in((*args, *(value for _, value in kwargs)))
    symbols = sorted(frozenset[str]().union(*(value.symbols for value in values)))
    where = ", ".join(
        f"{symbol} = {sizes[symbol]}" for symbol in symbols if sizes is not None and symbol in sizes
    )
    call = call_text(name, args, kwargs)
    problem = f"{call}{f' where {where}' if where else ''}: {short}"
    if isinstance(error, TypeError):
        return UnsupportedFunctionError(problem)
    if _SPEAKS_OF_DATA.search(words):
        return DynamicShapeError(f"{call}: the shape of the result depends on the data")
    if isinstance(error, NotImplementedError) and not speaks_of_dtypes(words):
        return UnsupportedFunctionError(problem)
    if any(_fits_as(dtype, args, kwargs, trial) for dtype in (DType.FLOAT32, DType.INT64)):
        found = list(dict.fromkeys(value.dtype for value in values))
        if len(found) > 1 and all(dtype.is_floating for dtype in found):
            return DtypeError(
                f"{call}{f' where {where}' if where else ''}: it takes tensors of one dtype, and here they are "
                + " and ".join(dtype.value for dtype in found),
                instead="tensor.to(value.dtype), or value.to(tensor.dtype) for more digits",
            )
        return DtypeError(problem)
    if isinstance(error, IndexError) or not speaks_of_dtypes(words):
        return ShapeError(problem, instead="shapes that fit: value.shape is known inside the block")
    return DtypeError(problem)


def _fits_as(dtype: DType, args: tuple[AbstractArg, ...], kwargs: AbstractKwargs, trial: Trial) -> bool:
    """Would the call fit if all its tensors had that dtype?  Then it was the dtypes, not the shapes."""

    def new(value: TensorType) -> AbstractArg:
        return TensorType(dtype, value.shape)

    try:
        trial(
            replace_tensors(args, new),
            tuple((key, replace_tensors((value,), new)[0]) for key, value in kwargs),
        )
    except (Misfit, Unsettled, TracelensError):
        return False
    return True
