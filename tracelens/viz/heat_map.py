"""A heat map as a picture: layers from below upwards, positions to the right, in each cell a token and a shade."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tracelens.errors import LensFileError
from tracelens.lens.statistics import Kind, Statistic, written
from tracelens.location import here
from tracelens.viz.drawing import BLUE, cell, image, opening, short, text
from tracelens.viz.scales import Scale

WORDS = 40
"""So many positions have room for words in their cells; more are drawn as one picture of shades."""
_CELL = (82, 24)
_LEFT, _TOP, _HEAD, _LEGEND, _GAP = 78, 40, 24, 34, 10
_WIDE, _HIGH = 1200, 480


@dataclass(frozen=True)
class Picture:
    """A picture, as SVG: a notebook shows it, ``picture.save("lens.svg")`` writes it."""

    svg: str
    title: str

    def save(self, path: str | Path) -> Path:
        """Writes the picture to a file that ends in ``.svg``, which browsers, editors and LaTeX's converters read."""
        path = Path(path)
        if path.suffix.lower() != ".svg":
            raise LensFileError(
                f"{path.name!r} does not end in .svg, and pictures are SVG",
                at=here(),
                instead=f'picture.save("{path.stem}.svg"); a browser or rsvg-convert makes other formats of it',
            )
        path.write_text(self.svg, encoding="utf-8")
        return path

    def __repr__(self) -> str:
        return f"<picture of {self.title}: .save(path) writes it as SVG>"

    def _repr_svg_(self) -> str:
        return self.svg


@dataclass(frozen=True)
class Panel:
    """One map: ``values`` [L, T] and their words ``[L][T]``, under a ``name`` where there are several."""

    name: str
    values: Tensor
    words: Sequence[Sequence[str]]


def heat_map(
    title: str,
    panels: Sequence[Panel],
    *,
    layers: Sequence[int],
    positions: Sequence[int],
    tokens: Sequence[str],
    statistic: Statistic,
    scale: Scale,
    prompt: int | None = None,
) -> Picture:
    """Maps below one another, over the same positions. ``prompt``: the position at which generated text begins."""
    L, T = len(layers), len(positions)
    wordy = T <= WORDS
    width, height = _CELL if wordy else (max(min(_WIDE // T, 16), 1), max(min(_HIGH // L, 16), 3))
    panel_height = _HEAD + L * height + (_GAP if len(panels) == 1 else _GAP + 18)
    whole = (max(_LEFT + width * T + 12, 640), _TOP + panel_height * len(panels) + _LEGEND)
    parts = [*opening(*whole), text(12, 20, title, size=13, bold=True)]
    begin = (
        None if prompt is None else next((at for at, place in enumerate(positions) if place >= prompt), None)
    )
    for number, panel in enumerate(panels):
        top = _TOP + number * panel_height
        if len(panels) > 1:
            top += 18
            parts.append(text(12, top - 6, panel.name, bold=True))
        parts += _heads(tokens, positions, top + _HEAD - 10, width, begin, wordy=wordy)
        draw = _cells if wordy else _points
        parts += draw(panel, layers, tokens, top + _HEAD, (width, height), statistic.kind, scale)
        if begin:
            x = _LEFT + begin * width - 1
            parts.append(
                f'<line x1="{x}" y1="{top + _HEAD - 6}" x2="{x}" y2="{top + _HEAD + L * height}" stroke="#111"/>'
            )
    parts += _legend(whole[1] - 14, statistic, scale)
    return Picture("\n".join([*parts, "</svg>"]) + "\n", f"{statistic.label}: {title}")


def _heads(
    tokens: Sequence[str], positions: Sequence[int], y: int, width: int, begin: int | None, *, wordy: bool
) -> list[str]:
    def colour(at: int) -> str:
        return BLUE if begin is not None and at >= begin else "#111"

    if wordy:
        return [text(12, y, "after", colour="#555")] + [
            text(_LEFT + at * width + (width - 2) // 2, y, short(token), anchor="middle", colour=colour(at))
            for at, token in enumerate(tokens)
        ]
    every = _round(60 / width)
    return [text(12, y, "position", colour="#555")] + [
        text(_LEFT + at * width + width // 2, y, str(place), anchor="middle", colour=colour(at))
        for at, place in _named(positions, every)
    ]


def _named(numbers: Sequence[int], every: int) -> list[tuple[int, int]]:
    """The round numbers among these with their places; the first, if none is round."""
    places = list(enumerate(numbers))
    return [(at, number) for at, number in places if number % every == 0] or places[:1]


def _round(least: float) -> int:
    """1, 2 or 5 times a power of ten: the first that is not less."""
    power = 10 ** max(math.floor(math.log10(max(least, 1))), 0)
    return next(step * power for step in (1, 2, 5, 10) if step * power >= least)


def _cells(
    panel: Panel,
    layers: Sequence[int],
    tokens: Sequence[str],
    top: int,
    size: tuple[int, int],
    kind: Kind,
    scale: Scale,
) -> list[str]:
    parts: list[str] = []
    values = panel.values.tolist()
    for line, row in enumerate(reversed(range(len(layers)))):
        y = top + line * size[1]
        parts.append(text(12, y + 16, f"layer {layers[row]}", colour="#555"))
        for column, token in enumerate(tokens):
            value, content = values[row][column], short(panel.words[row][column])
            said = f"layer {layers[row]}, after {short(token)}: {content} {written(value, kind)}"
            shade = scale.shade(value)
            x = _LEFT + column * size[0]
            parts.append(cell(x, y, size[0] - 2, size[1] - 2, shade, said, content, rx=2))
    return parts


def _points(
    panel: Panel,
    layers: Sequence[int],
    tokens: Sequence[str],
    top: int,
    size: tuple[int, int],
    kind: Kind,
    scale: Scale,
) -> list[str]:
    shades = [[scale.shade(value) for value in row] for row in panel.values.flip(0).tolist()]
    numbers = torch.tensor([[math.nan if shade is None else shade for shade in row] for row in shades])
    every = _round(14 / size[1])
    names = [
        text(12, top + line * size[1] + size[1] // 2 + 4, f"layer {layer}", colour="#555")
        for line, layer in _named(list(reversed(layers)), every)
    ]
    return [*names, image(_LEFT, top, size[0] * len(tokens), size[1] * len(layers), numbers)]


def _legend(y: int, statistic: Statistic, scale: Scale) -> list[str]:
    """The shades from the palest on, with their numbers."""
    if scale.counts:
        ends = (written(scale.high, statistic.kind), "0")
    else:
        below, above = scale.clipped and (scale.signed or statistic.kind is Kind.LOG), scale.clipped
        ends = (
            "≤ " * below + written(scale.low, statistic.kind),
            "≥ " * (above and statistic.kind is not Kind.LOG) + written(scale.high, statistic.kind),
        )
    steps = 12
    shades = [(2 * at / steps - 1 if scale.signed else at / steps) for at in range(steps + 1)]
    x = 12 + 8 * len(ends[0]) + 4
    bars = [cell(x + 10 * at, y - 10, 10, 12, shade, "") for at, shade in enumerate(shades)]
    x += 10 * len(bars) + 6
    return [
        text(12, y, ends[0], colour="#555"),
        *bars,
        text(x, y, ends[1], colour="#555"),
        text(x + 8 * len(ends[1]) + 14, y, f"shade: {statistic.label}", colour="#555"),
    ]
