"""Do the rows of a batch stay apart?  What sweeps and slices of a batch ask of every operation.

Types alone cannot say it, but the rules on positions can: a graph whose *positions* stay apart is one in which padding
changes nothing. So the batch axis is given the name of the position axis, positions become a plain number, and the
rules are asked again. What they do not know to keep rows apart may let rows meet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tracelens.ir import dims
from tracelens.ir.dims import Dim, Sizes, Sym
from tracelens.ir.ops import (
    WHOLE,
    Arg,
    Call,
    Index,
    IndexItem,
    IndexPut,
    TokenSelector,
    operands,
    results,
)
from tracelens.ir.retype import retype
from tracelens.ir.types import TensorType

# Positions and keys as plain numbers: primes that no width of a model equals.
NUMBERS: Sizes = {dims.POSITION: 1013, dims.KEY: 1019}


class RowsMeet(Exception):
    """An operation may let the rows of a batch meet."""


def require_rows_apart(
    op: Call | Index | IndexPut, types: Mapping[int, TensorType], numbers: Sizes = NUMBERS
) -> None:
    """Raises :class:`RowsMeet` for an operation that may let rows meet.

    ``types``: of what it uses and makes, by value. ``numbers``: of positions and keys, where the graph is tied to them.
    """
    if isinstance(op, Index | IndexPut):
        # An index of the last row, or a write to it, would pass as one of the last position.
        if addresses_rows(op.index, types[op.base]):
            raise RowsMeet("it addresses rows of the batch")
        if any(isinstance(item, TokenSelector) for item in op.index):
            return  # tokens are selected in each row for itself
    if isinstance(op, Call) and op.function == "tracelens.masked_mean":
        return  # over each row's own tokens
    named = {value: _named(types[value], numbers) for value in operands(op)}
    inferred = retype(_with_named_sizes(op, numbers), named, None, {})
    assert inferred is not None
    wanted = tuple(_named(type_, numbers) for _, type_ in results(op))
    if inferred.mixes or inferred.pins or inferred.types != wanted:
        raise RowsMeet("it may let the rows of a batch meet")


def addresses_rows(index: tuple[IndexItem, ...], base: TensorType) -> bool:
    """Does an index pick some of the rows of what it is applied to?"""
    taking = [item for item in index if item is not None]
    return any(
        item != WHOLE and dims.BATCH in dims.symbols(dim)
        for item, dim in zip(taking, base.shape, strict=False)
    )


def _named(type_: TensorType, numbers: Sizes) -> TensorType:
    return TensorType(type_.dtype, tuple(_renamed(dim, numbers) for dim in type_.shape))


def _renamed(dim: Dim, numbers: Sizes) -> Dim:
    if dim == dims.B:
        return dims.P
    if dims.BATCH in dims.symbols(dim):
        raise RowsMeet(f"an axis of size {dim} holds several rows")
    return dims.evaluate(dim, numbers)


def _with_named_sizes(op: Call | Index | IndexPut, numbers: Sizes) -> Call | Index | IndexPut:
    if not isinstance(op, Call):
        return op
    return replace(
        op,
        args=tuple(_renamed_argument(arg, numbers) for arg in op.args),
        kwargs=tuple((name, _renamed_argument(arg, numbers)) for name, arg in op.kwargs),
    )


def _renamed_argument(arg: Arg, numbers: Sizes) -> Arg:
    if isinstance(arg, Sym):
        return _renamed(arg, numbers)
    return tuple(_renamed_argument(part, numbers) for part in arg) if isinstance(arg, tuple) else arg
