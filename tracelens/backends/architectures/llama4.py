"""Llama-4 (text): layers with and without rotation, and mixtures of experts whose inputs are weighed."""

from typing import Any

import torch
from torch import Tensor

from tracelens.backends.architectures.absences import NO_POSITION_EMBEDDING, NO_POST_NORMS
from tracelens.backends.architectures.llama import LLAMA
from tracelens.backends.architectures.qwen3_moe import QWEN3_MOE
from tracelens.backends.base import Family, InSome, RowsView, Side, Tap


def _mixtures(config: Any) -> frozenset[int]:
    return frozenset(config.moe_layers)


def _dense(config: Any) -> frozenset[int]:
    return frozenset(range(config.num_hidden_layers)) - _mixtures(config)


def _weighed(router: Any, logits: Tensor) -> tuple[Tensor]:
    """What the input of each expert is multiplied by, [B * P, E], as the router makes it of its logits."""
    best, experts = logits.topk(router.top_k, dim=1)
    return (
        torch.full_like(logits, float("-inf")).scatter(1, experts, best).float().sigmoid().to(logits.dtype),
    )


_BEFORE = "what a router makes of its logits multiplies the inputs of its experts, and not what they return; "
_NEURONS = ("mlp_pre", "mlp_up", "mlp_act")

LLAMA4 = Family(
    "Llama-4 (text)",
    ("llama4_text",),
    LLAMA.layers,
    {
        **LLAMA.taps,
        "mlp_in": Tap("feed_forward", Side.IN, "hidden_states"),
        "router_logits": Tap("feed_forward.router", Side.OUT, 1, RowsView(), _weighed),
        "mlp_pre": Tap("feed_forward.gate_proj", Side.OUT),
        "mlp_up": Tap("feed_forward.up_proj", Side.OUT),
        "mlp_act": Tap("feed_forward.down_proj", Side.IN),
        # A mixture returns the rows of all tokens and its logits, an MLP one tensor.
        "mlp_out": Tap("feed_forward", Side.OUT, view=RowsView(flat=2)),
        "mlp_add": Tap("feed_forward", Side.OUT, view=RowsView(flat=2)),
    },
    {
        **NO_POSITION_EMBEDDING,
        **NO_POST_NORMS,
        "q_normed": "its norm comes after the rotation: q_rot is what attention goes on with",
        "k_normed": "its norm comes after the rotation: k_rot is what attention goes on with",
        "expert_index": "its router returns no list of experts; use router_logits, of which the largest are taken",
        "expert_weights": f"{_BEFORE}use router_logits, or "
        "model.module('model.layers.0.feed_forward.router').output[0]",
        "expert_act": f"{_BEFORE}every expert computes every token, most of them zeros; use mlp_out",
        "expert_out": f"{_BEFORE}every expert computes every token, most of them zeros; use mlp_out",
    },
    neurons="intermediate_size_mlp",
    widths={"E": "num_local_experts", "k": "num_experts_per_tok"},
    in_some=(
        InSome(("router_logits",), _mixtures, QWEN3_MOE.in_some[0].these, QWEN3_MOE.in_some[0].others),
        InSome(_NEURONS, _dense, QWEN3_MOE.in_some[1].these, QWEN3_MOE.in_some[1].others),
    ),
    wide_softmax=False,
    resized=True,
    counts_padding=lambda config: config.floor_scale if config.attn_temperature_tuning else None,
)
