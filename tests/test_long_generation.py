"""A model writes 1,500 tokens, and every layer's stream at every position goes to a file while it does."""

from __future__ import annotations

import resource
from pathlib import Path

import torch
from safetensors import safe_open

import tracelens as tl
from tests.support.families import FAMILIES

COUNT = 1500
LAYERS, WIDTH = 16, 512
PROMPT = [list(range(3, 15))]


def peak() -> int:
    """The most memory that this process has had, in bytes, without what of files is mapped into it."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_1500_tokens_with_every_stream_in_a_file(tmp_path: Path) -> None:
    # Wide streams and little else: they are most of what there is to keep.
    sizes = {"intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    hf = FAMILIES["llama"].build(
        num_hidden_layers=LAYERS, hidden_size=WIDTH, max_position_embeddings=2048, **sizes
    )
    with torch.no_grad():
        for layer in hf.model.layers:
            for parameter in layer.parameters():
                parameter *= (
                    0.3  # made for narrower layers: through wide ones rounding would grow from layer to layer
                )
    model = tl.wrap(hf)
    path = tmp_path / "traj.safetensors"
    with model.generate(PROMPT, max_new_tokens=2, eos_token_id=None) as t:  # what is made once is there
        model.layers[:].resid_post.save()
    positions = len(PROMPT[0]) + COUNT - 1
    planned = LAYERS * positions * WIDTH * 4
    before = peak()
    with model.generate(PROMPT, max_new_tokens=COUNT, eos_token_id=None) as t:
        model.layers[:].resid_post.save("traj", to=str(path))
    # The tensor is planned, and it is mapped memory; a second one of its size would show. So would the cache's copies.
    cache = 2 * LAYERS * positions * 32 * 4
    assert peak() - before < 1.1 * (planned + 2 * cache) + 24 * 2**20
    assert f"{planned / 2**20:.1f} MiB, to {path}" in t.explain()
    (tokens,) = t.tokens
    assert len(tokens) == COUNT
    with model.trace([[*PROMPT[0], *tokens[:-1]]]):
        whole = model.layers[:].resid_post.save()
    with safe_open(str(path), framework="pt") as file:
        stored = file.get_tensor("traj")
    assert stored.shape == whole.shape == (LAYERS, 1, positions, WIDTH)
    size = whole.value.abs().amax(-1, keepdim=True)
    error = (stored - whole.value).abs() / size
    assert error.max() < 1e-4, error.max()
    assert torch.equal(stored, t["traj"])
