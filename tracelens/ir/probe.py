"""Symbolic shapes from numbers: a function is run at sizes chosen so that they can be told apart afterwards."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from tracelens.ir import dims
from tracelens.ir.abstract import Misfit, Unsettled
from tracelens.ir.dims import Dim, Sizes, Sym
from tracelens.ir.types import TensorType

Run = Callable[[Sizes], tuple[TensorType, ...]]

# Primes, far from the sizes of models and with different distances, so that sums and products stay apart.
_LARGE: tuple[dict[str, int], ...] = (
    {dims.BATCH: 1009, dims.POSITION: 2003, dims.KEY: 3001},
    {dims.BATCH: 1013, dims.POSITION: 2027, dims.KEY: 3037},
    {dims.BATCH: 1031, dims.POSITION: 2063, dims.KEY: 3109},
)
# The sizes at which functions behave otherwise, if they ever do.
_SMALL: tuple[dict[str, int], ...] = (
    {dims.BATCH: 1, dims.POSITION: 1, dims.KEY: 1},
    {dims.BATCH: 2, dims.POSITION: 3, dims.KEY: 4},
    {dims.BATCH: 3, dims.POSITION: 6, dims.KEY: 8},
)


@dataclass(frozen=True, slots=True)
class Probed:
    """``limited``: some sizes do not fit, so that a known size must still be tried."""

    types: tuple[TensorType, ...]
    pins: frozenset[str]
    limited: bool


def probed(run: Run, shapes: Sequence[tuple[Dim, ...]], extra: Iterable[Sym], sizes: Sizes | None) -> Probed:
    """The symbolic result of ``run``, whose operands have ``shapes``; ``extra`` are sizes among the arguments.

    As few sizes as possible are pinned. Raises :class:`Misfit` where torch refuses, :class:`Unsettled` where numbers
    are needed that are not known.
    """
    bases = _bases(shapes, tuple(extra))
    symbols = sorted(
        frozenset[str]().union(*(dims.symbols(dim) for shape in (*shapes, tuple(extra)) for dim in shape))
    )
    if not symbols:
        return Probed(run({}), frozenset(), False)
    refusal: Misfit | None = None
    known = [symbol for symbol in symbols if sizes is not None and symbol in sizes]
    for count in range(len(known) + 1):
        for pinned in combinations(known, count):
            fixed = {symbol: sizes[symbol] for symbol in pinned} if sizes is not None else {}
            if count == len(symbols):
                return Probed(run(fixed), frozenset(pinned), False)
            try:
                found = _symbolic(run, bases, fixed)
            except Misfit as error:
                refusal = refusal or error
                continue
            if found is not None:
                if found.limited and sizes is not None and len(known) == len(symbols):
                    run(sizes)  # torch's own word on the real sizes
                return found
    if refusal is not None:
        if not any(_fits(run, assignment) for assignment in _SMALL):
            raise refusal
        names = " and ".join(symbols)
        raise Unsettled(
            f"it does not fit every {names}, and this recording has no prompt: {by_name(str(refusal))}"
        )
    raise Unsettled(f"the result's shape depends on {' and '.join(symbols)} in a way that has no name")


def by_name(words: str) -> str:
    """torch's words with the sizes' names in place of the numbers that stood for them."""
    for name, number in _LARGE[0].items():
        words = re.sub(rf"\b{number}\b", name, words)
    return words


def _fits(run: Run, sizes: Sizes) -> bool:
    try:
        run(sizes)
    except Misfit:
        return False
    return True


def _symbolic(run: Run, bases: list[Dim], fixed: dict[str, int]) -> Probed | None:
    samples: list[tuple[dict[str, int], tuple[TensorType, ...]]] = []
    for assignment in _LARGE:
        at = {**assignment, **fixed}
        samples.append((at, run(at)))
    limited = False
    for assignment in _SMALL:
        at = {**assignment, **fixed}
        try:
            samples.append((at, run(at)))
        except Misfit:
            limited = True
    first = samples[0][1]
    if any([(t.dtype, t.ndim) for t in types] != [(t.dtype, t.ndim) for t in first] for _, types in samples):
        return None
    result: list[TensorType] = []
    for number, type_ in enumerate(first):
        shape: list[Dim] = []
        for axis in range(type_.ndim):
            seen = [(at, types[number].shape[axis]) for at, types in samples]
            dim = _expression(bases, [(at, size) for at, size in seen if isinstance(size, int)], fixed)
            if dim is None:
                return None
            shape.append(dim)
        result.append(TensorType(type_.dtype, tuple(shape)))
    return Probed(tuple(result), frozenset(fixed), limited)


def _bases(shapes: Sequence[tuple[Dim, ...]], extra: tuple[Sym, ...]) -> list[Dim]:
    """What an axis of the result may be built from, the likely first."""
    plain = [dim for shape in shapes for dim in shape if isinstance(dim, Sym)] + list(extra)
    names = frozenset[str]().union(*(dims.symbols(dim) for dim in plain))
    plain += [dims.symbol(name) for name in sorted(names)]
    products: list[Dim] = []
    for shape in shapes:
        for count in range(2, len(shape) + 1):
            products += [dims.product(part) for part in combinations(shape, count)] if len(shape) <= 6 else []
    products += [dims.multiply(left, right) for left, right in combinations(dict.fromkeys(plain), 2)]
    return list(dict.fromkeys([*plain, *(dim for dim in products if isinstance(dim, Sym))]))


def _expression(
    bases: list[Dim], seen: Sequence[tuple[dict[str, int], int]], fixed: dict[str, int]
) -> Dim | None:
    """The first expression that is right at every sample, and does not speak of pinned sizes."""
    first_at, first = seen[0]

    def fits(dim: Dim) -> bool:
        return all(dims.evaluate(dim, at) == size for at, size in seen)

    free = [base for base in bases if not dims.symbols(base) & fixed.keys()]
    for base in free:
        if fits(base):
            return base
    if fits(first):
        return first
    for base in free:
        size = dims.evaluate(base, first_at)
        candidates: list[Dim | None] = [dims.add(base, first - size)]
        if size and first % size == 0:
            candidates.append(dims.multiply(base, first // size))
        if first and size % first == 0:
            candidates.append(dims.divide(base, size // first))
        for candidate in candidates:
            if candidate is not None and fits(candidate):
                return candidate
    return None
