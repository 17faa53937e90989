"""Tiny random models of the families that not all tests go through: as random as the others, and two layers deep."""

from __future__ import annotations

from typing import Any

from transformers import (
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3Config,
    GPTNeoXConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
)

from tests.support.dense_families import DENSE
from tests.support.families import (
    CHOSEN,
    D_MODEL,
    EVERY,
    EXPERTS,
    FAMILIES,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    NEURONS,
    POSITIONS,
    VOCABULARY,
    Family,
)
from tests.support.sparse_families import SPARSE, SPARSE_EAGER_ALONE

LAYERS = 2

_TWO: dict[str, Any] = {**FAMILIES["llama"].settings, "num_hidden_layers": LAYERS}
_IN_A_WINDOW = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4}
_GEMMA3: dict[str, Any] = {**FAMILIES["gemma3"].settings, "num_hidden_layers": LAYERS, **_IN_A_WINDOW}
_PLAIN: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": D_MODEL,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "tie_word_embeddings": False,
    # Never used in eval mode, so it shows at once when something has left the model in training mode.
    "attention_dropout": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_NEOX: dict[str, Any] = {
    **_PLAIN,
    "intermediate_size": NEURONS,
    "max_position_embeddings": POSITIONS,
    "hidden_dropout": 0.1,
    # Eight of the twelve numbers of a head are rotated.
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.67},
}
_FALCON: dict[str, Any] = {**_PLAIN, "ffn_hidden_size": NEURONS, "hidden_dropout": 0.1, "bias": True}
_SIGHT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}

MORE: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            "mixtral",
            MixtralConfig,
            {**_TWO, "num_local_experts": EXPERTS, "num_experts_per_tok": CHOSEN, "sliding_window": None},
        ),
        Family(
            "gemma2",
            Gemma2Config,
            # Low enough to bend scores and logits.
            {**_GEMMA3, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 4.0},
        ),
        Family("phi3", Phi3Config, {**_TWO, "sliding_window": None}),
        Family("olmo2", Olmo2Config, _TWO),
        Family("gpt_neox", GPTNeoXConfig, {**_NEOX, "use_parallel_residual": False}),
        Family("pythia", GPTNeoXConfig, {**_NEOX, "use_parallel_residual": True}),
        Family(
            "opt",
            OPTConfig,
            {
                **_PLAIN,
                "ffn_dim": NEURONS,
                "word_embed_proj_dim": D_MODEL,
                "max_position_embeddings": POSITIONS,
                "dropout": 0.1,
            },
        ),
        Family("bloom", BloomConfig, {**_PLAIN, "hidden_dropout": 0.1}),
        # As falcon-rw-1b, falcon-7b, falcon-40b and falcon-11b.
        Family(
            "falcon_sequential",
            FalconConfig,
            {**_FALCON, "parallel_attn": False, "multi_query": False, "alibi": True},
        ),
        Family("falcon_one_norm", FalconConfig, {**_FALCON, "parallel_attn": True, "multi_query": True}),
        Family(
            "falcon_two_norms",
            FalconConfig,
            {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": KV_HEADS},
        ),
        Family(
            "falcon_new_one_norm",
            FalconConfig,
            {
                **_FALCON,
                "new_decoder_architecture": True,
                "num_kv_heads": KV_HEADS,
                "num_ln_in_parallel_attn": 1,
            },
        ),
        Family(
            "gemma3_images",
            Gemma3Config,
            {
                "text_config": {**_GEMMA3, "head_dim": HEAD_DIM},
                "vision_config": _SIGHT,
                "mm_tokens_per_image": 4,
                "tie_word_embeddings": False,
                "image_token_id": VOCABULARY - 1,
            },
        ),
    )
} | SPARSE
MORE |= DENSE
ALL: dict[str, Family] = {**EVERY, **MORE}
EAGER_ALONE = ("gemma2", "bloom", *SPARSE_EAGER_ALONE)
"""Families of which transformers has no other implementation on a CPU."""
