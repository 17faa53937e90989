"""Products and contractions: matmul, linear, einsum.  Every axis has a label; equal labels belong together."""

from __future__ import annotations

from collections.abc import Collection, Sequence

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
    merge,
    replace_tensors,
    rows_differ,
    tensor,
)
from tracelens.ir.dims import Dim
from tracelens.ir.rules_pointwise import Rule
from tracelens.ir.types import DType, TensorType

Args = tuple[AbstractArg, ...]
Label = str
Labelled = tuple[TensorType, Sequence[Label]]


def contract(
    sizing: Sizing, operands: Sequence[Labelled], out: Sequence[Label], stretchable: Collection[Label]
) -> tuple[tuple[Dim, ...], bool]:
    """The shape of a contraction, and whether it mixes positions.  ``stretchable`` labels may meet a size of one."""
    sizes: dict[Label, Dim] = {}
    mixes = False
    for value, labels in operands:
        own: dict[Label, Dim] = {}
        for label, dim in zip(labels, value.shape, strict=True):
            if label in own:
                # A diagonal: the sizes must be the same, and over positions it mixes.
                own[label], _ = _same(sizing, own[label], dim)
                mixes = mixes or _positional(dim)
            else:
                own[label] = dim
        for label, dim in own.items():
            if label not in sizes:
                sizes[label] = dim
            else:
                common = merge if label in stretchable else _same
                sizes[label], by_number = common(sizing, sizes[label], dim)
                mixes = mixes or by_number
    if any(label not in sizes for label in out):
        raise Misfit
    gone = [dim for label, dim in sizes.items() if label not in out]
    positions_stay = any(_positional(sizes[label]) for label in out)
    for dim in gone:
        if carries(dim, dims.POSITION) or (carries(dim, dims.BATCH) and positions_stay):
            mixes = True
    return tuple(sizes[label] for label in out), mixes or rows_differ(operands)


def _same(sizing: Sizing, left: Dim, right: Dim) -> tuple[Dim, bool]:
    """The size of two axes that must be equal, and whether positions had to be taken by number for it."""
    if left == right:
        return left, False
    if not sizing.equal(left, right):
        raise Misfit
    return (right if isinstance(left, int) else left), _positional(left) or _positional(right)


def _positional(dim: Dim) -> bool:
    return carries(dim, dims.POSITION) or carries(dim, dims.KEY)


def _dtype(sizing: Sizing, name: str, args: Args, values: Sequence[TensorType]) -> DType:
    dtype = values[0].dtype
    if dtype.is_floating and all(value.dtype is dtype for value in values):
        return dtype
    small = replace_tensors(args, lambda value: TensorType(value.dtype, (1,) * value.ndim))
    return sizing.ask(name, small, ())[0].dtype


# name -> labels of each operand and of the result; only the ranks given here fit
_FIXED: dict[str, tuple[str, str, str]] = {
    "torch.bmm": ("bij", "bjk", "bik"),
    "torch.mm": ("ij", "jk", "ik"),
    "torch.mv": ("ij", "j", "i"),
    "torch.dot": ("i", "i", ""),
    "torch.vdot": ("i", "i", ""),
    "torch.outer": ("i", "j", "ij"),
}
_SECOND = {
    "torch.bmm": "mat2",
    "torch.mm": "mat2",
    "torch.mv": "vec",
    "torch.dot": "tensor",
    "torch.vdot": "other",
}
# ... the same with a first operand that is added, broadcast to the result
_ADDED: dict[str, tuple[str, str, str]] = {
    "torch.addmm": ("ij", "jk", "ik"),
    "torch.addmv": ("ij", "j", "i"),
    "torch.baddbmm": ("bij", "bjk", "bik"),
    "torch.addbmm": ("bij", "bjk", "ik"),
    "torch.addr": ("i", "j", "ij"),
}


def _checked(value: TensorType, labels: str) -> Labelled:
    if value.ndim != len(labels):
        raise Misfit
    return value, labels


def fixed(sizing: Sizing, name: str, args: Args, kwargs: AbstractKwargs) -> Inferred:
    second = _SECOND.get(name, "vec2")
    bound = bind(f"input {second}", args, kwargs)
    one, two = tensor(bound), tensor(bound, second)
    left, right, out = _FIXED[name]
    shape, mixes = contract(sizing, [_checked(one, left), _checked(two, right)], out, ())
    return sizing.done(TensorType(_dtype(sizing, name, (one, two), (one, two)), shape), mixes)


def added(sizing: Sizing, name: str, args: Args, kwargs: AbstractKwargs) -> Inferred:
    bound = bind("input one two * beta alpha", args, kwargs)
    values = (tensor(bound), tensor(bound, "one"), tensor(bound, "two"))
    if "beta" in bound or "alpha" in bound:
        raise Defer
    left, right, out = _ADDED[name]
    dtype = _dtype(sizing, name, values, values)
    shape, mixes = contract(sizing, [_checked(values[1], left), _checked(values[2], right)], out, ())
    return _plus(sizing, TensorType(dtype, shape), values[0], mixes)


def _plus(sizing: Sizing, result: TensorType, bias: TensorType, mixes: bool) -> Inferred:
    shape, by_number = broadcast(sizing, [result, bias])
    # The addend may be stretched, the product may not.
    if len(shape) != result.ndim or not all(map(sizing.equal, shape, result.shape)):
        raise Misfit
    return sizing.done(TensorType(result.dtype, shape), mixes or by_number)


def _batched(value: TensorType, last: str) -> tuple[Labelled, list[Label]]:
    """Labels for a value with any number of leading axes, numbered from the right."""
    batch = [f"batch{number}" for number in range(value.ndim - len(last), 0, -1)]
    return (value, [*batch, *last]), batch


