"""A lens result as a terminal shows it: the likeliest tokens, layers downwards to the first, positions to the right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tracelens.lens.statistics import written
from tracelens.token_texts import columns, padded, visible
from tracelens.view import WIDTH

if TYPE_CHECKING:
    from tracelens.lens.result import LensResult

ROWS = 16
"""So many layers are shown, if nothing else is asked for; fewer of each component where there are several."""
_CELL = 14
"""So many columns of the terminal a cell takes at most."""
_BAR = "| "
"""Where the generated text begins."""
_LEAST = 30
"""A narrower terminal has no room for a row's name and one cell."""


def table(
    result: LensResult,
    statistic: str | None = None,
    *tokens: str,
    width: int = WIDTH,
    rows: int = ROWS,
    heading: str | None = None,
    cell: Callable[[int, int, int], str] | None = None,
) -> str:
    """The table of each component, as text; the last positions that fit, and what was left out.

    ``cell``: what stands in a cell in place of the likeliest token, by component, layer and position.
    """
    width = max(width, _LEAST)
    values = None if statistic is None else result.statistic(statistic, *tokens).tolist()
    described = None if statistic is None else result.described(statistic, *tokens)
    best = result.top_ids[..., 0].tolist()

    def content(component: int, layer: int, position: int) -> str:
        if cell is not None:
            return cell(component, layer, position)
        text = visible(result.text_of[best[component][layer][position]], _CELL)
        if values is None or described is None:
            return text
        number = written(values[component][layer][position], described.kind)
        return f"{visible(text, _CELL - len(number) - 1)} {number}"

    shown = _spread(len(result.layers), max(rows, 1))[::-1]
    lines = [heading or title(result)]
    if described is not None:
        lines.append(f"in each cell: the likeliest token, and the {described.label}")
    for component, name in enumerate(result.components):
        names = [f"layer {result.layers[row]}" for row in shown]
        room = width - max(map(len, ["position", *names])) - len(_BAR)
        taken, cells = _fitting(result, shown, room, component, content)
        first = len(result.positions) - taken
        if len(result.components) > 1:
            lines.append(f"{name}:")
        heads = [
            ["position", *(str(position) for position in result.positions[first:])],
            ["token", *(visible(token, _CELL) for token in result.tokens[first:])],
        ]
        body = [[name, *row] for name, row in zip(names, cells, strict=True)]
        lines += _aligned([*heads, *body], _generated(result, first))
        left_out = _left_out(result, shown, first)
        if left_out:
            lines.append(left_out)
    return "\n".join(lines)


def title(result: LensResult) -> str:
    """One line: of which model, of what, and how much."""
    of = f" of {result.model}" if result.model else ""
    layers, positions = len(result.layers), len(result.positions)
    return (
        f"{result.lens[:1].upper()}{result.lens[1:]}{of}: {', '.join(result.components)}; "
        f"{layers} layer{'s' * (layers != 1)} x {positions} position{'s' * (positions != 1)}"
    )


def _spread(count: int, most: int) -> list[int]:
    """At most so many of ``count`` places, evenly, the last one among them."""
    if count <= most:
        return list(range(count))
    if most == 1:
        return [count - 1]
    return sorted({round(at * (count - 1) / (most - 1)) for at in range(most)})


def _fitting(
    result: LensResult,
    shown: Sequence[int],
    room: int,
    component: int,
    content: Callable[[int, int, int], str],
) -> tuple[int, list[list[str]]]:
    """How many of the last positions fit, and their cells, one list per row."""
    found: list[list[str]] = []
    for position in reversed(range(len(result.positions))):
        column = [content(component, row, position) for row in shown]
        heads = [str(result.positions[position]), visible(result.tokens[position], _CELL)]
        room -= 2 + max(map(columns, [*column, *heads]))
        if room < 0 and found:
            break
        found.append(column)
    return len(found), [list(row) for row in zip(*reversed(found), strict=True)]


def _generated(result: LensResult, first: int) -> int | None:
    """Before which of the shown positions the generated text begins, if the prompt is there too."""
    shown = result.positions[first:]
    begin = sum(position < result.n_prompt for position in shown)
    return begin if begin < len(shown) else None


def _aligned(rows: list[list[str]], generated: int | None) -> list[str]:
    widths = [max(map(columns, column)) for column in zip(*rows, strict=True)]
    lines: list[str] = []
    for row in rows:
        parts = [padded(cell, width) for cell, width in zip(row, widths, strict=True)]
        if generated is not None:
            parts[generated + 1] = _BAR + parts[generated + 1]
        lines.append("  ".join(parts).rstrip())
    return lines


def _left_out(result: LensResult, shown: Sequence[int], first: int) -> str:
    parts: list[str] = []
    if len(shown) < len(result.layers):
        parts.append(f"{len(result.layers) - len(shown)} of {len(result.layers)} layers")
    if first:
        span = (
            f"{result.positions[0]} to {result.positions[first - 1]}"
            if first > 1
            else f"{result.positions[0]}"
        )
        parts.append(f"position{'s' * (first > 1)} {span}")
    if not parts:
        return ""
    which = " and ".join(parts)
    return f"left out: {which}; lens.at(layers=..., positions=...) is a window, lens.to_html(path) has all"
