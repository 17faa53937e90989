"""A real model writes 1,500 tokens, and every layer's stream at every position goes to a file while it does."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import tracelens as tl

pytestmark = pytest.mark.smollm2

COUNT = 1500
PROMPT = "Once upon a time, in a small village by the sea,"


def peak() -> int:
    """The most memory that this process has had, in bytes, without what of files is mapped into it."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_1500_tokens_with_every_stream_in_a_file(tmp_path: Path) -> None:
    smollm2 = tl.load("smollm2-135m")
    path = tmp_path / "traj.safetensors"
    with smollm2.generate(PROMPT, max_new_tokens=2, eos_token_id=None) as t:  # what is made once is there
        smollm2.layers[:].resid_post.save()
    positions = len(smollm2.tokens(PROMPT)[0]) + COUNT - 1
    planned = 30 * positions * 576 * 4
    before = peak()
    with smollm2.generate(PROMPT, max_new_tokens=COUNT, eos_token_id=None) as t:
        smollm2.layers[:].resid_post.save("traj", to=str(path))
    # The tensor is planned, and it is mapped memory; the cache of keys and values grows to a fifth of it.
    cache = 2 * 30 * positions * 3 * 64 * 4
    assert peak() - before < 1.1 * (planned + 2 * cache) + 64 * 2**20
    assert f"{planned / 2**20:.1f} MiB, to {path}" in t.explain()
    assert len(t.tokens) == COUNT
    ids = [token.id for token in smollm2.tokens(PROMPT)[0]] + t.tokens[:-1]
    with smollm2.trace([ids]):
        whole = smollm2.layers[:].resid_post.save()
    with safe_open(str(path), framework="pt") as file:
        stored = file.get_tensor("traj")
    assert stored.shape == whole.shape == (30, 1, positions, 576)
    # Of a position's own size: the first one has numbers of 20,000 in a few places, and float32 has seven digits.
    size = whole.value.abs().amax(-1, keepdim=True)
    error = (stored - whole.value).abs() / size
    assert error.max() < 1e-4, error.max()
    assert torch.equal(stored, t["traj"])
