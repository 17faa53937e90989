"""The letters and colours of the documentation's pictures, as SVG."""

from __future__ import annotations

from html import escape

BLUE = "#2563a8"
RED = "#b3372f"


def opening(width: int, height: int) -> list[str]:
    """A white page of that size; the caller closes it with ``</svg>``."""
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        ' font-family="DejaVu Sans Mono, Menlo, Consolas, monospace" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]


def text(
    x: int,
    y: int,
    content: str,
    *,
    anchor: str = "start",
    colour: str = "#111",
    size: int = 11,
    bold: bool = False,
) -> str:
    """One line of text."""
    weight = "bold" if bold else "normal"
    return (
        f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{colour}" font-size="{size}" font-weight="{weight}">'
        f"{escape(content)}</text>"
    )


def visible(token: str) -> str:
    """A token so that its spaces and line ends are seen, and not too long."""
    shown = token.replace(" ", "\u00b7").replace("\n", "\u21b5").replace("\u00a0", "\u237d")
    return shown if len(shown) <= 10 else shown[:9] + "\u2026"
