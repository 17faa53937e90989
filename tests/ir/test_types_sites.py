"""Types and sites: how they are written, and the order of the forward pass."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.ir.forms import SITES, TYPES
from tests.support.batches import SINGLE, random_batch
from tests.support.families import FAMILIES
from tests.support.hand_forward import hand_forward, hand_sites
from tracelens.backends.architectures.lookup import family_of
from tracelens.ir.dims import B, P
from tracelens.ir.sites import (
    CANONICAL,
    GLOBAL_KINDS,
    KIND,
    KINDS,
    LAYER_KINDS,
    TEXT_KINDS,
    Effect,
    Scope,
    Site,
    near,
    parse_site,
    rows_of,
)  # fmt: skip
from tracelens.ir.types import DTYPE_BY_SHORT, DType, TensorType, parse_type


@given(TYPES)
def test_a_type_reads_back(type_):
    assert parse_type(str(type_)) == type_


def test_types_know_their_axes_and_their_bytes():
    type_ = TensorType(DType.BFLOAT16, (B, P, 4, P))
    assert str(type_) == "bf16[B,P,4,P]"
    assert (type_.ndim, type_.batch_axis, type_.position_axes) == (4, 0, (1, 3))
    assert type_.symbols == {"B", "P"}
    assert type_.sizes({"B": 2, "P": 3}) == (2, 3, 4, 3)
    assert type_.nbytes({"B": 2, "P": 3}) == 2 * 72
    assert parse_type("f32[]") == TensorType(DType.FLOAT32, ())
    assert TensorType(DType.FLOAT32, (4,)).batch_axis is None


@pytest.mark.parametrize("dtype", DType)
def test_dtypes_are_those_of_torch(dtype):
    theirs = getattr(torch, dtype.value)
    assert dtype.itemsize == theirs.itemsize
    assert dtype.is_floating == theirs.is_floating_point
    assert dtype.is_complex == theirs.is_complex
    assert DTYPE_BY_SHORT[dtype.short] is dtype


@pytest.mark.parametrize(
    "other", ["", "f32", "f32[", "f32[B", "f33[B]", "[B]", "f32[B,]", "f32[B]]", "float32[B]"]
)
def test_what_is_no_type_is_refused(other):
    with pytest.raises(ValueError, match=r"not a (type|size)"):
        parse_type(other)


@given(SITES)
def test_a_site_reads_back(site):
    assert parse_site(site.text) == site.always
    assert site.always.during(site.steps) == site


@pytest.mark.parametrize(
    "other",
    ["", "resid_post", "layers.3", "layers.3.logits", "layers.x.resid_post", "logits.3", "step.1", "post_ln"],
)
def test_what_is_no_site_is_refused(other):
    with pytest.raises(ValueError, match=r"not a site|invalid literal"):
        parse_site(other)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma3"])
def test_the_order_of_sites_is_the_order_of_the_forward_pass(family):
    """As the forward pass by hand reaches them, which was written without looking."""
    hf = FAMILIES[family].build()
    reached: list[Site] = []

    def intercept(site: Site, tensor: torch.Tensor) -> torch.Tensor:
        reached.append(site)
        return tensor

    with torch.no_grad():
        hand_forward(hf, *random_batch(SINGLE), intercept)
    assert reached == hand_sites(hf)
    rows = rows_of(family_of(hf.config).reached)
    reached = [replace(site, row=rows.get(site.name)) for site in reached]
    for earlier, later in pairwise(reached):
        assert earlier.sequence < later.sequence
        assert earlier.precedes(later) or earlier.order == later.order
        assert not later.precedes(earlier)


def test_what_one_site_feeds_comes_later():
    def before(one: str, other: str) -> bool:
        return parse_site(one).precedes(parse_site(other))

    assert before("embed", "layers.0.resid_pre")
    assert before("layers.0.attn_out", "layers.0.attn_add")
    assert before("layers.0.mlp_norm", "layers.0.mlp_in")
    assert before("layers.0.resid_post", "layers.1.resid_pre")
    assert before("layers.9.resid_post", "final_norm")
    assert before("lm_head", "logits")
    # The two branches of a gated MLP are there at the same moment.
    assert not before("layers.0.mlp_pre", "layers.0.mlp_up")
    assert not before("layers.0.mlp_up", "layers.0.mlp_pre")


@given(st.lists(SITES, min_size=2, max_size=8))
def test_the_sequence_refines_the_order(sites):
    for one in sites:
        for other in sites:
            if one.precedes(other):
                assert one.sequence < other.sequence
            if one.sequence == other.sequence:
                assert one.always == other.always


def test_the_vocabulary_is_sound():
    assert len(KIND) == len(KINDS)
    assert set(LAYER_KINDS) | set(GLOBAL_KINDS) | set(TEXT_KINDS) == set(KINDS)
    assert CANONICAL["post_ln"] == "mlp_norm"
    assert CANONICAL["pre_ln"] == "attn_norm"
    assert all(CANONICAL[kind.name] == kind.name for kind in KINDS)
    assert {kind.name for kind in KINDS if kind.effect is Effect.NONE} == {
        "token_mask",
        "token_ids",
        "positions",
        "next_tokens",
    }
    assert {kind.name for kind in LAYER_KINDS if kind.effect is Effect.STREAM} == {
        "resid_pre",
        "resid_mid",
        "resid_post",
    }
    for scope in Scope:
        levels = [kind.level for kind in KINDS if kind.scope is scope]
        assert levels == sorted(levels)


def test_misspelled_sites_are_recognised():
    assert near("resid_pots", tuple(KIND))[0] == "resid_post"
    assert near("xyz", tuple(KIND)) == ()
