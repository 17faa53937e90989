"""Sites held to what they are called: the identities between them, at load and on demand."""

from __future__ import annotations

import itertools
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, BitNetConfig, SeedOssConfig

import tracelens as tl
from tests.support.families import EVERY, FAMILIES, randomise
from tests.support.more_families import ALL, EAGER_ALONE
from tracelens import loading, proving
from tracelens.backends.architectures.lookup import family_of
from tracelens.backends.base import Family
from tracelens.errors import AbsentSiteError, RefutedSitesWarning
from tracelens.ir.sites import KIND
from tracelens.model import Model

IDS = [[3, 4, 5, 9]]
TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(autouse=True)
def probing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other tests leave it out."""
    monkeypatch.delenv("TRACELENS_PROBE")


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Nothing is known of any model, and what is found is kept in a folder of the test's."""
    monkeypatch.setenv("TRACELENS_CACHE", str(tmp_path))
    monkeypatch.setattr(proving, "_known", {})
    return tmp_path


def built(config: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomise(model, 0)
    return model.eval()


def tried(hf: nn.Module, family: Family, **taps: Any) -> proving.SiteProof:
    return proving.prove(Model(hf, None, _family=replace(family, taps={**family.taps, **taps})))


UNSPOKEN = {
    # Their scores are no products of these: a bias (ALiBi), or a rotation that is no site.
    **dict.fromkeys(
        ("falcon_sequential", "falcon_one_norm", "falcon_two_norms", "falcon_new_one_norm"),
        ("q", "k"),
    ),
    # The same; and its activation function is in no configuration.
    "bloom": ("q", "k", "mlp_pre", "mlp_act"),
    # Their lengths change with the rotation; and what its router makes of them is no site.
    "llama4": ("q", "k", "router_logits"),
    # Of neurons of experts nothing is known but what they are multiplied by.
    **dict.fromkeys(("qwen3_moe", "mixtral", "gpt_oss", "olmoe"), ("expert_act",)),
    # What is added to the sum of the experts is that of another one.
    **dict.fromkeys(("qwen3_next", "qwen3_5_moe", "deepseek_v3"), ("expert_act", "expert_out")),
}
"""Sites for which no identity speaks, by family: the conformance tests compare these."""


@pytest.mark.parametrize("name", ALL)
def test_the_sites_of_every_family_are_verified(name: str) -> None:
    model = tl.wrap(ALL[name].build(attn="eager" if name in EAGER_ALONE else "sdpa"), probe=False)
    found = model.check_sites()
    assert found.ok
    assert found.derived == UNSPOKEN.get(name, ())
    assert all(check.holds and check.error < 2e-5 for check in found.checks)
    assert set(found.verified) == {row.name for row in model.sites() if row.absent is None} - {
        "head_out",
        *found.derived,
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    assert tl.wrap(FAMILIES["qwen3"].build(dtype=dtype), probe=False).check_sites().ok


SAME = {
    frozenset(pair)
    for pair in (
        ("attn_norm", "attn_in"),
        ("mlp_norm", "mlp_in"),
        ("attn_out", "attn_add"),
        ("mlp_out", "mlp_add"),
        # Only their sum is anywhere in the model.
        ("embed", "pos_embed"),
    )
}
"""Sites that are one tensor in some families."""


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_sites_that_are_exchanged_are_found_out(name: str) -> None:
    hf = FAMILIES[name].build()
    family = family_of(hf.config)
    inside = ("scores", "pattern", "q_rot", "k_rot")  # known by their names and not by the table
    exchanged = 0
    for one, other in itertools.combinations([site for site in family.taps if site not in inside], 2):
        alike = KIND[one].shape == KIND[other].shape and KIND[one].scope is KIND[other].scope
        if not alike or family.taps[one] == family.taps[other] or {one, other} in SAME:
            continue
        try:
            found = tried(hf, family, **{one: family.taps[other], other: family.taps[one]})
        except (tl.TracelensError, RuntimeError, AssertionError):
            continue  # the tables' own checks have found it
        exchanged += 1
        assert {one, other} & set(found.refuted), (one, other)
    assert exchanged > 40


def test_a_refuted_site_is_refused_and_the_others_are_there(
    forgotten: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf = FAMILIES["llama"].build()
    family = family_of(hf.config)
    wrong = replace(family, taps={**family.taps, "attn_add": family.taps["attn_in"]})
    monkeypatch.setattr(loading, "Model", lambda hf, tokenizer: Model(hf, tokenizer, _family=wrong))
    with pytest.warns(
        RefutedSitesWarning, match=r"attn_add: in this model resid_pre \+ attn_add == resid_mid"
    ):
        model = tl.wrap(hf)
    rows = {row.name: row for row in model.sites()}
    assert rows["attn_add"].status == "absent"
    assert rows["attn_add"].absent is not None
    assert rows["mlp_add"].status == "verified"
    with pytest.raises(AbsentSiteError, match="does not hold"), model.trace(IDS):
        model.layers[0].attn_add.save()
    with model.trace(IDS):
        model.layers[0].mlp_add.save("x")


@pytest.mark.usefixtures("forgotten")
def test_what_hooks_do_to_one_model_is_not_said_of_others() -> None:
    changed = FAMILIES["llama"].build()
    changed.model.layers[0].self_attn.register_forward_hook(lambda module, args, out: (out[0] + 1, *out[1:]))
    with pytest.warns(RefutedSitesWarning, match="attn_out"):
        tl.wrap(changed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = tl.wrap(FAMILIES["llama"].build())
    assert model.anatomy.proof is not None
    assert {row.status for row in model.sites()} == {"verified", "absent"}


def test_models_that_are_built_alike_are_looked_at_once(
    forgotten: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    real = proving.prove
    monkeypatch.setattr(proving, "prove", lambda model: (passes.append(1), real(model))[1])
    first = tl.wrap(FAMILIES["llama"].build(seed=0))
    second = tl.wrap(FAMILIES["llama"].build(seed=1))
    assert len(passes) == 1
    assert first.anatomy.proof is second.anatomy.proof
    tl.wrap(EVERY["llama_bias"].build())
    assert len(passes) == 2
    # Another process finds the file.
    monkeypatch.setattr(proving, "_known", {})
    third = tl.wrap(FAMILIES["llama"].build(seed=2))
    assert len(passes) == 2
    assert third.anatomy.proof == first.anatomy.proof
    (file, *_) = sorted((forgotten / "sites").iterdir())
    file.write_text("{")
    for file in (forgotten / "sites").iterdir():
        file.write_text(json.dumps({"checks": 1}))
    monkeypatch.setattr(proving, "_known", {})
    tl.wrap(FAMILIES["llama"].build(seed=2))
    assert len(passes) == 3


@pytest.mark.usefixtures("forgotten")
def test_it_may_be_left_out_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACELENS_PROBE", "0")
    assert tl.wrap(FAMILIES["llama"].build()).anatomy.proof is None
    assert isinstance(tl.wrap(built(SeedOssConfig(**TINY))), tl.PlainModel)


@pytest.mark.usefixtures("forgotten")
def test_when_nothing_is_run() -> None:
    training = FAMILIES["llama"].build().train()
    model = tl.wrap(training)
    assert model.anatomy.proof is not None
    assert model.anatomy.proof.skipped == "the model is in training mode"
    assert {row.status for row in model.sites()} == {"derived", "absent"}
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(FAMILIES["llama"].config())
    found = tl.wrap(empty.eval()).anatomy.proof
    assert found is not None
    assert found.skipped is not None
    assert "meta" in found.skipped
    unasked = tl.wrap(FAMILIES["llama"].build(), probe=False)
    assert unasked.anatomy.proof is None


def test_it_shows_itself() -> None:
    text = str(tl.wrap(FAMILIES["llama"].build()).check_sites())
    assert text.startswith("26 sites verified, 0 by the family's table alone")
    assert "pattern @ v == z" in text


# --- types without a table --------------------------------------------------------------------------------------------


def test_a_type_without_a_table_gets_the_one_that_fits() -> None:
    hf = built(SeedOssConfig(**TINY))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = tl.wrap(hf)
    assert isinstance(model, tl.Model)
    assert repr(model).count("seed_oss") == 1
    rows = {row.name: row.status for row in model.sites()}
    assert rows["resid_post"] == rows["pattern"] == rows["mlp_act"] == "verified"
    assert set(rows.values()) == {"verified", "absent"}
    hidden = hf(torch.tensor(IDS), output_hidden_states=True).hidden_states
    with model.trace(IDS):
        stream = model.layers[1].resid_post.save()
        model.layers[1].attn_add = 0.0
        logits = model.logits.save()
    assert_close(logits.value.shape, torch.Size((1, 4, 97)))
    with model.trace(IDS):
        stream = model.layers[1].resid_post.save()
    assert_close(stream.value, hidden[2].detach(), atol=1e-5, rtol=1e-5)
    assert isinstance(tl.wrap(hf, probe=False), tl.PlainModel)


def test_of_a_table_that_fits_in_part_the_rest_is_withheld() -> None:
    # BitNet norms what its last projections read, so that these are neither z nor the neurons.
    model = tl.wrap(built(BitNetConfig(**TINY)))
    assert isinstance(model, tl.Model)
    rows = {row.name: row for row in model.sites()}
    assert rows["resid_mid"].status == "verified"
    for site in ("z", "mlp_act", "head_out"):
        assert rows[site].status == "absent"
    with pytest.raises(AbsentSiteError, match="does not hold"), model.trace(IDS):
        model.layers[0].z.save()


def test_a_table_without_the_head_is_none() -> None:
    # The logits are multiplied with a number of which no table knows, so a lens would be wrong.
    hf = built(SeedOssConfig(**TINY))
    before = hf.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        found = before(*args, **kwargs)
        found.logits = 0.3 * found.logits
        return found

    hf.forward = forward
    assert isinstance(tl.wrap(hf), tl.PlainModel)
