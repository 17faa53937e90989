"""The forward pass of each family, written out from the weights: the oracle that the library is proven against.

No module of transformers runs here, only torch functions on the state dict. The operations and their order are those of
the blocks in transformers with eager attention, so that results agree closely in float32 and in bfloat16. At every site
the caller may look at the tensor and replace it; what it returns is what everything later in the pass sees.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from tracelens.ir.sites import KIND, Site

Intercept = Callable[[Site, Tensor], Tensor]
"""Called at each site with its tensor; returns the tensor to go on with (the same one, to change nothing)."""

ROTARY = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma3_text")


def unchanged(site: Site, tensor: Tensor) -> Tensor:
    """The intercept that changes nothing."""
    return tensor


def hand_forward(
    model: PreTrainedModel,
    input_ids: Tensor,
    mask: Tensor,
    position_ids: Tensor,
    intercept: Intercept = unchanged,
) -> Tensor:
    """The logits [B, P, V] of a tiny model, with ``intercept`` called at every site in the order of ``Site.order``.

    ``input_ids`` and ``position_ids`` are int64 [B, P], ``mask`` bool [B, P]. Gradients flow to the parameters and to
    whatever ``intercept`` returns, as torch's grad mode has it.
    """
    refuse_what_is_not_written_here(model)
    if intercept(Site("token_mask"), mask) is not mask:
        raise ValueError("token_mask cannot be written")
    weights = Weights(model)
    stream = _gpt2_embedding if weights.family == "gpt2" else _rotary_embedding
    resid = stream(weights, input_ids, position_ids, intercept)
    for index in range(model.config.num_hidden_layers):
        layer = Layer(weights, index, mask, position_ids, intercept)
        resid = _block(layer, resid)
    if weights.family == "gpt2":
        normed = weights.layer_norm("transformer.ln_f", resid)
    else:
        normed = weights.rms_norm("model.norm", resid)
    final_norm = intercept(Site("final_norm"), normed)
    lm_head = intercept(Site("lm_head"), weights.linear("lm_head", final_norm))
    cap = getattr(model.config, "final_logit_softcapping", None)
    logits = lm_head if cap is None else torch.tanh(lm_head / cap) * cap
    return intercept(Site("logits"), logits)


def hand_sites(model: PreTrainedModel) -> list[Site]:
    """The sites that this model has, in the order of the forward pass: what :func:`hand_forward` intercepts."""
    gpt2 = model.config.model_type == "gpt2"
    qwen3 = model.config.model_type in ("qwen3", "qwen3_moe")
    experts = model.config.model_type == "qwen3_moe"
    gemma = model.config.model_type == "gemma3_text"
    inside = ["q", "q_normed", "k", "k_normed", "v"] if qwen3 else ["q", "k", "v"]
    inside += ["q_normed", "k_normed"] if gemma else []
    inside += [] if gpt2 else ["q_rot", "k_rot"]
    inside += ["scores", "pattern", "z"]
    names = ["resid_pre", "attn_norm", "attn_in", *(name for name in inside if name in KIND)]
    names += ["attn_out", *(["attn_post_norm"] if gemma else []), "attn_add"]
    names += ["resid_mid", "mlp_norm", "mlp_in"]
    dense = ["mlp_pre", "mlp_act"] if gpt2 else ["mlp_pre", "mlp_up", "mlp_act"]
    routed = ["router_logits", "expert_index", "expert_weights", "expert_act", "expert_out"]
    sparse = with_experts(model.config) if experts else ()
    end = ["mlp_out", *(["mlp_post_norm"] if gemma else []), "mlp_add", "resid_post"]
    before = ["token_mask", "embed", "pos_embed"] if gpt2 else ["token_mask", "embed"]
    layers = range(model.config.num_hidden_layers)
    return [
        *(Site(name) for name in before),
        *(
            Site(name, layer)
            for layer in layers
            for name in (*names, *(routed if layer in sparse else dense), *end)
        ),
        *(Site(name) for name in ("final_norm", "lm_head", "logits")),
    ]


def with_experts(config: PreTrainedConfig) -> tuple[int, ...]:
    """The layers of a Qwen3-MoE model whose MLP is a mixture of experts."""
    return tuple(
        layer
        for layer in range(config.num_hidden_layers)
        if layer not in config.mlp_only_layers and not (layer + 1) % config.decoder_sparse_step
    )


# --- one block ---------------------------------------------------------------------------------------------------


def _block(layer: Layer, stream: Tensor) -> Tensor:
    """What a write means is to be read here: a later line sees it exactly if it uses the name on the left."""
    norm = layer.weights.layer_norm if layer.gpt2 else layer.weights.rms_norm
    attention = _gpt2_attention if layer.gpt2 else _rotary_attention
    mlp = _gpt2_mlp if layer.gpt2 else _gated_mlp
    if layer.weights.family == "qwen3_moe":
        mlp = _expert_mlp
    before_attention, before_mlp = (
        ("ln_1", "ln_2") if layer.gpt2 else ("input_layernorm", "post_attention_layernorm")
    )
    if layer.gemma:
        before_mlp = "pre_feedforward_layernorm"

    resid_pre = layer.at("resid_pre", stream)
    attn_norm = layer.at("attn_norm", norm(layer.path(before_attention), resid_pre))
    attn_in = layer.at("attn_in", attn_norm)
    attn_out = layer.at("attn_out", attention(layer, attn_in))
    if layer.gemma:
        attn_out = layer.at("attn_post_norm", norm(layer.path("post_attention_layernorm"), attn_out))
    attn_add = layer.at("attn_add", attn_out)
    resid_mid = layer.at("resid_mid", resid_pre + attn_add)
    mlp_norm = layer.at("mlp_norm", norm(layer.path(before_mlp), resid_mid))
    mlp_in = layer.at("mlp_in", mlp_norm)
    mlp_out = layer.at("mlp_out", mlp(layer, mlp_in))
    if layer.gemma:
        mlp_out = layer.at("mlp_post_norm", norm(layer.path("post_feedforward_layernorm"), mlp_out))
    mlp_add = layer.at("mlp_add", mlp_out)
    return layer.at("resid_post", resid_mid + mlp_add)


def _gated_mlp(layer: Layer, mlp_in: Tensor) -> Tensor:
    mlp_pre = layer.at("mlp_pre", layer.weights.linear(layer.path("mlp.gate_proj"), mlp_in))
    mlp_up = layer.at("mlp_up", layer.weights.linear(layer.path("mlp.up_proj"), mlp_in))
    active = F.gelu(mlp_pre, approximate="tanh") if layer.gemma else F.silu(mlp_pre)
    mlp_act = layer.at("mlp_act", active * mlp_up)
    return layer.weights.linear(layer.path("mlp.down_proj"), mlp_act)


def _expert_mlp(layer: Layer, mlp_in: Tensor) -> Tensor:
    """Some experts of several for each token, weighted; in some layers one plain MLP."""
    weights, config = layer.weights, layer.weights.config
    if layer.index not in with_experts(config):
        return _gated_mlp(layer, mlp_in)
    logits = layer.at("router_logits", weights.linear(layer.path("mlp.gate"), mlp_in))
    chances = logits.softmax(-1, dtype=torch.float32)
    share, chosen = chances.topk(config.num_experts_per_tok, dim=-1)
    if config.norm_topk_prob:
        share = share / share.sum(-1, keepdim=True)
    chosen = layer.at("expert_index", chosen).flatten(0, 1)
    share = layer.at("expert_weights", share.to(mlp_in.dtype)).flatten(0, 1)
    rows = mlp_in.flatten(0, 1)
    into, down = (weights[layer.path(f"mlp.experts.{name}")] for name in ("gate_up_proj", "down_proj"))

    def of_each(width: int, make: Callable[[int, Tensor, Tensor], Tensor]) -> Tensor:
        """What ``make(expert, token, place)`` makes for each token and each of its places: [T, k, width]."""
        found = rows.new_zeros(*chosen.shape, width)
        for expert in range(config.num_experts):
            token, place = (chosen == expert).nonzero(as_tuple=True)
            found = found.index_put((token, place), make(expert, token, place))
        return found

    def neurons(expert: int, token: Tensor, place: Tensor) -> Tensor:
        gate, up = F.linear(rows[token], into[expert]).chunk(2, dim=-1)
        return F.silu(gate) * up

    sizes = mlp_in.shape[:2]
    act = of_each(config.moe_intermediate_size, neurons).unflatten(0, sizes)
    act = layer.at("expert_act", act).flatten(0, 1)
    out = of_each(rows.shape[-1], lambda expert, token, place: F.linear(act[token, place], down[expert]))
    out = layer.at("expert_out", out.unflatten(0, sizes)).flatten(0, 1)
    added = torch.zeros_like(rows)
    # In the order of the experts, as the eager loop of transformers adds them.
    for expert in range(config.num_experts):
        token, place = (chosen == expert).nonzero(as_tuple=True)
        added = added.index_add(0, token, out[token, place] * share[token, place, None])
    return added.view(mlp_in.shape)


def _gpt2_mlp(layer: Layer, mlp_in: Tensor) -> Tensor:
    mlp_pre = layer.at("mlp_pre", layer.weights.conv1d(layer.path("mlp.c_fc"), mlp_in))
    mlp_act = layer.at("mlp_act", _gelu_new(mlp_pre))
    return layer.weights.conv1d(layer.path("mlp.c_proj"), mlp_act)


def _gelu_new(x: Tensor) -> Tensor:
    """The tanh form of GELU, in the order of operations of transformers: torch's own rounds otherwise in bfloat16."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


