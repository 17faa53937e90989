"""Draws the pictures of the documentation from real runs of the embedded model."""

from __future__ import annotations

from html import escape
from pathlib import Path

import tracelens as tl
from docs import token_grids, trajectories
from docs.drawing import BLUE, opening, text, visible

PICTURES = Path(__file__).resolve().parent / "images"
LENS_PROMPT = "Paris is the capital of France. Rome is the capital of"

_CELL = (82, 24)
_LEFT, _TOP = 78, 62


def make() -> list[tuple[Path, str]]:
    """Every picture, with the file that it belongs in."""
    model = tl.load("smollm2-135m")
    return [
        (PICTURES / "logit_lens.svg", logit_lens(model, LENS_PROMPT)),
        (PICTURES / "steered_generation.svg", trajectories.steered(model)),
        (PICTURES / "tokens_in_a_trace.svg", token_grids.grids(model, generating=False)),
        (PICTURES / "tokens_in_a_generation.svg", token_grids.grids(model, generating=True)),
    ]


def logit_lens(model: tl.Model, prompt: str, every: int = 3) -> str:
    """What each layer would say after each token of a prompt, as SVG: best token, and its probability as a shade."""
    with model.trace(prompt):
        logits = model.hf.model.norm(model.layers[:].resid_post) @ model.unembed.T
        best = logits.softmax(dim=-1).max(dim=-1)
        p, ids = best.values.save(), best.indices.save()
    tokenizer = model.tokenizer
    assert tokenizer is not None
    words = [visible(str(tokenizer.decode([token]))) for token in tokenizer.encode(prompt)]
    layers = sorted({*range(0, model.n_layers, every), model.n_layers - 1}, reverse=True)
    width, height = _LEFT + _CELL[0] * len(words) + 12, _TOP + _CELL[1] * len(layers) + 34
    parts = [
        *opening(width, height),
        text(
            12,
            20,
            "Logit lens: what each layer would say next (SmolLM2-135M-Instruct)",
            size=13,
            bold=True,
        ),
        text(12, _TOP - 10, "after", colour="#555"),
    ]
    parts += [text(_middle(column), _TOP - 10, word, anchor="middle") for column, word in enumerate(words)]
    for row, layer in enumerate(layers):
        y = _TOP + row * _CELL[1]
        parts.append(text(12, y + 16, f"layer {layer}", colour="#555"))
        for column in range(len(words)):
            probability = float(p[layer, 0, column])
            word = visible(str(tokenizer.decode([int(ids[layer, 0, column])])))
            parts.append(
                f"<g><title>layer {layer}, after {escape(words[column])}: {escape(word)} {probability:.2f}</title>"
                f'<rect x="{_LEFT + column * _CELL[0]}" y="{y}" width="{_CELL[0] - 2}" height="{_CELL[1] - 2}" rx="2"'
                f' fill="{BLUE}" fill-opacity="{max(probability, 0.04):.2f}"/>'
                + text(
                    _middle(column),
                    y + 15,
                    word,
                    anchor="middle",
                    colour="white" if probability > 0.65 else "#111",
                )
                + "</g>"
            )
    scale = "shade: probability of the token shown, over the whole vocabulary"
    parts.append(text(12, height - 12, scale, colour="#555"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _middle(column: int) -> int:
    return _LEFT + column * _CELL[0] + (_CELL[0] - 2) // 2
