"""Sites by the names that other libraries have for them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import tracelens as tl
from tests.support.families import FAMILIES
from tracelens.errors import (
    AbsentSiteError,
    AmbiguousSiteError,
    LayerRangeError,
    NoTraceError,
    UnknownSiteError,
)
from tracelens.ir.sites import KIND, Scope, Site
from tracelens.other_names import SCHEMES, ByMlp, NoSite

IDS = [[3, 4, 5, 9]]


@pytest.fixture(scope="module")
def model() -> tl.Model:
    return tl.wrap(FAMILIES["llama"].build())


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("layers.5.resid_post", Site("resid_post", 5)),
        ("layers.5.post_ln", Site("mlp_norm", 5)),
        ("model.layers[5].pre_ln", Site("attn_norm", 5)),
        ("logits", Site("logits")),
        ("model.final_norm", Site("final_norm")),
        ("blocks.5.hook_resid_post", Site("resid_post", 5)),
        ("blocks.11.attn.hook_z", Site("z", 11)),
        ("blocks.0.hook_mlp_out", Site("mlp_add", 0)),
        ("blocks.0.mlp.hook_out", Site("mlp_out", 0)),
        ("blocks.2.ln2.hook_out", Site("mlp_norm", 2)),
        ("hook_embed", Site("embed")),
        ("layers_output[3]", Site("resid_post", 3)),
        ("attention_probabilities[0]", Site("pattern", 0)),
        ("token_embeddings", Site("embed")),
        ("attn_out_post.7", Site("attn_add", 7)),
        ("value.7", Site("v", 7)),
        ("embeddings", Site("embed")),
        (Site("z", 1), Site("z", 1)),
    ],
)
def test_a_name_is_one_site(name: str | Site, site: Site) -> None:
    assert tl.sites.parse(name) == site


def test_every_meaning_is_a_site_and_comes_back_from_its_name() -> None:
    for scheme in SCHEMES.values():
        for scope, table in ((True, scheme.of_layers), (False, scheme.of_model)):
            for name, meaning in table.items():
                full = scheme.layer.format(name=name, layer=4) if scope else name
                if isinstance(meaning, NoSite):
                    for near in meaning.near:
                        assert near == "head_out" or near.rpartition(".")[2] in KIND
                    with pytest.raises(AmbiguousSiteError):
                        tl.sites.parse(full)
                elif isinstance(meaning, ByMlp):
                    assert {meaning.gated, meaning.plain} <= KIND.keys()
                else:
                    assert (KIND[meaning].scope is Scope.LAYER) == scope, name
                    found = tl.sites.parse(full)
                    assert found == Site(meaning, 4 if scope else None)
                    assert full in tl.sites.names(found)[scheme.name]


def test_no_two_libraries_mean_different_sites_by_one_name() -> None:
    meant: dict[str, Any] = {name: Site(name) for name in KIND if KIND[name].scope is not Scope.LAYER}
    for scheme in SCHEMES.values():
        for name, meaning in scheme.of_model.items():
            if isinstance(meaning, str):
                assert meant.setdefault(name, Site(meaning)) == Site(meaning)


@pytest.mark.parametrize(
    ("name", "kind", "says"),
    [
        ("resid_post", AmbiguousSiteError, "a site of every layer"),
        ("layers[-1].z", AmbiguousSiteError, "without a model"),
        ("blocks.1.hook_mlp_in", AmbiguousSiteError, "'layers.1.resid_mid', 'layers.1.mlp_in'"),
        ("blocks.1.ln2.hook_normalized", AmbiguousSiteError, "before its gain"),
        ("blocks.1.mlp.hook_expert_weights", AmbiguousSiteError, "the chances of all experts"),
        ("blocks.1.mlp.in.hook_out", AmbiguousSiteError, "where the MLP is gated"),
        ("blocks.1.hook_resid_pst", UnknownSiteError, "'blocks.1.hook_resid_post'"),
        ("model.layers.1.mlp.output", UnknownSiteError, "did you mean"),
        ("", UnknownSiteError, "no library"),
        (3, UnknownSiteError, "named by a text"),
    ],
)
def test_what_is_refused(name: Any, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=re.escape(says)) as caught:
        tl.sites.parse(name)
    assert type(caught.value) is kind
    assert "test_names.py" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "kind", "says"),
    [
        ("blocks.3.hook_resid_post", LayerRangeError, "3 layers"),
        ("hook_pos_embed", AbsentSiteError, "pos_embed"),
        ("blocks.1.ln1_post.hook_out", AbsentSiteError, "attn_post_norm"),
        ("model.layers.1.mlp", AmbiguousSiteError, "'model.layers.1.mlp.input' (layers.1.mlp_in)"),
        ("model.rotary_emb.input", AmbiguousSiteError, "no named site"),
    ],
)
def test_what_a_model_refuses(model: tl.Model, name: str, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=re.escape(says)):
        tl.sites.parse(name, model)


def test_what_a_model_knows(model: tl.Model) -> None:
    assert tl.sites.parse("layers[-1].z", model) == Site("z", 2)
    assert tl.sites.parse("model.norm.output", model) == Site("final_norm")
    assert tl.sites.parse("path.model.layers.1.mlp.input", model) == Site("mlp_in", 1)
    assert tl.sites.parse("blocks.1.mlp.in.hook_out", model) == Site("mlp_up", 1)
    gpt2 = tl.wrap(FAMILIES["gpt2"].build())
    assert tl.sites.parse("blocks.1.mlp.in.hook_out", gpt2) == Site("mlp_pre", 1)


@pytest.mark.parametrize("name", ["blocks.1.hook_resid_post", "layers_output[1]", "model.layers.1.output"])
def test_reading_and_writing_by_name(model: tl.Model, name: str) -> None:
    with model.trace(IDS):
        named = model[name].save()
        own = model.layers[1].resid_post.save()
        plain = model.logits.save()
    torch.testing.assert_close(named.value, own.value, rtol=0, atol=0)
    with model.trace(IDS):
        model[name] += 1.0
        changed = model.logits.save()
    with model.trace(IDS):
        model.layers[1].resid_post += 1.0
        wanted = model.logits.save()
    assert not torch.allclose(plain.value, wanted.value, atol=1e-2)
    torch.testing.assert_close(changed.value, wanted.value, rtol=0, atol=0)
    with model.trace(IDS):
        model["blocks.0.attn.hook_z"][:, :, 2] = 0
        model.layers[2].resid_post.save("x")
    with pytest.raises(NoTraceError):
        model[name]