# --- attention ---------------------------------------------------------------------------------------------------


def _rotary_attention(layer: Layer, attn_in: Tensor) -> Tensor:
    heads = (*attn_in.shape[:-1], -1, layer.head_dim)

    def projected(name: str) -> Tensor:
        found = layer.inside(
            name, layer.weights.linear(layer.path(f"self_attn.{name}_proj"), attn_in).view(heads)
        )
        return (
            normed(name, found) if layer.weights.family in ("qwen3", "qwen3_moe") and name != "v" else found
        )

    def normed(name: str, heads: Tensor) -> Tensor:
        gain = layer.path(f"self_attn.{name}_norm")
        return layer.inside(f"{name}_normed", layer.weights.rms_norm(gain, heads))

    q, k, v = projected("q"), projected("k"), projected("v")
    if layer.gemma:
        q, k = normed("q", q), normed("k", k)
    cos, sin = layer.weights.rotation(layer.position_ids, q.dtype, layer.index)
    q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
    q, k = layer.inside("q_rot", q), layer.inside("k_rot", k)
    scale = (layer.weights.config.query_pre_attn_scalar if layer.gemma else layer.head_dim) ** -0.5
    # The probabilities are computed in float32, whatever the model's dtype.
    z = _attended(layer, q, k, v, scale=scale, softmax_dtype=torch.float32)
    return layer.weights.linear(layer.path("self_attn.o_proj"), z.reshape(*attn_in.shape[:-1], -1))


