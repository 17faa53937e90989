"""Share an intervention: record it, write it to a file, read it elsewhere, run it there.

The file is data: operations by name, with a checksum, and the tensors beside it. Reading it runs no code.

    python -m examples.save_and_share
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

import tracelens as tl

PROMPTS = ["The capital of France is", "Water is made of hydrogen and"]


def record(model: tl.Model, layer: int) -> tl.Graph:
    """A graph that weakens the last token's stream along a direction, for prompts of any size."""
    v = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    u = v / v.norm()
    with model.record() as r:
        last = model.layers[layer].resid_post[:, -1]
        along = last @ u
        model.layers[layer].resid_post[:, -1] = last - 0.5 * along[:, None] * u
        along.save("along")
        model.logits[:, -1].save("logits")
    return r.graph


def main(model: tl.Model | None = None, layer: int = 10, folder: Path | None = None) -> bool:
    """Prints the shared graph and its results; tells whether the copy gives the very numbers of the original."""
    model = model or tl.load("smollm2-135m")
    with tempfile.TemporaryDirectory() as scratch:
        path = (folder or Path(scratch)) / "ablation.json"
        original = record(model, layer)
        original.to_json(path)
        print(f"wrote {path.name} and {path.with_suffix('.safetensors').name}; the graph is")
        copy = tl.Graph.from_json(path)
    print(copy)
    here, there = (model.compile(graph)(PROMPTS) for graph in (original, copy))
    print(there)
    return all(torch.equal(here[name], there[name]) for name in here)


if __name__ == "__main__":
    main()
