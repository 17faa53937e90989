"""Bloom: positions as a bias on the scores (ALiBi), and sublayers that add what they make to the stream themselves."""

from tracelens.backends.architectures.absences import (
    NO_EXPERTS,
    NO_GATE,
    NO_POST_NORMS,
    NO_QK_NORMS,
)
from tracelens.backends.base import Family, HeadsView, Side, Tap

# One matrix makes queries, keys and values, head by head.
_FUSED = ("H", "H", "H")

BLOOM = Family(
    "Bloom",
    ("bloom",),
    "transformer.h.{}",
    {
        # With the norm that makes the stream of what the embedding returns.
        "embed": Tap("transformer.word_embeddings_layernorm", Side.OUT),
        "resid_pre": Tap("", Side.IN, "hidden_states"),
        "attn_norm": Tap("input_layernorm", Side.OUT),
        "attn_in": Tap("self_attention", Side.IN, "hidden_states"),
        "q": Tap("self_attention.query_key_value", Side.OUT, view=HeadsView(_FUSED, 0, grouped=True)),
        "k": Tap("self_attention.query_key_value", Side.OUT, view=HeadsView(_FUSED, 1, grouped=True)),
        "v": Tap("self_attention.query_key_value", Side.OUT, view=HeadsView(_FUSED, 2, grouped=True)),
        "scores": Tap("self_attention", Side.INSIDE, "scores"),
        "pattern": Tap("self_attention", Side.INSIDE, "pattern"),
        "z": Tap("self_attention.dense", Side.IN, view=HeadsView(("H",))),
        "attn_out": Tap("self_attention.dense", Side.OUT),
        "attn_add": Tap("self_attention.dense", Side.OUT),
        # The attention module returns the stream, and all that follows is made of that: a write needs nothing more.
        "resid_mid": Tap("self_attention", Side.OUT, 0),
        "mlp_norm": Tap("post_attention_layernorm", Side.OUT),
        "mlp_in": Tap("mlp", Side.IN, "hidden_states"),
        "mlp_pre": Tap("mlp.dense_h_to_4h", Side.OUT),
        "mlp_act": Tap("mlp.dense_4h_to_h", Side.IN),
        "mlp_out": Tap("mlp.dense_4h_to_h", Side.OUT),
        "mlp_add": Tap("mlp.dense_4h_to_h", Side.OUT),
        "resid_post": Tap("", Side.OUT, 0),
        "final_norm": Tap("transformer.ln_f", Side.OUT),
        "lm_head": Tap("lm_head", Side.OUT),
        "logits": Tap("", Side.OUT, "logits"),
    },
    {
        "pos_embed": "positions enter as a bias on the scores inside attention (ALiBi), so there is no position "
        "embedding",
        **NO_EXPERTS,
        **NO_GATE,
        **NO_POST_NORMS,
        **NO_QK_NORMS,
        "q_rot": "positions are a bias on the scores (ALiBi), so nothing is rotated in attention; use q",
        "k_rot": "positions are a bias on the scores (ALiBi), so nothing is rotated in attention; use k",
    },
    carries=(),
    refusals={
        "apply_residual_connection_post_layernorm": "its sublayers add what they make to the output of a norm, and "
        "not to the stream",
        "slow_but_exact": "with pretraining_tp above 1 its projections are computed in slices, past their modules",
    },
    refused_if={"slow_but_exact": lambda config: config.slow_but_exact and config.pretraining_tp > 1},
    embedding="transformer.word_embeddings",
    attends_itself=True,
)
