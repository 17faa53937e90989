"""Every site of the families in ``more_families``, read and written, in traces and in text that is generated.

What all families share (the language, spellings, the planner) is proven on the others; here it is the tables, one model
for each family and one run for many sites.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import tracelens as tl
from tests.conformance.blocks import edited_middle
from tests.conformance.spellings import SPELLINGS, Spelling
from tests.conformance.test_reads import expected_rows, looks, read, real_rows
from tests.support.batches import RAGGED, batch, random_rows
from tests.support.more_families import EAGER_ALONE, LAYERS, MORE
from tests.support.more_forwards import hand_forward
from tests.support.plain import plain_logits, untouched
from tracelens.backends.architectures import FAMILIES as TABLES
from tracelens.backends.base import RowsView, Side
from tracelens.errors import AbsentSiteError, PromptError, ReplacementError, UnknownArchitectureError
from tracelens.ir.sites import KINDS, TEXT, Effect, Scope, Site, rows_of

ROWS = random_rows(RAGGED)
PROMPT = batch(ROWS)
GRAD_MODES = (contextlib.nullcontext, torch.no_grad, torch.enable_grad, torch.inference_mode)
RAGGED_SPELLINGS = [spelling for spelling in SPELLINGS.values() if spelling.ragged]

every_family = pytest.mark.parametrize("family", MORE)


@cache
def built(family: str, attn: str = "") -> tuple[PreTrainedModel, tl.Model]:
    """One model for all tests, which leave it as it was; ``attn``: as the family's first where it is not said."""
    hf = MORE[family].build(attn=attn or ("eager" if family in EAGER_ALONE else "sdpa"))
    return hf, tl.wrap(hf)


@cache
def clean(family: str, attn: str = "") -> dict[Site, Tensor]:
    """Every site by hand, in the order of the forward pass."""
    hf, _ = built(family, attn)
    found: dict[Site, Tensor] = {}
    with torch.no_grad():
        hand_forward(hf, *PROMPT, lambda site, tensor: found.setdefault(site, tensor))
    return found


def kernels(family: str) -> tuple[str, ...]:
    return ("eager",) if family in EAGER_ALONE else ("sdpa", "eager")


def writable(family: str) -> list[Site]:
    return [site for site in clean(family) if site.kind.effect is not Effect.NONE and site.kind.dtype is None]


def same(actual: object, expected: Tensor, site: Site, atol: float = 2e-5) -> None:
    rows = zip(real_rows(actual, PROMPT, site), expected_rows(expected, PROMPT, site), strict=True)
    for one, other in rows:
        torch.testing.assert_close(one, other, atol=atol, rtol=2e-5, msg=lambda text: f"{site}: {text}")


# --- reading -----------------------------------------------------------------------------------------------------


def test_a_table_names_every_site_once() -> None:
    for table in TABLES:
        for kind in KINDS:
            if kind.scope not in TEXT:
                assert (kind.name in table.taps) != (kind.name in table.absent), (table.name, kind.name)


@every_family
def test_sites_are_reached_in_the_order_that_is_planned_with(family: str) -> None:
    """By hooks of its own at every module: a site that came earlier in truth would be missing, or too late."""
    hf, model = built(family)
    rows = rows_of(model.anatomy.family.reached)
    reached: list[Site] = []
    handles: list[Any] = []
    for site in clean(family):
        module, tap, _ = model.anatomy.tap(site)
        if tap.side is Side.IN:
            handles.append(module.register_forward_pre_hook(lambda *_, site=site: reached.append(site)))
        elif tap.side is Side.OUT:
            handles.append(module.register_forward_hook(lambda *_, site=site: reached.append(site)))
    plain_logits(hf, PROMPT)
    for handle in handles:
        handle.remove()
    # Sites of one hook point are there at once.
    planned = sorted(reached, key=lambda site: replace(site, row=rows.get(site.name)).sequence)
    assert [points(model, site) for site in reached] == [points(model, site) for site in planned]


def points(model: tl.Model, site: Site) -> tuple[str, str]:
    _, tap, path = model.anatomy.tap(site)
    return path, tap.side.value


