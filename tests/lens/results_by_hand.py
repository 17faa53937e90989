"""Lens results without a model: random logits, with every kind of token that can stand in a cell."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.support.tokenizers import byte_level_bpe
from tracelens.lens.result import LensResult

TEXT = "The capital of France is Paris. The capital of Italy is Rome"


def logits_of(shape: tuple[int, int, int], seed: int = 0) -> Tensor:
    """Logits [C, L, T, V] that grow surer from layer to layer, over a few more tokens than the vocabulary has."""
    C, L, T = shape
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(C, L, T, len(byte_level_bpe()) + 3, generator=generator)
    return logits * torch.linspace(0.5, 4.0, L)[:, None, None]


def by_hand(
    components: tuple[str, ...] = ("attn_out", "resid_post"), layers: int = 6, **options: Any
) -> LensResult:
    """A result of 13 positions, the last 5 of them generated, that tracks two tokens."""
    ids: list[int] = byte_level_bpe()(TEXT)["input_ids"]
    options = {
        "tokenizer": byte_level_bpe(),
        "components": components,
        "n_prompt": 8,
        "top_k": 4,
        "track": {" Paris": ids[5], " Rome": ids[-1]},
        "model": "tiny",
    } | options
    return LensResult.from_logits(logits_of((len(components), layers, len(ids))), ids, **options)


def same(one: LensResult, other: LensResult) -> None:
    """Asserts that two results are the same, number for number."""
    for name in ("components", "layers", "positions", "n_prompt", "model", "lens"):
        assert getattr(one, name) == getattr(other, name), name
    assert dict(one.tracked) == dict(other.tracked)
    assert list(one.tracked) == list(other.tracked)
    for name in ("token_ids", "next_ids", "top_ids", "top_log_probs", "tracked_log_probs", "tracked_ranks"):
        equal(getattr(one, name), getattr(other, name), name)
    assert set(one.statistics) == set(other.statistics)
    for name, tensor in one.statistics.items():
        equal(tensor, other.statistics[name], name)


def equal(one: Tensor | None, other: Tensor | None, what: str = "") -> None:
    """Asserts that two tensors are the same, nan where nan is."""
    if one is None or other is None:
        assert one is other, what
        return
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
