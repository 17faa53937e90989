"""The oracle against plain transformers: what everything else is compared with has to be right itself."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.support.batches import EVEN, RAGGED, SINGLE, Batch, random_batch
from tests.support.families import EVERY, LAYERS
from tests.support.hand_forward import hand_forward, hand_sites, head_dim, unchanged
from tests.support.plain import captured, edited, hook_point, plain_logits, untouched
from tracelens.ir.sites import Effect, Site

BATCHES = {"single": random_batch(SINGLE), "even": random_batch(EVEN), "ragged": random_batch(RAGGED)}

every_family = pytest.mark.parametrize("family", EVERY)
every_batch = pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)


@functools.cache
def built(family: str, attn: str = "eager", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return EVERY[family].build(attn=attn, dtype=dtype)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def hand_tensors(model: PreTrainedModel, batch: Batch) -> dict[Site, Tensor]:
    seen: dict[Site, Tensor] = {}

    def look(site: Site, tensor: Tensor) -> Tensor:
        assert site not in seen
        seen[site] = tensor
        return tensor

    with torch.no_grad():
        hand_forward(model, *batch, look)
    return seen


def noise(site: Site, shape: torch.Size) -> Tensor:
    generator = torch.Generator().manual_seed(len(site.name) + 31 * (site.layer or 0))
    return 0.5 * torch.randn(shape, generator=generator)


# --- without intervention ----------------------------------------------------------------------------------------


@every_family
@every_batch
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_equals_eager_transformers_bit_for_bit(family: str, batch: Batch, dtype: torch.dtype) -> None:
    model = built(family, "eager", dtype)
    with torch.no_grad():
        expected = plain_logits(model, batch)
        actual = hand_forward(model, *batch)
    assert actual.dtype == dtype
    # Every position, the padding too: the same operations in the same order.
    assert torch.equal(actual, expected)


@every_family
@every_batch
def test_equals_sdpa_transformers(family: str, batch: Batch) -> None:
    model = built(family, "sdpa")
    with torch.no_grad():
        expected = plain_logits(model, batch)
    # At the padding the two kernels differ, and mean nothing.
    close(hand_forward(model, *batch)[batch.mask], expected[batch.mask])


@every_family
def test_rows_of_a_padded_batch_equal_the_rows_alone(family: str) -> None:
    model, batch = built(family), BATCHES["ragged"]
    together = hand_forward(model, *batch)
    for row in range(len(RAGGED)):
        close(together[row][batch.mask[row]], hand_forward(model, *batch.row(row))[0])


def test_sliding_windows_cut() -> None:
    for sliding in ("mistral_sliding", "qwen2_sliding", "gemma3"):
        batch = BATCHES["single"]
        whole = EVERY[sliding].build(attn="eager", sliding_window=64)
        cut, full = hand_forward(built(sliding), *batch), hand_forward(whole, *batch)
        close(cut[:, :4], full[:, :4])
        assert (cut - full)[:, 4:].abs().amax(-1).min() > 1e-3


@every_family
def test_gradients_equal_those_of_transformers(family: str) -> None:
    batch = BATCHES["ragged"]
    gradients = []
    for forward in (plain_logits, lambda model, batch: hand_forward(model, *batch)):
        model = EVERY[family].build(attn="eager")
        logits = forward(model, batch)[batch.mask]
        logits.logsumexp(dim=-1).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    expected, actual = gradients
    assert all(gradient is not None for gradient in expected.values())
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], atol=1e-4, rtol=1e-4)


# --- every site --------------------------------------------------------------------------------------------------


@every_family
@every_batch
def test_every_site_equals_a_hook_placed_by_hand(family: str, batch: Batch) -> None:
    model = built(family)
    sites = hand_sites(model)[1:]
    with torch.no_grad(), captured(model, sites) as expected:
        plain_logits(model, batch)
    actual = hand_tensors(model, batch)
    for site in sites:
        (tensor,) = expected[site]
        close(actual[site], tensor)


@every_family
def test_the_stream_equals_output_hidden_states(family: str) -> None:
    # A model of its own: asking for hidden states leaves hooks of transformers on it for good.
    model, batch = EVERY[family].build(attn="eager"), BATCHES["ragged"]
    with torch.no_grad():
        states = model(
            input_ids=batch.input_ids,
            attention_mask=batch.mask.long(),
            position_ids=batch.position_ids,
            use_cache=False,
            output_hidden_states=True,
        ).hidden_states
    actual = hand_tensors(model, batch)
    assert len(states) == LAYERS + 1
    for layer in range(LAYERS):
        close(actual[Site("resid_pre", layer)], states[layer])
    close(actual[Site("final_norm")], states[-1])


@every_family
@every_batch
def test_identities(family: str, batch: Batch) -> None:
    model = built(family)
    at = hand_tensors(model, batch)
    start = at[Site("embed")] + at.get(Site("pos_embed"), torch.zeros(()))
    close(start, at[Site("resid_pre", 0)])
    for layer in range(LAYERS):
        if layer + 1 < LAYERS:
            assert torch.equal(at[Site("resid_post", layer)], at[Site("resid_pre", layer + 1)])
        here = {site.name: tensor for site, tensor in at.items() if site.layer == layer}
        assert torch.equal(here["attn_in"], here["attn_norm"])
        assert torch.equal(here["attn_add"], here.get("attn_post_norm", here["attn_out"]))
        assert torch.equal(here["resid_mid"], here["resid_pre"] + here["attn_add"])
        assert torch.equal(here["mlp_in"], here["mlp_norm"])
        assert torch.equal(here["mlp_add"], here.get("mlp_post_norm", here["mlp_out"]))
        if family.startswith("gemma"):
            for name in ("attn", "mlp"):
                assert (here[f"{name}_add"] - here[f"{name}_out"]).abs().max() > 0.1
        assert torch.equal(here["resid_post"], here["resid_mid"] + here["mlp_add"])
    assert torch.equal(at[Site("token_mask")], batch.mask)
    with torch.no_grad():
        assert torch.equal(model.get_output_embeddings()(at[Site("final_norm")]), at[Site("lm_head")])
    if (cap := getattr(model.config, "final_logit_softcapping", None)) is None:
        assert torch.equal(at[Site("logits")], at[Site("lm_head")])
    else:
        assert at[Site("lm_head")].abs().max() > cap > at[Site("logits")].abs().max()


@every_family
def test_sites_come_in_order_and_complete(family: str) -> None:
    model = built(family)
    called = list(hand_tensors(model, BATCHES["single"]))
    assert called == hand_sites(model)
    orders = [site.order for site in called]
    assert orders == sorted(orders)
    names = {site.name for site in called}
    assert ("pos_embed" in names) == family.startswith("gpt2")
    assert ("mlp_up" in names) == (not family.startswith("gpt2"))
    assert ("router_logits" in names) == (family == "qwen3_moe")


@every_family
def test_shapes_are_those_of_the_vocabulary(family: str) -> None:
    model, batch = built(family), BATCHES["ragged"]
    batch_size, width = batch.input_ids.shape
    heads = {
        "H": 4,
        "K": 4 if family.startswith("gpt2") else 2,
        **dict.fromkeys("cd", head_dim(model.config)),
    }
    sizes = {
        "B": batch_size,
        "P": width,
        "S": width,
        "D": 48,
        "M": 80,
        "V": 97,
        "E": 4,
        "k": 2,
        "N": 40,
        **heads,
    }
    for site, tensor in hand_tensors(model, batch).items():
        assert tensor.shape == tuple(sizes[str(dim)] for dim in site.kind.shape), site
        own = {"token_mask": torch.bool, "expert_index": torch.int64}
        assert tensor.dtype == own.get(site.name, torch.float32), site


# --- writes ------------------------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_every_write_changes_the_logits_as_an_edit_of_transformers_does(
    family: str, dtype: torch.dtype
) -> None:
    model, batch = built(family, "eager", dtype), BATCHES["ragged"]
    with torch.no_grad():
        untraced = hand_forward(model, *batch)
    for site in hand_sites(model)[1:]:
        if site.kind.effect is Effect.NONE or site.kind.dtype is not None:
            continue

        def edit(tensor: Tensor, site: Site = site) -> Tensor:
            return tensor + noise(site, tensor.shape).to(dtype)

        def intercept(at: Site, tensor: Tensor, site: Site = site) -> Tensor:
            return edit(tensor) if at == site else tensor

        with torch.no_grad():
            with edited(model, site, edit):
                expected = plain_logits(model, batch)
            actual = hand_forward(model, *batch, intercept)
        assert (actual - untraced)[batch.mask].abs().max() > 1e-3, site
        assert torch.equal(actual, expected), site


@every_family
def test_branch_writes_leave_the_stream_and_stream_writes_do_not(family: str) -> None:
    """Zero at a site of layer 1: which of the later tensors of that layer follow?"""
    model, batch = built(family), BATCHES["ragged"]
    clean = hand_tensors(model, batch)

    def zeroed(site: Site) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}

        def intercept(at: Site, tensor: Tensor) -> Tensor:
            tensor = torch.zeros_like(tensor) if at == site else tensor
            if at.layer == 1:
                seen[at.name] = tensor
            return tensor

        with torch.no_grad():
            hand_forward(model, *batch, intercept)
        return seen

    def changed(site: Site) -> set[str]:
        return {
            name for name, tensor in zeroed(site).items() if not torch.equal(tensor, clean[Site(name, 1)])
        }

    mlp = {"mlp_norm", "mlp_in", "mlp_pre", "mlp_up", "mlp_act", "mlp_out", "mlp_post_norm", "mlp_add"}
    mlp = (mlp | {"router_logits", "expert_index", "expert_weights", "expert_act", "expert_out"}) & {
        site.name for site in clean if site.layer == 1
    }
    assert changed(Site("mlp_norm", 1)) == mlp | {"resid_post"}
    assert changed(Site("resid_mid", 1)) == mlp | {"resid_mid", "resid_post"}
    assert changed(Site("mlp_add", 1)) == {"mlp_add", "resid_post"}
    assert changed(Site("attn_add", 1)) == mlp | {"attn_add", "resid_mid", "resid_post"}

    # A branch site set to zero: the rest of the sum still stands. A stream site: nothing of it does.
    after = zeroed(Site("mlp_norm", 1))
    assert torch.equal(after["resid_post"], clean[Site("resid_mid", 1)] + after["mlp_add"])
    after = zeroed(Site("resid_mid", 1))
    assert torch.equal(after["resid_post"], after["mlp_add"])


@every_family
def test_gradients_flow_through_what_intercept_returns(family: str) -> None:
    """The derivative by a site, against a difference quotient in float64."""
    model, batch = built(family), BATCHES["ragged"]
    site = Site("resid_mid", 1)
    direction = noise(site, torch.Size((*batch.mask.shape, 48)))
    leaf: list[Tensor] = []

    def loss(scale: float = 0.0) -> Tensor:
        def intercept(at: Site, tensor: Tensor) -> Tensor:
            if at != site:
                return tensor
            leaf[:] = [(tensor.detach() + scale * direction).requires_grad_()]
            return leaf[0]

        return hand_forward(model, *batch, intercept)[:, -1, 5].sum()

    (gradient,) = torch.autograd.grad(loss(), leaf)
    step = 1e-2
    with torch.no_grad():
        quotient = (loss(step) - loss(-step)) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), quotient, atol=2e-3, rtol=2e-3)


def test_token_mask_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="token_mask"):
        hand_forward(
            built("llama"),
            *BATCHES["ragged"],
            lambda site, tensor: ~tensor if site.name == "token_mask" else tensor,
        )


# --- what is not written is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {"hidden_act": "gelu"}),
        ("gemma3", {"hidden_activation": "silu"}),
        ("gemma3", {"use_bidirectional_attention": True}),
        ("gemma3", {"attn_logit_softcapping": 30.0}),
        ("gpt2", {"activation_function": "relu"}),
        ("gpt2", {"reorder_and_upcast_attn": True}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    ],
)
def test_what_is_not_written_is_refused(family: str, overrides: dict[str, object]) -> None:
    model = EVERY[family].build(**overrides)
    with pytest.raises(ValueError, match="not written here"):
        hand_forward(model, *BATCHES["single"], unchanged)


def test_training_mode_and_rounded_frequencies_are_refused() -> None:
    with pytest.raises(ValueError, match="training mode"):
        hand_forward(EVERY["gpt2"].build().train(), *BATCHES["single"])
    with pytest.raises(ValueError, match="rounded"):
        hand_forward(EVERY["llama"].build().to(torch.bfloat16), *BATCHES["single"])


# --- the models and the fingerprint ------------------------------------------------------------------------------


@every_family
def test_models_are_random_everywhere_and_reproducible(family: str) -> None:
    before = torch.random.get_rng_state()
    one, same, other = (EVERY[family].build(seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, same.get_parameter(name)), name
        assert not torch.equal(parameter, other.get_parameter(name)), name
        assert parameter.std() > 0.05, name
    tied = one.get_input_embeddings().weight is one.get_output_embeddings().weight
    assert tied == family.endswith("_tied")
    assert not one.training
    rounded = EVERY[family].build(dtype=torch.bfloat16)
    for name, parameter in rounded.named_parameters():
        assert torch.equal(parameter, one.get_parameter(name).to(torch.bfloat16)), name


def test_parts_that_make_the_families_differ_are_there() -> None:
    assert "model.layers.0.self_attn.q_proj.bias" in built("qwen2").state_dict()
    assert "model.layers.0.self_attn.q_norm.weight" in built("qwen3").state_dict()
    assert built("gpt2").transformer.h[0].mlp.dropout.p == 0.1
    assert built("mistral").config.sliding_window is None
    assert built("mistral_sliding").config.sliding_window == 4
    assert built("gemma3").config.layer_types == ["full_attention", "sliding_attention", "full_attention"]
    assert built("qwen2_sliding").config.layer_types == ["full_attention", *["sliding_attention"] * 2]


@every_family
def test_a_plain_run_leaves_the_fingerprint(family: str) -> None:
    model = EVERY[family].build()
    with untouched(model):
        plain_logits(model, BATCHES["ragged"])
        hand_forward(model, *BATCHES["ragged"])
        with edited(model, Site("resid_mid", 1), torch.zeros_like), captured(model, [Site("resid_pre", 0)]):
            plain_logits(model, BATCHES["ragged"])


def _zero_a_weight(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.lm_head.weight[0] = 0


def _hook_on_a_parameter(model: PreTrainedModel) -> None:
    model.lm_head.weight.register_hook(lambda gradient: gradient)


def _same_name_other_parameter(model: PreTrainedModel) -> None:
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())


TOUCHES = {
    "forward hook": lambda model: model.model.norm.register_forward_hook(lambda *_: None),
    "forward pre-hook": lambda model: model.model.norm.register_forward_pre_hook(lambda *_: None),
    "backward hook": lambda model: model.model.norm.register_full_backward_hook(lambda *_: None),
    "state dict hook": lambda model: model.register_state_dict_post_hook(lambda *_: None),
    "parameter hook": _hook_on_a_parameter,
    "forward": lambda model: setattr(model.model.norm, "forward", model.model.norm.forward),
    "attribute": lambda model: setattr(model.model.layers[1], "leftover", 1),
    "training": lambda model: model.model.layers[0].train(),
    "attention": lambda model: model.set_attn_implementation("eager"),
    "value": _zero_a_weight,
    "parameter": _same_name_other_parameter,
    "requires_grad": lambda model: model.lm_head.weight.requires_grad_(False),
    "gradient": lambda model: setattr(model.lm_head.weight, "grad", torch.zeros(97, 48)),
    "configuration": lambda model: setattr(model.config, "use_cache", False),
    "submodule": lambda model: setattr(model.model, "norm", torch.nn.Identity()),
}


@pytest.mark.parametrize("touch", TOUCHES.values(), ids=TOUCHES)
def test_the_fingerprint_notices(touch) -> None:
    model = EVERY["llama"].build()
    with pytest.raises(AssertionError, match="the model was changed"), untouched(model):
        touch(model)


def test_the_difference_is_readable() -> None:
    model = EVERY["llama"].build()
    with pytest.raises(AssertionError) as failure, untouched(model):
        model.model.layers[1].leftover = 1
    assert str(failure.value) == (
        "the model was changed:\n"
        "model.layers.1: attributes\n"
        "    before: nothing more\n"
        "    after:  leftover\n"
        "model.layers.1: leftover\n"
        "    before: absent\n"
        "    after:  1"
    )


def test_hook_points_cover_the_sites() -> None:
    for family in EVERY:
        model = built(family)
        for site in hand_sites(model):
            if site.kind.effect is not Effect.NONE and site.kind.dtype is None:
                path, _ = hook_point(model, site)
                model.get_submodule(path)
