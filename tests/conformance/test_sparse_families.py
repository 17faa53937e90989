"""What families with experts, sinks, latent or linear attention have of their own."""

from __future__ import annotations

import pytest
import torch

import tracelens as tl
from tests.conformance.test_more_families import ROWS, built
from tests.support.sparse_families import SPARSE
from tracelens.backends.attention import scores_of
from tracelens.errors import AttentionImplementationError, UnknownArchitectureError


def test_a_head_with_a_sink_looks_at_less_than_all() -> None:
    """Rows of the pattern are what the sink leaves: the softmax of the scores and one number more, that of the head."""
    hf, model = built("gpt_oss")
    with model.trace(ROWS[:1]) as t:
        model.layers[1].scores.save("scores")
        model.layers[1].pattern.save("pattern")
    sinks = hf.model.layers[1].self_attn.sinks.detach()
    left = 1 - t["pattern"].sum(-1)
    torch.testing.assert_close(
        left, (sinks[:, None] - torch.logaddexp(t["scores"].logsumexp(-1), sinks[:, None])).exp()
    )
    assert left.min() > 0.01


def test_sinks_are_not_guessed_at() -> None:
    """sdpa takes what it is given for sinks and leaves it out: what it computes has another pattern."""
    hf, _ = built("gpt_oss")
    q = torch.randn(1, 4, 3, 12)
    with pytest.raises(AttentionImplementationError, match=r"s_aux.* of sdpa"):
        scores_of("sdpa", hf.model.layers[0].self_attn, q, q, None, {"s_aux": torch.ones(4)})


def test_clipped_projections_are_refused() -> None:
    with pytest.raises(UnknownArchitectureError, match="clipped in place"):
        tl.wrap(SPARSE["olmoe"].build(clip_qkv=0.5))
