"""What Gemma-3 has that other families have not: sandwich norms, its own order in attention, capped logits."""

from __future__ import annotations

import pytest
import torch

import tracelens as tl
from tests.conformance.test_reads import close
from tests.conformance.test_writes import matters, oracle
from tests.support.batches import SINGLE, batch, random_rows
from tests.support.families import FAMILIES
from tests.support.plain import untouched
from tracelens.errors import AbsentSiteError, CausalityError, UnknownArchitectureError
from tracelens.ir.sites import Site

ROWS = random_rows(SINGLE)


def test_what_combines_sites_of_one_level_waits_for_the_last_of_them() -> None:
    """In Gemma the values come before the normed queries, in Qwen3 after them: the same block on both."""
    for family in ("gemma3", "qwen3"):
        hf = FAMILIES[family].build()
        model, prompt = tl.wrap(hf), batch(ROWS)
        expected: dict[Site, torch.Tensor] = {}
        oracle(hf, prompt, lambda site, tensor, seen=expected: seen.setdefault(site, tensor))
        at = {site.name: tensor for site, tensor in expected.items() if site.layer == 1}
        ran: list[int] = []
        hook = hf.model.layers[1].self_attn.o_proj.register_forward_hook(lambda *_, ran=ran: ran.append(1))
        with untouched(hf), model.trace(ROWS) as t:
            layer = model.layers[1]
            layer.k *= 2.0
            (layer.v * layer.k_normed).save("product")
            (layer.q_normed[:, :, 2:] - layer.v - layer.k).save("difference")
            layer.v.save("v")
        close(t["product"], at["v"] * at["k_normed"])  # the norm forgets the factor
        close(t["difference"], at["q_normed"][:, :, 2:] - at["v"] - 2.0 * at["k"])
        close(t["v"], at["v"])
        assert not ran  # the pass is left in attention
        hook.remove()
        compiled = tl.wrap(hf).compile(t.graph)(ROWS)
        assert torch.equal(compiled["product"], t["product"])


def test_sites_of_one_level_feed_each_other_in_no_family() -> None:
    model = tl.wrap(FAMILIES["gemma3"].build())
    for later, earlier in (("v", "q_normed"), ("q_normed", "v")):
        with pytest.raises(CausalityError), model.trace(ROWS):
            setattr(model.layers[1], later, getattr(model.layers[1], earlier).mean())


@pytest.mark.parametrize("part", ["attn", "mlp"])
def test_a_write_at_a_sandwich_norm_is_seen_where_it_is_added(part: str) -> None:
    hf = FAMILIES["gemma3"].build()
    model, prompt = tl.wrap(hf), batch(ROWS)
    post, add = Site(f"{part}_post_norm", 1), Site(f"{part}_add", 1)
    factors = {post: 0.5, add: -3.0}
    expected = oracle(hf, prompt, lambda site, tensor: tensor * factors[site] if site in factors else tensor)
    matters(expected, hf, prompt)
    with untouched(hf), model.trace(ROWS) as t:
        layer = model.layers[1]
        layer.resid_mid.save("mid")
        before = getattr(layer, post.name)
        setattr(layer, post.name, before * 0.5)
        getattr(layer, add.name).save("between")
        setattr(layer, add.name, getattr(layer, add.name) * -3.0)
        before.save("before")
        model.logits.save("logits")
    assert torch.equal(t["between"], t["before"] * 0.5)
    close(t["logits"], expected)


def test_logits_are_capped_and_the_unembedding_is_not() -> None:
    model = tl.wrap(FAMILIES["gemma3"].build())
    with model.trace(ROWS) as t:
        model.lm_head.save("raw")
        model.logits.save("logits")
    assert t["raw"].abs().max() > 4.0 > t["logits"].abs().max()
    assert torch.equal(t["logits"], torch.tanh(t["raw"] / 4.0) * 4.0)


def test_attention_that_looks_ahead_is_refused_when_the_model_is_wrapped() -> None:
    with pytest.raises(UnknownArchitectureError, match="looks ahead"):
        tl.wrap(FAMILIES["gemma3"].build(use_bidirectional_attention=True))


def test_families_without_sandwich_norms_name_what_is_added() -> None:
    for family in ("llama", "gpt2", "qwen3"):
        model = tl.wrap(FAMILIES[family].build())
        for part in ("attn", "mlp"):
            with pytest.raises(AbsentSiteError, match=f"use {part}_add"), model.trace(ROWS):
                getattr(model.layers[0], f"{part}_post_norm").save()
