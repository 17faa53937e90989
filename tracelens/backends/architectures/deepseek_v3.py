"""DeepSeek-V3: keys and values of one latent for all heads (MLA), and mixtures of experts with one for all tokens."""

from typing import Any

import torch
from torch import Tensor

from tracelens.backends.architectures.absences import NO_EXPERTS
from tracelens.backends.architectures.llama import LLAMA
from tracelens.backends.architectures.qwen3_moe import QWEN3_MOE
from tracelens.backends.base import Family, HeadsView, InSome, RowsView, Side, Tap, Word
from tracelens.ir.types import DType


def _mixtures(config: Any) -> frozenset[int]:
    return frozenset(range(config.first_k_dense_replace, config.num_hidden_layers))


def _dense(config: Any) -> frozenset[int]:
    return frozenset(range(config.num_hidden_layers)) - _mixtures(config)


def _chosen(router: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The weights and the experts of each token [B * P, k], as the router makes them of its logits [B * P, E]."""
    chances = logits.sigmoid()
    # A chance of 0 may come before others whose bias is lower: what is masked is never chosen.
    ranked = (chances + router.e_score_correction_bias).masked_fill(logits == float("-inf"), float("-inf"))
    groups = ranked.unflatten(-1, (router.num_group, -1))
    best = groups.topk(2, dim=-1)[0].sum(-1).topk(router.topk_group, dim=-1, sorted=False)[1]
    kept = torch.zeros_like(groups[..., 0]).scatter_(1, best, 1).bool()
    ranked = groups.masked_fill(~kept[..., None], float("-inf")).flatten(-2)
    experts = ranked.topk(router.top_k, dim=-1, sorted=False)[1]
    weights = chances.gather(1, experts)
    if router.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * router.routed_scaling_factor, experts


DEEPSEEK_V3 = Family(
    "DeepSeek-V3",
    ("deepseek_v3",),
    LLAMA.layers,
    {
        **{name: tap for name, tap in QWEN3_MOE.taps.items() if name not in ("k", "q_normed", "k_normed")},
        "q": Tap("self_attn.{q}", Side.OUT, view=HeadsView(("H",), width="c")),
        # Made of the latents of all tokens that are in the cache, each time anew.
        "v": Tap("self_attn", Side.INSIDE, "v"),
        # In float32 whatever the model is in.
        "router_logits": Tap("mlp.gate", Side.OUT, 0, RowsView(), _chosen, dtype=DType.FLOAT32),
        "expert_weights": Tap("mlp.gate", Side.OUT, 1, RowsView(), dtype=DType.FLOAT32),
    },
    {
        **{name: reason for name, reason in LLAMA.absent.items() if name not in NO_EXPERTS},
        "k": "a key is put together, inside attention, of a part that each head makes of a latent and a rotated part "
        "that all heads share; use k_rot, or model.module('model.layers.0.self_attn.kv_a_proj_with_mqa').output",
        "q_normed": "its norm is that of the latent that queries are made of; use q, or "
        "model.module('model.layers.0.self_attn.q_a_layernorm').output",
        "k_normed": "its norm is that of the latent that keys and values are made of; use k_rot, or "
        "model.module('model.layers.0.self_attn.kv_a_layernorm').output",
    },
    widths={
        "E": "n_routed_experts",
        "k": "num_experts_per_tok",
        "N": "moe_intermediate_size",
        "K": "num_attention_heads",
        "c": "qk_head_dim",
        "d": "v_head_dim",
    },
    in_some=tuple(
        InSome(some.names, layers, some.these, some.others)
        for some, layers in zip(QWEN3_MOE.in_some, (_mixtures, _dense), strict=True)
    ),
    words={"q": Word(("q_proj", "q_b_proj"), lambda config, layer: int(config.q_lora_rank is not None))},
    shared=True,
    sigmoid=True,
)
