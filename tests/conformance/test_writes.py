"""Every writable site, by every spelling, changes the logits exactly as the oracle says."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

import tracelens as tl
from tests.conformance.spellings import SPELLINGS, Spelling, spelled
from tests.conformance.test_reads import close, expected_rows, looks, read, real_rows
from tests.support.batches import EVEN, RAGGED, SINGLE, Batch, batch, random_rows
from tests.support.families import D_MODEL, EVERY, FAMILIES, FEWER, LAYERS
from tests.support.hand_forward import Intercept, hand_forward, hand_sites, head_dim, unchanged
from tests.support.plain import can_edit, edited, plain_logits, untouched
from tracelens.errors import PositionAxisError
from tracelens.ir.sites import Effect, Site
from tracelens.reference import evaluate

PROMPTS = {"single": random_rows(SINGLE), "ragged": random_rows(RAGGED), "even": random_rows(EVEN)}
GRAD_MODES = {
    "ambient": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference": torch.inference_mode,
}

FEW_SPELLINGS = ("SITE += v", "SITE *= 0.5", "SITE[:, -1] = x", "SITE.tok[1:3] += v")


def writable(hf: PreTrainedModel) -> list[Site]:
    """The sites whose last axis has a width of the model; scores and pattern have a test of their own."""
    return [
        site
        for site in hand_sites(hf)
        if site.kind.effect is not Effect.NONE and site.kind.dtype is None and not looks(site)
    ]


def forgotten(hf: PreTrainedModel, site: Site, code: str) -> bool:
    """Does the model itself forget the edit?

    One vector added to all keys that queries meet moves all scores of a query alike, which the softmax forgets; a norm
    that follows forgets a factor.
    """
    family = hf.config.model_type
    met = "k" if family == "gpt2" else "k_rot"
    added = ("SITE += v", "SITE = SITE + v", "SITE = v + SITE", "h = SITE; h += v; SITE = h", "SITE[1] += v")
    if site.name == met:
        return code in added
    normed = ("q", "k") if family in ("qwen3", "qwen3_moe") else ()
    if family == "gemma3_text":
        # Whatever a sandwich norm reads, through linear maps alone.
        normed = ("attn_norm", "attn_in", "q", "k", "v", "z", "attn_out", "mlp_up", "mlp_act", "mlp_out")
    return site.name in normed and code == "SITE *= 0.5"


def vectors(hf: PreTrainedModel, site: Site) -> tuple[Tensor, Tensor]:
    """What is added and what is assigned at a site: two random vectors of its width."""
    sizes = {"D": 48, "M": 80, "V": 97, "E": 4, "k": 2, "N": 40, **dict.fromkeys("cd", head_dim(hf.config))}
    width = sizes[str(site.kind.shape[-1])]
    generator = torch.Generator().manual_seed(17 + len(site.name))
    return 0.5 * torch.randn(width, generator=generator), torch.randn(width, generator=generator)


def oracle(hf: PreTrainedModel, prompt: Batch, intercept: Intercept = unchanged) -> Tensor:
    with torch.no_grad():
        return hand_forward(hf, *prompt, intercept)


def same_logits(saved: object, expected: Tensor, prompt: Batch) -> None:
    for actual, tensor in zip(real_rows(saved, prompt), expected_rows(expected, prompt), strict=True):
        close(actual, tensor)


def matters(expected: Tensor, hf: PreTrainedModel, prompt: Batch) -> None:
    """The edit has to show in the logits, or nothing would be tested."""
    assert (expected - oracle(hf, prompt))[prompt.mask].abs().max() > 1e-3


@pytest.mark.parametrize(
    ("family", "spelling"),
    [
        pytest.param(family, spelling, id=f"{family}-{code}")
        for family in FAMILIES
        for code, spelling in SPELLINGS.items()
        if family not in FEWER or code in FEW_SPELLINGS
    ],
)
def test_every_spelling_at_every_kind(family: str, spelling: Spelling) -> None:
    hf, rows = FAMILIES[family].build(), PROMPTS["ragged" if spelling.ragged else "even"]
    model, prompt = tl.wrap(hf), batch(rows)
    for site in writable(hf):
        if site.layer not in (None, 1):
            continue
        v, x = vectors(hf, site)
        expected = oracle(hf, prompt, spelling.intercept(site, prompt, v, x))
        if not forgotten(hf, site, spelling.code):
            matters(expected, hf, prompt)
        with untouched(hf), model.trace(rows):
            spelling.run(site, model=model, v=v, x=x)
            logits = model.logits.save()
        same_logits(logits.value, expected, prompt)


def test_a_row_of_a_ragged_batch_is_not_addressed_by_its_number() -> None:
    model = tl.wrap(FAMILIES["llama"].build())
    with pytest.raises(PositionAxisError), model.trace(PROMPTS["ragged"]):
        model.layers[1].resid_post[1] += 1.0


@pytest.mark.parametrize("rows", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("family", EVERY)
def test_every_site_of_every_layer(family: str, rows: list[list[int]]) -> None:
    hf, prompt = EVERY[family].build(), batch(rows)
    model = tl.wrap(hf)
    for site in writable(hf):
        v, x = vectors(hf, site)
        spelling = SPELLINGS["SITE *= 0.5" if forgotten(hf, site, "SITE += v") else "SITE += v"]
        expected = oracle(hf, prompt, spelling.intercept(site, prompt, v, x))
        matters(expected, hf, prompt)
        with untouched(hf), model.trace(rows):
            spelling.run(site, model=model, v=v, x=x)
            logits = model.logits.save()
        same_logits(logits.value, expected, prompt)


@pytest.mark.parametrize("mode", GRAD_MODES.values(), ids=GRAD_MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_grad_mode_does_not_matter(family: str, mode) -> None:
    hf, rows = FAMILIES[family].build(), PROMPTS["ragged"]
    model, prompt = tl.wrap(hf), batch(rows)
    for code in ("SITE += v", "SITE[:, -1] += v", "SITE = x", "SITE.tok[2] = x"):
        for name in (
            "resid_pre",
            "resid_mid",
            "q",
            "v",
            "z",
            "mlp_norm",
            "mlp_act",
            "attn_add",
            "resid_post",
        ):
            site, spelling = Site(name, 1), SPELLINGS[code]
            if site not in writable(hf):
                continue  # experts have no neurons of all tokens
            v, x = vectors(hf, site)
            expected = oracle(hf, prompt, spelling.intercept(site, prompt, v, x))
            matters(expected, hf, prompt)
            with mode(), untouched(hf), model.trace(rows):
                spelling.run(site, model=model, v=v, x=x)
                logits = model.logits.save()
            same_logits(logits.value, expected, prompt)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_write_is_seen_by_the_reads_after_it_and_not_by_those_before(family: str) -> None:
    hf, rows = FAMILIES[family].build(), PROMPTS["single"]
    model, prompt = tl.wrap(hf), batch(rows)
    clean: dict[Site, Tensor] = {}
    oracle(hf, prompt, lambda site, tensor: clean.setdefault(site, tensor))
    for site in writable(hf):
        v, _ = vectors(hf, site)
        with model.trace(rows):
            before = read(model, site).save()
            exec(f"{spelled(site)} += v", {"model": model, "v": v})
            after = read(model, site).save()
        close(before.value, clean[site])
        close(after.value, clean[site] + v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(
    ("family", "attn"),
    [
        (family, attn)
        for family in EVERY
        for attn in ("sdpa", "eager")
        if family not in FEWER or attn == "eager"
    ],
)
def test_writes_equal_an_edited_model_bit_for_bit(family: str, attn: str, dtype: torch.dtype) -> None:
    """Hooks placed by hand, and for ``resid_mid`` a block whose forward was rewritten: no rounding may differ."""
    hf, rows = EVERY[family].build(attn=attn, dtype=dtype), PROMPTS["ragged"]
    model, prompt = tl.wrap(hf), batch(rows)
    edits = {
        "SITE += v": lambda h, v: (h + v).to(dtype),
        "SITE *= 0": lambda h, v: h * 0,
        "SITE = v": lambda h, v: v.to(dtype).expand_as(h).clone(),
    }
    with torch.no_grad():
        clean = plain_logits(hf, prompt)
    for site in writable(hf):
        if not can_edit(hf, site) or (family in FEWER and site.layer == 0):
            continue
        v, _ = vectors(hf, site)
        for code, edit in edits.items():
            with torch.no_grad(), edited(hf, site, lambda h, v=v, edit=edit: edit(h, v)):
                expected = plain_logits(hf, prompt)
            if not forgotten(hf, site, code):
                assert (expected - clean)[prompt.mask].abs().max() > 1e-3, (site, code)
            with untouched(hf), model.trace(rows):
                exec(code.replace("SITE", spelled(site)), {"model": model, "v": v})
                logits = model.logits.save()
            for actual, tensor in zip(
                real_rows(logits.value, prompt), expected_rows(expected, prompt), strict=True
            ):
                assert torch.equal(actual, tensor), (site, code)


@pytest.mark.parametrize("family", FAMILIES)
def test_mapped_writes_are_one_write_for_each_layer(family: str) -> None:
    hf, rows = FAMILIES[family].build(), PROMPTS["ragged"]
    model, prompt = tl.wrap(hf), batch(rows)
    names = [site.name for site in writable(hf) if site.layer == 0 and Site(site.name, 2) in writable(hf)]
    for name in names:
        width = vectors(hf, Site(name, 0))[0].shape[0]
        rows_of_v = 0.5 * torch.randn(LAYERS, width, generator=torch.Generator().manual_seed(3))
        v = rows_of_v[0]
        cases: list[tuple[str, dict[int, Tensor], bool]] = [
            (f"model.layers[0:2].{name} += v", {0: v, 1: v}, False),
            (f"model.layers[:].{name} += tl.per_layer(V)", dict(enumerate(rows_of_v)), False),
            (f"model.layers[[2, 0]].{name} = model.layers[[2, 0]].{name} + v", {2: v, 0: v}, False),
            (f"model.layers[0:2].{name}[:, -1] += v", {0: v, 1: v}, True),
        ]
        for code, added, only_last in cases:

            def intercept(
                at: Site,
                tensor: Tensor,
                name: str = name,
                added: dict[int, Tensor] = added,
                only_last: bool = only_last,
            ) -> Tensor:
                if at.name != name or at.layer not in added:
                    return tensor
                if not only_last:
                    return tensor + added[at.layer]
                return torch.cat((tensor[:, :-1], tensor[:, -1:] + added[at.layer]), dim=1)

            expected = oracle(hf, prompt, intercept)
            if only_last or not forgotten(hf, Site(name, 0), "SITE += v"):
                matters(expected, hf, prompt)
            with untouched(hf), model.trace(rows):
                exec(code, {"model": model, "tl": tl, "v": v, "V": rows_of_v})
                logits = model.logits.save()
            same_logits(logits.value, expected, prompt)


@pytest.mark.parametrize("family", FAMILIES)
def test_values_flow_forward_between_sites(family: str) -> None:
    hf, rows = FAMILIES[family].build(), PROMPTS["ragged"]
    model, prompt = tl.wrap(hf), batch(rows)
    held: dict[Site, Tensor] = {}
    inner = "mlp_out" if family == "qwen3_moe" else "mlp_act"

    def intercept(site: Site, tensor: Tensor) -> Tensor:
        held[site] = tensor
        if site == Site("resid_mid", 1):
            return tensor + 0.5 * held[Site(inner, 0)][..., :48]
        if site == Site("mlp_norm", 2):
            return tensor - held[Site("resid_post", 0)]
        return tensor

    expected = oracle(hf, prompt, intercept)
    matters(expected, hf, prompt)
    with model.trace(rows):
        # The statements stand in an order of their own: only the forward pass decides.
        model.layers[2].mlp_norm -= model.layers[0].resid_post
        model.layers[1].resid_mid += 0.5 * getattr(model.layers[0], inner)[..., :48]
        logits = model.logits.save()
    same_logits(logits.value, expected, prompt)


_MODELS: dict[str, PreTrainedModel] = {}


@given(data=st.data())
@pytest.mark.parametrize("family", FAMILIES)
def test_any_set_of_writes_in_any_order(family: str, data: st.DataObject) -> None:
    hf = _MODELS.setdefault(family, FAMILIES[family].build())
    rows = random_rows(data.draw(st.lists(st.integers(4, 9), min_size=2, max_size=3), label="lengths"))
    model, prompt = tl.wrap(hf), batch(rows)
    site = st.sampled_from(writable(hf))
    writes = data.draw(
        st.lists(
            st.tuples(site, st.sampled_from(sorted(code for code, how in SPELLINGS.items() if how.ragged))),
            min_size=1,
            max_size=5,
        ),
        label="writes",
    )
    edits: dict[Site, list[Intercept]] = {}
    for at, code in writes:
        edits.setdefault(at, []).append(SPELLINGS[code].intercept(at, prompt, *vectors(hf, at)))

    def intercept(at: Site, tensor: Tensor) -> Tensor:
        for edit in edits.get(at, []):
            tensor = edit(at, tensor)
        return tensor

    expected = oracle(hf, prompt, intercept)
    with untouched(hf), model.trace(rows):
        for at, code in writes:
            v, x = vectors(hf, at)
            SPELLINGS[code].run(at, model=model, v=v, x=x)
        logits = model.logits.save()
    # Several writes make activations larger than one does, and the rounding with them.
    for actual, tensor in zip(real_rows(logits.value, prompt), expected_rows(expected, prompt), strict=True):
        torch.testing.assert_close(actual, tensor, atol=1e-4, rtol=1e-4)


CASTING: dict[str, tuple[str, list[int]]] = {
    "tokens": (".tok[[0, 2]]", [0, 2]),
    "one token": (".tok[1]", [1]),
    "a mask": (".tok[MASK]", [1, 2, 4]),
    "a list of positions": ("[:, [0, 3]]", [0, 3]),
    "a tensor of positions": ("[:, torch.tensor([4])]", [4]),
    "a slice": ("[:, 1:3]", [1, 2]),
}


@pytest.mark.parametrize("kind", CASTING)
def test_what_is_assigned_to_a_part_is_cast_once(kind: str) -> None:
    """torch itself casts what is assigned to a slice, and refuses to for an index of tensors."""
    model = tl.wrap(FAMILIES["llama"].build(dtype=torch.bfloat16))
    index, positions = CASTING[kind]
    chosen = torch.zeros(5, dtype=torch.bool)
    chosen[positions] = True
    v = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(0)) / 3
    with model.trace([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]]) as t:
        h = model.layers[1].resid_post
        before = h.save()
        exec(f"h{index} += v", {"h": h, "v": v, "torch": torch, "MASK": chosen.expand(2, 5)})
        after = model.layers[1].resid_post.save("after")
    wanted = torch.where(chosen[None, :, None], (before.value.float() + v).bfloat16(), before.value)
    assert torch.equal(after.value, wanted)
    assert not torch.equal(wanted, before.value)
    reference = evaluate(
        t.graph,
        lambda intercept: intercept(Site("resid_post", 1), before.value),
        constants=[constant.tensor for constant in t.graph.constants],
        select=t._prompt.select,
    )
    assert torch.equal(reference["after"], wanted)
