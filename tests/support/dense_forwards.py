"""The forward pass of the families in ``dense_families``, written out from the weights.

As ``more_forwards`` does it for the others: only torch functions on the state dict, and at every site the caller may
look at the tensor and replace it. Written from the modelling files, without the library's tables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from tests.support.hand_forward import Intercept, unchanged
from tracelens.ir.sites import Site

Norm = Callable[[Tensor, Tensor | None, Tensor | None, float], Tensor]


def _rms(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    assert weight is not None
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def _rms_about_one(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Gemma keeps a gain as its distance from 1."""
    assert weight is not None
    return _rms(x, 1.0 + weight, None, eps)


def _centred(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Over the last axis alone, also where the gain has one for each head."""
    x = x - x.mean(-1, keepdim=True)
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _halves(x: Tensor, angles: Tensor) -> Tensor:
    """RoPE that pairs the first half of what is rotated with the second."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat(
        (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), -1
    )


def _neighbours(x: Tensor, angles: Tensor) -> Tensor:
    """RoPE that pairs each number with the one beside it."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def _tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _plain(layer: Layer, x: Tensor) -> Tensor:
    return layer.linear(
        "mlp.fc2", layer.at("mlp_act", _tanh_gelu(layer.at("mlp_pre", layer.linear("mlp.fc1", x))))
    )


def _gated(layer: Layer, x: Tensor, active: Callable[[Tensor], Tensor] = F.silu) -> Tensor:
    pre = layer.at("mlp_pre", layer.linear("mlp.gate_proj", x))
    up = layer.at("mlp_up", layer.linear("mlp.up_proj", x))
    return layer.linear("mlp.down_proj", layer.at("mlp_act", active(pre) * up))


def _fused_gate(layer: Layer, x: Tensor) -> Tensor:
    both = layer.linear("mlp.gate_up_proj", x)
    half = both.shape[-1] // 2
    pre, up = layer.at("mlp_pre", both[..., :half]), layer.at("mlp_up", both[..., half:])
    return layer.linear("mlp.down_proj", layer.at("mlp_act", F.silu(pre) * up))


@dataclass(frozen=True)
class Block:
    """How the blocks of a family are put together. Paths are relative to a layer; ``None``: there is no such norm.

    ``rotates``: does a layer, by its number? ``inner_norms``: the names of the norms of queries and keys, which
    are over all heads at once where they are ``flat``.
    """

    norm: Norm = _rms
    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None
    parallel: bool = False
    rotate: Callable[[Tensor, Tensor], Tensor] = _halves
    rotates: Callable[[Any, int], bool] = lambda config, index: True
    out: str = "self_attn.o_proj"
    inner_norms: tuple[str, str] | None = None
    flat: bool = False
    mlp: Callable[[Layer, Tensor], Tensor] = _gated
    layers: str = "model.layers"
    embed: str = "model.embed_tokens"
    final: str = "model.norm"


_SIDE_BY_SIDE: dict[str, Any] = {"norm": _centred, "before_mlp": None, "parallel": True}


def block_of(config: Any) -> Block:
    """How the model of a configuration is put together."""
    block = BLOCKS[config.model_type]
    if config.model_type == "cohere" and config.use_qk_norm:
        block = Block(**{**vars(block), "inner_norms": ("self_attn.q_norm", "self_attn.k_norm")})
    return block


BLOCKS: dict[str, Block] = {
    "granite": Block(),
    "cohere": Block(**_SIDE_BY_SIDE, rotate=_neighbours),
    "cohere2": Block(
        **_SIDE_BY_SIDE,
        rotate=_neighbours,
        rotates=lambda config, index: config.layer_types[index] == "sliding_attention",
    ),
    "glm": Block(rotate=_neighbours, mlp=_fused_gate),
    "glm4": Block(
        rotate=_neighbours,
        mlp=_fused_gate,
        after_attention="post_self_attn_layernorm",
        after_mlp="post_mlp_layernorm",
    ),
    "phi": Block(**_SIDE_BY_SIDE, out="self_attn.dense", mlp=_plain, final="model.final_layernorm"),
    "smollm3": Block(rotates=lambda config, index: bool(config.no_rope_layers[index])),
    "olmo": Block(norm=_centred),
    "olmo3": Block(
        before_attention=None,
        after_attention="post_attention_layernorm",
        before_mlp=None,
        after_mlp="post_feedforward_layernorm",
        inner_norms=("self_attn.q_norm", "self_attn.k_norm"),
        flat=True,
    ),
    "gemma": Block(norm=_rms_about_one, mlp=partial(_gated, active=_tanh_gelu)),
}
"""By ``model_type``."""


def dense_forward(
    model: PreTrainedModel,
    input_ids: Tensor,
    mask: Tensor,
    position_ids: Tensor,
    intercept: Intercept = unchanged,
) -> Tensor:
    """The logits [B, P, V] of a tiny model in float32, with ``intercept`` called at every site but the inputs'."""
    config = model.config
    block = block_of(config)
    weights = dict(model.state_dict(keep_vars=True))
    stream = F.embedding(input_ids, weights[f"{block.embed}.weight"])
    if config.model_type == "granite":
        stream = stream * config.embedding_multiplier
    if config.model_type == "gemma":
        stream = stream * config.hidden_size**0.5
    stream = intercept(Site("embed"), stream)
    place = partial(Layer, config, block, weights, mask=mask, position_ids=position_ids, intercept=intercept)
    for index in range(config.num_hidden_layers):
        stream = _block(place(index), stream)
    final = intercept(Site("final_norm"), place(0).normed(block.final, stream))
    logits = intercept(
        Site("lm_head"), F.linear(final, weights["lm_head.weight"], weights.get("lm_head.bias"))
    )
    if config.model_type == "granite":
        logits = logits / config.logits_scaling
    if config.model_type.startswith("cohere"):
        logits = logits * config.logit_scale
    return intercept(Site("logits"), logits)


