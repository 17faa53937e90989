"""Qwen3-Next and Qwen3.5: linear attention in most layers, gated attention in the others."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tracelens.backends.architectures.llama import QWEN3
from tracelens.backends.architectures.mixtral import MIXTRAL
from tracelens.backends.architectures.qwen3_moe import QWEN3_MOE
from tracelens.backends.base import HeadsView, InSome, RowsView, Side, Tap, Word


def _with_heads(config: Any) -> frozenset[int]:
    """The layers whose attention looks at tokens."""
    return frozenset(layer for layer, kind in enumerate(config.layer_types) if kind == "full_attention")


def _chosen(router: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The weights and the experts of each token [B * P, k], as Qwen3.5's router makes them of its logits [B * P, E]."""
    weights, experts = logits.softmax(-1, dtype=torch.float32).topk(router.top_k, dim=-1)
    return (weights / weights.sum(-1, keepdim=True)).to(logits.dtype), experts


def _hybrid(taps: Mapping[str, Tap]) -> Mapping[str, Tap]:
    return {
        **taps,
        "attn_in": Tap("{mixer}", Side.IN, "hidden_states"),
        # Head by head, the query and its gate.
        "q": Tap("self_attn.q_proj", Side.OUT, view=HeadsView(("H", "H"), grouped=True)),
        # The gates are on it already.
        "z": Tap("self_attn.o_proj", Side.IN, view=HeadsView(("H",))),
        "attn_out": Tap("{mixer}.{out}", Side.OUT),
        "attn_add": Tap("{mixer}", Side.OUT),
    }


def _kind(config: Any, layer: int) -> int:
    return int(layer in _with_heads(config))


_WORDS = {"mixer": Word(("linear_attn", "self_attn"), _kind), "out": Word(("out_proj", "o_proj"), _kind)}
_HEADS = InSome(
    ("q", "q_normed", "k", "k_normed", "v", "q_rot", "k_rot", "scores", "pattern", "z"),
    _with_heads,
    "layers with full attention",
    "has linear attention, which keeps one state for all tokens before and looks at none: its queries and keys have no "
    "scores; use attn_in, attn_out and attn_add",
)
_NEURONS = ("mlp_pre", "mlp_up", "mlp_act")

QWEN3_NEXT = replace(
    QWEN3_MOE,
    name="Qwen3-Next",
    model_types=("qwen3_next",),
    taps=_hybrid(QWEN3_MOE.taps),
    in_some=(*QWEN3_MOE.in_some, _HEADS),
    words=_WORDS,
    gated=True,
    shared=True,
)
QWEN3_5 = replace(
    QWEN3,
    name="Qwen3.5",
    model_types=("qwen3_5_text",),
    taps=_hybrid(QWEN3.taps),
    in_some=(_HEADS,),
    words=_WORDS,
    gated=True,
)
QWEN3_5_MOE = replace(
    QWEN3_5,
    name="Qwen3.5 with experts",
    model_types=("qwen3_5_moe_text",),
    taps={
        **_hybrid({name: tap for name, tap in QWEN3_MOE.taps.items() if name not in _NEURONS}),
        "router_logits": Tap("mlp.gate", Side.OUT, 0, RowsView(), _chosen),
    },
    absent={
        **QWEN3_MOE.absent,
        **{name: MIXTRAL.absent[name] for name in _NEURONS},
    },
    widths=QWEN3_MOE.widths,
    shared=True,
)
