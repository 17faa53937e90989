"""The forward pass of the families in ``more_families``, written out from the weights.

As ``hand_forward`` does it for the others: only torch functions on the state dict, and at every site the caller may
look at the tensor and replace it. Written from the modelling files, without the library's tables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from tests.support import dense_forwards
from tests.support.hand_forward import Intercept, unchanged
from tests.support.sparse_forwards import FORWARDS, sparse_forward
from tracelens.ir.sites import Site


@dataclass(frozen=True)
class Block:
    """How the blocks of a family are put together. Paths are relative to a layer; ``None``: there is no such norm."""

    layers: str
    embed: str
    final: str
    norm: Callable[[Tensor, Tensor, Tensor | None, float], Tensor]
    attention: str
    out: str
    qkv: Callable[[Layer, Tensor], tuple[Tensor, Tensor, Tensor]]
    mlp: Callable[[Layer, Tensor], Tensor]
    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None
    parallel: bool = False
    rotates: bool = True
    shows_rotated: bool = True
    """Are queries and keys sites once more after rotation?"""


def hand_forward(
    model: PreTrainedModel,
    input_ids: Tensor,
    mask: Tensor,
    position_ids: Tensor,
    intercept: Intercept = unchanged,
) -> Tensor:
    """The logits [B, P, V] of a tiny model in float32, with ``intercept`` called at every site but the inputs'."""
    config = model.config.get_text_config()
    if config.model_type in FORWARDS:
        return sparse_forward(model, input_ids, mask, position_ids, intercept)
    if config.model_type in dense_forwards.BLOCKS:
        return dense_forwards.dense_forward(model, input_ids, mask, position_ids, intercept)
    block = block_of(config)
    weights = dict(model.state_dict(keep_vars=True))
    embed = F.embedding(input_ids, weights[f"{block.embed}.weight"])
    if config.model_type.startswith("gemma"):
        embed = embed * config.hidden_size**0.5
    first = Layer(config, block, weights, 0, mask, position_ids, intercept)
    if config.model_type == "bloom":
        embed = first.normed("transformer.word_embeddings_layernorm", embed)
    stream = intercept(Site("embed"), embed)
    if config.model_type == "opt":
        table = weights["model.decoder.embed_positions.weight"]
        stream = stream + intercept(Site("pos_embed"), F.embedding(position_ids + 2, table))
    for index in range(config.num_hidden_layers):
        stream = _block(Layer(config, block, weights, index, mask, position_ids, intercept), stream)
    final = intercept(Site("final_norm"), first.normed(block.final, stream))
    logits = intercept(Site("lm_head"), F.linear(final, weights["lm_head.weight"]))
    # transformers caps no logits of a model that sees images.
    cap = getattr(config, "final_logit_softcapping", None) if model.config is config else None
    return intercept(Site("logits"), logits if cap is None else cap * torch.tanh(logits / cap))


def _block(layer: Layer, stream: Tensor) -> Tensor:
    block = layer.block

    def norm(name: str | None, site: str, tensor: Tensor) -> Tensor:
        return tensor if name is None else layer.at(site, layer.normed(layer.path(name), tensor))

    resid_pre = layer.at("resid_pre", stream)
    attn_norm = norm(block.before_attention, "attn_norm", resid_pre)
    attn_out = layer.at("attn_out", _attention(layer, layer.at("attn_in", attn_norm)))
    attn_add = layer.at("attn_add", norm(block.after_attention, "attn_post_norm", attn_out))
    read = resid_pre
    if not block.parallel:
        read = resid_mid = layer.at("resid_mid", resid_pre + attn_add)
    elif block.before_mlp is None:
        read = attn_norm
    mlp_norm = norm(block.before_mlp, "mlp_norm", read)
    mlp_out = layer.at("mlp_out", block.mlp(layer, layer.at("mlp_in", mlp_norm)))
    mlp_add = layer.at("mlp_add", norm(block.after_mlp, "mlp_post_norm", mlp_out))
    return layer.at("resid_post", resid_pre + attn_add + mlp_add if block.parallel else resid_mid + mlp_add)


