"""What a value holds at keys that are padding, found by following it from the scores and patterns that it was made of.

In a batch of prompts that differ in length, each row has keys that are padding. They add nothing to a sum over keys if
they hold zero, and nothing to a soft-max if they hold something very low. A pattern holds zero there, and scores the
lowest number; what was computed from them may hold anything. So each value gets a :class:`Held`, and an operation that
lets keys meet is right only where that fits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf, isfinite, isnan

from tracelens.ir import dims
from tracelens.ir.abstract import carries
from tracelens.ir.dims import Sym
from tracelens.ir.ops import Scalar, Special
from tracelens.ir.types import DType, TensorType

Number = bool | int | float

ORDINARY = 1e4
"""No number that a model computes is taken to be larger than this, unless an operation on it says otherwise."""


@dataclass(frozen=True, slots=True)
class Held:
    """What is known of a value.

    ``padding``: every number that may stand at a key that is padding, or ``None`` where that is not known. ``finite``:
    it is finite as far as its operations can tell. ``unless_broken``: ``padding`` is right only where the numbers at
    real keys are finite. ``positive``: no number at a real key is below zero. ``reach``: none there is larger, the sign
    left out.
    """

    padding: tuple[Number, ...] | None = None
    finite: bool = True
    unless_broken: bool = False
    positive: bool = False
    reach: float = ORDINARY

    @property
    def zero(self) -> bool:
        """Does it hold nothing but zero there?"""
        return self.padding is not None and all(number == 0 for number in self.padding)

    @property
    def tame(self) -> bool:
        """Is it finite there too?"""
        return self.finite if self.padding is None else all(isfinite(number) for number in self.padding)

    @property
    def lowest(self) -> bool:
        """Is it there so far below every number at a real key that a soft-max gives it no weight?"""
        if self.padding is None or any(isnan(number) for number in self.padding):
            return False
        highest = max(self.padding)
        return highest == -inf or highest < -2 * self.reach - 200

    @property
    def never_largest(self) -> bool:
        """Is it there at most as large as the largest number at real keys?"""
        if self.padding is None or any(isnan(number) for number in self.padding):
            return False
        highest = max(self.padding)
        return highest == -inf or highest < -self.reach or (self.positive and highest <= 0)


UNKNOWN = Held(None, finite=False, reach=inf)
PATTERN = Held((0.0,), positive=True, reach=1.0)

_LOWEST: dict[DType, tuple[Number, ...]] = {
    DType.FLOAT64: (-1.7976931348623157e308,),
    DType.FLOAT32: (-3.4028234663852886e38,),
    DType.BFLOAT16: (-3.3895313892515355e38,),
    # A mask that is added rounds to the number below, or to one nearby.
    DType.FLOAT16: (-inf, -65504.0, -60000.0),
}


def scores(dtype: DType) -> Held:
    """What attention scores hold: the lowest number of their dtype at padding."""
    return Held(_LOWEST.get(dtype))


def key_axes(type_: TensorType) -> tuple[int, ...]:
    """The axes that carry keys."""
    return tuple(axis for axis, dim in enumerate(type_.shape) if carries(dim, dims.KEY))


def has_keys(types: Iterable[TensorType]) -> bool:
    """Does any axis carry the keys that attention looks at?"""
    return any(isinstance(dim, Sym) and carries(dim, dims.KEY) for type_ in types for dim in type_.shape)


def plain(scalar: Scalar) -> Number | None:
    """The number that a scalar is; ``None`` for a complex one."""
    if isinstance(scalar, Special):
        return scalar.number
    return None if isinstance(scalar, complex) else scalar


def of_number(number: Number | None) -> Held:
    """A number takes part as if it stood everywhere."""
    if number is None:
        return UNKNOWN
    reach = inf if isnan(number) else abs(float(number))
    return Held((number,), finite=isfinite(number), positive=number >= 0, reach=reach)


def union(several: Sequence[Held]) -> Held:
    """What a value holds that is put together from several."""
    numbers: list[Number] | None = []
    for held in several:
        if held.padding is None:
            numbers = None
            break
        numbers += held.padding
    return Held(
        None if numbers is None else distinct(numbers),
        finite=all(held.finite for held in several),
        unless_broken=any(held.unless_broken for held in several),
        positive=all(held.positive for held in several),
        reach=max((held.reach for held in several), default=0.0),
    )


def distinct(numbers: Iterable[Number]) -> tuple[Number, ...]:
    """Each number once; zeros of both signs are kept apart, and nan is one number."""
    return tuple({repr(number): number for number in numbers}.values())


def shifted(low: Held, other: Held) -> tuple[tuple[Number, ...], bool] | None:
    """What stands at padding in the sum of something known there and something whose size alone is known."""
    if low.padding is None or other.reach == inf:
        return None
    ends = [number + sign * other.reach for number in low.padding for sign in (-1, 1)]
    return distinct(ends), low.unless_broken or not other.finite
