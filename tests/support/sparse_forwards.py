"""The forward pass of the families in ``sparse_families``, written out from the weights.

As ``more_forwards`` does it for the others: only torch functions on the state dict, and at every site the caller may
look at the tensor and replace it. Written from the modelling files, without the library's tables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.support.hand_forward import Intercept
from tracelens.ir.sites import Site


def sparse_forward(
    model: Any, input_ids: Tensor, mask: Tensor, position_ids: Tensor, intercept: Intercept
) -> Tensor:
    """The logits [B, P, V] of a tiny model in float32, with ``intercept`` called at every site but the inputs'."""
    config = model.config.get_text_config()
    attention, mlp = FORWARDS[config.model_type]
    weights = dict(model.state_dict(keep_vars=True))
    stream = intercept(Site("embed"), F.embedding(input_ids, weights["model.embed_tokens.weight"]))
    for index in range(config.num_hidden_layers):
        layer = Layer(config, weights, f"model.layers.{index}", index, mask, position_ids, intercept)
        resid_pre = layer.at("resid_pre", stream)
        attn_in = layer.at("attn_in", layer.at("attn_norm", layer.normed("input_layernorm", resid_pre)))
        attn_add = layer.at("attn_add", layer.at("attn_out", attention(layer, attn_in)))
        resid_mid = layer.at("resid_mid", resid_pre + attn_add)
        mlp_norm = layer.at("mlp_norm", layer.normed("post_attention_layernorm", resid_mid))
        mlp_out = layer.at("mlp_out", mlp(layer, layer.at("mlp_in", mlp_norm)))
        stream = layer.at("resid_post", resid_mid + layer.at("mlp_add", mlp_out))
    whole = Layer(config, weights, "model", 0, mask, position_ids, intercept)
    final = intercept(Site("final_norm"), whole.normed("norm", stream))
    logits = intercept(Site("lm_head"), F.linear(final, weights["lm_head.weight"]))
    return intercept(Site("logits"), logits)