def _attention(layer: Layer, attn_in: Tensor) -> Tensor:
    config, block = layer.config, layer.block
    q, k, v = block.qkv(layer, attn_in)
    if block.rotates and not getattr(config, "alibi", False):
        q, k = layer.rotated(q), layer.rotated(k)
    if block.shows_rotated and block.rotates:
        q, k = layer.at("q_rot", q), layer.at("k_rot", k)
    shared = q.shape[2] // k.shape[2]
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    k, v = (tensor.repeat_interleave(shared, dim=1) for tensor in (k, v))
    scale = getattr(config, "query_pre_attn_scalar", layer.width) ** -0.5
    scores = q @ k.transpose(2, 3) * scale + layer.alibi()
    cap = getattr(config, "attn_logit_softcapping", None)
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    scores = scores.masked_fill(~layer.allowed(), torch.finfo(scores.dtype).min)
    real = layer.mask[:, None, None, :]
    # Whatever is written there, a query that is no padding sees none.
    scores = layer.at("scores", scores).masked_fill(~real, torch.finfo(scores.dtype).min)
    pattern = layer.at("pattern", scores.softmax(-1))
    pattern = pattern.masked_fill(~real & layer.mask[:, None, :, None], 0.0)
    z = layer.at("z", (pattern @ v).transpose(1, 2))
    return layer.linear(f"{block.attention}.{block.out}", z.flatten(2))


# --- queries, keys and values ------------------------------------------------------------------------------------


