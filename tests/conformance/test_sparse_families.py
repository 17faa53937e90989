"""What families with experts, sinks, latent or linear attention have of their own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tracelens as tl
from tests.conformance.test_more_families import ROWS, built
from tests.support.sparse_families import SPARSE
from tracelens import proving
from tracelens.backends.attention import scores_of
from tracelens.errors import (
    AbsentSiteError,
    AttentionImplementationError,
    PromptError,
    UnknownArchitectureError,
)
from tracelens.model import Model


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


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5", "qwen3_5_moe"])
def test_linear_attention_has_no_heads_and_says_so(family: str) -> None:
    _, model = built(family)
    with pytest.raises(AbsentSiteError, match=r"linear attention.*use attn_in") as failure, model.trace(ROWS):
        model.layers[1].pattern.save()
    assert failure.value.instead == "model.layers[0].pattern"
    for layers in (1, slice(None)):
        with pytest.raises(AbsentSiteError, match="no 'z': layer 1 has linear attention"), model.trace(ROWS):
            model.layers[layers].head_out.save()
    # What there is instead, at either module.
    with model.trace(ROWS[:1]) as t:
        for layer, module in enumerate(("self_attn", "linear_attn")):
            model.layers[layer].attn_in.save(f"in {layer}")
            model.layers[layer].attn_add.save(f"add {layer}")
            model.module(f"model.layers.{layer}.{module}").inputs["hidden_states"].save(f"module in {layer}")
    for layer in range(2):
        assert torch.equal(t[f"in {layer}"], t[f"module in {layer}"])
    with pytest.raises(PromptError, match="layers with linear_attention"):
        model.prepare(ROWS[:1], branches=2)


def test_z_has_its_gate_on_it() -> None:
    hf, model = built("qwen3_next")
    with model.trace(ROWS[:1]) as t:
        for name in ("pattern", "v", "z", "attn_in"):
            getattr(model.layers[0], name).save(name)
    values = t["v"].repeat_interleave(2, dim=2).transpose(1, 2)
    mixed = (t["pattern"] @ values).transpose(1, 2)
    gates = hf.model.layers[0].self_attn.q_proj(t["attn_in"]).unflatten(-1, (4, 2, 12))[..., 1, :].sigmoid()
    torch.testing.assert_close(t["z"], mixed * gates.detach(), atol=1e-5, rtol=1e-5)
    assert (t["z"] - mixed).abs().max() > 0.1
    assert model.check_sites().verified["z"] == "pattern @ v == z"


def test_a_gate_that_would_make_more_of_a_value_is_none() -> None:
    """What an identity with gates shows: with one token's values for another's it does not hold."""
    _, model = built("qwen3_next")
    family = model.anatomy.family
    wrong = replace(family, taps={**family.taps, "v": family.taps["k"]})
    found = proving.prove(Model(built("qwen3_next")[0], None, _family=wrong))
    assert "v" in found.refuted


def test_clipped_projections_are_refused() -> None:
    with pytest.raises(UnknownArchitectureError, match="clipped in place"):
        tl.wrap(SPARSE["olmoe"].build(clip_qkv=0.5))
