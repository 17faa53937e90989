"""``tl.grad`` against autograd on plain transformers: every site of every family, versions, batches, early stops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import tracelens as tl
from tests.properties.drawn import traceable_sites
from tests.support.batches import EVEN, RAGGED, batch, random_rows
from tests.support.families import D_MODEL, EVERY, FAMILIES, LAYERS, VOCABULARY
from tests.support.plain import can_edit, edited_at, plain_logits, untouched
from tracelens.ir.sites import Site

ROWS, RAGGED_ROWS = random_rows(EVEN), random_rows(RAGGED)
WEIGHTS = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(3))
DIRECTION = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(4))
MODELS = {name: tl.wrap(family.build()) for name, family in FAMILIES.items()}
LLAMA = MODELS["llama"]


def site_value(model: tl.Model, site: Site) -> tl.Value:
    return getattr(model if site.layer is None else model.layers[site.layer], site.name)


def last_loss(logits: Any) -> Any:
    return (logits[:, -1] * WEIGHTS.to(logits.dtype)).sum()


def plain_gradients(
    hf: Any, rows: list[list[int]], sites: list[Site], loss: Callable[[Tensor], Tensor] = last_loss
) -> list[Tensor]:
    """By autograd on transformers: each site's tensor becomes one of its own, from which the model goes on."""
    found: dict[Site, Tensor] = {}

    def apart(tensor: Tensor, site: Site) -> Tensor:
        found[site] = tensor.clone() if found else tensor.detach().requires_grad_()
        return found[site]

    with edited_at(hf, {site: lambda tensor, site=site: apart(tensor, site) for site in sites}):
        logits = plain_logits(hf, batch(rows))
    return list(torch.autograd.grad(loss(logits), [found[site] for site in sites]))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", EVERY)
