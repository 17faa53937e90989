"""What families with experts, sinks, latent or linear attention have of their own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import tracelens as tl
from tests.conformance.test_more_families import ROWS, built
from tests.support.batches import batch
from tests.support.more_forwards import hand_forward
from tests.support.sparse_families import SPARSE
from tracelens import proving
from tracelens.backends.attention import scores_of
from tracelens.errors import (
    AbsentSiteError,
    AttentionImplementationError,
    PromptError,
    UnknownArchitectureError,
    WriteTargetError,
)
from tracelens.ir.sites import Site
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


def test_latent_attention_has_the_widths_that_it_computes_with() -> None:
    """Queries and keys are wider than values; what is no tensor of the model is refused with what there is."""
    _, model = built("deepseek_v3")
    shapes = {row.name: row.shape for row in model.sites() if row.absent is None}
    assert shapes["q"] == shapes["q_rot"] == shapes["k_rot"] == "[B, P, 4, 14]"
    assert shapes["v"] == shapes["z"] == "[B, P, 4, 12]"
    for name, says in {"k": "use k_rot", "q_normed": "q_a_layernorm", "k_normed": "kv_a_layernorm"}.items():
        with pytest.raises(AbsentSiteError, match=says), model.trace(ROWS):
            getattr(model.layers[0], name).save()
    with model.trace(ROWS[:1]) as t:
        for name in ("q_rot", "k_rot", "scores", "pattern", "v", "z"):
            getattr(model.layers[0], name).save(name)
        # What the reasons name is there.
        model.module("model.layers.0.self_attn.kv_a_proj_with_mqa").output.save("latent")
        model.module("model.layers.0.self_attn.q_a_layernorm").output.save("normed")
    q, k, v = (t[name].transpose(1, 2) for name in ("q_rot", "k_rot", "v"))
    scores = q @ k.mT * 14**-0.5
    seen = t["scores"] > -1e30
    torch.testing.assert_close(t["scores"][seen], scores[seen], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close((t["pattern"] @ v).transpose(1, 2), t["z"], atol=1e-5, rtol=1e-5)
    # One rotated key for all heads.
    assert torch.equal(t["k_rot"][:, :, 0, 8:], t["k_rot"][:, :, 3, 8:])
    assert t["latent"].shape[-1] == 16 + 6
    assert t["normed"].shape[-1] == 20


@pytest.mark.parametrize("name", ["v", "k_rot"])
def test_what_latents_make_of_the_cache_is_refused_in_a_generation(name: str) -> None:
    _, model = built("deepseek_v3")
    refused = pytest.raises(WriteTargetError, match="behind it stands the cache")
    with refused as failure, model.generate(ROWS[:1], max_new_tokens=2):
        setattr(model.layers[0], name, 0.0)
    assert failure.value.instead == "scores"


def test_queries_without_a_latent() -> None:
    """As in smaller models: another module has the same site."""
    hf = SPARSE["deepseek_v3"].build(q_lora_rank=None)
    model = tl.wrap(hf)
    with model.trace(ROWS[:1]) as t:
        model.layers[1].attn_in.save("x")
        model.layers[1].q.save("q")
    torch.testing.assert_close(t["q"].flatten(2), hf.model.layers[1].self_attn.q_proj(t["x"]).detach())


def test_experts_are_chosen_by_group_and_by_bias() -> None:
    """Written logits choose anew as the router does: the largest one is not taken where its group is not."""
    hf, model = built("deepseek_v3")
    router = hf.model.layers[1].mlp.gate
    with model.trace(ROWS[:1]) as t:
        model.layers[1].mlp_in.save("x")
        model.layers[1].router_logits = model.layers[1].router_logits * -2.0 + 0.3
        model.layers[1].router_logits.save("logits")
        model.layers[1].expert_index.save("index")
        model.layers[1].expert_weights.save("weights")
    wanted = F.linear(t["x"], router.weight).detach() * -2.0 + 0.3
    torch.testing.assert_close(t["logits"], wanted, atol=1e-5, rtol=1e-5)
    ranked = wanted.sigmoid() + router.e_score_correction_bias
    for token, (row, chosen) in enumerate(zip(ranked[0], t["index"][0], strict=True)):
        pairs = row.view(4, 2).sum(-1).topk(2).indices.tolist()
        inside = [expert for pair in pairs for expert in (2 * pair, 2 * pair + 1)]
        best = sorted(inside, key=lambda expert: -row[expert].item())[:2]
        assert sorted(chosen.tolist()) == sorted(best)
        own = wanted[0, token, chosen].sigmoid()
        torch.testing.assert_close(t["weights"][0, token], 2.5 * own / own.sum(), atol=1e-5, rtol=1e-5)
    ignored = (ranked.topk(2, dim=-1).indices.sort(-1).values != t["index"].sort(-1).values).any()
    assert ignored  # the groups matter


def test_queries_of_llama4_grow_with_their_place_in_the_row() -> None:
    """In layers without rotation; padding counts there, so rows of several lengths are refused where it would."""
    hf = SPARSE["llama4"].build(floor_scale=3)
    model = tl.wrap(hf)
    row = ROWS[0]
    expected: dict[Site, Tensor] = {}
    with torch.no_grad():
        hand_forward(hf, *batch([row]), lambda site, tensor: expected.setdefault(site, tensor))
    with model.trace([row]) as t:
        for name in ("q", "q_rot", "z"):
            getattr(model.layers[1], name).save(name)
    for name in ("q", "q_rot", "z"):
        torch.testing.assert_close(t[name], expected[Site(name, 1)], atol=1e-5, rtol=1e-5)
    assert (t["q_rot"] - t["q"]).abs().max() > 0.1
    with pytest.raises(PromptError, match="from 3 positions on"):
        model.prepare(ROWS)
    with pytest.raises(PromptError, match="padding counted"), model.generate([[1], [2, 3]], max_new_tokens=2):
        model.logits.save()
    model.prepare([row, row])
    tl.wrap(SPARSE["llama4"].build(floor_scale=3, attn_temperature_tuning=False)).prepare(ROWS)


def test_experts_of_llama4_are_fed_less() -> None:
    """Nothing multiplies what they return: a written logit weighs their inputs."""
    _, model = built("llama4")
    for name in ("expert_weights", "expert_index", "expert_out", "q_normed"):
        with pytest.raises(AbsentSiteError, match=r"router_logits|mlp_out|q_rot"), model.trace(ROWS):
            getattr(model.layers[0], name).save()
    with model.trace(ROWS[:1]) as t:
        model.layers[0].router_logits = model.layers[0].router_logits - 100.0
        model.layers[0].mlp_out.save("alone")
        model.module("model.layers.0.feed_forward.shared_expert").output.save("shared")
    torch.testing.assert_close(t["alone"].flatten(0, 1), t["shared"])


def test_clipped_projections_are_refused() -> None:
    with pytest.raises(UnknownArchitectureError, match="clipped in place"):
        tl.wrap(SPARSE["olmoe"].build(clip_qkv=0.5))
