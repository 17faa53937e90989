"""Qwen3-MoE: the block of Qwen3, where the MLP of most layers is a mixture of experts."""

from typing import Any

import torch
from torch import Tensor

from tracelens.backends.architectures.absences import NO_EXPERTS
from tracelens.backends.architectures.llama import QWEN3
from tracelens.backends.base import Family, InSome, RowsView, Side, Tap, expert_taps


def _mixtures(config: Any) -> frozenset[int]:
    """The layers whose MLP is a mixture of experts."""
    if not config.num_experts:
        return frozenset()
    return frozenset(
        layer
        for layer in range(config.num_hidden_layers)
        if layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0
    )


def _dense(config: Any) -> frozenset[int]:
    """The layers with one MLP for all tokens."""
    return frozenset(range(config.num_hidden_layers)) - _mixtures(config)


def _chosen(router: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The weights and the experts of each token [B * P, k], as the router makes them of its logits [B * P, E]."""
    weights, experts = logits.softmax(-1, dtype=torch.float32).topk(router.top_k, dim=-1)
    if router.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights.to(logits.dtype), experts


# What layers of both kinds have: the MLP module is either one, and what it returns is added as it is.
QWEN3_MOE = Family(
    "Qwen3-MoE",
    ("qwen3_moe",),
    QWEN3.layers,
    {
        **QWEN3.taps,
        "mlp_in": Tap("mlp", Side.IN, "hidden_states"),
        # The block forgets the logits that its router returns.
        "router_logits": Tap("mlp.gate", Side.OUT, 0, RowsView(), _chosen),
        "expert_index": Tap("mlp.gate", Side.OUT, 2, RowsView()),
        "expert_weights": Tap("mlp.gate", Side.OUT, 1, RowsView()),
        **expert_taps("mlp.experts"),
        "mlp_out": Tap("mlp", Side.OUT),
    },
    {name: reason for name, reason in QWEN3.absent.items() if name not in NO_EXPERTS},
    widths={"E": "num_experts", "k": "num_experts_per_tok", "N": "moe_intermediate_size"},
    in_some=(
        InSome(
            ("router_logits", "expert_index", "expert_weights", "expert_act", "expert_out"),
            _mixtures,
            "layers that are mixtures of experts",
            "has one MLP for all tokens, and no experts that tokens are sent to",
        ),
        InSome(
            ("mlp_pre", "mlp_up", "mlp_act"),
            _dense,
            "layers with one MLP for all tokens",
            "is a mixture of experts: experts work on the rows of the tokens that come to them, so there is no "
            "[B, P, neurons]",
        ),
    ),
)
