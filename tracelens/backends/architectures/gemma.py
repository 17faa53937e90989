"""Gemma-3 (text): norms on both ends of each sublayer, layers with a sliding window, logits that may be soft-capped."""

from tracelens.backends.architectures.absences import NO_EXPERTS, NO_POSITION_EMBEDDING
from tracelens.backends.architectures.llama import QWEN3
from tracelens.backends.base import Family, HeadsView, Side, Tap

GEMMA3 = Family(
    "Gemma-3 (text)",
    ("gemma3_text",),
    QWEN3.layers,
    {
        # The module of "embed" multiplies by the square root of d_model itself, and "logits" are soft-capped where the
        # configuration has final_logit_softcapping.
        **QWEN3.taps,
        # Turned to [B, H, P, d] before the norms.
        "q_normed": Tap("self_attn.q_norm", Side.OUT, view=HeadsView(("H",), heads_first=True)),
        "k_normed": Tap("self_attn.k_norm", Side.OUT, view=HeadsView(("K",), heads_first=True)),
        # transformers' name says when it comes; it is not the norm before the MLP, as in Llama.
        "attn_post_norm": Tap("post_attention_layernorm", Side.OUT),
        "attn_add": Tap("post_attention_layernorm", Side.OUT),
        "resid_mid": Tap("pre_feedforward_layernorm", Side.IN, "x"),
        "mlp_norm": Tap("pre_feedforward_layernorm", Side.OUT),
        "mlp_post_norm": Tap("post_feedforward_layernorm", Side.OUT),
        "mlp_add": Tap("post_feedforward_layernorm", Side.OUT),
    },
    {**NO_POSITION_EMBEDDING, **NO_EXPERTS},
    refusals={
        "use_bidirectional_attention": "its attention looks ahead, so that a token depends on those after it, which "
        "positions and generation steps do not allow for"
    },
    softcap="final_logit_softcapping",
    # All three projections first, and only then the norms.
    reached=("q", "k", "v", "q_normed", "k_normed"),
)
