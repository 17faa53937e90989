"""Torch hooks as one writes them by hand, around transformers' own generation: the answer that all others must give."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.peers.laps import Tick
from benchmarks.peers.subject import Results
from benchmarks.peers.text import WRITTEN, Text, plain

NAME = "hooks"


def version() -> str:
    return torch.__version__


def build(text: Text) -> dict[str, WRITTEN]:
    """A function for each case; each puts its hooks on, generates and takes them off."""
    every = range(text.n_layers)
    return {
        "read-one": written(text, (text.middle,), steers=False),
        "read-all": written(text, every, steers=False),
        "steer-all": written(text, (), steers=True),
        "both": written(text, every, steers=True),
        "uncached": written(text, every, steers=False, cached=False),
    }


def written(text: Text, layers: Any, *, steers: bool, cached: bool = True) -> WRITTEN:
    text = text.separate()
    vector, bare = text.vector, plain(text, cached=cached)

    def write(new: int, tick: Tick) -> Results:
        found: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}

        def hook_of(layer: int) -> Any:
            kept = found.get(layer)

            def hook(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor | None:
                if kept is not None:
                    # Without a cache every pass is over all of the text again.
                    kept.append(output if cached or not kept else output[:, -1:])
                return output + vector if steers else None

            return hook

        wanted = range(text.n_layers) if steers else layers
        handles = [text.blocks[layer].register_forward_hook(hook_of(layer)) for layer in wanted]
        try:
            results = bare(new, tick)
        finally:
            for handle in handles:
                handle.remove()
        if found:
            results["stream"] = torch.stack([torch.cat(parts, 1) for parts in found.values()])
        return results

    return write
