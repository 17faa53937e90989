"""Windows of what a lens has read: some of its layers or positions, by their own numbers."""

from __future__ import annotations

import bisect
import operator
from collections.abc import Iterable
from typing import Any

from tracelens.errors import LensSelectionError
from tracelens.location import here

Window = int | slice | Iterable[int] | None
"""One number, several, or a slice; ``None`` for all."""


def chosen(window: Window, held: tuple[int, ...], what: str) -> list[int]:
    """Where in ``held`` the window's numbers stand; negative ones count from the end of ``held``."""
    if window is None:
        return list(range(len(held)))
    if isinstance(window, slice):
        found = _of_slice(window, held, what)
    else:
        numbers = list(window) if isinstance(window, Iterable) else [window]
        found = [_place(number, held, what) for number in numbers]
        if found != sorted(set(found)):
            raise LensSelectionError(
                f"the {what}s {numbers} of a window are not in order, or one is there twice",
                at=here(),
                instead=f"{[held[at] for at in sorted(set(found))]}",
            )
    if not found:
        raise LensSelectionError(
            f"the window has no {what}: {window!r} of {_shown(held)}",
            at=here(),
            instead="a window with at least one",
        )
    return found


def _place(number: Any, held: tuple[int, ...], what: str) -> int:
    number = _integer(number, what)
    if number < 0 and -number <= len(held):
        return len(held) + number
    at = bisect.bisect_left(held, number)
    if at == len(held) or held[at] != number:
        raise LensSelectionError(
            f"this lens has no {what} {number}; it has {_shown(held)}",
            at=here(),
            instead=f"one of these; negative numbers count from the end: {what}s=-1 is {what} {held[-1]}",
        )
    return at


def _of_slice(window: slice, held: tuple[int, ...], what: str) -> list[int]:
    step = 1 if window.step is None else _integer(window.step, what)
    if step < 1:
        raise LensSelectionError(
            f"the step of a window of {what}s is {step}",
            at=here(),
            instead="a step of 1 or more: the order is always that of the text and the model",
        )

    def bound(number: Any, default: int) -> int:
        if number is None:
            return default
        number = _integer(number, what)
        return max(len(held) + number, 0) if number < 0 else bisect.bisect_left(held, number)

    return list(range(bound(window.start, 0), bound(window.stop, len(held)), step))


def _integer(number: Any, what: str) -> int:
    try:
        if isinstance(number, bool):
            raise TypeError
        return operator.index(number)
    except TypeError:
        raise LensSelectionError(
            f"{number!r} is not the number of a {what}",
            at=here(),
            instead=f"an int, a slice or a list of ints: {what}s=3, {what}s=slice(0, 8), {what}s=[0, 4, 8]",
        ) from None


def _shown(held: tuple[int, ...]) -> str:
    if held == tuple(range(held[0], held[-1] + 1)):
        return str(held[0]) if len(held) == 1 else f"{held[0]} to {held[-1]}"
    few = ", ".join(map(str, held[:12]))
    return few if len(held) <= 12 else f"{few} ... {held[-1]}"
