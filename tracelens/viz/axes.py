"""A frame with two axes, and curves, bands and points in it, as SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from tracelens.viz.drawing import text

GREY = "#888"
_PALE = "#e4e4e4"


@dataclass(frozen=True, slots=True)
class Axes:
    """A rectangle of the page, in points, and the numbers that its sides stand for."""

    left: int
    top: int
    width: int
    height: int
    x: tuple[float, float]
    y: tuple[float, float]

    def across(self, value: float) -> float:
        """Where a number of the axis across stands."""
        low, high = self.x
        return self.left + (value - low) / (high - low) * self.width

    def up(self, value: float) -> float:
        """Where a number of the axis up stands."""
        low, high = self.y
        return self.top + self.height - (value - low) / (high - low) * self.height

    def frame(self, *, across: Sequence[tuple[float, str]], words: str, below: str = "") -> list[str]:
        """The axes: labels across where they are given, round numbers up, and what both are."""
        found: list[str] = []
        bottom, right = self.top + self.height, self.left + self.width
        for number in ticks(*self.y):
            y = self.up(number)
            colour = GREY if number == 0 else _PALE
            found.append(_line(self.left, y, right, y, colour))
            found.append(text(self.left - 6, round(y) + 4, f"{number:g}", anchor="end", colour="#444"))
        for number, label in across:
            x = self.across(number)
            found.append(_line(x, bottom, x, bottom + 4, GREY))
            found.append(text(round(x), bottom + 17, label, anchor="middle", colour="#444"))
        found.append(_line(self.left, self.top, self.left, bottom, GREY))
        found.append(_line(self.left, bottom, right, bottom, GREY))
        found.append(text(self.left, self.top - 8, words, colour="#111"))
        if below:
            found.append(
                text(self.left + self.width // 2, bottom + 34, below, anchor="middle", colour="#111")
            )
        return found

    def curve(
        self,
        x: Iterable[float],
        y: Iterable[float],
        colour: str,
        *,
        width: float = 1.0,
        dash: str = "",
        opacity: float = 1.0,
    ) -> str:
        """A line from point to point."""
        points = " ".join(f"{self.across(a):.1f},{self.up(b):.1f}" for a, b in zip(x, y, strict=True))
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        return (
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{width:g}"'
            f' stroke-opacity="{opacity:g}"{dashed}/>'
        )

    def band(self, x: Sequence[float], low: Sequence[float], high: Sequence[float], colour: str) -> str:
        """What lies between two curves, pale."""
        there = [f"{self.across(a):.1f},{self.up(b):.1f}" for a, b in zip(x, high, strict=True)]
        back = [f"{self.across(a):.1f},{self.up(b):.1f}" for a, b in zip(x, low, strict=True)]
        return (
            f'<polygon points="{" ".join([*there, *reversed(back)])}" fill="{colour}" fill-opacity="0.18"/>'
        )

    def point(
        self, x: float, y: float, colour: str, said: str, *, radius: float = 2.5, opacity: float = 1.0
    ) -> str:
        """A dot, with what is said where one points at it."""
        return (
            f'<circle cx="{self.across(x):.1f}" cy="{self.up(y):.1f}" r="{radius:g}" fill="{colour}"'
            f' fill-opacity="{opacity:g}"><title>{escape(said)}</title></circle>'
        )

    def outline(self, x: float, values: Sequence[float], reach: float, colour: str) -> str:
        """How values are spread, as a violin around ``x``: a smoothed density, ``reach`` wide where it is largest."""
        if len(values) < 3 or max(values) == min(values):
            return ""
        count = len(values)
        mean = sum(values) / count
        spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
        # Silverman's rule.
        width = max(1.06 * spread * count**-0.2, 1e-9)
        low, high = min(values), max(values)
        steps = [low + (high - low) * step / 40 for step in range(41)]
        heights = [sum(math.exp(-0.5 * ((at - value) / width) ** 2) for value in values) for at in steps]
        most = max(heights)
        one = [(x + reach * tall / most, at) for tall, at in zip(heights, steps, strict=True)]
        other = [(x - reach * tall / most, at) for tall, at in zip(heights, steps, strict=True)]
        points = " ".join(f"{self.across(a):.1f},{self.up(b):.1f}" for a, b in [*one, *reversed(other)])
        return (
            f'<polygon points="{points}" fill="{colour}" fill-opacity="0.12"'
            f' stroke="{colour}" stroke-opacity="0.35"/>'
        )

    def interval(self, x: float, low: float, high: float, colour: str) -> str:
        """A bar from one end of an interval to the other, with caps."""
        middle, half = self.across(x), 5
        return "".join(
            (
                _line(middle, self.up(low), middle, self.up(high), colour, 2),
                _line(middle - half, self.up(low), middle + half, self.up(low), colour, 2),
                _line(middle - half, self.up(high), middle + half, self.up(high), colour, 2),
            )
        )


def _line(x: float, y: float, to_x: float, to_y: float, colour: str, width: float = 1) -> str:
    return (
        f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}"'
        f' stroke="{colour}" stroke-width="{width:g}"/>'
    )


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from ``low`` to ``high``, about so many.

    >>> ticks(-1.3, 2.2)
    [-1.0, 0.0, 1.0, 2.0]
    """
    rough = (high - low) / about
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * one for one in (1, 2, 5, 10) if size * one >= rough * 0.99)
    # The sum of zero and a negative zero is zero.
    return [round(at * step, 12) + 0.0 for at in range(math.ceil(low / step), math.floor(high / step) + 1)]


def room(values: Iterable[float], *, zero: bool = True) -> tuple[float, float]:
    """From below the smallest to above the largest of some numbers, zero among them unless it says nothing."""
    found = [value for value in values if math.isfinite(value)] + [0.0] * zero
    low, high = (min(found), max(found)) if found else (0.0, 0.0)
    if low == high:
        return low - 1.0, high + 1.0
    more = 0.06 * (high - low)
    return low - more, high + more
