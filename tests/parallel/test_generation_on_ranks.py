"""Generations with steps and saves on models in several processes: what one process gives, on the first rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tracelens as tl
from tests.support.families import D_MODEL, FAMILIES
from tests.support.ranks import PoolOf
from tests.support.spread_models import Both, fixture_of
from tests.support.tokenizers import byte_level_bpe
from tracelens import errors

ROWS = [[5, 6, 7, 8, 9, 10, 4, 3], [11, 12], [3, 4, 5]]
NEW = 6
SHARP: dict[str, Any] = {"initializer_range": 0.4}
"""So that one token stands out at every step, and all ways of adding up numbers find the same one."""
CLOSE: dict[str, Any] = {"rtol": 2e-4, "atol": 2e-4}
V = 3 * torch.randn(D_MODEL, generator=torch.Generator().manual_seed(0))

SPREADS = {
    "llama tp2": ("llama", {"tp": 2}),
    "gemma3 pp2": ("gemma3", {"pp": 2}),
    "qwen3 pp2 x tp2": ("qwen3", {"pp": 2, "tp": 2}),
}


models = fixture_of(SPREADS, SHARP)


Block = Callable[[tl.Model, tl.Generation], None]


def generated(model: tl.Model, block: Block, rows: Any = ROWS, **options: Any) -> tl.Generation:
    with model.generate(rows, **{"max_new_tokens": NEW, "eos_token_id": None, **options}) as t:
        block(model, t)
    return t


def require_same(models: Both, block: Block, rows: Any = ROWS, **options: Any) -> tl.Generation:
    """Tokens, and all that was saved."""
    spread, one = (generated(model, block, rows, **options) for model in (models.spread, models.one))
    assert spread.tokens == one.tokens
    assert torch.equal(spread.valid, one.valid)
    assert list(spread.results) == list(one.results)
    for name in one.results:
        wanted, found = one[name], spread[name]
        assert isinstance(found, list) == isinstance(wanted, list), name
        for x, y in zip(found, wanted, strict=True) if isinstance(wanted, list) else [(found, wanted)]:
            assert x.dtype == y.dtype, name
            within = {"rtol": 1e-2, "atol": 1e-2} if x.dtype is torch.bfloat16 else CLOSE
            torch.testing.assert_close(
                x, y, **within, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
            )
    return spread


def everything(model: tl.Model, t: tl.Generation) -> None:
    """Values in parts, partial sums and whole ones, of all steps, of some, and of one."""
    model.layers[0].resid_post.tok[model.positions >= 3] += V
    t.decode.layers[2].mlp_act[..., :40] = 0
    t.steps[2:4].layers[1].head(1).z = 0
    scopes: dict[str, Any] = {"all": model, "decode": t.decode, "window": t.steps[1:4], "prompt": t.prefill}
    for name, scope in scopes.items():
        for layer in (0, 2):
            handle = scope.layers[layer]
            for site in ("mlp_act", "z", "q", "attn_out", "mlp_out", "resid_post"):
                getattr(handle, site).save(f"{name} {layer}.{site}")
            handle.mlp_act[:, -1].save(f"{name} {layer}.mlp_act of the newest")
            handle.z[:, -1].save(f"{name} {layer}.z of the newest")
            handle.mlp_out[:, -1].save(f"{name} {layer}.mlp_out of the newest")
            handle.mlp_act.norm(dim=-1).save(f"{name} {layer}.norms")
        scope.layers[:].mlp_act.save(f"{name} stack")
        scope.layers[:].mlp_act[:, -1].save(f"{name} stack of the newest")
        scope.logits.save(f"{name} logits")
        scope.logits[:, -1].argmax(-1).save(f"{name} picks")
        scope.layers[1].resid_post.save(f"{name} half", dtype=torch.bfloat16)


def held(model: tl.Model, t: tl.Generation) -> None:
    """Values of one step in later ones: whole, in parts, from the last stage to the first, from a middle step."""
    late = t.prefill.layers[2].resid_post.tok[-1]
    t.decode.layers[0].resid_post[:, -1] += 0.3 * late
    act = t.prefill.layers[0].mlp_act.tok[-1]
    t.steps[2:].layers[2].mlp_act[:, -1] += act
    out = t.steps[3].layers[2].mlp_out[:, -1]
    t.steps[4:].layers[0].resid_post[:, -1] += out
    z = t.prefill.layers[1].z.tok[-1]
    t.decode.layers[1].z[:, -1] = z
    late.save("late")
    act.save("act")
    model.layers[2].resid_post.save("after")
    (model.layers[2].resid_post[:, -1] - late).norm(dim=-1).save("distance")


def test_steps_and_saves(models: Both) -> None:
    t = require_same(models, everything)
    assert t["all 0.mlp_act of the newest"].shape[:2] == (NEW, len(ROWS))
    plain = generated(models.one, lambda model, t: None)
    assert plain.tokens != t.tokens


def test_rows_that_end_at_different_steps(models: Both) -> None:
    whole = generated(models.one, everything).tokens
    end = next(token for token in whole[1] if len({(*row, token).index(token) for row in whole}) > 1)
    t = require_same(models, everything, eos_token_id=end)
    assert len({len(row) for row in t.tokens}) > 1


def test_held_values(models: Both) -> None:
    t = require_same(models, held)
    assert t.tokens != generated(models.one, lambda model, t: None).tokens


def test_include_last_and_no_new_tokens(models: Both) -> None:
    def saves(model: tl.Model, t: tl.Generation) -> None:
        model.layers[0].resid_post += V
        model.layers[2].mlp_act.save("act")
        model.layers[2].resid_post[:, -1].save("newest")
        model.logits.save("logits")
        t.decode.layers[0].resid_post.save("decode")

    t = require_same(models, saves, include_last=True)
    assert [len(row[0]) for row in t["act"]] == [len(row) + NEW for row in ROWS]
    t = require_same(models, saves, max_new_tokens=0)
    assert t.tokens == [[], [], []]
    assert t["decode"].shape == (3, 0, D_MODEL)


def test_a_seed_is_the_same_on_ranks(models: Both) -> None:
    def saves(model: tl.Model, t: tl.Generation) -> None:
        model.layers[1].mlp_act.save("act")

    options: dict[str, Any] = {"do_sample": True, "temperature": 1.5, "top_k": 20}
    texts = []
    for seed in (5, 5, 6):
        torch.manual_seed(len(texts))
        texts.append(require_same(models, saves, seed=seed, **options).tokens)
    assert texts[0] == texts[1] != texts[2]


def test_files(models: Both, tmp_path: Path) -> None:
    path = tmp_path / "traj.safetensors"
    with models.spread.generate(ROWS, max_new_tokens=NEW, eos_token_id=None) as t:
        models.spread.layers[:].resid_post.save("filed", to=path)
        models.spread.layers[:].resid_post.save("kept")
        t.steps[9].layers[0].resid_post.save("never", to=path)
        t.steps[9:].layers[0].resid_post.save("nothing", to=path)
    for one, other in zip(t["filed"], t["kept"], strict=True):
        assert torch.equal(one, other)
    assert t["nothing"].shape == (3, 0, D_MODEL)
    with pytest.raises(errors.GenerationStepError):
        _ = t["never"]
    assert [one.name for one in tmp_path.iterdir()] == ["traj.safetensors"]


# --- saves that would lie differently in different steps ---------------------------------------------------------


def summed(model: tl.Model, t: tl.Generation) -> None:
    """Parts that the ranks add up: at the end, unless a step needs the sum itself."""
    for layer, window in enumerate((t.decode, t.steps[2:4])):
        x = (model.layers[layer].mlp_act * 0.1).sum(-1)
        window.layers[2].resid_post += x.abs()[..., None]
        x.save(f"sum {layer}")
    one = model.layers[0].mlp_act[:, -1, 3]
    t.decode.layers[1].resid_post[:, -1] += one.abs()[..., None]
    one.save("one")
    stack = model.layers[:].mlp_act.sum(-1)
    stack.save("stack")
    t.steps[1].layers[2].resid_post += (t.steps[1].layers[1].mlp_act.sum(-1) ** 2)[..., None] * 0.1


def elsewhere(model: tl.Model, t: tl.Generation) -> None:
    """With a weight of another stage: where the weight is, unless a step writes it before that."""
    x = (model.layers[0].resid_post @ model.param("model.layers.2.mlp.gate_proj.weight").T).amax(
        -1, keepdim=True
    )
    t.decode.layers[1].resid_post += 0.5 * x
    x.save("scaled")


def following(model: tl.Model, t: tl.Generation) -> None:
    """What one save has made whole in a step, another takes, in this step alone."""
    early = t.steps[0:2].layers[0].mlp_act.sum(-1)
    late = t.decode.layers[0].mlp_act.sum(-1)
    t.steps[2:4].layers[1].resid_post += late.abs()[..., None]
    late.save("late")
    early.save("early")


@pytest.mark.parametrize("block", [summed, following, elsewhere])
def test_a_save_leaves_from_the_same_place_in_every_step(block: Block, models: Both) -> None:
    t = require_same(models, block)
    assert t.tokens != generated(models.one, lambda model, t: None).tokens


def test_logits_of_the_newest_position_alone(models: Both) -> None:
    def picks(model: tl.Model, t: tl.Generation) -> None:
        t.steps[1].logits[:, -1, 50] += 1e4
        t.steps[:].logits[:, -1].argmax(-1).save("picks")
        t.decode.logits[:, -1].topk(3).values.save("best")

    t = require_same(models, picks)
    assert t["picks"].T.tolist() == t.tokens


def test_stop_strings(ranks_of: PoolOf, tmp_path: Path) -> None:
    """A rank has the tokenizer from the folder of the model."""
    tokenizer = byte_level_bpe()
    hf = FAMILIES["qwen2"].build(vocab_size=len(tokenizer))
    hf.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    one = tl.wrap(hf, tokenizer)
    with one.generate(ROWS, max_new_tokens=8) as t:
        pass
    stop = " Fr"
    assert stop in tokenizer.decode(t.tokens[0])
    with tl.load(tmp_path, tp=2, ranks=ranks_of(2)) as spread:
        found = [
            generated(model, saving_streams, max_new_tokens=8, stop_strings=[stop]) for model in (spread, one)
        ]
    assert found[0].tokens == found[1].tokens != t.tokens
    torch.testing.assert_close(found[0]["newest"], found[1]["newest"], **CLOSE, equal_nan=True)


def saving_streams(model: tl.Model, t: tl.Generation) -> None:
    model.layers[0].resid_post[:, -1].save("newest")
