"""Draws what a generation has saved at every layer and position, with its tokens below."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

import tracelens as tl
from tracelens.viz.drawing import BLUE, cell, opening, short, text

FILM = "I watched the new film last night, and I thought that it was"
LAYER = 14

_CELL = (30, 15)
_LEFT, _TOP, _GAP = 70, 52, 44
_BELOW = 84


def steered(model: tl.Model) -> str:
    """A generation that is steered in five of its steps: norms of the stream, and where it points along the vector."""
    with model.trace(["That was wonderful. I loved it", "That was terrible. I hated it"]):
        ends = model.layers[LAYER].resid_post[:, -1].save()
    v = ends.value[0] - ends.value[1]
    with model.generate(FILM, max_new_tokens=16) as t:
        t.steps[5:10].layers[LAYER].resid_post += v
        streams: Any = model.layers[:].resid_post
        norms = streams.norm(dim=-1).save()
        cosines: Any = torch.nn.functional.cosine_similarity(streams, v, dim=-1)
        cosines = cosines.save()
    tokenizer = model.tokenizer
    assert tokenizer is not None
    prompt = tokenizer.encode(FILM)
    new: list[int] = t.tokens
    words = [short(str(tokenizer.decode([token]))) for token in [*prompt, *new[:-1]]]
    return trajectory(norms.value[:, 0], cosines.value[:, 0], words, len(prompt), written=(5, 10))


def trajectory(
    norms: torch.Tensor, cosines: torch.Tensor, words: list[str], prompt: int, *, written: tuple[int, int]
) -> str:
    """Two maps, layers x positions, as SVG: norms [L, P] by order of magnitude, and cosines [L, P] with a vector."""
    layers = range(norms.shape[0] - 1, -1, -1)
    below = _TOP + _CELL[1] * len(layers)
    width = _LEFT + _CELL[0] * len(words) + 24
    height = 2 * below + _GAP + _BELOW
    parts = [
        *opening(width, height),
        text(
            12, 20, "A generation of SmolLM2-135M-Instruct, steered in five of its steps", size=13, bold=True
        ),
        text(
            12,
            _TOP - 10,
            "norm of the stream after each layer; shade: 20 (white) to 2,000 and more",
            colour="#555",
        ),
    ]
    low, high = math.log(20.0), math.log(2000.0)
    shades = ((norms.log() - low) / (high - low)).clamp(0, 1)
    parts += _cells(norms, shades, words, layers, _TOP, lambda value: f"norm {value:.1f}")
    second = below + _GAP
    said = "cosine of the stream with the vector; blue: along it, red: against it; full shade: 0.5"
    parts.append(text(12, second - 10, said, colour="#555"))
    parts += _cells(
        cosines, (cosines / 0.5).clamp(-1, 1), words, layers, second, lambda value: f"cosine {value:.2f}"
    )
    bottom = second + _CELL[1] * len(layers)
    edge = _LEFT + _CELL[0] * prompt - 1
    for top in (_TOP, second):
        parts.append(
            f'<line x1="{edge}" y1="{top - 4}" x2="{edge}" y2="{top + _CELL[1] * len(layers) + 4}" stroke="#111"/>'
        )
    first = _LEFT + _CELL[0] * (prompt + written[0] - 1)
    span = _CELL[0] * (written[1] - written[0]) - 2
    top = second + _CELL[1] * (len(layers) - 1 - LAYER)
    parts.append(
        f'<rect x="{first}" y="{top - 1}" width="{span}" height="{_CELL[1]}" fill="none" stroke="#111"/>'
    )
    for column, word in enumerate(words):
        x, y = _LEFT + column * _CELL[0] + _CELL[0] // 2 - 4, bottom + 8
        colour = "#111" if column < prompt else BLUE
        parts.append(f'<g transform="translate({x} {y}) rotate(60)">{text(0, 4, word, colour=colour)}</g>')
    parts.append(
        text(
            12,
            height - 8,
            "black tokens: the prompt; blue: generated; box: where the vector was added",
            colour="#555",
        )
    )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _cells(
    values: torch.Tensor,
    shades: torch.Tensor,
    words: list[str],
    layers: range,
    top: int,
    said: Callable[[float], str],
) -> list[str]:
    parts: list[str] = []
    for row, layer in enumerate(layers):
        y = top + row * _CELL[1]
        if layer % 5 == 0 or row == 0:
            parts.append(text(12, y + 12, f"layer {layer}", colour="#555"))
        for column in range(len(words)):
            shade = float(shades[layer, column])
            said_here = f"layer {layer}, {words[column]} ({column}): {said(float(values[layer, column]))}"
            x = _LEFT + column * _CELL[0]
            parts.append(cell(x, y, _CELL[0] - 1, _CELL[1] - 1, shade, said_here))
    return parts
