"""GPT-2: learned positions, LayerNorm, and an MLP without a gate."""

from tracelens.backends.architectures.absences import (
    NO_EXPERTS,
    NO_GATE,
    NO_POST_NORMS,
    NO_QK_NORMS,
    NO_ROTATION,
)
from tracelens.backends.base import Family, HeadsView, Side, Tap

# One matrix makes queries, keys and values, side by side.
_FUSED = ("H", "H", "H")

GPT2 = Family(
    "GPT-2",
    ("gpt2",),
    "transformer.h.{}",
    {
        "embed": Tap("transformer.wte", Side.OUT),
        "pos_embed": Tap("transformer.wpe", Side.OUT),
        "resid_pre": Tap("", Side.IN, "hidden_states"),
        "attn_norm": Tap("ln_1", Side.OUT),
        "attn_in": Tap("attn", Side.IN, "hidden_states"),
        "q": Tap("attn.c_attn", Side.OUT, view=HeadsView(_FUSED, 0)),
        "k": Tap("attn.c_attn", Side.OUT, view=HeadsView(_FUSED, 1)),
        "v": Tap("attn.c_attn", Side.OUT, view=HeadsView(_FUSED, 2)),
        "scores": Tap("attn", Side.INSIDE, "scores"),
        "pattern": Tap("attn", Side.INSIDE, "pattern"),
        "z": Tap("attn.c_proj", Side.IN, view=HeadsView(("H",))),
        "attn_out": Tap("attn.c_proj", Side.OUT),
        "attn_add": Tap("attn", Side.OUT, 0),
        "resid_mid": Tap("ln_2", Side.IN),
        "mlp_norm": Tap("ln_2", Side.OUT),
        "mlp_in": Tap("mlp", Side.IN, "hidden_states"),
        "mlp_pre": Tap("mlp.c_fc", Side.OUT),
        "mlp_act": Tap("mlp.c_proj", Side.IN),
        "mlp_out": Tap("mlp.c_proj", Side.OUT),
        "mlp_add": Tap("mlp", Side.OUT),
        "resid_post": Tap("", Side.OUT),
        "final_norm": Tap("transformer.ln_f", Side.OUT),
        "lm_head": Tap("lm_head", Side.OUT),
        "logits": Tap("", Side.OUT, "logits"),
    },
    {
        **NO_EXPERTS,
        **NO_GATE,
        **NO_POST_NORMS,
        **NO_QK_NORMS,
        **NO_ROTATION,
    },
    neurons="n_inner",
    refusals={
        "add_cross_attention": "blocks with cross-attention add a third term to the stream, which has no site"
    },
    withheld={
        "reorder_and_upcast_attn": (
            ("scores", "pattern"),
            "with reorder_and_upcast_attn the block computes attention in a way of its own, which cannot be tapped",
        )
    },
    out_by_in=False,
    wide_softmax=False,
)
