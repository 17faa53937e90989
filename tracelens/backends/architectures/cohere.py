"""Cohere (Command R) and Cohere 2 (Command R7B, Aya Expanse): attention and MLP side by side behind one norm."""

from dataclasses import replace
from typing import Any

from tracelens.backends.architectures.absences import NO_QK_NORMS, PARALLEL
from tracelens.backends.architectures.llama import LLAMA, QWEN3
from tracelens.backends.base import Family, InSome


def _in_windows(config: Any) -> frozenset[int]:
    return frozenset(layer for layer, kind in enumerate(config.layer_types) if kind == "sliding_attention")


_ABSENT = {
    **QWEN3.absent,
    **PARALLEL,
    "mlp_norm": "the MLP reads the norm that attention reads; use attn_norm for both, or mlp_in for the MLP",
}
_SHARED = ("resid_mid", "mlp_norm")

COHERE_QK_NORM = Family(
    "Cohere (with QK-norm)",
    ("cohere",),
    LLAMA.layers,
    {name: tap for name, tap in QWEN3.taps.items() if name not in _SHARED},
    _ABSENT,
    carries=(),
    logits_times="logit_scale",
    # All three projections first, and only then the norms.
    reached=("q", "k", "v", "q_normed", "k_normed"),
    not_on_ranks={"tp": "each rank has some heads of q and k, and the norms of all of them"},
    serves=lambda config: bool(config.use_qk_norm),
    these="`use_qk_norm` is true",
)
COHERE = replace(
    COHERE_QK_NORM,
    name="Cohere",
    taps={name: tap for name, tap in LLAMA.taps.items() if name not in _SHARED},
    absent={**_ABSENT, **NO_QK_NORMS},
    reached=(),
    not_on_ranks={},
    serves=None,
    these="`use_qk_norm` is false",
)
COHERE2 = replace(
    COHERE,
    name="Cohere 2",
    model_types=("cohere2",),
    in_some=(
        InSome(
            ("q_rot", "k_rot"),
            _in_windows,
            "layers that look back by a window, and rotate queries and keys",
            "looks at all tokens, and rotates nothing; use q and k",
        ),
    ),
    these="",
)
