"""Generation by hand: each row alone, without a cache, every edit told the absolute positions of its text.

Nothing of the library takes part. A pass is a plain forward over the whole text so far, with one hook a layer, and what
is done to a position depends on where it stands in its own text alone: so this is what any generation with caches,
batches and padding has to give.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

PATHS = {"gpt2": "transformer.h.{}"}


@dataclass(frozen=True)
class Edit:
    """``chosen(token ids, prompt length)`` is a mask [T] over the text so far; there ``change(h)`` is put in."""

    layer: int
    chosen: Callable[[torch.Tensor, int], torch.Tensor]
    change: Callable[[torch.Tensor], torch.Tensor]


def steps_of(length: int, prompt: int) -> torch.Tensor:
    """The generation step in which each position of a text is first seen: 0 for the prompt's."""
    return (torch.arange(length) - prompt + 1).clamp(min=0)


def forward(hf: Any, family: str, ids: Sequence[int], prompt: int, edits: Sequence[Edit]) -> tuple[Any, Any]:
    """Logits [T, V] and the residual stream after each layer [L, T, D], edits included."""
    text = torch.tensor(ids)
    streams: list[torch.Tensor] = []
    handles = []
    path = PATHS.get(family, "model.layers.{}")
    for layer in range(hf.config.num_hidden_layers):

        def hook(_m: Any, _a: Any, output: Any, layer: int = layer) -> Any:
            tensor = output if isinstance(output, torch.Tensor) else output[0]
            for edit in edits:
                if edit.layer == layer:
                    mask = edit.chosen(text, prompt)
                    tensor = torch.where(mask[None, :, None], edit.change(tensor), tensor)
            streams.append(tensor[0])
            return tensor if isinstance(output, torch.Tensor) else (tensor, *output[1:])

        handles.append(hf.get_submodule(path.format(layer)).register_forward_hook(hook))
    try:
        with torch.no_grad():
            logits = hf(text[None], use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    return logits, torch.stack(streams)


def generate(
    hf: Any, family: str, prompt: Sequence[int], count: int, edits: Sequence[Edit], end: int | None = None
) -> list[int]:
    """The new tokens, greedily."""
    text = list(prompt)
    for _ in range(count):
        logits, _ = forward(hf, family, text, len(prompt), edits)
        text.append(int(logits[-1].argmax()))
        if text[-1] == end:
            break
    return text[len(prompt) :]