def _gpt2_attention(layer: Layer, attn_in: Tensor) -> Tensor:
    config = layer.weights.config
    scale = layer.head_dim**-0.5 if config.scale_attn_weights else 1.0
    if config.scale_attn_by_inverse_layer_idx:
        scale /= float(layer.index + 1)
    heads = (*attn_in.shape[:-1], -1, layer.head_dim)
    fused = layer.weights.conv1d(layer.path("attn.c_attn"), attn_in)
    q, k, v = (
        layer.inside(name, part.view(heads))
        for name, part in zip("qkv", fused.split(config.hidden_size, dim=2), strict=True)
    )
    z = _attended(layer, q, k, v, scale=scale, softmax_dtype=None)
    return layer.weights.conv1d(layer.path("attn.c_proj"), z.reshape(*attn_in.shape[:-1], -1))


def _attended(
    layer: Layer, q: Tensor, k: Tensor, v: Tensor, *, scale: float, softmax_dtype: torch.dtype | None
) -> Tensor:
    """Scores, softmax and the mix of values: q [B, P, H, d] and k, v [B, P, K, d] to z [B, P, H, d]."""
    shared = q.shape[2] // k.shape[2]
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    if shared > 1:
        k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
    scores = torch.matmul(q, k.transpose(2, 3)) * scale + layer.additive_mask(q.dtype)
    scores = layer.inside("scores", scores)
    # Whatever the caller puts there: a row of a batch sees what it sees alone, and that is no padding.
    real = layer.mask[:, None, None, :]
    scores = scores.masked_fill(~real, torch.finfo(scores.dtype).min)
    pattern = layer.inside("pattern", F.softmax(scores, dim=-1, dtype=softmax_dtype).to(q.dtype))
    pattern = pattern.masked_fill(~real & layer.mask[:, None, :, None], 0.0)
    z = torch.matmul(pattern, v).transpose(1, 2).contiguous()
    return layer.inside("z", z)


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on [B, P, H, d]: the first half of a head is paired with the second."""
    first, second = heads.chunk(2, dim=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return heads * cos + torch.cat((-second, first), dim=-1) * sin


# --- before the first layer --------------------------------------------------------------------------------------


def _rotary_embedding(
    weights: Weights, input_ids: Tensor, position_ids: Tensor, intercept: Intercept
) -> Tensor:
    embed = F.embedding(input_ids, weights["model.embed_tokens.weight"])
    if weights.family == "gemma3_text":
        # The factor is rounded to the model's dtype before it multiplies.
        embed = embed * torch.tensor(weights.config.hidden_size**0.5).to(embed)
    return intercept(Site("embed"), embed)


def _gpt2_embedding(
    weights: Weights, input_ids: Tensor, position_ids: Tensor, intercept: Intercept
) -> Tensor:
    embed = intercept(Site("embed"), F.embedding(input_ids, weights["transformer.wte.weight"]))
    pos_embed = intercept(Site("pos_embed"), F.embedding(position_ids, weights["transformer.wpe.weight"]))
    return embed + pos_embed


# --- weights and masks -------------------------------------------------------------------------------------------


class Weights:
    """The state dict by name, and the few layers that the families are made of."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.config = model.config
        self.family: str = model.config.model_type
        # keep_vars: the parameters themselves, so that gradients reach them.
        self._tensors: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def linear(self, path: str, x: Tensor) -> Tensor:
        return F.linear(x, self[path + ".weight"], self._tensors.get(path + ".bias"))

    def conv1d(self, path: str, x: Tensor) -> Tensor:
        """GPT-2 keeps its matrices as [in, out]."""
        weight = self[path + ".weight"]
        flat = torch.addmm(self[path + ".bias"], x.reshape(-1, x.shape[-1]), weight)
        return flat.view(*x.shape[:-1], weight.shape[1])

    def layer_norm(self, path: str, x: Tensor) -> Tensor:
        weight, bias = self[path + ".weight"], self[path + ".bias"]
        return F.layer_norm(x, weight.shape, weight, bias, self.config.layer_norm_epsilon)

    def rms_norm(self, path: str, x: Tensor) -> Tensor:
        """Normalised in float32, cast back, and only then multiplied by the gain.

        Gemma keeps gains as their distance from 1, and casts back after them.
        """
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps)
        if self.family == "gemma3_text":
            return (wide * (1.0 + self[path + ".weight"].float())).to(x.dtype)
        return self[path + ".weight"] * wide.to(x.dtype)

    def rotation(self, position_ids: Tensor, dtype: torch.dtype, layer: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, P, d], computed in float32."""
        width = head_dim(self.config)
        pairs = torch.arange(0, width, 2, dtype=torch.float32, device=position_ids.device)
        frequencies = 1.0 / (rope_of(self.config, layer)["rope_theta"] ** (pairs / width))
        angles = position_ids[..., None].float() * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


@dataclass(frozen=True)
class Layer:
    """One layer of one run: where its weights are, what it may attend to, and whom to ask at its sites."""

    weights: Weights
    index: int
    mask: Tensor
    position_ids: Tensor
    intercept: Intercept

    @property
    def gpt2(self) -> bool:
        return self.weights.family == "gpt2"

    @property
    def gemma(self) -> bool:
        return self.weights.family == "gemma3_text"

    @property
    def head_dim(self) -> int:
        return head_dim(self.weights.config)

    def path(self, name: str) -> str:
        return f"transformer.h.{self.index}.{name}" if self.gpt2 else f"model.layers.{self.index}.{name}"

    def at(self, name: str, tensor: Tensor) -> Tensor:
        return self.intercept(Site(name, self.index), tensor)

    def inside(self, name: str, tensor: Tensor) -> Tensor:
        """A site inside attention: asked for as soon as the vocabulary has it."""
        return self.at(name, tensor) if name in KIND else tensor

    def additive_mask(self, dtype: torch.dtype) -> Tensor:
        """0 where a query may look, the lowest finite number elsewhere: [B, 1, P, P].

        Not minus infinity: the queries at the padding may look nowhere, and their softmax has to stay finite.
        """
        places = torch.arange(self.mask.shape[1], device=self.mask.device)
        allowed = places[None, :] <= places[:, None]
        window = _window(self.weights.config, self.index)
        if window is not None:
            allowed = allowed & (places[None, :] > places[:, None] - window)
        allowed = allowed[None, None] & self.mask[:, None, None, :]
        return torch.where(
            allowed, torch.zeros((), dtype=dtype, device=allowed.device), torch.finfo(dtype).min
        )


def head_dim(config: PreTrainedConfig) -> int:
    """The width of one head: its own setting where the family has one."""
    own = getattr(config, "head_dim", None)
    return own or config.hidden_size // config.num_attention_heads


def rope_of(config: PreTrainedConfig, layer: int) -> Mapping[str, Any]:
    """How a layer rotates: Gemma's layers with a window do it in a way of their own."""
    rope = config.rope_parameters
    return rope[config.layer_types[layer]] if config.model_type == "gemma3_text" else rope


