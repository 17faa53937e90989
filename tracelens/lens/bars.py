"""A bar plot of signed numbers with names, as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

_ROW, _LEFT, _BARS, _RIGHT, _TOP = 18, 210, 320, 60, 28
_FOR, _AGAINST, _INK, _PALE = "#2563a8", "#b3372f", "#111", "#999"


@dataclass(frozen=True, slots=True)
class Bars:
    """A bar plot, which a notebook shows: bars to the right of zero in blue, to the left in red."""

    title: str
    names: tuple[str, ...]
    numbers: tuple[float, ...]

    @property
    def svg(self) -> str:
        """The picture as SVG, without scripts."""
        return _drawn(self.title, self.names, self.numbers)

    def save(self, path: str | Path) -> None:
        """Writes the picture to a file, which any browser opens."""
        Path(path).write_text(self.svg + "\n", encoding="utf-8")

    def _repr_html_(self) -> str:
        return self.svg

    def __repr__(self) -> str:
        return f"<bar plot of {len(self.names)} numbers: {self.title}>"


def _drawn(title: str, names: Sequence[str], numbers: Sequence[float]) -> str:
    low, high = min(0.0, *numbers), max(0.0, *numbers)
    per = _BARS / ((high - low) or 1.0)
    zero = _LEFT - low * per
    height = _TOP + _ROW * len(names) + 6
    width = _LEFT + _BARS + _RIGHT
    found = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        ' font-family="DejaVu Sans Mono, Menlo, Consolas, monospace" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _text(8, 16, title, "start"),
    ]
    for row, (name, number) in enumerate(zip(names, numbers, strict=True)):
        y = _TOP + _ROW * row
        end = zero + number * per
        found += [
            _text(_LEFT - _RIGHT, y + 12, name, "end"),
            f'<rect x="{min(zero, end):.1f}" y="{y + 2}" width="{abs(end - zero):.1f}" height="{_ROW - 5}" '
            f'fill="{_FOR if number >= 0 else _AGAINST}"><title>{escape(name)}: {number:+.4f}</title></rect>',
            _text(
                end + (4 if number >= 0 else -4), y + 12, f"{number:+.2f}", "start" if number >= 0 else "end"
            ),
        ]
    found.append(
        f'<line x1="{zero:.1f}" y1="{_TOP - 2}" x2="{zero:.1f}" y2="{height - 4}" stroke="{_PALE}"/></svg>'
    )
    return "".join(found)


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}" fill="{_INK}">{escape(words)}</text>'