def _block(layer: Layer, stream: Tensor) -> Tensor:
    block = layer.block
    factor = layer.config.residual_multiplier if layer.config.model_type == "granite" else 1.0

    def norm(name: str | None, site: str, tensor: Tensor) -> Tensor:
        return tensor if name is None else layer.at(site, layer.normed(layer.path(name), tensor))

    resid_pre = layer.at("resid_pre", stream)
    attn_norm = norm(block.before_attention, "attn_norm", resid_pre)
    attn_out = layer.at("attn_out", _attention(layer, layer.at("attn_in", attn_norm)))
    attn_add = layer.at("attn_add", factor * norm(block.after_attention, "attn_post_norm", attn_out))
    if block.parallel:
        read = attn_norm
    else:
        read = resid_mid = layer.at("resid_mid", resid_pre + attn_add)
    mlp_in = layer.at("mlp_in", norm(block.before_mlp, "mlp_norm", read))
    mlp_out = layer.at("mlp_out", block.mlp(layer, mlp_in))
    mlp_add = layer.at("mlp_add", factor * norm(block.after_mlp, "mlp_post_norm", mlp_out))
    return layer.at("resid_post", resid_pre + attn_add + mlp_add if block.parallel else resid_mid + mlp_add)


def _attention(layer: Layer, x: Tensor) -> Tensor:
    config, block = layer.config, layer.block
    made = {
        name: layer.at(name, layer.linear(f"self_attn.{name}_proj", x).unflatten(-1, (-1, layer.width)))
        for name in "qkv"
    }
    for name, path in zip("qk", block.inner_norms or (), strict=False):
        given = made[name].flatten(2) if block.flat else made[name]
        normed = layer.normed(layer.path(path), given).reshape(made[name].shape)
        made[name] = layer.at(f"{name}_normed", normed)
    if block.rotates(config, layer.index):
        for name in "qk":
            made[name] = layer.at(f"{name}_rot", layer.rotated(made[name]))
    shared = config.num_attention_heads // made["k"].shape[2]
    q, k, v = made["q"], *(made[name].repeat_interleave(shared, dim=2) for name in "kv")
    scale = config.attention_multiplier if config.model_type == "granite" else layer.width**-0.5
    lowest = torch.finfo(q.dtype).min
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    real = layer.mask[:, None, None, :]
    # Whatever is written there, a query that is no padding sees none.
    scores = layer.at("scores", scores.masked_fill(~layer.allowed(), lowest)).masked_fill(~real, lowest)
    pattern = layer.at("pattern", scores.softmax(-1)).masked_fill(~real & layer.mask[:, None, :, None], 0.0)
    z = layer.at("z", torch.einsum("bhqk,bkhd->bqhd", pattern, v))
    return layer.linear(block.out, z.flatten(2))


@dataclass(frozen=True)
class Layer:
    """One layer of one run."""

    config: Any
    block: Block
    weights: Mapping[str, Tensor]
    index: int
    mask: Tensor
    position_ids: Tensor
    intercept: Intercept

    @property
    def width(self) -> int:
        """Of a head."""
        own = getattr(self.config, "head_dim", None)
        return own or self.config.hidden_size // self.config.num_attention_heads

    def path(self, name: str) -> str:
        return f"{self.block.layers}.{self.index}.{name}"

    def at(self, name: str, tensor: Tensor) -> Tensor:
        return self.intercept(Site(name, self.index), tensor)

    def linear(self, name: str, x: Tensor) -> Tensor:
        path = self.path(name)
        return F.linear(x, self.weights[f"{path}.weight"], self.weights.get(f"{path}.bias"))

    def normed(self, path: str, x: Tensor) -> Tensor:
        words = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")
        eps = next((getattr(self.config, word) for word in words if hasattr(self.config, word)), 1e-5)
        own = (self.weights.get(f"{path}.{name}") for name in ("weight", "bias"))
        return self.block.norm(x, *own, eps)

    def rotated(self, heads: Tensor) -> Tensor:
        """RoPE on the first part of each head of [B, P, H, d]."""
        rope = self.config.rope_parameters
        rope = rope if "rope_type" in rope else rope[self.config.layer_types[self.index]]
        assert rope["rope_type"] == "default"
        width = int(self.width * rope.get("partial_rotary_factor", 1.0))
        frequencies = rope["rope_theta"] ** (-torch.arange(0, width, 2).float() / width)
        angles = (self.position_ids[..., None].float() * frequencies)[:, :, None]
        return torch.cat((self.block.rotate(heads[..., :width], angles), heads[..., width:]), dim=-1)

    def allowed(self) -> Tensor:
        """Where queries may look, [B, 1, P, S]."""
        places = torch.arange(self.mask.shape[1])
        allowed = places[None, :] <= places[:, None]
        kinds = getattr(self.config, "layer_types", None)
        if kinds is not None and kinds[self.index] == "sliding_attention":
            allowed = allowed & (places[None, :] > places[:, None] - self.config.sliding_window)
        return allowed[None, None] & self.mask[:, None, None, :]