@every_family
def test_every_site_is_read(family: str) -> None:
    """With both kernels, and rows as alone; the table has the sites that there are by hand, and no others."""
    for attn in kernels(family):
        hf, model = built(family, attn)
        expected = clean(family, attn)
        layers = {Scope.LAYER: range(LAYERS)}
        assert set(expected) == {
            site
            for kind in KINDS
            if kind.scope not in TEXT
            for site in (Site(kind.name, layer) for layer in layers.get(kind.scope, (None,)))
            if model.anatomy.has(site)
        }
        with torch.no_grad():
            plain = plain_logits(hf, PROMPT)
        with untouched(hf), model.trace(ROWS) as t:
            for site in expected:
                read(model, site).save(str(site))
        for site, tensor in expected.items():
            same(t[str(site)], tensor, site)
        for one, other in zip(real_rows(t["logits"], PROMPT), expected_rows(plain, PROMPT), strict=True):
            assert torch.equal(one, other)  # reading changes nothing, to the last bit
        with model.trace(ROWS[1:2]) as alone:
            for site in expected:
                read(model, site).save(str(site))
        for site, tensor in expected.items():
            own = expected_rows(tensor, PROMPT, site)[1]
            torch.testing.assert_close(alone[str(site)][0], own, atol=2e-5, rtol=2e-5)


@every_family
def test_one_site_alone_is_what_it_is_among_all(family: str) -> None:
    """The pass is left after it: nothing that comes later makes it right, and what is saved stays as it was."""
    _, model = built(family)
    for site, tensor in clean(family).items():
        if site.layer in (None, LAYERS - 1):
            with model.trace(ROWS):
                saved = read(model, site).save()
            same(saved.value, tensor, site)


@every_family
def test_in_bfloat16_sites_have_the_dtypes_that_are_said(family: str) -> None:
    hf = MORE[family].build(attn=kernels(family)[0], dtype=torch.bfloat16)
    model = tl.wrap(hf)
    sites = list(clean(family))
    with torch.no_grad():
        plain = plain_logits(hf, PROMPT)
    with model.trace(ROWS):
        saved = {site: read(model, site).save() for site in sites}
    for site, handle in saved.items():
        value: Any = handle.value
        dtype = value.dtype if isinstance(value, Tensor) else value[0].dtype
        assert str(dtype) == f"torch.{model.sites()[site.name].dtype}"
    for one, other in zip(
        real_rows(saved[Site("logits")].value, PROMPT), expected_rows(plain, PROMPT), strict=True
    ):
        assert torch.equal(one, other)


# --- writing -----------------------------------------------------------------------------------------------------


def vectors(family: str, site: Site) -> tuple[Tensor, Tensor]:
    """What is added and what is assigned: random vectors of the site's width, as large as what is there."""
    there = clean(family)[site]
    size = there[there.abs() < 1e30].std().item()
    width = 1 if looks(site) else there.shape[-1]
    generator = torch.Generator().manual_seed(17 + len(site.name))
    return 0.5 * size * torch.randn(width, generator=generator), size * torch.randn(
        width, generator=generator
    )


def written(family: str) -> list[tuple[Site, list[Spelling]]]:
    """Each site with its spellings: all of them in the first layer that has it, one in each of the others."""
    sites = [site for site in writable(family) if not looks(site)]
    first: dict[str, int | None] = {}
    for site in sites:
        first.setdefault(site.name, site.layer)
    return [
        (
            site,
            RAGGED_SPELLINGS
            if site.layer == first[site.name]
            else [RAGGED_SPELLINGS[number % len(RAGGED_SPELLINGS)]],
        )
        for number, site in enumerate(sites)
    ]


@every_family
def test_every_site_is_written(family: str) -> None:
    """By every spelling, in grad modes that take turns, and the logits change exactly as by hand."""
    hf, model = built(family)
    plain = clean(family)[Site("logits")]
    shown: set[Site] = set()
    for site, spellings in written(family):
        v, x = vectors(family, site)
        for number, spelling in enumerate(spellings):
            with torch.no_grad():
                expected = hand_forward(hf, *PROMPT, spelling.intercept(site, PROMPT, v, x))
            if (expected - plain)[PROMPT.mask].abs().max() > 1e-3:
                shown.add(site)
            with GRAD_MODES[number % 4](), model.trace(ROWS):
                spelling.run(site, model=model, v=v, x=x)
                logits = model.logits.save()
            # Some edits make numbers large, whose rounding the layers after them carry on.
            same(logits.value, expected, Site("logits"), atol=1e-4)
    # A norm or a softmax forgets some edits of what it reads: a factor, or one vector that is added to all keys.
    assert len(shown) > 0.9 * len(written(family))