def _three(layer: Layer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix for each; OLMo-2 norms queries and keys over all heads at once, Gemma-3 each head."""
    made: dict[str, Tensor] = {}
    late = layer.config.model_type == "gemma3_text"
    for name in "qkv":
        flat = layer.linear(f"self_attn.{name}_proj", x)
        made[name] = layer.at(name, layer.heads(flat))
        if layer.config.model_type == "olmo2" and name != "v":
            normed = layer.normed(layer.path(f"self_attn.{name}_norm"), made[name].flatten(2))
            made[name] = layer.at(f"{name}_normed", layer.heads(normed))
    for name in "qk" if late else "":
        normed = layer.normed(layer.path(f"self_attn.{name}_norm"), made[name])
        made[name] = layer.at(f"{name}_normed", normed)
    return made["q"], made["k"], made["v"]


def _side_by_side(layer: Layer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Phi-3: all queries, all keys, all values."""
    heads, kv = layer.config.num_attention_heads, layer.config.num_key_value_heads
    fused = layer.linear("self_attn.qkv_proj", x)
    parts = fused.split([count * layer.width for count in (heads, kv, kv)], dim=-1)
    return layer.qkv(*(layer.heads(part) for part in parts))


def _by_head(layer: Layer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each head's query, key and value together."""
    fused = layer.linear(f"{layer.block.attention}.query_key_value", x)
    apart = fused.view(*fused.shape[:2], layer.config.num_attention_heads, 3, layer.width)
    return layer.qkv(*apart.unbind(3))


def _by_group(layer: Layer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Falcon: the queries that share a key and a value, then these two."""
    config = layer.config
    groups = config.num_kv_heads if config.new_decoder_architecture else 1
    fused = layer.linear("self_attention.query_key_value", x)
    apart = fused.view(*fused.shape[:2], groups, config.num_attention_heads // groups + 2, layer.width)
    return layer.qkv(apart[..., :-2, :].flatten(2, 3), apart[..., -2, :], apart[..., -1, :])


# --- MLPs --------------------------------------------------------------------------------------------------------


def _gated(layer: Layer, x: Tensor) -> Tensor:
    pre = layer.at("mlp_pre", layer.linear("mlp.gate_proj", x))
    up = layer.at("mlp_up", layer.linear("mlp.up_proj", x))
    gemma = layer.config.model_type.startswith("gemma")
    active = F.gelu(pre, approximate="tanh") if gemma else F.silu(pre)
    return layer.linear("mlp.down_proj", layer.at("mlp_act", active * up))


def _fused_gate(layer: Layer, x: Tensor) -> Tensor:
    pre, up = layer.linear("mlp.gate_up_proj", x).chunk(2, dim=-1)
    pre, up = layer.at("mlp_pre", pre), layer.at("mlp_up", up)
    return layer.linear("mlp.down_proj", layer.at("mlp_act", F.silu(pre) * up))


def _experts(layer: Layer, x: Tensor) -> Tensor:
    config = layer.config
    logits = layer.at("router_logits", layer.linear("mlp.gate", x))
    share, chosen = logits.softmax(-1).topk(config.num_experts_per_tok, dim=-1)
    chosen = layer.at("expert_index", chosen)
    share = layer.at("expert_weights", share / share.sum(-1, keepdim=True))
    into, out = (layer.weights[layer.path(f"mlp.experts.{name}")] for name in ("gate_up_proj", "down_proj"))
    gates, ups = torch.einsum("bpd,end->bpen", x, into).chunk(2, dim=-1)
    every = F.silu(gates) * ups
    act = layer.at("expert_act", every.gather(2, chosen[..., None].expand(*chosen.shape, every.shape[-1])))
    made = layer.at("expert_out", torch.einsum("bpkn,bpkdn->bpkd", act, out[chosen]))
    return (share[..., None] * made).sum(2)


def _plain(into: str, out: str, active: Callable[[Tensor], Tensor]) -> Callable[[Layer, Tensor], Tensor]:
    def mlp(layer: Layer, x: Tensor) -> Tensor:
        return layer.linear(out, layer.at("mlp_act", active(layer.at("mlp_pre", layer.linear(into, x)))))

    return mlp


def _tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


# --- one layer ---------------------------------------------------------------------------------------------------


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
        return f"{self.block.layers.format(self.index)}.{name}"

    def at(self, name: str, tensor: Tensor) -> Tensor:
        return self.intercept(Site(name, self.index), tensor)

    def linear(self, name: str, x: Tensor) -> Tensor:
        path = self.path(name)
        return F.linear(x, self.weights[f"{path}.weight"], self.weights.get(f"{path}.bias"))

    def normed(self, path: str, x: Tensor) -> Tensor:
        words = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")
        eps = next((getattr(self.config, word) for word in words if hasattr(self.config, word)), 1e-5)
        return self.block.norm(x, self.weights[f"{path}.weight"], self.weights.get(f"{path}.bias"), eps)

    def heads(self, flat: Tensor) -> Tensor:
        return flat.unflatten(-1, (-1, self.width))

    def qkv(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.at("q", q), self.at("k", k), self.at("v", v)

    def rotated(self, heads: Tensor) -> Tensor:
        """RoPE on [B, P, H, d]: of the part of a head that is rotated, the first half is paired with the second."""
        rope = self.config.rope_parameters
        kinds = getattr(self.config, "layer_types", None)
        if kinds is not None and kinds[self.index] in rope:
            rope = rope[kinds[self.index]]
        assert rope["rope_type"] == "default"
        width = int(self.width * rope.get("partial_rotary_factor", 1.0))
        frequencies = rope["rope_theta"] ** (-torch.arange(0, width, 2).float() / width)
        angles = (self.position_ids[..., None].float() * frequencies)[:, :, None]
        first, second = heads[..., : width // 2], heads[..., width // 2 : width]
        turned = (
            first * angles.cos() - second * angles.sin(),
            second * angles.cos() + first * angles.sin(),
            heads[..., width:],
        )
        return torch.cat(turned, dim=-1)

    def alibi(self) -> Tensor:
        """What positions add to the scores: [B, H, 1, S], or nothing."""
        kind, heads = self.config.model_type, self.config.num_attention_heads
        if kind != "bloom" and not getattr(self.config, "alibi", False):
            return torch.zeros(())
        slopes = 2.0 ** (-8.0 / heads * torch.arange(1, heads + 1))
        places = (self.mask.long().cumsum(-1) - 1) * self.mask
        # Falcon divides it as it divides the products of queries and keys; its eager attention adds it twice, once
        # with the mask.
        times = 2 if self.config._attn_implementation == "eager" else 1
        scale = 1.0 if kind == "bloom" else times * self.width**-0.5
        return scale * slopes[None, :, None, None] * places[:, None, None, :]

    def allowed(self) -> Tensor:
        """Where queries may look, [B, 1, P, S]."""
        places = torch.arange(self.mask.shape[1])
        allowed = places[None, :] <= places[:, None]
        kinds = getattr(self.config, "layer_types", None)
        window = getattr(self.config, "sliding_window", None)
        if window is not None and (kinds is None or kinds[self.index] == "sliding_attention"):
            allowed = allowed & (places[None, :] > places[:, None] - window)
        return allowed[None, None] & self.mask[:, None, None, :]


def _rms(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def _gemma_rms(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return _rms(x, 1.0 + weight, None, eps)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


# --- the families ------------------------------------------------------------------------------------------------


def block_of(config: Any) -> Block:
    """How the model of a configuration is put together."""
    if config.model_type == "gpt_neox":
        return _neox(parallel=config.use_parallel_residual)
    return _falcon(config) if config.model_type == "falcon" else _BLOCKS[config.model_type]


def _llama_like(**own: Any) -> Block:
    given: dict[str, Any] = {
        "layers": "model.layers.{}",
        "embed": "model.embed_tokens",
        "final": "model.norm",
        "norm": _rms,
        "attention": "self_attn",
        "out": "o_proj",
        "qkv": _three,
        "mlp": _gated,
    }
    return Block(**{**given, **own})


def _neox(*, parallel: bool) -> Block:
    return Block(
        layers="gpt_neox.layers.{}",
        embed="gpt_neox.embed_in",
        final="gpt_neox.final_layer_norm",
        norm=_layer_norm,
        attention="attention",
        out="dense",
        qkv=_by_head,
        mlp=_plain("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", F.gelu),
        parallel=parallel,
    )


def _bloom(**own: Any) -> Block:
    given: dict[str, Any] = {
        "layers": "transformer.h.{}",
        "embed": "transformer.word_embeddings",
        "final": "transformer.ln_f",
        "norm": _layer_norm,
        "attention": "self_attention",
        "out": "dense",
        "qkv": _by_head,
        "mlp": _plain("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", _tanh_gelu),
        "rotates": False,
        "shows_rotated": False,
    }
    return Block(**{**given, **own})


def _falcon(config: Any) -> Block:
    new = config.new_decoder_architecture
    norms: dict[str, Any] = {"parallel": new or config.parallel_attn}
    if new and config.num_ln_in_parallel_attn == 2:
        norms |= {"before_attention": "ln_attn", "before_mlp": "ln_mlp"}
    elif norms["parallel"]:
        norms |= {"before_mlp": None}
    return _bloom(
        qkv=_by_group if new or config.multi_query else _by_head,
        mlp=_plain("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", F.gelu),
        rotates=not config.alibi,
        **norms,
    )


_SANDWICH: dict[str, Any] = {
    "norm": _gemma_rms,
    "after_attention": "post_attention_layernorm",
    "before_mlp": "pre_feedforward_layernorm",
    "after_mlp": "post_feedforward_layernorm",
}
_SEEING = "model.language_model"
_BLOCKS: dict[str, Block] = {
    "mixtral": _llama_like(mlp=_experts),
    "gemma2": _llama_like(**_SANDWICH),
    # The text alone is in hand_forward; here with what else there is for images.
    "gemma3_text": _llama_like(
        **_SANDWICH, layers=_SEEING + ".layers.{}", embed=f"{_SEEING}.embed_tokens", final=f"{_SEEING}.norm"
    ),
    "phi3": _llama_like(qkv=_side_by_side, mlp=_fused_gate),
    "olmo2": _llama_like(
        before_attention=None,
        after_attention="post_attention_layernorm",
        before_mlp=None,
        after_mlp="post_feedforward_layernorm",
    ),
    "opt": Block(
        layers="model.decoder.layers.{}",
        embed="model.decoder.embed_tokens",
        final="model.decoder.final_layer_norm",
        norm=_layer_norm,
        attention="self_attn",
        out="out_proj",
        qkv=_three,
        mlp=_plain("fc1", "fc2", F.relu),
        before_attention="self_attn_layer_norm",
        before_mlp="final_layer_norm",
        rotates=False,
    ),
    "bloom": _bloom(),
}
