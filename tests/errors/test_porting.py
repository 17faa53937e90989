"""Names of other libraries: each is refused with what it is called here, and that is there."""

from __future__ import annotations

import re

import pytest

from tests.errors import GPT2, IDS, LLAMA, refused
from tracelens.errors import UnknownSiteError
from tracelens.ir.sites import CANONICAL, GLOBAL_KINDS
from tracelens.other_names import TRANSFORMER_LENS
from tracelens.porting import ON_A_LAYER, ON_THE_MODEL, elsewhere_called
from tracelens.sites import parse

model = LLAMA.model


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model", "model.hf.model"),
        ("transformer", "model.hf.transformer"),
        ("blocks", "model.layers[i].resid_post"),
        ("run_with_cache", "with model.trace(prompt)"),
        ("hook_resid_post", "model.layers[i].resid_post"),
        ("hook_mlp_out", "model.layers[i].mlp_add"),
        ("W_U", "model.unembed"),
    ],
)
def test_names_on_the_model(name: str, said: str) -> None:
    with refused(UnknownSiteError, repr(name), instead=said), model.trace(IDS):
        getattr(model, name)  # <-


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("output", "model.layers[1].resid_post"),
        ("save", "model.layers[1].resid_post.save()"),
        ("hook_resid_post", "model.layers[1].resid_post"),
        ("hook_attn_out", "model.layers[1].attn_add"),
        ("hook_mlp_out", "model.layers[1].mlp_add"),
        ("hook_pre", "model.layers[1].mlp_pre"),
        ("hook_post", "model.layers[1].mlp_act"),
        ("hook_z", "model.layers[1].z"),
        ("hook_q_input", "model.layers[1].resid_pre or model.layers[1].attn_in, which are other tensors"),
        ("self_attn", "model.layers[1].attn_out"),
        ("mlp", "model.layers[1].mlp_out"),
        ("hook_expert_weights", "model.layers[1].router_logits.softmax(-1)"),
        ("hook_expert_indices", "model.layers[1].expert_index"),
        ("router", "model.layers[1].router_logits"),
        ("experts", "model.layers[1].expert(i).out"),
    ],
)
def test_names_on_a_layer(name: str, said: str) -> None:
    with refused(UnknownSiteError, repr(name), instead=said), model.trace(IDS):
        getattr(model.layers[1], name)  # <-
    with refused(UnknownSiteError, instead=said.replace("[1]", "[0:2]")), model.trace(IDS):
        getattr(model.layers[0:2], name)  # <-


def test_hooks_mean_what_they_mean_as_names_of_sites() -> None:
    """One table, whose names were compared number by number."""
    for name, meaning in TRANSFORMER_LENS.of_layers.items():
        if name.startswith("hook_") and isinstance(meaning, str):
            assert str(parse(f"blocks.5.{name}")) == f"layers.5.{meaning}"
            assert elsewhere_called(name, "model.layers[5]") == f"model.layers[5].{meaning}"


def test_the_table_names_what_there_is() -> None:
    for hint in ON_A_LAYER.values():
        sites: list[str] = re.findall(r"(?:\{owner\}|or )\.(\w+)", hint)
        assert sites
        assert set(sites) <= CANONICAL.keys() | {"head", "expert"}
    known = {kind.name for kind in GLOBAL_KINDS} | set(dir(model))
    for name, hint in ON_THE_MODEL.items():
        assert name not in known, f"model.{name} is there"
        used = re.findall(r"\bmodel\.(\w+)", hint)
        assert used
        assert set(used) <= known, hint
    assert not ON_A_LAYER.keys() & set(dir(GPT2.model.layers[0]))