def matmul(sizing: Sizing, name: str, args: Args, kwargs: AbstractKwargs) -> Inferred:
    bound = bind("input other", args, kwargs)
    one, two = tensor(bound), tensor(bound, "other")
    if not one.ndim or not two.ndim:
        raise Misfit
    left, batch_left = _batched(one, "ij" if one.ndim > 1 else "j")
    right, batch_right = _batched(two, "jk" if two.ndim > 1 else "j")
    batch = max(batch_left, batch_right, key=len)
    out = [*batch, *("i" if one.ndim > 1 else ""), *("k" if two.ndim > 1 else "")]
    shape, mixes = contract(sizing, [left, right], out, batch)
    return sizing.done(TensorType(_dtype(sizing, name, (one, two), (one, two)), shape), mixes)


def linear(sizing: Sizing, name: str, args: Args, kwargs: AbstractKwargs) -> Inferred:
    bound = bind("input weight bias", args, kwargs)
    value, weight, bias = tensor(bound), tensor(bound, "weight"), bound.get("bias")
    if not value.ndim or weight.ndim != 2 or not (bias is None or isinstance(bias, TensorType)):
        raise Defer
    left, batch = _batched(value, "i")
    shape, mixes = contract(sizing, [left, (weight, "oi")], [*batch, "o"], ())
    values = [part for part in (value, weight, bias) if isinstance(part, TensorType)]
    if any(part.dtype is not value.dtype for part in values):
        raise Defer
    result = TensorType(_dtype(sizing, name, (value, weight), (value, weight)), shape)
    if isinstance(bias, TensorType):
        if bias.ndim != 1:
            raise Defer
        return _plus(sizing, result, bias, mixes)
    return sizing.done(result, mixes)


def inner(sizing: Sizing, name: str, args: Args, kwargs: AbstractKwargs) -> Inferred:
    bound = bind("input other", args, kwargs)
    one, two = tensor(bound), tensor(bound, "other")
    if not one.ndim or not two.ndim:
        raise Defer
    left, right = [f"l{axis}" for axis in range(one.ndim - 1)], [f"r{axis}" for axis in range(two.ndim - 1)]
    shape, mixes = contract(sizing, [(one, [*left, "j"]), (two, [*right, "j"])], [*left, *right], ())
    return sizing.done(TensorType(_dtype(sizing, name, (one, two), (one, two)), shape), mixes)


def tensordot(sizing: Sizing, name: str, args: Args, kwargs: AbstractKwargs) -> Inferred:
    bound = bind("input other dims", args, kwargs)
    one, two = tensor(bound), tensor(bound, "other")
    given = bound.get("dims", 2)
    if not isinstance(given, int) or isinstance(given, bool) or not 0 <= given <= min(one.ndim, two.ndim):
        raise Defer
    both = [f"j{axis}" for axis in range(given)]
    left = [f"l{axis}" for axis in range(one.ndim - given)]
    right = [f"r{axis}" for axis in range(two.ndim - given)]
    shape, mixes = contract(sizing, [(one, [*left, *both]), (two, [*both, *right])], [*left, *right], ())
    return sizing.done(TensorType(_dtype(sizing, name, (one, two), (one, two)), shape), mixes)


# --- einsum ------------------------------------------------------------------------------------------------------


def _letters(term: str, ndim: int) -> list[Label]:
    """The labels of one operand: letters, and numbered dots for the axes under an ellipsis."""
    before, dots, after = term.partition("...")
    if not (before + after).isascii() or not ((before + after).isalpha() or not before + after):
        raise Defer
    hidden = ndim - len(before) - len(after)
    if hidden < 0 or (not dots and hidden):
        raise Misfit
    return [*before, *(f".{number}" for number in range(hidden, 0, -1)), *after]


def einsum(sizing: Sizing, name: str, args: Args, kwargs: AbstractKwargs) -> Inferred:
    if kwargs or len(args) < 2 or not isinstance(args[0], str):
        raise Defer
    values = [arg for arg in args[1:] if isinstance(arg, TensorType)]
    left, arrow, right = args[0].replace(" ", "").partition("->")
    terms = left.split(",")
    if len(values) != len(args) - 1 or len(terms) != len(values):
        raise Misfit
    operands: list[Labelled] = [
        (value, _letters(term, value.ndim)) for value, term in zip(values, terms, strict=True)
    ]
    every = [label for _, labels in operands for label in labels]
    dots = sorted({label for label in every if label[0] == "."}, key=lambda label: -int(label[1:]))
    if arrow:
        if right.count("...") > 1 or (dots and "..." not in right):
            raise Defer
        out = _letters(right, len(right.replace("...", "")) + (len(dots) if "..." in right else 0))
    else:
        once = sorted(label for label in set(every) if every.count(label) == 1 and label[0] != ".")
        out = [*dots, *once]
    if len(set(out)) != len(out):
        raise Misfit
    shape, mixes = contract(sizing, operands, out, set(every))
    return sizing.done(TensorType(_dtype_of_einsum(values), shape), mixes)


def _dtype_of_einsum(values: Sequence[TensorType]) -> DType:
    dtype = values[0].dtype
    if not dtype.is_floating or any(value.dtype is not dtype for value in values):
        raise Defer
    return dtype


RULES: dict[str, Rule] = {
    **dict.fromkeys(_FIXED, fixed),
    **dict.fromkeys(_ADDED, added),
    **dict.fromkeys(("torch.matmul", "torch.linalg.matmul"), matmul),
    "torch.nn.functional.linear": linear,
    "torch.inner": inner,
    "torch.tensordot": tensordot,
    "torch.einsum": einsum,
}
