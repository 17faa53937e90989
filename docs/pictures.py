"""Draws the pictures of the documentation from real runs of the embedded model."""

from __future__ import annotations

from html import escape
from pathlib import Path

import tracelens as tl

PICTURES = Path(__file__).resolve().parent / "images"
LENS_PROMPT = "Paris is the capital of France. Rome is the capital of"

_CELL = (82, 24)
_LEFT, _TOP = 78, 62
_BLUE = "#2563a8"


def make() -> list[tuple[Path, str]]:
    """Every picture, with the file that it belongs in."""
    return [(PICTURES / "logit_lens.svg", logit_lens(tl.load("smollm2-135m"), LENS_PROMPT))]


def logit_lens(model: tl.Model, prompt: str, every: int = 3) -> str:
    """What each layer would say after each token of a prompt, as SVG: best token, and its probability as a shade."""
    with model.trace(prompt):
        logits = model.hf.model.norm(model.layers[:].resid_post) @ model.unembed.T
        best = logits.softmax(dim=-1).max(dim=-1)
        p, ids = best.values.save(), best.indices.save()
    tokenizer = model.tokenizer
    assert tokenizer is not None
    words = [_shown(tokenizer.decode([token])) for token in tokenizer.encode(prompt)]
    layers = sorted({*range(0, model.n_layers, every), model.n_layers - 1}, reverse=True)
    width, height = _LEFT + _CELL[0] * len(words) + 12, _TOP + _CELL[1] * len(layers) + 34
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        ' font-family="DejaVu Sans Mono, Menlo, Consolas, monospace" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _text(
            12,
            20,
            "Logit lens: what each layer would say next (SmolLM2-135M-Instruct)",
            size=13,
            weight="bold",
        ),
        _text(12, _TOP - 10, "after", colour="#555"),
    ]
    parts += [_text(_middle(column), _TOP - 10, word, anchor="middle") for column, word in enumerate(words)]
    for row, layer in enumerate(layers):
        y = _TOP + row * _CELL[1]
        parts.append(_text(12, y + 16, f"layer {layer}", colour="#555"))
        for column in range(len(words)):
            probability = float(p[layer, 0, column])
            word = _shown(tokenizer.decode([int(ids[layer, 0, column])]))
            parts.append(
                f"<g><title>layer {layer}, after {escape(words[column])}: {escape(word)} {probability:.2f}</title>"
                f'<rect x="{_LEFT + column * _CELL[0]}" y="{y}" width="{_CELL[0] - 2}" height="{_CELL[1] - 2}" rx="2"'
                f' fill="{_BLUE}" fill-opacity="{max(probability, 0.04):.2f}"/>'
                + _text(
                    _middle(column),
                    y + 15,
                    word,
                    anchor="middle",
                    colour="white" if probability > 0.65 else "#111",
                )
                + "</g>"
            )
    scale = "shade: probability of the token shown, over the whole vocabulary"
    parts.append(_text(12, height - 12, scale, colour="#555"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _middle(column: int) -> int:
    return _LEFT + column * _CELL[0] + (_CELL[0] - 2) // 2


def _shown(token: str) -> str:
    """A token so that its spaces and line ends are seen."""
    visible = token.replace(" ", "\u00b7").replace("\n", "\u21b5").replace("\u00a0", "\u237d")
    return visible if len(visible) <= 10 else visible[:9] + "\u2026"


def _text(
    x: int,
    y: int,
    content: str,
    *,
    anchor: str = "start",
    colour: str = "#111",
    size: int = 11,
    weight: str = "normal",
) -> str:
    return (
        f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{colour}" font-size="{size}" font-weight="{weight}">'
        f"{escape(content)}</text>"
    )