@every_family
def test_scores_and_patterns_are_written(family: str) -> None:
    for attn in kernels(family):
        hf, model = built(family, attn)
        for name in ("scores", "pattern"):
            site = Site(name, 0)

            def edit(at: Site, tensor: Tensor, site: Site = site) -> Tensor:
                return torch.cat((tensor[:, :1] * 0.25, tensor[:, 1:]), dim=1) if at == site else tensor

            with torch.no_grad():
                expected = hand_forward(hf, *PROMPT, edit)
            assert (expected - clean(family, attn)[Site("logits")])[PROMPT.mask].abs().max() > 1e-3
            with untouched(hf), model.trace(ROWS):
                spelled = read(model, site)
                spelled[:, 0] *= 0.25
                logits = model.logits.save()
            same(logits.value, expected, Site("logits"))


@every_family
def test_all_writes_in_one_pass_each_seen_by_what_comes_after(family: str) -> None:
    """What was read before a write stays what it was, in whose memory the block may go on to compute."""
    hf, model = built(family)
    sites = [site for site in writable(family) if not looks(site)]
    added = {site: 0.3 * vectors(family, site)[0] for site in sites}
    before: dict[Site, Tensor] = {}

    def intercept(site: Site, tensor: Tensor) -> Tensor:
        before[site] = tensor
        return tensor + added[site] if site in added else tensor

    with torch.no_grad():
        expected = hand_forward(hf, *PROMPT, intercept)
    with untouched(hf), model.trace(ROWS) as t:
        for site in sites:
            here = model if site.layer is None else model.layers[site.layer]
            old = getattr(here, site.name)
            new = old + added[site]
            setattr(here, site.name, new)
            old.save(f"{site} before")
            new.save(f"{site} new")
            getattr(here, site.name).save(f"{site} after")
    for site in sites:
        same(t[f"{site} before"], before[site], site)
        same(t[f"{site} new"], before[site] + added[site], site)
        same(t[f"{site} after"], before[site] + added[site], site)
    same(t["logits after"], expected, Site("logits"))


