"""Tiny random models of dense families with numbers, norms and rotations of their own."""

from __future__ import annotations

from typing import Any

from transformers import (
    Cohere2Config,
    CohereConfig,
    GemmaConfig,
    Glm4Config,
    GlmConfig,
    GraniteConfig,
    Olmo3Config,
    OlmoConfig,
    Phi3Config,
    PhiConfig,
    SmolLM3Config,
)

from tests.support.families import FAMILIES, Family

LAYERS = 2
_TWO: dict[str, Any] = {**FAMILIES["llama"].settings, "num_hidden_layers": LAYERS}
_WITHOUT_WIDTH = {name: value for name, value in _TWO.items() if name != "head_dim"}
_IN_A_WINDOW = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4}
# Eight of the twelve numbers of a head.
_PARTLY = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.67}

DENSE: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            "granite",
            GraniteConfig,
            {
                **_WITHOUT_WIDTH,
                "attention_bias": True,
                "mlp_bias": True,
                # No powers of two, by which one could divide without rounding.
                "embedding_multiplier": 2.3,
                "attention_multiplier": 0.4,
                "residual_multiplier": 0.7,
                "logits_scaling": 1.7,
            },
        ),
        Family("cohere", CohereConfig, {**_WITHOUT_WIDTH, "attention_bias": True, "logit_scale": 0.6}),
        Family("cohere_qk", CohereConfig, {**_WITHOUT_WIDTH, "use_qk_norm": True, "logit_scale": 0.6}),
        Family("cohere2", Cohere2Config, {**_WITHOUT_WIDTH, **_IN_A_WINDOW, "logit_scale": 0.6}),
        Family("glm", GlmConfig, {**_TWO, "rope_parameters": _PARTLY}),
        Family("glm4", Glm4Config, {**_TWO, "rope_parameters": _PARTLY}),
        Family("phi", PhiConfig, {**_WITHOUT_WIDTH, "rope_parameters": _PARTLY}),
        # As Phi-4-mini: a part of each head is rotated, and the unembedding is the embedding.
        Family(
            "phi4",
            Phi3Config,
            {**_TWO, "sliding_window": None, "rope_parameters": _PARTLY, "tie_word_embeddings": True},
        ),
        Family("smollm3", SmolLM3Config, {**_WITHOUT_WIDTH, "no_rope_layers": [1, 0]}),
        Family("olmo", OlmoConfig, _WITHOUT_WIDTH),
        Family("olmo3", Olmo3Config, {**_WITHOUT_WIDTH, **_IN_A_WINDOW}),
        Family("gemma", GemmaConfig, {**_TWO, "bos_token_id": 2, "eos_token_id": 1}),
    )
}
"""Merged into the table of ``more_families``."""
_LIKE_LLAMA = ("phi4", "smollm3", "olmo", "olmo3", "gemma")
DENSE_WITH_PLAN = ("granite", "cohere", "cohere2", "glm", "glm4", "phi", *_LIKE_LLAMA)
"""Those that transformers can spread inside of their layers."""
DENSE_CUT = ("cohere", "cohere2", "cohere_qk", "glm", "glm4", *_LIKE_LLAMA)
"""... and of which it can give layers to stages."""
DENSE_SPREAD_WRONGLY = {
    ("granite", "pp"): "each stage multiplies the stream with embedding_multiplier once more",
    ("cohere_qk", "tp"): "the norms of all of them",
}
"""What it would do without an error, or with one of torch."""
