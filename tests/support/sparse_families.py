"""Tiny random models of families with experts, sinks, latent or linear attention: two layers, one of each kind."""

from __future__ import annotations

from typing import Any

from transformers import (
    DeepseekV3Config,
    GptOssConfig,
    Llama4TextConfig,
    OlmoeConfig,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
)

from tests.support.families import CHOSEN, EXPERTS, FAMILIES, HEAD_DIM, HEADS, NEURONS, Family

_TWO: dict[str, Any] = {**FAMILIES["llama"].settings, "num_hidden_layers": 2}
_ROUTED = {"num_experts_per_tok": CHOSEN}
_HYBRID: dict[str, Any] = {
    **_TWO,
    "layer_types": ["full_attention", "linear_attention"],
    # Half of a head is rotated.
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 10,
    "linear_conv_kernel_dim": 3,
}
_SHARED = {
    **_ROUTED,
    "num_experts": EXPERTS,
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 24,
}

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
        # The second layer has one MLP for all tokens.
        Family("qwen3_next", Qwen3NextConfig, {**_HYBRID, **_SHARED, "mlp_only_layers": [1]}),
        Family("qwen3_5", Qwen3_5TextConfig, _HYBRID),
        Family(
            "deepseek_v3",
            DeepseekV3Config,
            {
                **{name: value for name, value in _TWO.items() if name != "head_dim"},
                **_ROUTED,
                "num_key_value_heads": HEADS,
                "q_lora_rank": 20,
                "kv_lora_rank": 16,
                # Other widths for what is rotated, for what is not, and for values.
                "qk_nope_head_dim": 8,
                "qk_rope_head_dim": 6,
                "v_head_dim": HEAD_DIM,
                "first_k_dense_replace": 1,
                "moe_intermediate_size": 40,
                # Two of four groups, and two experts of the four in them.
                "n_routed_experts": 8,
                "n_group": 4,
                "topk_group": 2,
            },
        ),
        Family(
            "llama4",
            Llama4TextConfig,
            {
                **_TWO,
                **_ROUTED,
                "num_local_experts": EXPERTS,
                "intermediate_size": 40,
                "intermediate_size_mlp": NEURONS,
                "moe_layers": [0],
                # The second one without rotation, over all tokens; the first one over stretches of four.
                "no_rope_layers": [1, 0],
                "attention_chunk_size": 4,
                # Beyond the prompts: there, padding would count.
                "floor_scale": 60,
            },
        ),
        Family("qwen3_5_moe", Qwen3_5MoeTextConfig, {**_HYBRID, **_SHARED}),
    )
}
SPARSE_EAGER_ALONE = ("gpt_oss",)
"""Families of which transformers has no other implementation on a CPU."""
_HYBRIDS = ("qwen3_next", "qwen3_5", "qwen3_5_moe")
SPARSE_WITH_PLAN = ("olmoe", "deepseek_v3", "llama4", *_HYBRIDS)
"""Families that transformers spreads inside layers,"""
SPARSE_CUT = ("gpt_oss", "deepseek_v3", *_HYBRIDS)
"""... and that it cuts into stages."""
SPARSE_EXPERTS = tuple(
    name for name, family in SPARSE.items() if "num_experts_per_tok" in family.settings and name != "llama4"
)
"""Families of which ranks can share whole experts: transformers has no plan for those of Llama-4."""
