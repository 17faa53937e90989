"""Experts by number, and what each of a token's experts makes, beside transformers and a block written by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import tracelens as tl
from tests.conformance.test_reads import close, expected_rows, real_rows
from tests.support.batches import EVEN, RAGGED, Batch, batch, random_rows
from tests.support.families import FAMILIES
from tests.support.hand_forward import hand_forward
from tests.support.more_families import MORE
from tests.support.plain import edited_router, plain_logits, untouched
from tracelens.errors import (
    AbsentSiteError,
    ExpertChoiceError,
    ExpertRangeError,
    LostUpdateError,
    SiteMismatchError,
    StaleValueError,
    UnknownSiteError,
    WriteTargetError,
)
from tracelens.ir.sites import Site

ROWS, UNEVEN = random_rows(EVEN), random_rows(RAGGED)
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
every_family = pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe", "gpt_oss"])
LAYER, EXPERT = 1, 2


def built(family: str = "qwen3_moe", **settings: Any) -> Any:
    table = FAMILIES if family in FAMILIES else MORE
    options = {"attn": "eager"} if family == "gpt_oss" else {}
    return table[family].build(**options, **settings)


def logits_of(model: tl.Model, block: Callable[[Any], object], rows: Any = ROWS) -> Any:
    with model.trace(rows):
        block(model.layers[LAYER])
        found = model.logits.save()
    return found.value


@contextmanager
def an_expert_that(hf: Any, does: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Qwen3-MoE's module of experts with a forward written by hand: ``does(rows, out)`` of the one expert's rows."""
    experts = hf.model.layers[LAYER].mlp.experts

    def forward(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        total = torch.zeros_like(hidden)
        for token in range(len(hidden)):
            for expert, weight in zip(index[token].tolist(), weights[token], strict=True):
                gate, up = (experts.gate_up_proj[expert] @ hidden[token]).chunk(2)
                out = experts.down_proj[expert] @ (F.silu(gate) * up)
                total[token] += weight * (does(hidden[token], out) if expert == EXPERT else out)
        return total

    experts.forward = forward
    try:
        yield
    finally:
        del experts.forward


def plain(hf: Any, rows: Any = ROWS) -> Tensor:
    with torch.no_grad():
        return plain_logits(hf, batch(rows))


def same(actual: Any, expected: Tensor, prompt: Batch) -> None:
    for one, other in zip(real_rows(actual, prompt), expected_rows(expected, prompt), strict=True):
        close(one, other)


# --- what each of a token's experts makes ----------------------------------------------------------------------------


@every_family
@every_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_reading_changes_no_bit_and_the_sum_is_the_models(
    family: str, implementation: str, dtype: torch.dtype
) -> None:
    hf = built(family, dtype=dtype)
    hf.set_experts_implementation(implementation)
    model, expected = tl.wrap(hf), plain(hf)
    with untouched(hf), model.trace(ROWS):
        layers = [model.layers[0], model.layers[1]]
        saved = [
            [getattr(layer, name).save() for name in ("expert_weights", "expert_out", "mlp_out")]
            for layer in layers
        ]
        act = model.layers[1].expert_act.save()
        logits = model.logits.save()
    assert torch.equal(logits.value, expected)
    tolerance = 1e-5 if dtype is torch.float32 else 3e-2
    for weights, out, mlp_out in saved:
        assert out.value.dtype is dtype
        assert out.value.abs().max() > 1e-3
        total = (weights.value[..., None].double() * out.value.double()).sum(-2)
        size = total.abs().max().item()
        torch.testing.assert_close(mlp_out.value.double(), total, atol=tolerance * size, rtol=tolerance)
    down = hf.model.layers[1].mlp.experts.down_proj
    assert act.value.shape[:3] == saved[1][1].value.shape[:3]
    assert act.value.shape[3] == down.shape[1 if family == "gpt_oss" else 2]
    assert model.check_sites().status("expert_out") == "verified"


@every_implementation
def test_what_is_written_replaces_it_at_the_tokens_it_changes_alone(implementation: str) -> None:
    hf = built()
    hf.set_experts_implementation(implementation)
    model, before = tl.wrap(hf), plain(hf)
    assert torch.equal(
        logits_of(model, lambda layer: setattr(layer, "expert_out", layer.expert_out * 1.0)), before
    )

    def last(layer: Any) -> None:
        layer.expert_act[:, -1] = 0

    found = logits_of(model, last)
    assert torch.equal(found[:, :-1], before[:, :-1])
    assert (found[:, -1] - before[:, -1]).abs().max() > 1e-3
    with model.trace(ROWS):
        model.layers[LAYER].expert_act[:, -1] = 0
        out, added = model.layers[LAYER].expert_out.save(), model.layers[LAYER].mlp_out.save()
    assert not out.value[:, -1].any()
    assert not added.value[:, -1].any()
    assert out.value[:, :-1].abs().max() > 1e-3


def test_one_expert_for_each_token() -> None:
    hf = built(num_experts_per_tok=1)
    model, prompt = tl.wrap(hf), batch(UNEVEN)
    for site in (Site("expert_act", LAYER), Site("expert_out", LAYER)):
        with torch.no_grad():
            expected = hand_forward(hf, *prompt, lambda at, x, site=site: x * 0.3 if at == site else x)
        with model.trace(UNEVEN):
            setattr(model.layers[LAYER], site.name, getattr(model.layers[LAYER], site.name) * 0.3)
            logits = model.logits.save()
        same(logits.value, expected, prompt)


@every_implementation
def test_gradients_are_those_of_autograd(implementation: str) -> None:
    hf = built()
    hf.set_experts_implementation(implementation)
    model, prompt = tl.wrap(hf), batch(ROWS)
    sites = [Site(name, layer) for layer in (0, 1) for name in ("expert_act", "expert_out")]
    with untouched(hf), model.trace(ROWS):
        loss = model.logits[:, -1].pow(2).mean()
        wrt = [getattr(model.layers[site.layer], site.name) for site in sites]
        found = [value.save() for value in tl.grad(loss, wrt)]
    leaves: dict[Site, Tensor] = {}

    def leaf(site: Site, tensor: Tensor) -> Tensor:
        if site in sites:
            tensor = tensor if tensor.requires_grad and leaves else tensor.detach().requires_grad_()
            tensor.retain_grad()
            leaves[site] = tensor
        return tensor

    for parameter in hf.parameters():
        parameter.requires_grad_(False)
    hand_forward(hf, *prompt, leaf)[:, -1].pow(2).mean().backward()
    for value, site in zip(found, sites, strict=True):
        gradient = leaves[site].grad
        assert gradient is not None
        assert gradient.abs().max() > 1e-5
        torch.testing.assert_close(value.value, gradient, atol=1e-6, rtol=1e-4)


def test_a_gradient_beside_a_write_goes_through_what_was_written() -> None:
    """Where it has the same numbers as what was there, the derivative still is that of what was written."""
    model = tl.wrap(built())
    with model.trace(ROWS):
        layer = model.layers[LAYER]
        scale = layer.mlp_in * 0 + 1.0
        layer.expert_out = layer.expert_out * scale[..., None, :]
        loss = model.logits[:, -1].pow(2).mean()
        through = tl.grad(loss, layer.expert_out).save()
        (received,) = (tl.grad(loss, [layer.mlp_in])[0].save(),)
    with model.trace(ROWS):
        loss = model.logits[:, -1].pow(2).mean()
        unscaled = tl.grad(loss, model.layers[LAYER].mlp_in).save()
    assert through.value.abs().max() > 1e-5
    torch.testing.assert_close(received.value, unscaled.value, atol=1e-6, rtol=1e-4)


def test_text_is_generated_without_an_expert() -> None:
    hf = built()
    model, prompt = tl.wrap(hf), batch(ROWS)
    with untouched(hf), model.generate(ROWS, max_new_tokens=6) as t:
        model.layers[LAYER].expert(EXPERT).out = 0
        out = model.layers[LAYER].expert_out.save()
        chosen = model.layers[LAYER].expert(EXPERT).chosen.save()

    def generated() -> list[list[int]]:
        found = hf.generate(prompt.input_ids, attention_mask=prompt.mask, max_new_tokens=6, do_sample=False)
        return found[:, prompt.input_ids.shape[1] :].tolist()

    before = generated()
    with an_expert_that(hf, lambda rows, out: 0 * out):
        want = generated()
    assert [row + [0] * (6 - len(row)) for row in t.tokens] == want != before
    assert out.value.shape[:2] == chosen.value.shape
    index_zero = (out.value == 0).all(-1).any(-1)
    assert torch.equal(index_zero, chosen.value)


def test_experts_whose_sum_is_not_what_they_return_are_refused() -> None:
    hf = built()
    experts = hf.model.layers[LAYER].mlp.experts
    own = experts.forward
    experts.forward = lambda *args: own(*args) * 1.5
    model = tl.wrap(hf)
    for name in ("expert_out", "expert_act"):
        with (
            pytest.raises(SiteMismatchError, match="something else than the weighted sum"),
            model.trace(ROWS),
        ):
            getattr(model.layers[LAYER], name).save()
    with model.trace(ROWS):
        model.layers[0].expert_out.save()


def test_experts_that_are_not_described_are_absent() -> None:
    hf = built()
    for layer in (0, 1):
        del hf.model.layers[layer].mlp.experts.has_bias
    model = tl.wrap(hf)
    assert "not among the modules of experts that transformers describes" in (
        model.sites()["expert_out"].absent or ""
    )
    with pytest.raises(AbsentSiteError, match="Qwen3MoeExperts"), model.trace(ROWS):
        model.layers[LAYER].expert(EXPERT).out.save()


def test_the_plan_says_what_is_computed_anew() -> None:
    model = tl.wrap(built())
    words = "layer 1: what experts make is computed and summed anew"
    with model.trace(ROWS) as t:
        model.layers[LAYER].expert_out.save()
    assert words not in str(t.explain())
    with model.trace(ROWS) as t:
        model.layers[LAYER].expert(EXPERT).out = 0
        model.logits.save()
    assert words in str(t.explain())


# --- one expert ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [ROWS, UNEVEN], ids=["even", "ragged"])
def test_an_expert_has_what_it_received_and_returned_and_zero_elsewhere(rows: Any) -> None:
    hf = built()
    model, prompt = tl.wrap(hf), batch(rows)
    with model.trace(rows):
        layer = model.layers[LAYER]
        expert = layer.expert(EXPERT)
        saved = {name: getattr(expert, name).save() for name in ("out", "act", "input", "weight", "chosen")}
    seen: dict[Site, Tensor] = {}
    with torch.no_grad():
        hand_forward(hf, *prompt, lambda site, tensor: seen.setdefault(site, tensor))
    index, x = seen[Site("expert_index", LAYER)], seen[Site("mlp_in", LAYER)]
    chosen = (index == EXPERT).any(-1)
    assert chosen[prompt.mask].any()
    assert not chosen[prompt.mask].all()
    experts = hf.model.layers[LAYER].mlp.experts
    with torch.no_grad():
        gate, up = (x @ experts.gate_up_proj[EXPERT].T).chunk(2, dim=-1)
        act = F.silu(gate) * up
        expected = {
            "act": act * chosen[..., None],
            "out": act @ experts.down_proj[EXPERT].T * chosen[..., None],
            "input": x * chosen[..., None],
            "weight": (seen[Site("expert_weights", LAYER)] * (index == EXPERT)).sum(-1),
        }
    for name, tensor in expected.items():
        same(saved[name].value, tensor, prompt)
    for one, other in zip(
        real_rows(saved["chosen"].value, prompt), expected_rows(chosen, prompt), strict=True
    ):
        assert torch.equal(one, other)


@every_implementation
def test_an_expert_is_written_as_in_a_block_written_by_hand(implementation: str) -> None:
    hf = built()
    hf.set_experts_implementation(implementation)
    model, before = tl.wrap(hf), plain(hf)
    v = torch.randn(48, generator=torch.Generator().manual_seed(5))
    edits: dict[str, tuple[Callable[[Any], object], Callable[[Tensor, Tensor], Tensor]]] = {
        "removed": (lambda one: setattr(one, "out", 0), lambda rows, out: 0 * out),
        "neurons removed": (lambda one: setattr(one, "act", 0), lambda rows, out: 0 * out),
        "weight removed": (lambda one: setattr(one, "weight", 0.0), lambda rows, out: 0 * out),
        "scaled": (lambda one: setattr(one, "out", one.out * 2.0), lambda rows, out: 2 * out),
        "moved": (lambda one: setattr(one, "out", one.out + v), lambda rows, out: out + v),
        "assigned": (lambda one: setattr(one, "out", v.numpy()), lambda rows, out: v),
        "a function of what it received": (
            lambda one: setattr(one, "out", one.input),
            lambda rows, out: rows,
        ),
    }
    for name, (block, does) in edits.items():
        with an_expert_that(hf, does):
            want = plain(hf)
        assert (want - before).abs().max() > 1e-3, name
        close(logits_of(model, lambda layer, block=block: block(layer.expert(EXPERT))), want)
    with an_expert_that(hf, lambda rows, out: out):
        close(plain(hf), before)  # the block by hand is the model's


def test_a_part_of_an_expert_is_assigned_and_patched_from_another_prompt() -> None:
    model = tl.wrap(built())
    with model.trace(ROWS) as source:
        model.layers[LAYER].expert(EXPERT).out.save("out")
        model.layers[LAYER].expert(EXPERT).chosen.save("chosen")
    assert source["chosen"][:, -2:].any()

    def patched(layer: Any) -> None:
        layer.expert(EXPERT).out[:, -2:] = source["out"][:, -2:] * 3

    def whole(layer: Any) -> None:
        mask = torch.zeros(source["chosen"].shape, dtype=torch.bool)
        mask[:, -2:] = True
        places = (layer.expert_index == EXPERT) & mask[..., None]
        layer.expert_out = tl.where(places[..., None], layer.expert_out * 3, layer.expert_out)

    def by_token(layer: Any) -> None:
        layer.expert(EXPERT).out.tok[-2:] *= 3

    def in_place(layer: Any) -> None:
        layer.expert(EXPERT).out[:, -2:] *= 3

    want = logits_of(model, whole)
    assert (want - logits_of(model, lambda layer: None)).abs().max() > 1e-3
    for block in (patched, by_token, in_place):
        close(logits_of(model, block), want)


def test_the_same_expert_of_several_layers() -> None:
    model = tl.wrap(built())
    with model.trace(ROWS):
        both = model.layers[:2].expert(EXPERT).out.save()
        each = [model.layers[layer].expert(EXPERT).out.save() for layer in (0, 1)]
    assert torch.equal(both.value, torch.stack([one.value for one in each]))
    with model.trace(ROWS):
        model.layers[:2].expert(EXPERT).out = 0
        model.layers[:2].expert(0).mask()
        mapped = model.logits.save()
    with model.trace(ROWS):
        for layer in (0, 1):
            model.layers[layer].expert(EXPERT).out = 0
            model.layers[layer].expert(0).mask()
        alone = model.logits.save()
    assert torch.equal(mapped.value, alone.value)
    with model.trace(ROWS):
        model.layers[:2].expert(1).force()
        index = model.layers[0].expert_index.save()
    assert (index.value == 1).any(-1).all()


# --- who goes where --------------------------------------------------------------------------------------------------


@every_family
def test_a_masked_expert_is_never_chosen(family: str) -> None:
    hf = built(family)
    model = tl.wrap(hf)
    with model.trace(ROWS):
        plainly = model.layers[LAYER].expert(EXPERT).chosen.save()
    assert plainly.value.any()
    with model.trace(ROWS):
        model.layers[LAYER].expert(EXPERT).mask()
        index, weights = model.layers[LAYER].expert_index.save(), model.layers[LAYER].expert_weights.save()
        masked = model.logits.save()
    assert not (index.value == EXPERT).any()
    assert (weights.value > 0).all()
    with model.trace(ROWS):
        model.layers[LAYER].router_logits[..., EXPERT] = float("-inf")
        spelled = model.logits.save()
    assert torch.equal(masked.value, spelled.value)
    if family == "qwen3_moe":
        out = torch.tensor([0.0, 0.0, float("-inf"), 0.0])
        with (
            torch.no_grad(),
            edited_router(hf, f"model.layers.{LAYER}.mlp.gate", {"router_logits": lambda h: h + out}),
        ):
            want = plain(hf)
        assert torch.equal(masked.value, want)


def test_a_masked_expert_is_never_chosen_for_its_bias() -> None:
    """A chance of 0 and a bias may be more than what others have: minus infinity is no chance of 0."""
    hf = built("deepseek_v3")
    model = tl.wrap(hf)
    layer = model.anatomy.layers_with("router_logits")[-1]
    router = hf.model.layers[layer].mlp.gate
    router.e_score_correction_bias[EXPERT] = 5.0
    with model.trace(ROWS):
        before = model.layers[layer].expert(EXPERT).chosen.save()
    assert before.value.all()
    with model.trace(ROWS):
        model.layers[layer].expert(EXPERT).mask()
        index = model.layers[layer].expert_index.save()
    assert not (index.value == EXPERT).any()


@every_family
def test_a_forced_expert_takes_the_place_and_the_weight_of_the_last(family: str) -> None:
    hf = built(family)
    model = tl.wrap(hf)
    names = ("expert_index", "expert_weights", "router_logits")
    with model.trace(ROWS) as before:
        for name in names:
            getattr(model.layers[LAYER], name).save(name)
    with model.trace(ROWS) as after:
        model.layers[LAYER].expert(EXPERT).force()
        for name in names:
            getattr(model.layers[LAYER], name).save(name)
        model.logits.save("logits")
    index = before["expert_index"].clone()
    missing = ~(index == EXPERT).any(-1)
    assert missing.any()
    assert not missing.all()
    index[..., -1] = torch.where(missing, EXPERT, index[..., -1])  # the experts come best first
    assert torch.equal(after["expert_index"], index)
    for name in names[1:]:
        assert torch.equal(after[name], before[name])

    def forced(module: Any, args: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (*output[:2], index.flatten(0, 1))

    router = hf.get_submodule(model.anatomy.tap(Site("expert_index", LAYER))[2])
    hook = router.register_forward_hook(forced)
    want = plain(hf)
    hook.remove()
    assert torch.equal(after["logits"], want)
    assert (want - plain(hf)).abs().max() > 1e-3


def test_some_tokens_alone_are_meant() -> None:
    model = tl.wrap(built())

    def index(block: Callable[[Any], object]) -> list[Tensor]:
        with model.trace(UNEVEN):
            block(model.layers[LAYER])
            found = model.layers[LAYER].expert_index.save()
        return [one[0] for one in found.value]

    before = index(lambda layer: None)
    masked = index(lambda layer: layer.expert(EXPERT).mask(where=model.positions >= 2))
    forced = index(lambda layer: layer.expert(EXPERT).force(where=model.positions < 2))
    assert any((one[2:] == EXPERT).any() for one in before)
    assert any(not (one[:2] == EXPERT).any(-1).all() for one in before)
    for plainly, one, other in zip(before, masked, forced, strict=True):
        assert torch.equal(one[:2], plainly[:2])
        assert not (one[2:] == EXPERT).any()
        assert (other[:2] == EXPERT).any(-1).all()
        assert torch.equal(other[2:], plainly[2:])


def test_a_written_choice_is_seen_by_what_comes_after() -> None:
    """The router's logits decide first; what is written to the choice then stands, and the experts work by it."""
    model = tl.wrap(built())
    with model.trace(ROWS):
        layer = model.layers[LAYER]
        layer.router_logits[..., 0] = float("-inf")
        layer.expert_index = torch.tensor([0, 3])
        index, out = layer.expert_index.save(), layer.expert_out.save()
        first, x = layer.expert(0).out.save(), layer.mlp_in.save()
    assert torch.equal(index.value, torch.tensor([0, 3]).expand_as(index.value))
    assert torch.equal(first.value, out.value[..., 0, :])
    experts = model.hf.model.layers[LAYER].mlp.experts
    with torch.no_grad():
        gate, up = (x.value @ experts.gate_up_proj[0].T).chunk(2, dim=-1)
        close(first.value, (F.silu(gate) * up) @ experts.down_proj[0].T)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (lambda layer: layer.__setattr__("expert_index", torch.tensor([1, 4])), "4 was written to"),
        (lambda layer: layer.__setattr__("expert_index", torch.tensor([-1, 0])), "-1 was written to"),
        (lambda layer: layer.__setattr__("expert_index", 1), "sends a token to expert 1 twice"),
        (lambda layer: [layer.expert(number).mask() for number in (0, 1, 2)], "leaves 1 at some token"),
    ],
    ids=["beyond", "negative", "twice", "too few"],
)
def test_a_choice_that_is_none_is_refused_at_its_line(block: Any, words: str) -> None:
    hf = built()
    model = tl.wrap(hf)
    with pytest.raises(ExpertChoiceError, match=words) as failure, untouched(hf):
        logits_of(model, block)
    assert failure.value.at is not None
    assert failure.value.at.filename == __file__