@dataclass(frozen=True)
class Layer:
    """One layer of one run."""

    config: Any
    weights: Mapping[str, Tensor]
    prefix: str
    index: int
    mask: Tensor
    position_ids: Tensor
    intercept: Intercept

    def at(self, name: str, tensor: Tensor) -> Tensor:
        return self.intercept(Site(name, self.index), tensor)

    def weight(self, name: str) -> Tensor:
        return self.weights[f"{self.prefix}.{name}"]

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weight(f"{name}.weight"), self.weights.get(f"{self.prefix}.{name}.bias"))

    def normed(self, name: str, x: Tensor) -> Tensor:
        # Qwen3-Next keeps a gain as its distance from 1.
        one = 1.0 if self.config.model_type.startswith(("qwen3_next", "qwen3_5")) else 0.0
        return rms(x, self.config.rms_norm_eps) * (one + self.weight(f"{name}.weight"))

    def heads(self, name: str, x: Tensor, width: int) -> Tensor:
        return self.linear(name, x).unflatten(-1, (-1, width))

    def rotated(self, heads: Tensor, width: int | None = None, *, neighbours: bool = False) -> Tensor:
        """RoPE on the first ``width`` numbers of [B, P, H, d]; pairs are neighbours, or of one half and the other."""
        rope = self.config.rope_parameters
        assert rope["rope_type"] == "default"
        width = heads.shape[-1] if width is None else width
        frequencies = rope["rope_theta"] ** (-torch.arange(0, width, 2).float() / width)
        angles = (self.position_ids[..., None].float() * frequencies)[:, :, None]
        turning = heads[..., :width]
        one, other = (
            (turning[..., ::2], turning[..., 1::2])
            if neighbours
            else (turning[..., : width // 2], turning[..., width // 2 :])
        )
        turned = (one * angles.cos() - other * angles.sin(), other * angles.cos() + one * angles.sin())
        both = torch.stack(turned, dim=-1).flatten(-2) if neighbours else torch.cat(turned, dim=-1)
        return torch.cat((both, heads[..., width:]), dim=-1)

    def allowed(self) -> Tensor:
        """Where queries may look, [B, 1, P, S]."""
        places = torch.arange(self.mask.shape[1])
        allowed = places[None, :] <= places[:, None]
        kinds = getattr(self.config, "layer_types", None)
        if kinds is not None and kinds[self.index] == "sliding_attention":
            allowed = allowed & (places[None, :] > places[:, None] - self.config.sliding_window)
        if kinds is not None and kinds[self.index] == "chunked_attention":
            chunks = self.position_ids // self.config.attention_chunk_size
            return (
                (chunks[:, None, :, None] == chunks[:, None, None, :]) & allowed & self.mask[:, None, None, :]
            )
        return allowed[None, None] & self.mask[:, None, None, :]

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        """What each head makes of the values [B, P, H, d]; queries and keys are rotated already."""
        q, k = self.at("q_rot", q), self.at("k_rot", k)
        scale = q.shape[-1] ** -0.5
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
        lowest = torch.finfo(q.dtype).min
        scores = self.at("scores", (q @ k.transpose(2, 3) * scale).masked_fill(~self.allowed(), lowest))
        real = self.mask[:, None, None, :]
        # Whatever is written there, a query that is no padding sees none.
        weights = scores.masked_fill(~real, lowest).exp()
        if sinks is None:
            pattern = scores.masked_fill(~real, lowest).softmax(-1)
        else:
            # As one more key, whose value is nothing.
            pattern = weights / (weights.sum(-1, keepdim=True) + sinks.exp()[None, :, None, None])
        pattern = self.at("pattern", pattern).masked_fill(~real & self.mask[:, None, :, None], 0.0)
        return (pattern @ v).transpose(1, 2)


def rms(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


# --- attention ---------------------------------------------------------------------------------------------------


def _with_sinks(layer: Layer, x: Tensor) -> Tensor:
    width = layer.config.head_dim
    q, k, v = (layer.at(name, layer.heads(f"self_attn.{name}_proj", x, width)) for name in "qkv")
    z = layer.mixed(layer.rotated(q), layer.rotated(k), v, layer.weight("self_attn.sinks"))
    return layer.linear("self_attn.o_proj", layer.at("z", z).flatten(2))


def _normed_flat(layer: Layer, x: Tensor) -> Tensor:
    """OLMoE norms queries and keys over all heads at once."""
    width = layer.config.hidden_size // layer.config.num_attention_heads
    made: dict[str, Tensor] = {}
    for name in "qk":
        flat = layer.at(name, layer.heads(f"self_attn.{name}_proj", x, width)).flatten(2)
        normed = layer.normed(f"self_attn.{name}_norm", flat).unflatten(-1, (-1, width))
        made[name] = layer.rotated(layer.at(f"{name}_normed", normed))
    v = layer.at("v", layer.heads("self_attn.v_proj", x, width))
    return layer.linear("self_attn.o_proj", layer.at("z", layer.mixed(made["q"], made["k"], v)).flatten(2))


def _without_rotation_in_some(layer: Layer, x: Tensor) -> Tensor:
    config, width = layer.config, layer.config.head_dim
    q, k, v = (layer.at(name, layer.heads(f"self_attn.{name}_proj", x, width)) for name in "qkv")
    if config.no_rope_layers[layer.index]:
        q, k = (rms(layer.rotated(each, neighbours=True), config.rms_norm_eps) for each in (q, k))
    else:
        steps = torch.floor((torch.arange(x.shape[1]) + 1.0) / config.floor_scale)
        q = q * (steps.log1p() * config.attn_scale + 1.0)[:, None, None]
    return layer.linear("self_attn.o_proj", layer.at("z", layer.mixed(q, k, v)).flatten(2))


def _latent(layer: Layer, x: Tensor) -> Tensor:
    """DeepSeek-V3: queries of one latent, keys and values of another, and one rotated key for all heads."""
    config = layer.config
    still, turning = config.qk_nope_head_dim, config.qk_rope_head_dim

    def normed(name: str, latent: Tensor) -> Tensor:
        return rms(latent, 1e-6) * layer.weight(f"self_attn.{name}.weight")

    def turned(part: Tensor) -> Tensor:
        pairs = layer.rotated(part, neighbours=True)
        return torch.cat((pairs[..., ::2], pairs[..., 1::2]), dim=-1)

    latent = normed("q_a_layernorm", layer.linear("self_attn.q_a_proj", x))
    q = layer.at("q", layer.heads("self_attn.q_b_proj", latent, still + turning))
    latent, key = layer.linear("self_attn.kv_a_proj_with_mqa", x).split(
        [config.kv_lora_rank, turning], dim=-1
    )
    own = layer.heads("self_attn.kv_b_proj", normed("kv_a_layernorm", latent), still + config.v_head_dim)
    k, v = own[..., :still], layer.at("v", own[..., still:])
    key = turned(key[:, :, None]).expand(*k.shape[:3], turning)
    q = torch.cat((q[..., :still], turned(q[..., still:])), dim=-1)
    z = layer.at("z", layer.mixed(q, torch.cat((k, key), dim=-1), v))
    return layer.linear("self_attn.o_proj", z.flatten(2))


def _hybrid(layer: Layer, x: Tensor) -> Tensor:
    if layer.config.layer_types[layer.index] == "linear_attention":
        return _delta(layer, x)
    width = layer.config.head_dim
    both = layer.heads("self_attn.q_proj", x, 2 * width)
    q, gate = layer.at("q", both[..., :width]), both[..., width:]
    k = layer.heads("self_attn.k_proj", x, width)
    rotated = int(width * layer.config.rope_parameters["partial_rotary_factor"])
    q = layer.rotated(layer.at("q_normed", layer.normed("self_attn.q_norm", q)), rotated)
    k = layer.rotated(layer.at("k_normed", layer.normed("self_attn.k_norm", layer.at("k", k))), rotated)
    v = layer.at("v", layer.heads("self_attn.v_proj", x, width))
    z = layer.at("z", layer.mixed(q, k, v) * gate.sigmoid())
    return layer.linear("self_attn.o_proj", z.flatten(2))


def _delta(layer: Layer, x: Tensor) -> Tensor:
    """The gated delta rule, one token after the other."""
    config = layer.config
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    each, wide, narrow = values // keys, config.linear_value_head_dim, config.linear_key_head_dim
    x = x * layer.mask[..., None]
    if config.model_type == "qwen3_next":
        # Key head by key head, what belongs to it.
        parts = layer.linear("linear_attn.in_proj_qkvz", x).unflatten(-1, (keys, -1))
        q, k, v, z = parts.split([narrow, narrow, each * wide, each * wide], dim=-1)
        b, a = (
            part.flatten(2)
            for part in layer.linear("linear_attn.in_proj_ba", x).unflatten(-1, (keys, 2, each)).unbind(3)
        )
        flat = torch.cat((q.flatten(2), k.flatten(2), v.flatten(2)), dim=-1)
    else:
        flat, z, b, a = (layer.linear(f"linear_attn.in_proj_{name}", x) for name in ("qkv", "z", "b", "a"))
    kernel = layer.weight("linear_attn.conv1d.weight")[:, 0]
    before = F.pad(flat, (0, 0, kernel.shape[1] - 1, 0))
    conv = sum(before[:, at : at + x.shape[1]] * kernel[:, at] for at in range(kernel.shape[1]))
    assert isinstance(conv, Tensor)
    q, k, v = F.silu(conv).split([keys * narrow, keys * narrow, values * wide], dim=-1)
    q, k = (part.unflatten(-1, (keys, narrow)).repeat_interleave(each, dim=2) for part in (q, k))
    q, k = (part * torch.rsqrt(part.pow(2).sum(-1, keepdim=True) + 1e-6) for part in (q, k))
    v = v.unflatten(-1, (values, wide))
    rate = b.sigmoid()[..., None]
    kept = (
        -layer.weight("linear_attn.A_log").exp() * F.softplus(a + layer.weight("linear_attn.dt_bias"))
    ).exp()
    state, found = x.new_zeros(x.shape[0], values, narrow, wide), []
    for at in range(x.shape[1]):
        state = state * kept[:, at, :, None, None]
        known = torch.einsum("bhn,bhnw->bhw", k[:, at], state)
        state = state + torch.einsum("bhn,bhw->bhnw", k[:, at], rate[:, at] * (v[:, at] - known))
        found.append(torch.einsum("bhn,bhnw->bhw", q[:, at], state) * narrow**-0.5)
    mixed = rms(torch.stack(found, dim=1), config.rms_norm_eps) * layer.weight("linear_attn.norm.weight")
    mixed = mixed * F.silu(z.reshape(mixed.shape))
    return layer.linear("linear_attn.out_proj", mixed.flatten(2))


# --- experts -----------------------------------------------------------------------------------------------------


def _silu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _experts(layer: Layer, x: Tensor, share: Tensor, chosen: Tensor) -> Tensor:
    """The sum of what the chosen experts make, times what each counts: [B, P, D]."""
    into, out = layer.weight("mlp.experts.gate_up_proj"), layer.weight("mlp.experts.down_proj")
    every = _silu(*torch.einsum("bpd,end->bpen", x, into).chunk(2, dim=-1))
    return _counted(layer, share, chosen, every, out.mT)


def _counted(
    layer: Layer, share: Tensor, chosen: Tensor, every: Tensor, out: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Of the neurons [B, P, E, N] of all experts, what the chosen ones make by ``out`` [E, N, D]."""
    act = every.gather(2, chosen[..., None].expand(*chosen.shape, every.shape[-1]))
    made = torch.einsum("bpkn,bpknd->bpkd", layer.at("expert_act", act), out[chosen])
    made = layer.at("expert_out", made if bias is None else made + bias[chosen])
    return (share[..., None] * made).sum(2)


def _gpt_oss(layer: Layer, x: Tensor) -> Tensor:
    config = layer.config
    logits = layer.at("router_logits", layer.linear("mlp.router", x))
    chosen = layer.at("expert_index", logits.topk(config.num_experts_per_tok, dim=-1).indices)
    share = layer.at("expert_weights", logits.gather(-1, chosen).softmax(-1))
    into, out = (layer.weight(f"mlp.experts.{name}_proj") for name in ("gate_up", "down"))
    into_bias, out_bias = (layer.weight(f"mlp.experts.{name}_proj_bias") for name in ("gate_up", "down"))
    # Gate and other branch take turns.
    made = (torch.einsum("bpd,edn->bpen", x, into) + into_bias).unflatten(-1, (-1, 2))
    gate = made[..., 0].clamp(max=config.swiglu_limit)
    up = made[..., 1].clamp(-config.swiglu_limit, config.swiglu_limit)
    neurons = (up + 1) * gate * torch.sigmoid(1.702 * gate)
    return _counted(layer, share, chosen, neurons, out, out_bias)


def _of_all(layer: Layer, x: Tensor) -> Tensor:
    """The best of a softmax over all experts."""
    logits = layer.at("router_logits", layer.linear("mlp.gate", x))
    share, chosen = logits.softmax(-1).topk(layer.config.num_experts_per_tok, dim=-1)
    chosen = layer.at("expert_index", chosen)
    if getattr(layer.config, "norm_topk_prob", True):
        share = share / share.sum(-1, keepdim=True)
    return _experts(layer, x, layer.at("expert_weights", share), chosen)


def _gated(layer: Layer, x: Tensor, path: str = "mlp") -> Tensor:
    pre = layer.at("mlp_pre", layer.linear(f"{path}.gate_proj", x))
    up = layer.at("mlp_up", layer.linear(f"{path}.up_proj", x))
    return layer.linear(f"{path}.down_proj", layer.at("mlp_act", _silu(pre, up)))


def _shared(layer: Layer, name: str, x: Tensor, path: str = "mlp") -> Tensor:
    """What an expert makes of every token."""
    gate, up = (layer.linear(f"{path}.{name}.{part}_proj", x) for part in ("gate", "up"))
    return layer.linear(f"{path}.{name}.down_proj", _silu(gate, up))


def _of_all_and_one(layer: Layer, x: Tensor) -> Tensor:
    if layer.index in getattr(layer.config, "mlp_only_layers", ()):
        return _gated(layer, x)
    counts = layer.linear("mlp.shared_expert_gate", x).sigmoid()
    return _of_all(layer, x) + counts * _shared(layer, "shared_expert", x)


def _fed_less(layer: Layer, x: Tensor) -> Tensor:
    """Llama-4: what an expert is fed is weighed."""
    config = layer.config
    if layer.index not in config.moe_layers:
        return _gated(layer, x, "feed_forward")
    logits = layer.at("router_logits", layer.linear("feed_forward.router", x))
    chosen = logits.topk(config.num_experts_per_tok, dim=-1).indices
    into, out = (layer.weight(f"feed_forward.experts.{name}_proj") for name in ("gate_up", "down"))
    made = _shared(layer, "shared_expert", x, "feed_forward")
    for expert in range(config.num_local_experts):
        counts = ((chosen == expert).any(-1) * logits[..., expert].sigmoid())[..., None]
        gate, up = ((counts * x) @ into[expert]).chunk(2, dim=-1)
        made = made + _silu(gate, up) @ out[expert]
    return made


def _in_groups(layer: Layer, x: Tensor) -> Tensor:
    config = layer.config
    if layer.index < config.first_k_dense_replace:
        return _gated(layer, x)
    logits = layer.at("router_logits", layer.linear("mlp.gate", x))
    chances = logits.sigmoid()
    ranked = chances + layer.weight("mlp.gate.e_score_correction_bias")
    each = config.n_routed_experts // config.n_group
    groups = ranked.unflatten(-1, (config.n_group, each)).topk(2, dim=-1).values.sum(-1)
    worst = groups.argsort(-1)[..., : config.n_group - config.topk_group]
    out = torch.zeros_like(groups, dtype=torch.bool).scatter(-1, worst, True).repeat_interleave(each, dim=-1)
    chosen = (
        ranked.masked_fill(out, float("-inf")).topk(config.num_experts_per_tok, dim=-1, sorted=False).indices
    )
    chosen = layer.at("expert_index", chosen)
    share = chances.gather(-1, chosen)
    if config.norm_topk_prob:
        share = share / share.sum(-1, keepdim=True)
    share = layer.at("expert_weights", share * config.routed_scaling_factor)
    return _experts(layer, x, share, chosen) + _shared(layer, "shared_experts", x)


Part = Callable[[Layer, Tensor], Tensor]
FORWARDS: dict[str, tuple[Part, Part]] = {
    "gpt_oss": (_with_sinks, _gpt_oss),
    "olmoe": (_normed_flat, _of_all),
    "deepseek_v3": (_latent, _in_groups),
    "llama4_text": (_without_rotation_in_some, _fed_less),
    "qwen3_next": (_hybrid, _of_all_and_one),
    "qwen3_5_text": (_hybrid, _gated),
    "qwen3_5_moe_text": (_hybrid, _of_all_and_one),
}
"""By model type: attention, and what comes after it."""
