"""Tiny random models of families with experts, sinks, latent or linear attention: two layers, one of each kind."""

from __future__ import annotations

from typing import Any

from transformers import GptOssConfig, OlmoeConfig

from tests.support.families import CHOSEN, EXPERTS, FAMILIES, Family

_TWO: dict[str, Any] = {**FAMILIES["llama"].settings, "num_hidden_layers": 2}
_ROUTED = {"num_experts_per_tok": CHOSEN}

SPARSE: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            "gpt_oss",
            GptOssConfig,
            {
                **_TWO,
                **_ROUTED,
                "num_local_experts": EXPERTS,
                "layer_types": ["full_attention", "sliding_attention"],
                # Shorter than the prompts, so that the window cuts.
                "sliding_window": 4,
                # Low enough to cut what goes into an expert's gate.
                "swiglu_limit": 1.0,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            },
        ),
        Family("olmoe", OlmoeConfig, {**_TWO, **_ROUTED, "num_experts": EXPERTS, "norm_topk_prob": True}),
    )
}
SPARSE_EAGER_ALONE = ("gpt_oss",)
"""Families of which transformers has no other implementation on a CPU."""
SPARSE_WITH_PLAN = ("olmoe",)
"""Families that transformers spreads inside layers,"""
SPARSE_CUT = ("gpt_oss",)
"""... and that it cuts into stages."""