def _window(config: PreTrainedConfig, layer: int) -> int | None:
    """How many positions back this layer looks, itself included; ``None``: all."""
    if config.model_type == "mistral":
        return config.sliding_window
    windowed = config.model_type in ("qwen2", "qwen3", "gemma3_text")
    if windowed and config.layer_types[layer] == "sliding_attention":
        return config.sliding_window
    return None


def refuse_what_is_not_written_here(model: PreTrainedModel) -> None:
    """An oracle that guessed would agree with the same guess elsewhere."""
    config = model.config
    family = config.model_type
    if model.training:
        raise ValueError("the model is in training mode: dropout is not written here")
    if family == "gpt2":
        if config.activation_function != "gelu_new":
            raise ValueError(f"activation {config.activation_function!r} is not written here")
        if config.add_cross_attention or config.reorder_and_upcast_attn:
            raise ValueError("cross attention and upcast attention are not written here")
        return
    if family not in ROTARY:
        raise ValueError(f"family {family!r} is not written here")
    gemma = family == "gemma3_text"
    activation = config.hidden_activation if gemma else config.hidden_act
    if activation != ("gelu_pytorch_tanh" if gemma else "silu"):
        raise ValueError(f"activation {activation!r} is not written here")
    if gemma and (config.use_bidirectional_attention or config.attn_logit_softcapping is not None):
        raise ValueError("attention that looks ahead and capped scores are not written here")
    for layer in range(config.num_hidden_layers):
        rope = rope_of(config, layer)
        if rope["rope_type"] != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(f"position encoding {rope} is not written here")
    if any(frequencies.dtype != torch.float32 for frequencies in model.model.rotary_emb.buffers()):
        # model.to(torch.bfloat16) rounds them; loading in bfloat16 does not.
        raise ValueError(
            "the rotary frequencies were rounded: build the model in its dtype instead of casting it"
        )