def test_the_gradient_at_every_site_is_that_of_autograd_to_the_last_bit(name: str, attention: str) -> None:
    hf = EVERY[name].build(attn=attention)
    model = tl.wrap(hf)
    for site in (site for site in traceable_sites(hf) if can_edit(hf, site)):
        with untouched(hf), model.trace(ROWS) as t:
            tl.grad(last_loss(model.logits), site_value(model, site)).save("g")
        (wanted,) = plain_gradients(hf, ROWS, [site])
        assert wanted.abs().max() > 1e-4
        assert torch.equal(t["g"], wanted), site


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gradients_at_all_sites_come_from_one_backward_pass_in_any_order(name: str, attention: str) -> None:
    hf = FAMILIES[name].build(attn=attention)
    model = tl.wrap(hf)
    sites = [site for site in traceable_sites(hf) if can_edit(hf, site)]
    shuffled = [sites[i] for i in torch.randperm(len(sites), generator=torch.Generator().manual_seed(0))]
    with untouched(hf), model.trace(ROWS) as t:
        wrt = [site_value(model, site) for site in shuffled]
        for site, g in zip(shuffled, tl.grad(last_loss(model.logits), wrt), strict=True):
            g.save(str(site))
    for site, wanted in zip(sites, plain_gradients(hf, ROWS, sites), strict=True):
        torch.testing.assert_close(t[str(site)], wanted, rtol=1e-5, atol=1e-6)
        with model.trace(ROWS) as alone:
            tl.grad(last_loss(model.logits), site_value(model, site)).save("g")
        torch.testing.assert_close(t[str(site)], alone["g"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_in_bfloat16(name: str) -> None:
    hf = FAMILIES[name].build(dtype=torch.bfloat16, attn="eager")
    model = tl.wrap(hf)
    for site in traceable_sites(hf):
        with untouched(hf), model.trace(ROWS) as t:
            tl.grad(last_loss(model.logits), site_value(model, site)).save("g")
        (wanted,) = plain_gradients(hf, ROWS, [site])
        assert t["g"].dtype is torch.bfloat16
        assert torch.equal(t["g"], wanted), site


@pytest.mark.parametrize("name", FAMILIES)
def test_of_prompts_of_different_lengths_each_row_has_the_gradient_that_it_has_alone(name: str) -> None:
    model = MODELS[name]
    with model.trace(RAGGED_ROWS) as t:
        tl.grad(last_loss(model.logits), model.layers[1].resid_mid).save("g")
    for row, found in zip(RAGGED_ROWS, t["g"], strict=True):
        assert found.shape == (1, len(row), D_MODEL)
        with model.trace([row]) as alone:
            tl.grad(last_loss(model.logits), model.layers[1].resid_mid).save("g")
        torch.testing.assert_close(found, alone["g"], rtol=1e-4, atol=1e-5)
        (wanted,) = plain_gradients(model.hf, [row], [Site("resid_mid", 1)])
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


# --- versions --------------------------------------------------------------------------------------------------------


def test_the_derivative_is_at_the_version_that_was_read() -> None:
    """Twice the stream goes on: before the write its gradient is twice that after it."""
    with LLAMA.trace(ROWS) as t:
        before = LLAMA.layers[0].resid_post
        LLAMA.layers[0].resid_post *= 2.0
        after = LLAMA.layers[0].resid_post
        LLAMA.layers[0].resid_post += 1.0
        at_last = LLAMA.layers[0].resid_post
        g = tl.grad(last_loss(LLAMA.logits), [at_last, before, after])
        for name, value in zip(("last", "before", "after"), g, strict=True):
            value.save(name)
    assert torch.equal(t["before"], 2 * t["after"])
    assert torch.equal(t["last"], t["after"])
    assert t["last"].abs().max() > 1e-3


def test_a_value_is_not_the_site_that_it_was_written_to() -> None:
    """The written value has a use of its own, which is none of the site's."""
    with LLAMA.trace(ROWS) as t:
        h = LLAMA.layers[0].resid_post
        new = h * 3.0
        LLAMA.layers[0].resid_post = new
        written = LLAMA.layers[0].resid_post
        loss = new.sum() + (5 * written).sum()
        a, b = tl.grad(loss, (h, written))
        a.save("h")
        b.save("written")
    assert torch.equal(t["written"], torch.full_like(t["written"], 5.0))
    assert torch.equal(t["h"], torch.full_like(t["h"], 3.0 + 15.0))


def test_a_site_written_back_is_another_version() -> None:
    with LLAMA.trace(ROWS) as t:
        h = LLAMA.layers[0].resid_post
        LLAMA.layers[0].resid_post = h
        again = LLAMA.layers[0].resid_post
        a, b = tl.grad((2 * h).sum() + (7 * again).sum(), [h, again])
        a.save("first")
        b.save("second")
    assert torch.equal(t["first"], torch.full_like(t["first"], 9.0))
    assert torch.equal(t["second"], torch.full_like(t["second"], 7.0))


def test_two_names_of_one_tensor_are_two_sites() -> None:
    """What the block returns is what the next one receives, and only the first was used by the loss itself."""
    with LLAMA.trace(ROWS) as t:
        post, pre = LLAMA.layers[0].resid_post, LLAMA.layers[1].resid_pre
        a, b = tl.grad((post * DIRECTION).sum() + last_loss(LLAMA.logits), [post, pre])
        a.save("post")
        b.save("pre")
        tl.grad(last_loss(LLAMA.logits), post).save("alone")
    torch.testing.assert_close(t["post"] - t["pre"], DIRECTION.expand(3, 7, D_MODEL), rtol=1e-5, atol=1e-5)
    assert torch.equal(t["pre"], t["alone"])


def test_a_write_between_a_site_and_the_loss_is_differentiated() -> None:
    with LLAMA.trace(ROWS) as t:
        h = LLAMA.layers[0].resid_post
        LLAMA.layers[1].resid_mid[:, -1] = h[:, 0] * DIRECTION
        tl.grad((LLAMA.layers[1].resid_mid * DIRECTION).sum(), h).save("g")
        LLAMA.layers[1].resid_mid.save("mid")
    # At the last position only the write leads to the loss, and it comes from position 0.
    with LLAMA.trace(ROWS) as plain:
        h = LLAMA.layers[0].resid_post
        mid = LLAMA.layers[1].resid_mid
        tl.grad((mid[:, :-1] * DIRECTION).sum() + (h[:, 0] * DIRECTION * DIRECTION).sum(), h).save("g")
    torch.testing.assert_close(t["g"], plain["g"], rtol=1e-5, atol=1e-6)


def test_a_written_site_has_its_gradient_beyond_the_write_only() -> None:
    with LLAMA.trace(ROWS) as t:
        LLAMA.layers[1].attn_out = 0.0
        g = tl.grad(last_loss(LLAMA.logits), [LLAMA.layers[1].attn_out, LLAMA.layers[1].resid_pre])
        g[0].save("attn_out")
        g[1].save("resid_pre")
    assert torch.equal(t["attn_out"], t["resid_pre"])  # nothing but the sum is left between the two


# --- what may be asked -----------------------------------------------------------------------------------------------


def test_mapped_sites_have_mapped_gradients() -> None:
    with LLAMA.trace(ROWS) as t:
        streams, embed = LLAMA.layers[:].resid_post, LLAMA.embed
        loss = last_loss(LLAMA.logits)
        gradients, at_embed = tl.grad(loss, (streams, embed))
        assert isinstance(gradients, tl.MappedValue)
        assert gradients.shape == (3, 7, D_MODEL)
        (gradients * streams).sum(-1).save("products")
        gradients.save("all")
        at_embed.save("embed")
        loss.save("loss")
    assert t["all"].shape == (LAYERS, 3, 7, D_MODEL)
    sites = [Site("resid_post", layer) for layer in range(LAYERS)]
    for layer, wanted in enumerate(plain_gradients(LLAMA.hf, ROWS, sites)):
        torch.testing.assert_close(t["all"][layer], wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(t["embed"], plain_gradients(LLAMA.hf, ROWS, [Site("embed")])[0])
    entry = t.results.entries["all"]
    assert (entry.described, entry.layers) == ("gradient at layers[0:3].resid_post", (0, 1, 2))
    assert entry.axes == ("layer", "row", "position", "3")


def test_what_goes_in_comes_out() -> None:
    with LLAMA.trace(ROWS):
        h, loss = LLAMA.layers[0].resid_post, last_loss(LLAMA.logits)
        assert isinstance(tl.grad(loss, h), tl.Value)
        assert isinstance(tl.grad(loss, [h]), list)
        assert isinstance(tl.grad(loss, (h,)), tuple)
        assert tl.grad(loss, h).shape == h.shape
        assert tl.grad(loss, h).dtype == h.dtype


def test_a_site_may_be_named_twice() -> None:
    with LLAMA.trace(ROWS) as t:
        h = LLAMA.layers[0].resid_post
        a, b = tl.grad(last_loss(LLAMA.logits), [h, LLAMA.layers[0].resid_post])
        a.save("a")
        b.save("b")
    assert torch.equal(t["a"], t["b"])


def test_several_losses_in_one_block() -> None:
    with LLAMA.trace(ROWS) as t:
        h = LLAMA.layers[0].resid_post
        early = (LLAMA.layers[1].mlp_out * DIRECTION).sum()
        for name, loss in (("late", last_loss(LLAMA.logits)), ("early", early)):
            tl.grad(loss, h).save(name)
        tl.grad(early + last_loss(LLAMA.logits), h).save("both")
    torch.testing.assert_close(t["both"], t["early"] + t["late"], rtol=1e-4, atol=1e-5)
    assert not torch.equal(t["early"], t["late"])


def test_a_closed_form() -> None:
    """The logits are linear in what the head reads."""
    unembed = LLAMA.hf.lm_head.weight.detach()
    with LLAMA.trace(ROWS) as t:
        tl.grad((LLAMA.logits * WEIGHTS).sum(), LLAMA.final_norm).save("g")
        tl.grad((LLAMA.logits * WEIGHTS).sum(), LLAMA.logits).save("w")
        h = LLAMA.layers[0].resid_pre
        tl.grad((h * h * DIRECTION).sum(), h).save("square")
        h.save("h")
    torch.testing.assert_close(t["g"], (WEIGHTS @ unembed).expand(3, 7, -1), rtol=1e-5, atol=1e-5)
    assert torch.equal(t["w"], WEIGHTS.expand(3, 7, -1))
    torch.testing.assert_close(t["square"], 2 * t["h"] * DIRECTION, rtol=1e-6, atol=1e-6)


def test_gradients_are_computed_on_like_values() -> None:
    with LLAMA.trace(ROWS) as t:
        h = LLAMA.layers[1].resid_post
        g = tl.grad(last_loss(LLAMA.logits), h)
        g.save("g")
        h.save("h")
        (g * h)[:, -1].sum(-1).save("product")
        torch.topk(g.norm(dim=-1), 2).indices.save("top")
        g.tok[-1].save("last")
    assert torch.equal(t["product"], (t["g"] * t["h"])[:, -1].sum(-1))
    assert torch.equal(t["top"], torch.topk(t["g"].norm(dim=-1), 2).indices)
    assert torch.equal(t["last"], t["g"][:, -1])


def test_a_detached_gradient_is_a_constant_of_the_next_loss() -> None:
    with LLAMA.trace(ROWS) as t:
        h = LLAMA.layers[1].resid_post
        g = tl.grad(last_loss(LLAMA.logits), h)
        tl.grad((g.detach() * h).sum(), h).save("again")
        g.save("g")
    assert torch.equal(t["again"], t["g"])


def test_the_users_own_functions_and_modules_are_differentiated() -> None:
    probe = torch.nn.Linear(D_MODEL, 1)
    with LLAMA.trace(ROWS) as t:
        h = LLAMA.layers[1].resid_post
        tl.grad(probe(h).sum(), h).save("probe")
        tl.grad(tl.apply(lambda x: x**3, h).sum(), h).save("cube")
        h.save("h")
    assert torch.equal(t["probe"], probe.weight.detach().expand(3, 7, -1))
    torch.testing.assert_close(t["cube"], 3 * t["h"] ** 2, rtol=1e-5, atol=1e-6)
    assert probe.weight.grad is None


def test_programs_take_gradients_on_any_prompt() -> None:
    with LLAMA.record() as r:
        tl.grad(last_loss(LLAMA.logits), LLAMA.layers[1].mlp_act).save("g")
    program = LLAMA.compile(tl.Graph.from_json(r.graph.to_json(), constants=r.graph.constants_bytes()))
    for rows in (ROWS, [ROWS[0]], [[5, 6, 7]]):
        (wanted,) = plain_gradients(LLAMA.hf, rows, [Site("mlp_act", 1)])
        assert torch.equal(program(rows)["g"], wanted)


def test_the_forward_pass_still_stops_early() -> None:
    entered: list[int] = []
    handles = [
        layer.register_forward_pre_hook(lambda module, args, i=i: entered.append(i))
        for i, layer in enumerate(LLAMA.hf.model.layers)
    ]
    try:
        with LLAMA.trace(ROWS) as t:
            h = LLAMA.layers[0].resid_post
            tl.grad(LLAMA.layers[1].mlp_out.sum(), h).save("g")
    finally:
        for handle in handles:
            handle.remove()
    assert entered == [0, 1]
    plan = t.plan().plan
    assert plan.stop == Site("mlp_out", 1)
    assert plan.differentiated == {Site("resid_post", 0)}
    assert "one backward pass" in t.explain()
    assert "writes" not in plan.text()
