"""Every site of every family, read by a trace, equals the oracle."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import tracelens as tl
from tests.support.batches import RAGGED, SINGLE, Batch, batch, random_rows
from tests.support.families import EVERY, FAMILIES, LAYERS
from tests.support.hand_forward import hand_forward, hand_sites
from tests.support.plain import plain_logits, untouched
from tracelens.errors import AbsentSiteError
from tracelens.ir.sites import Site

PROMPTS = {"single": random_rows(SINGLE), "ragged": random_rows(RAGGED)}

every_family = pytest.mark.parametrize("family", EVERY)
every_prompt = pytest.mark.parametrize("rows", PROMPTS.values(), ids=PROMPTS)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def read(model, site: Site):
    return getattr(model if site.layer is None else model.layers[site.layer], site.name)


def real_rows(value: object, prompt: Batch, site: Site | None = None) -> list[Tensor]:
    """What was saved, as one tensor [P_i, width] for each prompt ([H, P_i, P_i] for scores and pattern)."""
    if isinstance(value, Tensor):
        return expected_rows(value, prompt, site)
    axis = 2 if looks(site) else 1
    assert [part.shape[axis] for part in value] == prompt.lengths
    assert all(part.shape[0] == 1 for part in value)
    return [part[0] for part in value]


def expected_rows(tensor: Tensor, prompt: Batch, site: Site | None = None) -> list[Tensor]:
    if looks(site):
        return [tensor[row][:, mask][:, :, mask] for row, mask in enumerate(prompt.mask)]
    return [tensor[row][mask] for row, mask in enumerate(prompt.mask)]


def looks(site: Site | None) -> bool:
    """Is it a site [B, H, P, S], which says where queries look?"""
    return site is not None and site.name in ("scores", "pattern")


@every_family
@every_prompt
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_all_sites_at_once(family: str, rows: list[list[int]], attn: str) -> None:
    hf, prompt = EVERY[family].build(attn=attn), batch(rows)
    model = tl.wrap(hf)
    expected: dict[Site, Tensor] = {}
    with torch.no_grad():
        hand_forward(hf, *prompt, lambda site, tensor: expected.setdefault(site, tensor))
        plain = plain_logits(hf, prompt)
    sites = hand_sites(hf)[1:]
    with untouched(hf):
        with model.trace(rows) as t:
            saved = {site: read(model, site).save(str(site)) for site in sites}
        for site in sites:
            for actual, tensor in zip(
                real_rows(saved[site].value, prompt, site),
                expected_rows(expected[site], prompt, site),
                strict=True,
            ):
                close(actual, tensor)
            assert t[str(site)] is not None
        # Reading changes nothing, to the last bit.
        for actual, tensor in zip(
            real_rows(saved[Site("logits")].value, prompt), expected_rows(plain, prompt), strict=True
        ):
            assert torch.equal(actual, tensor)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_site_alone(family: str) -> None:
    """A trace that reads one site only: nothing else of the trace may be what makes it right."""
    hf, rows = FAMILIES[family].build(), PROMPTS["ragged"]
    model, prompt = tl.wrap(hf), batch(rows)
    expected: dict[Site, Tensor] = {}
    with torch.no_grad():
        hand_forward(hf, *prompt, lambda site, tensor: expected.setdefault(site, tensor))
    for site in hand_sites(hf)[1:]:
        with untouched(hf), model.trace(rows):
            saved = (read(model, site) if looks(site) else read(model, site)[:, -1]).save()
        if not looks(site):
            close(saved.value, expected[site][:, -1])
            continue
        wanted = expected_rows(expected[site], prompt, site)
        for actual, tensor in zip(real_rows(saved.value, prompt, site), wanted, strict=True):
            close(actual, tensor)


@pytest.mark.parametrize("family", FAMILIES)
def test_mapped_reads_are_stacked_in_the_order_asked(family: str) -> None:
    hf, rows = FAMILIES[family].build(), PROMPTS["single"]
    model, prompt = tl.wrap(hf), batch(rows)
    expected: dict[Site, Tensor] = {}
    with torch.no_grad():
        hand_forward(hf, *prompt, lambda site, tensor: expected.setdefault(site, tensor))
    every_layer = {site.name for site in expected if site.layer == 0} & {
        site.name for site in expected if site.layer == LAYERS - 1
    }
    for name in sorted(every_layer):
        with model.trace(rows):
            whole = getattr(model.layers[:], name).save()
            chosen = getattr(model.layers[[2, 0]], name)[:, -1].save()
            last = getattr(model.layers[-1], name).save()
        close(whole.value, torch.stack([expected[Site(name, layer)] for layer in range(LAYERS)]))
        close(chosen.value, torch.stack([expected[Site(name, layer)][:, -1] for layer in (2, 0)]))
        close(last.value, expected[Site(name, LAYERS - 1)])


@pytest.mark.parametrize("family", FAMILIES)
def test_aliases_are_the_sites(family: str) -> None:
    model = tl.wrap(FAMILIES[family].build())
    with model.trace(PROMPTS["single"]):
        pairs = [
            (model.layers[1].pre_ln.save(), model.layers[1].attn_norm.save()),
            (model.layers[1].post_ln.save(), model.layers[1].mlp_norm.save()),
        ]
    for alias, site in pairs:
        assert torch.equal(alias.value, site.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_counted_without_the_padding(family: str) -> None:
    hf, rows = FAMILIES[family].build(), PROMPTS["ragged"]
    model, prompt = tl.wrap(hf), batch(rows)
    expected: dict[Site, Tensor] = {}
    with torch.no_grad():
        hand_forward(hf, *prompt, lambda site, tensor: expected.setdefault(site, tensor))
    real = expected_rows(expected[Site("resid_post", 1)], prompt)
    with model.trace(rows):
        h = model.layers[1].resid_post
        saved = [h.tok[2].save(), h.tok[-3].save(), h.tok[1:3].save(), h.tok[[0, -1]].save()]
    wanted = [
        torch.stack([row[2] for row in real]),
        torch.stack([row[-3] for row in real]),
        torch.stack([row[1:3] for row in real]),
        torch.stack([row[[0, -1]] for row in real]),
    ]
    for actual, tensor in zip(saved, wanted, strict=True):
        close(actual.value, tensor)


@every_family
def test_absent_sites_are_refused(family: str) -> None:
    model = tl.wrap(EVERY[family].build())
    absent = Site("mlp_up", 1) if family.startswith("gpt2") else Site("pos_embed")
    with pytest.raises(AbsentSiteError) as failure, model.trace(PROMPTS["single"]):
        read(model, absent).save()
    assert failure.value.at is not None
    assert failure.value.at.filename == __file__
