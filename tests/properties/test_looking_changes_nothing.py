"""Looking does not change what is looked at: promise 5 of the design."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

import tracelens as tl
from tests.properties.drawn import programs, traceable_sites
from tests.properties.plain_language import unpadded
from tests.properties.programs import Change, ChangeLayers, perform, site_text
from tests.support.batches import EVEN, RAGGED, SINGLE, batch, random_rows
from tests.support.families import EVERY
from tests.support.plain import plain_logits, untouched

ROWS = {"single": random_rows(SINGLE), "even": random_rows(EVEN), "ragged": random_rows(RAGGED)}
FAMILIES = ("llama", "gpt2", "qwen3", "mistral_sliding", "llama_tied")
HF = {name: EVERY[name].build() for name in FAMILIES}
EAGER = {name: EVERY[name].build(attn="eager") for name in FAMILIES}
MODELS = {name: tl.wrap(hf) for name, hf in HF.items()}
SOME = settings(max_examples=settings().max_examples // 3)


def assert_plain(saved: object, hf: PreTrainedModel, rows: str) -> None:
    with torch.no_grad():
        wanted = unpadded(plain_logits(hf, batch(ROWS[rows])), batch(ROWS[rows]))
    if rows == "ragged":
        assert all(map(torch.equal, saved, wanted))
        assert len(saved) == len(wanted)
    else:
        assert torch.equal(saved, plain_logits(hf, batch(ROWS[rows])))


@pytest.mark.parametrize("name", FAMILIES)
@SOME
@given(data=st.data(), rows=st.sampled_from(list(ROWS)))
def test_a_block_without_writes_leaves_the_logits_bit_identical(name, data, rows):
    program = data.draw(programs(traceable_sites(HF[name]), aligned=rows != "ragged"))
    looking = tuple(statement for statement in program if not isinstance(statement, Change | ChangeLayers))
    with untouched(HF[name]), MODELS[name].trace(ROWS[rows]) as trace:
        perform(looking, MODELS[name])
    assert_plain(trace["logits"], HF[name], rows)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
@SOME
@given(data=st.data(), rows=st.sampled_from(list(ROWS)))
def test_writing_back_what_was_read_is_exact(name, attn, data, rows):
    hf = HF[name] if attn == "sdpa" else EAGER[name]
    model = MODELS[name] if attn == "sdpa" else tl.wrap(hf)
    # sdpa never holds scores and pattern: a write to them replaces it by a kernel that rounds otherwise.
    kernels = ("scores", "pattern")
    writable = [site for site in traceable_sites(hf) if attn == "eager" or site.name not in kernels]
    sites = data.draw(st.lists(st.sampled_from(writable), min_size=1, max_size=8))
    spellings = [
        "SITE = SITE",
        "SITE[:, -1] = SITE[:, -1]",
        "SITE[..., :5] = SITE[..., :5]",
        "SITE.tok[0] = SITE.tok[0]",
    ]
    lines: list[str] = []
    for site in sites:
        fitting = [spelling for spelling in spellings if site.name not in kernels or "..." not in spelling]
        lines.append(data.draw(st.sampled_from(fitting)).replace("SITE", site_text(site)))
    with model.trace(ROWS[rows]) as trace:
        exec("\n".join(lines), {"model": model})
        model.logits.save("logits")
    assert_plain(trace["logits"], hf, rows)


@pytest.mark.parametrize("name", FAMILIES)
def test_all_sites_saved_at_once_are_what_they_were_and_change_nothing(name):
    model = MODELS[name]
    sites = traceable_sites(HF[name])
    with model.trace(ROWS["even"]) as trace:
        for site in sites:
            owner = model if site.layer is None else model.layers[site.layer]
            getattr(owner, site.name).save(str(site))
    assert_plain(trace["logits"], HF[name], "even")
    assert list(trace.results) == [str(site) for site in sites]
    for layer in range(2):
        assert torch.equal(trace[f"layers.{layer}.resid_post"], trace[f"layers.{layer + 1}.resid_pre"])
        assert torch.equal(trace[f"layers.{layer}.attn_norm"], trace[f"layers.{layer}.attn_in"])
