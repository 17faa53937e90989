"""Gemma; Gemma-2 and Gemma-3: norms on both ends of each sublayer, layers with a sliding window, capped logits.

Gemma-3 models that see images, too: text alone is what they are given here.
"""

from dataclasses import replace

from tracelens.backends.architectures.absences import NO_EXPERTS, NO_POSITION_EMBEDDING, NO_QK_NORMS
from tracelens.backends.architectures.llama import LLAMA, QWEN3
from tracelens.backends.base import Family, HeadsView, Side, Tap

# The module of "embed" multiplies by the square root of d_model itself, and "logits" are soft-capped where the
# configuration has final_logit_softcapping.
_SANDWICH = {
    # transformers' name says when it comes; it is not the norm before the MLP, as in Llama.
    "attn_post_norm": Tap("post_attention_layernorm", Side.OUT),
    "attn_add": Tap("post_attention_layernorm", Side.OUT),
    "resid_mid": Tap("pre_feedforward_layernorm", Side.IN, "x"),
    "mlp_norm": Tap("pre_feedforward_layernorm", Side.OUT),
    "mlp_post_norm": Tap("post_feedforward_layernorm", Side.OUT),
    "mlp_add": Tap("post_feedforward_layernorm", Side.OUT),
}
_REFUSALS = {
    "use_bidirectional_attention": "its attention looks ahead, so that a token depends on those after it, which "
    "positions and generation steps do not allow for"
}

GEMMA = replace(LLAMA, name="Gemma", model_types=("gemma",), refusals=_REFUSALS)
"""The first one, with the block of Llama."""
GEMMA2 = Family(
    "Gemma-2",
    ("gemma2",),
    LLAMA.layers,
    {**LLAMA.taps, **_SANDWICH},
    {**NO_POSITION_EMBEDDING, **NO_EXPERTS, **NO_QK_NORMS},
    refusals=_REFUSALS,
    softcap="final_logit_softcapping",
)
GEMMA3 = Family(
    "Gemma-3 (text)",
    ("gemma3_text",),
    QWEN3.layers,
    {
        **QWEN3.taps,
        # Turned to [B, H, P, d] before the norms.
        "q_normed": Tap("self_attn.q_norm", Side.OUT, view=HeadsView(("H",), heads_first=True)),
        "k_normed": Tap("self_attn.k_norm", Side.OUT, view=HeadsView(("K",), heads_first=True)),
        **_SANDWICH,
    },
    {**NO_POSITION_EMBEDDING, **NO_EXPERTS},
    refusals=_REFUSALS,
    softcap="final_logit_softcapping",
    # All three projections first, and only then the norms.
    reached=("q", "k", "v", "q_normed", "k_normed"),
)
GEMMA3_WITH_IMAGES = replace(
    GEMMA3,
    name="Gemma-3 (text and images)",
    model_types=("gemma3",),
    layers="model.language_model.layers.{}",
    taps={
        **GEMMA3.taps,
        "embed": Tap("model.language_model.embed_tokens", Side.OUT),
        "final_norm": Tap("model.language_model.norm", Side.OUT),
    },
    # transformers 5.23 forgets it there: these logits are what lm_head returns, whatever the configuration says.
    softcap=None,
)
