"""Qwen3.5: the layers of Qwen3-Next, with one MLP for all tokens or with experts."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tracelens.backends.architectures.llama import QWEN3
from tracelens.backends.architectures.mixtral import MIXTRAL
from tracelens.backends.architectures.qwen3_moe import QWEN3_MOE
from tracelens.backends.architectures.qwen3_next import HEADS, WORDS, hybrid
from tracelens.backends.base import RowsView, Side, Tap

_NEURONS = ("mlp_pre", "mlp_up", "mlp_act")


def _chosen(router: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The weights and the experts of each token [B * P, k], as Qwen3.5's router makes them of its logits [B * P, E]."""
    weights, experts = logits.softmax(-1, dtype=torch.float32).topk(router.top_k, dim=-1)
    return (weights / weights.sum(-1, keepdim=True)).to(logits.dtype), experts


QWEN3_5 = replace(
    QWEN3,
    name="Qwen3.5",
    model_types=("qwen3_5_text",),
    taps=hybrid(QWEN3.taps),
    in_some=(HEADS,),
    words=WORDS,
    gated=True,
)
QWEN3_5_MOE = replace(
    QWEN3_5,
    name="Qwen3.5 with experts",
    model_types=("qwen3_5_moe_text",),
    taps={
        **hybrid({name: tap for name, tap in QWEN3_MOE.taps.items() if name not in _NEURONS}),
        "router_logits": Tap("mlp.gate", Side.OUT, 0, RowsView(), _chosen),
    },
    absent={
        **QWEN3_MOE.absent,
        **{name: MIXTRAL.absent[name] for name in _NEURONS},
    },
    widths=QWEN3_MOE.widths,
    shared=True,
)