def test_what_is_not_there_is_refused_by_name() -> None:
    model = tl.wrap(built())
    for number, words in (
        (4, "there is no expert 4"),
        (-5, "no expert -5"),
        ("a", "with a number"),
        (True, "number"),
    ):
        with pytest.raises(ExpertRangeError, match=words):
            model.layers[LAYER].expert(number)
    assert repr(model.layers[LAYER].expert(-1)) == "model.layers[1].expert(3)"
    assert "expert" in dir(model.layers[LAYER])
    assert "expert" not in dir(model.layers[2])
    with model.trace(ROWS):
        model.logits.save()
        expert = model.layers[LAYER].expert(EXPERT)
        with pytest.raises(UnknownSiteError, match="has no 'outt'"):
            expert.outt  # it raises
        with pytest.raises(WriteTargetError, match="can be read but not written"):
            expert.chosen = 0
        with pytest.raises(AbsentSiteError, match="layer 2 has one MLP for all tokens"):
            model.layers[2].expert(EXPERT).out  # it raises
        old = expert.out
        model.layers[LAYER].expert_out = model.layers[LAYER].expert_out * 2
        with pytest.raises(StaleValueError):
            old[:, -1] = 0

    def lost(layer: Any) -> None:
        found = layer.expert(EXPERT).out
        found += 1.0

    with pytest.raises(LostUpdateError):
        logits_of(model, lost)
