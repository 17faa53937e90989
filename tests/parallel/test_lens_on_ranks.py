"""The lens on models whose vocabulary, or whose layers, several processes share: what one process says."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from torch.testing import assert_close

import tracelens as tl
from tests.support.spread_models import Both, fixture_of
from tracelens import compiling
from tracelens.collectives import collectives
from tracelens.generation_plan import CompiledGeneration
from tracelens.ir.ops import Call

ROWS = [[5, 6, 7, 8, 9, 10, 4, 3], [11, 12, 90, 2, 3, 4, 5, 6]]
SPREADS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama tp2": ("llama", {"tp": 2}),
    "gemma3 tp2, soft-capped": ("gemma3", {"tp": 2, "settings": {"final_logit_softcapping": 4.0}}),
    "mistral pp2": ("mistral", {"pp": 2}),
    "qwen3 pp2 x tp2": ("qwen3", {"pp": 2, "tp": 2}),
}


models = fixture_of(SPREADS)


def looked_at(model: tl.Model) -> tl.Trace:
    ids = torch.tensor(ROWS)
    following = torch.cat([ids[:, 1:], torch.full((2, 1), -1)], 1)
    with model.trace(ids) as t:
        lens = model.lens(model.layers[:].resid_post, workspace=8000)
        lens.topk(4).save("top")
        lens.entropy().save("entropy")
        lens.kl().save("kl")
        lens.js().save("js")
        lens.tv().save("tv")
        lens.log_prob(following).save("log_prob")
        lens.rank(following).save("rank")
        model.lens(model.layers[1].attn_out[:, -1]).logit(3).save("logit")
        model.layers[2].resid_post *= model.lens(model.layers[0].resid_post).max_prob()[..., None]
        model.lens(model.layers[2].resid_post).logsumexp().save("after")
    return t


def test_ranks_say_what_one_process_says(models: Both) -> None:
    one, spread = looked_at(models.one), looked_at(models.spread)
    for name in ("top.indices", "rank"):
        assert torch.equal(one[name], spread[name])
    for name in ("top.values", "entropy", "kl", "js", "tv", "log_prob", "logit", "after"):
        assert_close(one[name], spread[name], atol=2e-5, rtol=2e-5, equal_nan=True)


def test_no_logits_and_no_states_travel_between_ranks(models: Both) -> None:
    with models.spread.record() as r:
        lens = models.spread.lens(models.spread.layers[1].resid_post)
        lens.topk(4).save("top")
        lens.rank(3).save("rank")
    plan = r.plan().plan
    places = plan.placement.places
    ranks = places[-1].ranks
    parts = [op for op in plan.graph.ops if isinstance(op, Call) and op.function == "tracelens.lens_part"]
    assert len(parts) == (ranks > 1)
    moved = sum(one.nbytes({"B": 2, "P": 8}) for one in collectives(plan))
    # Of each row: the logit of the token, seven numbers and five whole ones, from either rank to the other.
    rows, ways = 16, ranks * (ranks - 1)
    assert moved == ways * rows * (4 + (2 + 4 + 1) * 4 + (4 + 1) * 8)


def test_generations_on_ranks_say_what_one_process_says(models: Both) -> None:
    rows = [[5, 6, 7, 8, 9, 10], [11, 12, 4]]
    found: list[tl.Generation] = []
    for model in (models.one, models.spread):
        with model.generate(rows, max_new_tokens=4, eos_token_id=None) as t:
            following = model.next_tokens.save("next")
            lens = model.lens(model.layers[:].resid_post)
            for name in ("rank", "log_prob"):
                getattr(lens, name)(following).save(name)
            for name in ("kl", "js", "tv"):
                getattr(lens, name)().save(name)
            lens.topk(2).save("top")
        found.append(t)
    one, spread = found
    assert one.tokens == spread.tokens
    for name in ("next", "rank", "log_prob", "kl", "js", "tv", "top.values", "top.indices"):
        for row, (x, y) in enumerate(zip(one[name], spread[name], strict=True)):
            assert_close(x, y, atol=2e-5, rtol=2e-5, equal_nan=True)
            if name == "next":
                assert x.flatten().tolist() == [*rows[row][1:], *one.tokens[row]]


def written(model: tl.Model, **options: Any) -> tl.Generation:
    """More steps than wait for each other."""
    rows = [[5, 6, 7, 8], [11, 12]]
    with model.generate(rows, **{"max_new_tokens": 40, "eos_token_id": None, **options}) as t:
        lens = model.lens(model.layers[:].resid_post)
        lens.topk(3).save("top")
        lens.log_prob(model.next_tokens).save("log_prob")
        lens.rank(model.next_tokens).save("rank")
        lens.kl().save("kl")
        lens.js().save("js")
        model.layers[1].mlp_act[..., :9].save("neurons")
    return t


def test_steps_that_wait_for_each_other_on_ranks(models: Both) -> None:
    with patch.object(compiling, "defer_lenses", lambda *_, **__: None):
        plain = written(models.one)
    tokens: Any = plain.tokens
    end = tokens[0][4]
    for options in ({}, {"eos_token_id": end, "pad_token_id": 0, "include_last": True}, {"use_cache": False}):
        one = written(models.one, **options) if options else plain
        spread = written(models.spread, **options)
        compiled = spread._compiled()
        assert isinstance(compiled, CompiledGeneration)
        (tail,) = compiled.tails
        assert tail is not None
        assert tail.together({"B": 2, "P": 4, "S": 4})[0] < 40
        assert one.tokens == spread.tokens
        for name in one.results:
            for found, wanted in zip(spread[name], one[name], strict=True):
                if name in ("top.indices", "rank"):
                    assert torch.equal(found, wanted), name
                else:
                    assert_close(found, wanted, atol=2e-5, rtol=2e-5, equal_nan=True, msg=name)
