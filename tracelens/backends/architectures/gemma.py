"""Gemma-3 (text): norms on both ends of each sublayer, layers with a sliding window, logits that may be soft-capped."""

from tracelens.backends.architectures.dense import NO_EXPERTS
from tracelens.backends.base import Family, HeadsView, Side, Tap

GEMMA3 = Family(
    "Gemma-3 (text)",
    ("gemma3_text",),
    "model.layers.{}",
    {
        # The module multiplies by the square root of d_model itself.
        "embed": Tap("model.embed_tokens", Side.OUT),
        "resid_pre": Tap("", Side.IN, "hidden_states"),
        "attn_norm": Tap("input_layernorm", Side.OUT),
        "attn_in": Tap("self_attn", Side.IN, "hidden_states"),
        "q": Tap("self_attn.q_proj", Side.OUT, view=HeadsView(("H",))),
        # Turned to [B, H, P, d] before the norms.
        "q_normed": Tap("self_attn.q_norm", Side.OUT, view=HeadsView(("H",), heads_first=True)),
        "k": Tap("self_attn.k_proj", Side.OUT, view=HeadsView(("K",))),
        "k_normed": Tap("self_attn.k_norm", Side.OUT, view=HeadsView(("K",), heads_first=True)),
        "v": Tap("self_attn.v_proj", Side.OUT, view=HeadsView(("K",))),
        "q_rot": Tap("self_attn", Side.INSIDE, "q_rot"),
        "k_rot": Tap("self_attn", Side.INSIDE, "k_rot"),
        "scores": Tap("self_attn", Side.INSIDE, "scores"),
        "pattern": Tap("self_attn", Side.INSIDE, "pattern"),
        "z": Tap("self_attn.o_proj", Side.IN, view=HeadsView(("H",))),
        "attn_out": Tap("self_attn.o_proj", Side.OUT),
        # transformers' name says when it comes; it is not the norm before the MLP, as in Llama.
        "attn_post_norm": Tap("post_attention_layernorm", Side.OUT),
        "attn_add": Tap("post_attention_layernorm", Side.OUT),
        "resid_mid": Tap("pre_feedforward_layernorm", Side.IN, "x"),
        "mlp_norm": Tap("pre_feedforward_layernorm", Side.OUT),
        "mlp_in": Tap("mlp", Side.IN, "x"),
        "mlp_pre": Tap("mlp.gate_proj", Side.OUT),
        "mlp_up": Tap("mlp.up_proj", Side.OUT),
        "mlp_act": Tap("mlp.down_proj", Side.IN),
        "mlp_out": Tap("mlp.down_proj", Side.OUT),
        "mlp_post_norm": Tap("post_feedforward_layernorm", Side.OUT),
        "mlp_add": Tap("post_feedforward_layernorm", Side.OUT),
        "resid_post": Tap("", Side.OUT),
        "final_norm": Tap("model.norm", Side.OUT),
        "lm_head": Tap("lm_head", Side.OUT),
        # Soft-capped, where the configuration has final_logit_softcapping.
        "logits": Tap("", Side.OUT, "logits"),
    },
    {
        "pos_embed": "positions enter by rotation inside attention (RoPE), so there is no position embedding",
        **NO_EXPERTS,
    },
    refusals={
        "use_bidirectional_attention": "its attention looks ahead, so that a token depends on those after it, which "
        "positions and generation steps do not allow for"
    },
    # All three projections first, and only then the norms.
    reached=("q", "k", "v", "q_normed", "k_normed"),
)
