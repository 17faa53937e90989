"""Qwen3-MoE: layers with experts and without, what only some layers have, and the router."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tracelens as tl
from tests.conformance.test_reads import close, read
from tests.support.batches import EVEN, batch, random_rows
from tests.support.families import FAMILIES
from tests.support.hand_forward import hand_forward, hand_sites, with_experts
from tests.support.plain import edited_router, plain_logits, untouched
from tracelens.errors import AbsentSiteError, SiteMismatchError
from tracelens.ir.sites import Site

ROWS = random_rows(EVEN)
ROUTED = ("router_logits", "expert_index", "expert_weights")
OF_EXPERTS = (*ROUTED, "expert_act", "expert_out")
NEURONS = ("mlp_pre", "mlp_up", "mlp_act")


def built(**settings: Any) -> Any:
    return FAMILIES["qwen3_moe"].build(**settings)


# --- what only some layers have --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NEURONS)
def test_a_mixture_of_experts_has_no_neurons_of_all_tokens(name: str) -> None:
    model = tl.wrap(built())
    for layer in (0, 1):
        with model.trace(ROWS):
            getattr(
                model.layers[2], name
            ).save()  # this layer has one MLP; what holds there does not hold elsewhere
            with pytest.raises(AbsentSiteError) as failure:
                getattr(model.layers[layer], name)
        assert f"layer {layer} is a mixture of experts: experts work on the rows" in failure.value.problem
        assert failure.value.instead == f"model.layers[2].{name}"
        assert failure.value.at is not None
        assert failure.value.at.filename == __file__


@pytest.mark.parametrize("name", OF_EXPERTS)
def test_a_layer_without_experts_has_no_router(name: str) -> None:
    model = tl.wrap(built())
    with (
        pytest.raises(AbsentSiteError, match="layer 2 has one MLP for all tokens") as failure,
        model.trace(ROWS),
    ):
        getattr(model.layers[:], name).save()
    assert failure.value.instead == f"model.layers[[0, 1]].{name}"
    assert (name in dir(model.layers[0])) is True
    assert (name in dir(model.layers[2])) is False


def test_the_table_of_sites_says_which_layers_have_one() -> None:
    table = tl.wrap(built()).sites()
    assert table["mlp_act"].layers == (2,)
    assert table["mlp_act"].others is not None
    assert table["mlp_act"].others.startswith("layer 0 is a mixture of experts")
    assert table["mlp_act"].shape == "[B, P, 80]"
    assert table["router_logits"].layers == (0, 1)
    assert table["router_logits"].shape == "[B, P, 4]"
    assert (table["expert_index"].shape, table["expert_index"].dtype) == ("[B, P, 2]", "int64")
    assert table["expert_index"].writable
    assert table["expert_out"].shape == "[B, P, 2, 48]"
    assert table["expert_act"].shape == "[B, P, 2, 40]"
    assert table["resid_mid"].layers == ()
    assert "in layers 0, 1; layer 2 has one MLP for all tokens" in repr(table)


@pytest.mark.parametrize(
    ("settings", "mixtures"),
    [
        ({"mlp_only_layers": [], "decoder_sparse_step": 2}, (1,)),
        ({"mlp_only_layers": [1], "norm_topk_prob": False}, (0, 2)),
        ({"mlp_only_layers": [], "num_experts_per_tok": 1}, (0, 1, 2)),
        ({"mlp_only_layers": [0, 1, 2]}, ()),
    ],
    ids=["sparse step", "raw weights", "one expert", "none"],
)
def test_every_arrangement_of_layers(settings: dict[str, Any], mixtures: tuple[int, ...]) -> None:
    hf = built(**settings)
    model, prompt = tl.wrap(hf), batch(ROWS)
    assert with_experts(hf.config) == mixtures
    expected: dict[Site, Tensor] = {}
    with torch.no_grad():
        hand_forward(hf, *prompt, lambda site, tensor: expected.setdefault(site, tensor))
    with untouched(hf), model.trace(ROWS):
        saved = {site: read(model, site).save() for site in hand_sites(hf)[1:]}
    for site, handle in saved.items():
        close(handle.value, expected[site])
    for name in ROUTED:
        assert tuple(model.anatomy.layers_with(name)) == mixtures
    for name in NEURONS:
        assert tuple(model.anatomy.layers_with(name)) == tuple(set(range(3)) - set(mixtures))
    if not mixtures:
        assert model.sites()["router_logits"].absent == (
            "each layer has one MLP for all tokens, and no experts that tokens are sent to"
        )
        with (
            pytest.raises(AbsentSiteError, match="models have no 'router_logits': layer 1 has"),
            model.trace(ROWS),
        ):
            model.layers[1].router_logits.save()
        return
    # Where a write is to show, in the arrangement of this model.
    layer = mixtures[-1]
    prefix = f"model.layers.{layer}.mlp.gate"
    shift = torch.tensor([0.0, 3.0, -2.0, 1.0])
    with torch.no_grad(), edited_router(hf, prefix, {"router_logits": lambda h: h + shift}):
        want = plain_logits(hf, prompt)
    with untouched(hf), model.trace(ROWS):
        model.layers[layer].router_logits += shift
        logits = model.logits.save()
    assert torch.equal(logits.value, want)
    with torch.no_grad():
        assert (want - plain_logits(hf, prompt)).abs().max() > 1e-3


# --- the router ------------------------------------------------------------------------------------------------------


def test_written_logits_choose_experts_and_weights_anew() -> None:
    hf = built()
    model, prompt = tl.wrap(hf), batch(ROWS)
    banned = torch.tensor([0.0, 0.0, 0.0, -1e9])
    with untouched(hf), model.trace(ROWS):
        layer = model.layers[1]
        layer.router_logits += banned
        logits, index, weights = (getattr(layer, name).save() for name in ROUTED)
        out = model.logits.save()
    with model.trace(ROWS):
        plain = model.layers[1].expert_index.save()
    assert (plain.value == 3).any()
    assert not (index.value == 3).any()
    chances = logits.value.softmax(-1).topk(2, dim=-1)
    assert torch.equal(index.value, chances.indices)
    close(weights.value, chances.values / chances.values.sum(-1, keepdim=True))
    with (
        torch.no_grad(),
        edited_router(hf, "model.layers.1.mlp.gate", {"router_logits": lambda h: h + banned}),
    ):
        want = plain_logits(hf, prompt)
    assert torch.equal(out.value, want)


def test_an_expert_is_taken_out_by_its_weight() -> None:
    """The experts that a token goes to are there before their weights, so one can depend on the other."""
    hf = built()
    model, prompt = tl.wrap(hf), batch(ROWS)
    with untouched(hf), model.trace(ROWS):
        layer = model.layers[0]
        layer.expert_weights = layer.expert_weights * (layer.expert_index != 2)
        out = model.logits.save()
    zeroed = built()
    with torch.no_grad():
        zeroed.model.layers[0].mlp.experts.down_proj[2] = 0.0
        want, plain = plain_logits(zeroed, prompt), plain_logits(hf, prompt)
    close(out.value, want)
    assert (want - plain).abs().max() > 1e-3


def test_logits_and_weights_written_together() -> None:
    hf = built()
    model, prompt = tl.wrap(hf), batch(ROWS)
    shift = torch.tensor([1.0, -2.0, 0.5, 0.0])
    with model.trace(ROWS):
        layer = model.layers[1]
        layer.expert_weights *= 0.5
        layer.router_logits += shift
        out = model.logits.save()

    def halved(module: Any, args: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        logits = output[0] + shift
        weights, index = logits.softmax(-1).topk(2, dim=-1)
        return logits, 0.5 * weights / weights.sum(-1, keepdim=True), index

    hook = hf.model.layers[1].mlp.gate.register_forward_hook(halved)
    with torch.no_grad():
        want = plain_logits(hf, prompt)
    hook.remove()
    close(out.value, want)


def test_a_router_of_another_kind_is_read_and_its_logits_are_not_written() -> None:
    """What follows from other logits is not known of it."""
    hf = built()
    router = hf.model.layers[1].mlp.gate
    own = router.forward

    def sharper(hidden_states: Tensor) -> tuple[Tensor, ...]:
        logits, weights, index = own(hidden_states)
        return logits, weights**2, index

    router.forward = sharper
    model = tl.wrap(hf)
    with model.trace(ROWS):
        weights = model.layers[1].expert_weights.save()
        model.layers[0].router_logits += torch.ones(4)
    assert (weights.value.sum(-1) < 0.99).any()

    def written() -> None:
        with model.trace(ROWS):
            model.layers[1].router_logits += 1.0
            model.logits.save()

    with pytest.raises(SiteMismatchError, match="makes something else of"):
        written()


def test_gradients_of_the_router_are_those_of_autograd() -> None:
    hf = built()
    model, prompt = tl.wrap(hf), batch(ROWS)
    with untouched(hf), model.trace(ROWS):
        layer = model.layers[0]
        loss = model.logits[:, -1].pow(2).mean()
        found = [value.save() for value in tl.grad(loss, [layer.router_logits, layer.expert_weights])]
    leaves: dict[Site, Tensor] = {}

    def leaf(site: Site, tensor: Tensor) -> Tensor:
        if site not in (Site("router_logits", 0), Site("expert_weights", 0)):
            return tensor
        if site.name == "router_logits":
            tensor = tensor.detach().requires_grad_()
        else:
            tensor.retain_grad()
        leaves[site] = tensor
        return tensor

    hand_forward(hf, *prompt, leaf)[:, -1].pow(2).mean().backward()
    for value, name in zip(found, ("router_logits", "expert_weights"), strict=True):
        gradient = leaves[Site(name, 0)].grad
        assert gradient is not None
        assert gradient.abs().max() > 1e-4
        torch.testing.assert_close(value.value, gradient, atol=1e-6, rtol=1e-4)


def test_text_is_generated_with_other_experts() -> None:
    hf = built()
    model, prompt = tl.wrap(hf), batch(ROWS)
    shift = torch.tensor([4.0, -4.0, 0.0, 0.0])
    with untouched(hf), model.generate(ROWS, max_new_tokens=6) as t:
        model.layers[:2].router_logits += shift

    def generated() -> Tensor:
        found = hf.generate(prompt.input_ids, attention_mask=prompt.mask, max_new_tokens=6, do_sample=False)
        return found[:, prompt.input_ids.shape[1] :]

    plain = generated()
    with (
        edited_router(hf, "model.layers.0.mlp.gate", {"router_logits": lambda h: h + shift}),
        edited_router(hf, "model.layers.1.mlp.gate", {"router_logits": lambda h: h + shift}),
    ):
        want = generated()
    padded = [row + [0] * (6 - len(row)) for row in t.tokens]
    assert padded == want.tolist()
    assert padded != plain.tolist()


# --- by path ---------------------------------------------------------------------------------------------------------


def test_the_router_is_read_and_its_weights_are_written_by_path() -> None:
    hf = built()
    model, path = tl.wrap(hf), "model.layers.1.mlp.gate"
    with untouched(hf), model.trace(ROWS) as t:
        router = model.module(path)
        router.output[0].save("logits")
        router.output[2].save("experts")
        router.output[1] = router.output[1] * 0.5
        model.layers[1].mlp_in.save("mlp_in")
        model.logits.save("out")
    rows = t["mlp_in"].flatten(0, 1)
    close(t["logits"], rows @ hf.get_submodule(path).weight.T)
    assert torch.equal(t["experts"], t["logits"].softmax(-1).topk(2, dim=-1).indices)
    plain = plain_logits(hf, batch(ROWS))
    hook = hf.get_submodule(path).register_forward_hook(lambda _, args, out: (out[0], out[1] * 0.5, out[2]))
    expected = plain_logits(hf, batch(ROWS))
    hook.remove()
    assert torch.equal(t["out"], expected)
    assert (expected - plain).abs().max() > 1e-3