@pytest.mark.parametrize("code", ["layer.mlp_add = y", "layer.replace(mlp_add=y)", "mlp.output = y"])
@pytest.mark.parametrize("family", ["falcon_one_norm", "falcon_two_norms"])
def test_a_value_that_a_block_is_given_stays_as_it_is(family: str, code: str) -> None:
    """Falcon adds to what the MLP returned in place: what is written there is used again later."""
    hf, model = built(family)
    held: dict[str, Tensor] = {}

    def intercept(site: Site, tensor: Tensor) -> Tensor:
        if site == Site("resid_pre", 0):
            held["y"] = tensor * 2
        if site == Site("mlp_add", 0):
            return held["y"]
        return tensor + held["y"] if site == Site("resid_pre", 1) else tensor

    with torch.no_grad():
        expected = hand_forward(hf, *PROMPT, intercept)
    with untouched(hf), model.trace(ROWS) as t:
        layer, mlp = model.layers[0], model.module("transformer.h.0.mlp")
        y = layer.resid_pre * 2
        exec(code, {"layer": layer, "mlp": mlp, "y": y})
        model.layers[1].resid_pre += y
        y.save("y")
        model.logits.save("logits")
    same(t["logits"], expected, Site("logits"))
    same(t["y"], held["y"], Site("resid_pre", 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@every_family
def test_the_middle_of_a_block_is_written_bit_for_bit(family: str, dtype: torch.dtype) -> None:
    """As a block does whose forward was rewritten by hand; where there is no middle, that is said."""
    hf = MORE[family].build(attn=kernels(family)[0], dtype=dtype)
    model = tl.wrap(hf)
    if not model.anatomy.has(Site("resid_mid", 0)):
        with pytest.raises(AbsentSiteError, match="side by side"), model.trace(ROWS):
            model.layers[0].resid_mid.save()
        return
    v = torch.randn(48, generator=torch.Generator().manual_seed(5)).to(dtype)
    for code, edit in {"+= v": lambda h: h + v, "*= 0": lambda h: h * 0}.items():
        with torch.no_grad(), edited_middle(hf, 0, edit):
            expected = plain_logits(hf, PROMPT)
        assert (expected - plain_logits(hf, PROMPT)).abs().max() > 1e-3
        with untouched(hf), model.trace(ROWS):
            exec(f"model.layers[0].resid_mid {code}", {"model": model, "v": v})
            logits = model.logits.save()
        for one, other in zip(real_rows(logits.value, PROMPT), expected_rows(expected, PROMPT), strict=True):
            assert torch.equal(one, other), code


@every_family
def test_gradients_are_those_of_autograd(family: str) -> None:
    hf, model = built(family)
    names = [site.name for site in writable(family) if site.layer == 0]
    leaves: dict[str, Tensor] = {}

    def leaf(site: Site, tensor: Tensor) -> Tensor:
        if site.layer != 0 or site.name not in names:
            return tensor
        # A tensor of its own: what two sites show is not what both feed.
        leaves[site.name] = tensor = (
            tensor.clone() if tensor.requires_grad else tensor.detach().requires_grad_()
        )
        tensor.retain_grad()
        return tensor

    logits = hand_forward(hf, *PROMPT, leaf)
    (logits[:, -1, 5].sum() - logits[:, -1, 90].sum()).backward()
    hf.zero_grad()
    with untouched(hf), model.trace(ROWS):
        sites = [getattr(model.layers[0], name) for name in names]
        loss = model.logits[:, -1, 5].sum() - model.logits[:, -1, 90].sum()
        found = [gradient.save() for gradient in tl.grad(loss, wrt=sites)]
    for name, handle in zip(names, found, strict=True):
        gradient = leaves[name].grad
        assert gradient is not None
        for one, other in zip(
            real_rows(handle.value, PROMPT, Site(name, 0)),
            expected_rows(gradient, PROMPT, Site(name, 0)),
            strict=True,
        ):
            torch.testing.assert_close(
                one, other, atol=1e-5, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
            )


@every_family
def test_what_is_not_run_is_replaced(family: str) -> None:
    """A layer that is skipped, and sublayers that are not run."""
    hf, model = built(family)
    stream: dict[str, Tensor] = {}

    def without_a_layer(site: Site, tensor: Tensor) -> Tensor:
        if site == Site("resid_pre", 1):
            stream["pre"] = tensor
        return stream["pre"] if site == Site("resid_post", 1) else tensor

    with torch.no_grad():
        expected = hand_forward(hf, *PROMPT, without_a_layer)
    with untouched(hf), model.trace(ROWS):
        model.layers[1].skip()
        logits = model.logits.save()
    same(logits.value, expected, Site("logits"))
    for name in ("attn_out", "attn_add", "mlp_out", "mlp_add", "resid_post"):
        if isinstance(model.anatomy.family.taps[name].view, RowsView):
            with pytest.raises(ReplacementError, match="not the whole output"), model.trace(ROWS):
                model.layers[0].replace(**{name: model.layers[0].resid_pre})
            continue
        with torch.no_grad():
            expected = hand_forward(
                hf,
                *PROMPT,
                lambda site, tensor, name=name: (
                    clean(family)[Site("embed")] if site == Site(name, 0) else tensor
                ),
            )
        with untouched(hf), model.trace(ROWS):
            model.layers[0].replace(**{name: model.embed})
            logits = model.logits.save()
        same(logits.value, expected, Site("logits"))


@every_family
def test_heads_are_read_and_written_by_number(family: str) -> None:
    hf, model = built(family)
    site = Site("z", 0)
    with torch.no_grad():
        expected = hand_forward(
            hf,
            *PROMPT,
            lambda at, z: torch.cat((z[:, :, :1], 0 * z[:, :, 1:2], z[:, :, 2:]), 2) if at == site else z,
        )
    with untouched(hf), model.trace(ROWS):
        model.layers[0].head(1).z = 0.0
        added = model.layers[0].head_out.sum(2).save()
        whole = model.layers[0].attn_out.save()
        logits = model.logits.save()
    same(logits.value, expected, Site("logits"))
    biases = [
        (one - other)
        for one, other in zip(real_rows(whole.value, PROMPT), real_rows(added.value, PROMPT), strict=True)
    ]
    for bias in biases:
        torch.testing.assert_close(bias, biases[0][:1].expand_as(bias), atol=1e-5, rtol=1e-5)


# --- generation --------------------------------------------------------------------------------------------------


@every_family
def test_generation_is_the_same_with_and_without_a_cache(family: str) -> None:
    """Steered text, and every site in every step as in one pass over the whole text."""
    hf, model = built(family)
    row, new = ROWS[0], 4
    v = torch.randn(48, generator=torch.Generator().manual_seed(3))
    second = [site.name for site in writable(family) if site.layer == 1]
    # Of the first layer what the second one lacks.
    sites = [
        site
        for site in writable(family)
        if (site.layer == 1 or (site.layer == 0 and site.name not in second))
        and not looks(site)
        # Of all tokens in the cache.
        and not (site.name in ("k_rot", "v") and model.anatomy.tap(site)[1].side is Side.INSIDE)
    ]
    with untouched(hf), model.generate([row], max_new_tokens=new) as plain:
        pass
    wanted = hf.generate(torch.tensor([row]), max_new_tokens=new, do_sample=False)[0, len(row) :].tolist()
    assert plain.tokens == [wanted]
    with model.generate(ROWS, max_new_tokens=new) as together:
        model.layers[0].mlp_out += v
    for row_alone, tokens in zip(ROWS, together.tokens, strict=True):
        with model.generate([row_alone], max_new_tokens=new) as alone:
            model.layers[0].mlp_out += v
        assert alone.tokens == [tokens]
    runs: list[Any] = []
    for options in ({}, {"use_cache": False}):
        with untouched(hf), model.generate([row], max_new_tokens=new, **options) as t:
            model.layers[0].attn_add += v
            model.layers[0].mlp_out += v
            for site in sites:
                read(model, site).save(site.name)
        runs.append(t)
    assert runs[0].tokens == runs[1].tokens != plain.tokens
    with model.trace([row + runs[0].tokens[0][:-1]]) as whole:
        model.layers[0].attn_add += v
        model.layers[0].mlp_out += v
        for site in sites:
            read(model, site).save(site.name)
    for site in sites:
        for t in runs:
            torch.testing.assert_close(t[site.name], whole[site.name], atol=5e-5, rtol=5e-5)


# --- lenses ------------------------------------------------------------------------------------------------------


@every_family
def test_a_lens_reads_the_stream_as_the_models_own_head_does(family: str) -> None:
    hf, model = built(family)
    with torch.no_grad():
        # A stream that leaves the first layer for the head: what is left out of the second adds nothing.
        early = hand_forward(
            hf,
            *PROMPT,
            lambda site, tensor: (
                clean(family)[Site("resid_post", 0)] if site == Site("resid_post", 1) else tensor
            ),
        )
    with model.trace(ROWS):
        saved = [
            (lens.topk(3).save(), lens.logit(7).save())
            for lens in (model.lens(model.layers[layer].resid_post) for layer in range(LAYERS))
        ]
    for logits, (top, logit) in zip((early, clean(family)[Site("logits")]), saved, strict=True):
        wanted = logits.log_softmax(-1).topk(3)
        same(top.values.value, wanted.values, Site("resid_post", 0))
        same(logit.value, logits[..., 7], Site("resid_post", 0))
        for one, other in zip(
            real_rows(top.indices.value, PROMPT), expected_rows(wanted.indices, PROMPT), strict=True
        ):
            assert torch.equal(one, other)


@every_family
def test_a_logit_is_the_sum_of_what_every_component_writes(family: str) -> None:
    """And a head's part is what is missing of the stream's direction when the head is."""
    hf, model = built(family)
    neurons = "all" if all(model.anatomy.has(Site("mlp_act", layer)) for layer in range(LAYERS)) else None
    found = model.logit_attribution(ROWS[:1], 5, against=9, neurons=neurons)[0]
    last = clean(family)[Site("lm_head")][0, -1]
    assert abs(found.logit - (last[5] - last[9]).item()) < 1e-4
    assert abs(found.left_over) < 1e-4
    assert abs(sum(row.contribution for row in found.contributions) - found.logit) < 1e-9
    returned = clean(family)[Site("logits")][0, -1]
    assert abs(found.returned - (returned[5] - returned[9]).item()) < 1e-4
    parts = {part.kind for part in found.parts}
    assert ("neuron" in parts) == (neurons is not None)
    assert found.heads.shape == (LAYERS, 4)
    # The last layer's heads through its own matrix: where no norm follows, what leaves the sum without them.
    if "attn_post_norm" in model.anatomy.family.taps:
        return
    last = model.anatomy.layers_with("z")[-1]
    assert found.heads.isnan().any(-1).tolist() == [
        not model.anatomy.has(Site("z", layer)) for layer in range(LAYERS)
    ]
    head = hf.get_submodule(model.anatomy.output_projection(last)[0].removesuffix(".weight"))
    z = clean(family)[Site("z", last)][0, -1]
    own = (head.weight.view(48, 4, 12).transpose(0, 1) @ z[..., None])[..., 0]
    own = own * getattr(hf.config, "residual_multiplier", 1.0)
    final = hf.get_submodule(model.anatomy.head.norm)
    stream = clean(family)[Site("resid_post", 1)][0, -1]
    head_rows = hf.lm_head.weight[5] - hf.lm_head.weight[9]
    if "LayerNorm" in type(final).__name__:
        centred, scale = own - own.mean(-1, keepdim=True), (stream.var(correction=0) + 1e-5).rsqrt()
    else:
        centred, scale = own, (stream.pow(2).mean() + 1e-6).rsqrt()
    gain = getattr(final, "weight", torch.ones(48))
    gain = 1 + gain if family.startswith(("qwen3_next", "qwen3_5")) or family == "gemma" else gain
    wanted = (centred * scale * gain) @ head_rows
    torch.testing.assert_close(found.heads[last].float(), wanted.detach(), atol=1e-4, rtol=1e-3)


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "settings", "says"),
    [
        ("opt", {"do_layer_norm_before": False}, "norms come after each sum"),
        ("opt", {"word_embed_proj_dim": 24}, "narrower than the stream"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "output of a norm"),
        ("bloom", {"slow_but_exact": True, "pretraining_tp": 2}, "computed in slices"),
        ("gemma2", {"use_bidirectional_attention": True}, "looks ahead"),
        ("gemma", {"use_bidirectional_attention": True}, "looks ahead"),
        ("phi", {"qk_layernorm": True}, "which no published Phi does"),
        ("granite", {"residual_multiplier": 0.0}, "residual_multiplier is 0"),
        ("granite", {"embedding_multiplier": 0.0}, "embedding_multiplier is 0"),
    ],
)
def test_configurations_that_would_mean_something_else_are_refused(
    family: str, settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(UnknownArchitectureError, match=says):
        tl.wrap(MORE[family].build(attn=kernels(family)[0], **settings))


@pytest.mark.parametrize(
    ("family", "site", "says"),
    [
        ("olmo2", "attn_norm", "without a norm before it; use attn_in"),
        ("olmo2", "post_ln", "without a norm before it; use mlp_in"),
        ("falcon_one_norm", "post_ln", "the norm that attention reads; use attn_norm"),
        ("mixtral", "mlp_act", "is a mixture of experts"),
        ("opt", "q_rot", "nothing is rotated"),
        ("cohere", "post_ln", "the norm that attention reads; use attn_norm"),
        ("phi", "post_ln", "the norm that attention reads; use attn_norm"),
        ("cohere2", "q_rot", "rotates nothing; use q"),
        ("bloom", "pos_embed", "ALiBi"),
        ("falcon_two_norms", "k_rot", "cannot be tapped; use k"),
    ],
)
def test_what_a_family_lacks_is_said_with_what_there_is_instead(family: str, site: str, says: str) -> None:
    _, model = built(family)
    with pytest.raises(AbsentSiteError, match=says), model.trace(ROWS):
        getattr(model if site == "pos_embed" else model.layers[0], site).save()


@pytest.mark.parametrize("family", ["bloom", "falcon_sequential", "falcon_two_norms"])
def test_a_pattern_that_no_table_computes_is_what_its_module_returns(family: str) -> None:
    """Beside what transformers gives; and a softmax in a hook of the user's own is not taken for the module's."""
    hf, model = built(family, "eager")
    with torch.no_grad():
        mask = PROMPT.mask.long()
        theirs = hf(
            PROMPT.input_ids, attention_mask=mask, position_ids=PROMPT.position_ids, output_attentions=True
        )
    with untouched(hf), model.trace(ROWS):
        layer = model.layers[0]
        layer.q = torch.softmax(layer.q, dim=-1) * 0 + layer.q
        saved = {at: model.layers[at].pattern.save() for at in range(LAYERS)}
    for at, handle in saved.items():
        rows = expected_rows(theirs.attentions[at], PROMPT, Site("pattern", at))
        for one, other in zip(real_rows(handle.value, PROMPT, Site("pattern", at)), rows, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


def test_images_are_refused_by_name() -> None:
    hf, model = built("gemma3_images")
    assert model.config is hf.config  # of all of it; the widths of sites are those of the text
    assert model.sites()["logits"].shape == "[B, P, 97]"
    prompt = {"input_ids": [ROWS[0]], "pixel_values": torch.zeros(1, 3, 16, 16)}
    with pytest.raises(PromptError, match="pixel_values"), model.trace(prompt):
        model.logits.save()


def test_capped_scores_are_not_guessed_at() -> None:
    """sdpa leaves the cap out or refuses it, by the version of transformers: neither are the model's scores."""
    from tracelens.backends.attention import scores_of
    from tracelens.errors import AttentionImplementationError

    hf, _ = built("gemma2")
    q = torch.randn(1, 4, 3, 12)
    with pytest.raises(AttentionImplementationError, match="softcap"):
        scores_of("sdpa", hf.model.layers[0].self_attn, q, q, None, {"softcap": 1.5})


def test_a_path_is_no_name_of_a_product() -> None:
    """By its path there is what the module returns; by the name what the model makes of it."""
    hf, model = built("granite")
    for name in ("embed", "attn_add", "mlp_add"):
        tap = model.anatomy.family.taps[name]
        path = tap.module if name == "embed" else f"model.layers.0.{tap.module}"
        with pytest.raises(tl.TracelensError, match="is no named site"):
            tl.sites.parse(f"{path}.output", model)
    with untouched(hf), model.trace(ROWS):
        product = model.layers[0].mlp_add.save()
        returned = model.module("model.layers.0.mlp").output.save()
        model.module("model.layers.0.mlp").output = returned * 2
        logits = model.logits.save()
    for one, other in zip(real_rows(product.value, PROMPT), real_rows(returned.value, PROMPT), strict=True):
        assert torch.equal(one, other * hf.config.residual_multiplier)
    with torch.no_grad():
        doubled = hand_forward(
            hf, *PROMPT, lambda site, tensor: tensor * 2 if site == Site("mlp_add", 0) else tensor
        )
    same(logits.value, doubled, Site("logits"))


def test_what_a_model_clips_before_it_goes_on_has_no_name() -> None:
    hf = MORE["olmo"].build(clip_qkv=0.5)
    model = tl.wrap(hf)
    for name in "qkv":
        with pytest.raises(AbsentSiteError, match="clips what the projection returns"), model.trace(ROWS):
            getattr(model.layers[0], name).save()
    with model.trace(ROWS[:1]):
        rotated = model.layers[0].q_rot.save()
        unrotated = model.module("model.layers.0.self_attn.q_proj").output.save()
    assert unrotated.value.abs().max() > 0.6  # as the projection returned it
    clipped = unrotated.value.clamp(-0.5, 0.5).unflatten(-1, (4, 12))
    torch.testing.assert_close(rotated.value.norm(dim=-1), clipped.norm(dim=-1), atol=1e-5, rtol=1e-5)
    assert tl.wrap(hf, probe=False).check_sites().ok
