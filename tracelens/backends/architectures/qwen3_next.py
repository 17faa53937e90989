"""Qwen3-Next: linear attention in most layers, gated attention in the others, and mixtures of experts."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tracelens.backends.architectures.qwen3_moe import QWEN3_MOE
from tracelens.backends.base import HeadsView, InSome, Side, Tap, Word


def _with_heads(config: Any) -> frozenset[int]:
    """The layers whose attention looks at tokens."""
    return frozenset(layer for layer, kind in enumerate(config.layer_types) if kind == "full_attention")


def hybrid(taps: Mapping[str, Tap]) -> Mapping[str, Tap]:
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


WORDS = {"mixer": Word(("linear_attn", "self_attn"), _kind), "out": Word(("out_proj", "o_proj"), _kind)}
HEADS = InSome(
    ("q", "q_normed", "k", "k_normed", "v", "q_rot", "k_rot", "scores", "pattern", "z"),
    _with_heads,
    "layers with full attention",
    "has linear attention, which keeps one state for all tokens before and looks at none: its queries and keys have no "
    "scores; use attn_in, attn_out and attn_add",
)
QWEN3_NEXT = replace(
    QWEN3_MOE,
    name="Qwen3-Next",
    model_types=("qwen3_next",),
    taps=hybrid(QWEN3_MOE.taps),
    in_some=(*QWEN3_MOE.in_some, HEADS),
    words=WORDS,
    gated=True,
    shared=True,
)
