"""A write that changes nothing changes nothing: of every family, at every site, to the last bit."""

from __future__ import annotations

import pytest
import torch

import tracelens as tl
from tests.conformance.test_reads import expected_rows, looks, read, real_rows
from tests.support.batches import RAGGED, batch, random_rows
from tests.support.more_families import ALL, EAGER_ALONE
from tests.support.plain import plain_logits, untouched
from tracelens.ir.sites import KINDS, TEXT, Effect, Scope, Site

ROWS = random_rows(RAGGED)
PROMPT = batch(ROWS)


def written(model: tl.Model) -> list[Site]:
    """Every site of the model that a float can be written to."""
    return [
        site
        for kind in KINDS
        if kind.scope not in TEXT and kind.effect is not Effect.NONE and kind.dtype is None
        for layer in (range(model.n_layers) if kind.scope is Scope.LAYER else (None,))
        if model.anatomy.has(site := Site(kind.name, layer))
    ]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ALL)
def test_a_write_of_what_is_there_changes_no_bit(family: str, attn: str) -> None:
    if attn == "sdpa" and family in EAGER_ALONE:
        attn = "eager"
    hf = ALL[family].build(attn=attn)
    model = tl.wrap(hf)
    with torch.no_grad():
        plain = plain_logits(hf, PROMPT)
    expected = expected_rows(plain, PROMPT)
    sites = written(model)
    assert len(sites) > 20
    for site in sites:
        here = model if site.layer is None else model.layers[site.layer]
        with model.trace(ROWS):
            setattr(here, site.name, read(model, site) * 1.0)
            logits = model.logits.save()
        for one, other in zip(real_rows(logits.value, PROMPT), expected, strict=True):
            if looks(site) and attn == "sdpa":
                # Where a pattern is written, values are mixed with it, and not by a kernel that never builds one.
                torch.testing.assert_close(
                    one, other, atol=2e-5, rtol=2e-5, msg=lambda text, s=site: f"{s}: {text}"
                )
            else:
                assert torch.equal(one, other), str(site)
    with untouched(hf), model.trace(ROWS):
        model.layers[0].mlp_add *= 1.5
        logits = model.logits.save()
    differences = [
        (one - other).abs().max().item()
        for one, other in zip(real_rows(logits.value, PROMPT), expected, strict=True)
    ]
    assert max(differences) > 1e-3  # a factor is no small thing in these models
