"""Llama and the families that share its block: Mistral, Qwen2, Qwen3."""

from tracelens.backends.architectures.absences import (
    NO_EXPERTS,
    NO_POSITION_EMBEDDING,
    NO_POST_NORMS,
    NO_QK_NORMS,
)
from tracelens.backends.base import Family, HeadsView, Side, Tap

_TAPS = {
    "embed": Tap("model.embed_tokens", Side.OUT),
    "resid_pre": Tap("", Side.IN, "hidden_states"),
    "attn_norm": Tap("input_layernorm", Side.OUT),
    "attn_in": Tap("self_attn", Side.IN, "hidden_states"),
    "q": Tap("self_attn.q_proj", Side.OUT, view=HeadsView(("H",))),
    "k": Tap("self_attn.k_proj", Side.OUT, view=HeadsView(("K",))),
    "v": Tap("self_attn.v_proj", Side.OUT, view=HeadsView(("K",))),
    "q_rot": Tap("self_attn", Side.INSIDE, "q_rot"),
    "k_rot": Tap("self_attn", Side.INSIDE, "k_rot"),
    "scores": Tap("self_attn", Side.INSIDE, "scores"),
    "pattern": Tap("self_attn", Side.INSIDE, "pattern"),
    "z": Tap("self_attn.o_proj", Side.IN, view=HeadsView(("H",))),
    "attn_out": Tap("self_attn.o_proj", Side.OUT),
    "attn_add": Tap("self_attn", Side.OUT, 0),
    "resid_mid": Tap("post_attention_layernorm", Side.IN, "hidden_states"),
    "mlp_norm": Tap("post_attention_layernorm", Side.OUT),
    "mlp_in": Tap("mlp", Side.IN, "x"),
    "mlp_pre": Tap("mlp.gate_proj", Side.OUT),
    "mlp_up": Tap("mlp.up_proj", Side.OUT),
    "mlp_act": Tap("mlp.down_proj", Side.IN),
    "mlp_out": Tap("mlp.down_proj", Side.OUT),
    "mlp_add": Tap("mlp", Side.OUT),
    "resid_post": Tap("", Side.OUT),
    "final_norm": Tap("model.norm", Side.OUT),
    "lm_head": Tap("lm_head", Side.OUT),
    "logits": Tap("", Side.OUT, "logits"),
}

# On [B, P, H, d] already.
_QK_NORMS = {
    "q_normed": Tap("self_attn.q_norm", Side.OUT),
    "k_normed": Tap("self_attn.k_norm", Side.OUT),
}

_ABSENT = {
    **NO_POSITION_EMBEDDING,
    **NO_POST_NORMS,
    **NO_EXPERTS,
    **NO_QK_NORMS,
}

LLAMA = Family("Llama", ("llama",), "model.layers.{}", _TAPS, _ABSENT)
MISTRAL = Family("Mistral", ("mistral",), "model.layers.{}", _TAPS, _ABSENT)
QWEN2 = Family("Qwen2", ("qwen2",), "model.layers.{}", _TAPS, _ABSENT)
QWEN3 = Family(
    "Qwen3",
    ("qwen3",),
    "model.layers.{}",
    {**_TAPS, **_QK_NORMS},
    {**NO_POSITION_EMBEDDING, **NO_POST_NORMS, **NO_EXPERTS},
)
