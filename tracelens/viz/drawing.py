"""The letters and colours of pictures, as SVG: those that a lens draws, and those of the documentation."""

from __future__ import annotations

import base64
import struct
import zlib
from html import escape

from torch import Tensor

from tracelens.token_texts import visible
from tracelens.viz.scales import BLUE, RED

PALEST = 0.04
"""A cell is never quite white, so that one sees that it is there."""


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


def short(token: str, most: int = 10) -> str:
    """A token so that its spaces and line ends are seen, and not too long."""
    return visible(token, most)


def cell(
    x: int, y: int, width: int, height: int, shade: float | None, said: str, content: str = "", *, rx: int = 0
) -> str:
    """A rectangle in a shade from -1 (red) over 0 to 1 (blue), with what is said where one points at it, and a word.

    Without a shade it is empty.
    """
    opacity = "0" if shade is None else f"{max(abs(shade), PALEST):.2f}"
    round_ = f' rx="{rx}"' if rx else ""
    dark = shade is not None and abs(shade) > 0.65
    inside = (
        text(
            x + width // 2, y + height // 2 + 4, content, anchor="middle", colour="white" if dark else "#111"
        )
        if content
        else ""
    )
    return (
        f"<g><title>{escape(said)}</title>"
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}"{round_}'
        f' fill="{RED if (shade or 0) < 0 else BLUE}" fill-opacity="{opacity}"/>{inside}</g>'
    )


def image(x: int, y: int, width: int, height: int, shades: Tensor) -> str:
    """Many cells as one picture: ``shades`` [rows, columns] between -1 and 1, nan where there is none."""
    rows = []
    for row in shades.tolist():
        line = bytearray([0])
        for shade in row:
            line += bytes(_mixed(shade))
        rows.append(bytes(line))
    header = struct.pack(">IIBBBBB", shades.shape[1], shades.shape[0], 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for name, part in ((b"IHDR", header), (b"IDAT", zlib.compress(b"".join(rows), 9)), (b"IEND", b"")):
        data += struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part))
    return (
        f'<image x="{x}" y="{y}" width="{width}" height="{height}" preserveAspectRatio="none"'
        f' style="image-rendering:pixelated" href="data:image/png;base64,{base64.b64encode(data).decode()}"/>'
    )


def _mixed(shade: float) -> list[int]:
    """White with as much of the colour as the shade says; white where there is none."""
    part = 0.0 if shade != shade else max(abs(shade), PALEST)
    colour = RED if shade < 0 else BLUE
    return [round(255 + (int(colour[at : at + 2], 16) - 255) * part) for at in (1, 3, 5)]
