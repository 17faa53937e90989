"""A square of cosines: how alike the directions of a steering vector are from layer to layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tracelens.viz.drawing import cell, opening, text
from tracelens.viz.heat_map import Picture

_LEFT, _TOP, _LEGEND = 44, 56, 30


def cosine_map(title: str, layers: Sequence[int], cosines: Tensor) -> Picture:
    """The cosines [L, L] between layers, blue where they point the same way and red where the other."""
    count = len(layers)
    size = max(6, min(24, 480 // count))
    every = max(1, round(24 / size))
    width, height = max(_LEFT + count * size + 12, 360), _TOP + count * size + _LEGEND
    parts = [*opening(width, height), text(12, 20, title, size=13, bold=True)]
    parts.append(text(12, _TOP - 8, "layer", colour="#555"))
    for row, layer in enumerate(layers):
        if row % every == 0:
            middle = row * size + size // 2
            parts.append(text(_LEFT - 6, _TOP + middle + 4, str(layer), anchor="end", colour="#555"))
            parts.append(text(_LEFT + middle, _TOP - 8, str(layer), anchor="middle", colour="#555"))
        for column, other in enumerate(layers):
            found = cosines[row, column].item()
            shade = None if found != found else found
            said = f"layers {layer} and {other}: {found:.3f}"
            parts.append(cell(_LEFT + column * size, _TOP + row * size, size - 1, size - 1, shade, said))
    y = height - 10
    parts.append(text(12, y, "-1", colour="#555"))
    parts += [cell(34 + 10 * at, y - 10, 10, 12, at / 6 - 1, "") for at in range(13)]
    parts.append(text(172, y, "1", colour="#555"))
    return Picture("\n".join([*parts, "</svg>"]) + "\n", title)
