"""einops: the pattern says which axes there are, so it also says what happens to positions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tracelens.ir import dims
from tracelens.ir.abstract import (
    AbstractArg,
    AbstractKwargs,
    Defer,
    Inferred,
    Misfit,
    Sizing,
    carries,
    merge,
    rows_differ,
)
from tracelens.ir.dims import Dim, Sym
from tracelens.ir.rules_pointwise import Rule
from tracelens.ir.rules_product import Labelled, contract
from tracelens.ir.types import TensorType

Args = tuple[AbstractArg, ...]
Group = tuple[str, ...]
"""The axes that one axis of a tensor is made of; none for a size of one."""

_TOKEN = re.compile(r"\s*(\(|\)|\.\.\.|…|[A-Za-z_][A-Za-z0-9_]*|\d+)")


@dataclass(frozen=True, slots=True)
class _Side:
    groups: tuple[Group, ...]

    @property
    def names(self) -> list[str]:
        return [name for group in self.groups for name in group]


def _parse(text: str, hidden: int | None) -> _Side:
    """One side of a pattern.  ``hidden``: how many axes the ellipsis stands for."""
    groups: list[Group] = []
    inside: list[str] | None = None
    position = 0
    text = text.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise Defer
        position = match.end()
        token = match[1]
        if token == "(" and inside is None:
            inside = []
        elif token == ")" and inside is not None:
            groups.append(tuple(inside))
            inside = None
        elif token in ("...", "…") and inside is None and hidden is not None:
            groups += [(f".{number}",) for number in range(hidden)]
        elif token == "1":
            if inside is None:
                groups.append(())
        elif token in "()" or token[0].isdigit() or token in ("...", "…"):
            raise Defer  # anonymous axes and ellipses in parentheses are left to einops
        elif inside is None:
            groups.append((token,))
        else:
            inside.append(token)
    side = _Side(tuple(groups))
    if inside is not None or len(set(side.names)) != len(side.names):
        raise Misfit
    return side


def _sides(pattern: AbstractArg, ndim: int) -> tuple[_Side, _Side]:
    if not isinstance(pattern, str) or pattern.count("->") != 1:
        raise Defer
    left, _, right = pattern.partition("->")
    visible = len(_parse(left, 0).groups)
    dots = "..." in left or "…" in left
    if ndim < visible or (ndim > visible and not dots):
        raise Misfit
    hidden = ndim - visible if dots else None
    return _parse(left, hidden), _parse(right, hidden)


def _solve(sizing: Sizing, side: _Side, shape: Sequence[Dim], known: dict[str, Dim]) -> dict[str, Dim]:
    """The size of every name on the left."""
    sizes = dict(known)
    for group, dim in zip(side.groups, shape, strict=True):
        unknown = [name for name in group if name not in sizes]
        product = dims.product(sizes[name] for name in group if name in sizes)
        if len(unknown) > 1:
            raise Misfit
        if not unknown:
            if not sizing.equal(product, dim):
                raise Misfit
            if len(group) == 1 and isinstance(dim, Sym):
                sizes[group[0]] = dim  # the axis keeps its symbol
            continue
        if product == 0:
            raise Defer
        rest = dims.divide(dim, product)
        if rest is None:
            whole, part = sizing.number(dim), sizing.number(product)
            if part == 0 or whole % part:
                raise Misfit
            rest = whole // part
        sizes[unknown[0]] = rest
    return sizes


def _given(kwargs: AbstractKwargs) -> dict[str, Dim]:
    found: dict[str, Dim] = {}
    for name, size in kwargs:
        if isinstance(size, Sym) or (isinstance(size, int) and not isinstance(size, bool) and size > 0):
            found[name] = size
        else:
            raise Defer
    return found


def _mixes(value: TensorType, left: _Side, right: _Side) -> bool:
    """Positions, and rows beside them, must each be one whole axis before and after."""
    positional = any(_positional(dim) for dim in value.shape)
    for group, dim in zip(left.groups, value.shape, strict=True):
        matters = _positional(dim) or (positional and carries(dim, dims.BATCH))
        if matters and (len(group) != 1 or group not in right.groups):
            return True
    return False


def _positional(dim: Dim) -> bool:
    return carries(dim, dims.POSITION) or carries(dim, dims.KEY)


def _one_tensor(sizing: Sizing, arg: AbstractArg) -> tuple[TensorType, bool]:
    """The tensor, or several as one with a new first axis."""
    if isinstance(arg, TensorType):
        return arg, False
    if not isinstance(arg, tuple) or not arg:
        raise Defer
    parts = [part for part in arg if isinstance(part, TensorType)]
    if (
        len(parts) != len(arg)
        or len({part.ndim for part in parts}) != 1
        or len({part.dtype for part in parts}) != 1
    ):
        raise Defer
    shape = list(parts[0].shape)
    mixes = False
    for part in parts[1:]:
        for axis, dim in enumerate(part.shape):
            if not sizing.equal(shape[axis], dim):
                raise Misfit
            shape[axis], by_number = merge(sizing, shape[axis], dim)
            mixes = mixes or by_number
    mixes = mixes or rows_differ([(part, range(part.ndim)) for part in parts])
    return TensorType(parts[0].dtype, (len(parts), *shape)), mixes


def _moved(
    sizing: Sizing, value: TensorType, pattern: AbstractArg, kwargs: AbstractKwargs, loses: bool, gains: bool
) -> tuple[TensorType, bool]:
    left, right = _sides(pattern, value.ndim)
    known = _given(kwargs)
    names = {*left.names, *right.names}
    if not known.keys() <= names:
        raise Misfit
    lost = set(left.names) - set(right.names)
    gained = set(right.names) - set(left.names)
    if (lost and not loses) or (gained and not gains) or not gained <= known.keys():
        raise Misfit
    sizes = _solve(sizing, left, value.shape, known)
    shape = tuple(dims.product(sizes[name] for name in group) for group in right.groups)
    return TensorType(value.dtype, shape), _mixes(value, left, right)


def rearrange(sizing: Sizing, name: str, args: Args, kwargs: AbstractKwargs) -> Inferred:
    """``rearrange`` and ``repeat``."""
    if len(args) != 2:
        raise Defer
    value, joined = _one_tensor(sizing, args[0])
    result, mixes = _moved(sizing, value, args[1], kwargs, loses=False, gains=name == "einops.repeat")
    return sizing.done(result, mixes or joined)


_REDUCTIONS = frozenset({"sum", "mean", "max", "min", "prod"})


def reduce(sizing: Sizing, name: str, args: Args, kwargs: AbstractKwargs) -> Inferred:
    named = dict(kwargs)
    if len(args) == 3:
        source, pattern, reduction = args
    elif len(args) == 2:
        (source, pattern), reduction = args, named.pop("reduction", None)
    else:
        raise Defer
    if reduction not in _REDUCTIONS:
        raise Defer
    value, joined = _one_tensor(sizing, source)
    if not value.dtype.is_floating:
        raise Defer
    result, mixes = _moved(sizing, value, pattern, tuple(named.items()), loses=True, gains=False)
    return sizing.done(result, mixes or joined)


def einsum(sizing: Sizing, name: str, args: Args, kwargs: AbstractKwargs) -> Inferred:
    values = [arg for arg in args[:-1] if isinstance(arg, TensorType)]
    pattern = args[-1] if args else None
    if kwargs or not isinstance(pattern, str) or not values or len(values) != len(args) - 1:
        raise Defer
    left, arrow, right = pattern.partition("->")
    terms = left.split(",")
    if not arrow or len(terms) != len(values):
        raise Misfit
    operands: list[Labelled] = [
        (value, _words(term, value.ndim)) for value, term in zip(values, terms, strict=True)
    ]
    out = _words(right, None)
    if len(set(out)) != len(out):
        raise Misfit
    dtype = values[0].dtype
    if not dtype.is_floating or any(value.dtype is not dtype for value in values):
        raise Defer
    shape, mixes = contract(sizing, operands, out, {label for _, labels in operands for label in labels})
    return sizing.done(TensorType(dtype, shape), mixes)


def _words(term: str, ndim: int | None) -> list[str]:
    words = term.split()
    if not all(word.isidentifier() for word in words):
        raise Defer
    if ndim is not None and len(words) != ndim:
        raise Misfit
    return words


RULES: dict[str, Rule] = {
    "einops.rearrange": rearrange,
    "einops.repeat": rearrange,
    "einops.reduce": reduce,
    "einops.einsum": einsum,
}
