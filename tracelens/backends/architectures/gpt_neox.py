"""GPT-NeoX and Pythia: attention and MLP one after the other, or (most Pythia models) side by side."""

from tracelens.backends.architectures.absences import (
    NO_EXPERTS,
    NO_GATE,
    NO_POSITION_EMBEDDING,
    NO_POST_NORMS,
    NO_QK_NORMS,
    PARALLEL,
)
from tracelens.backends.base import Family, HeadsView, Side, Tap

# One matrix makes queries, keys and values, head by head.
_FUSED = ("H", "H", "H")

_TAPS = {
    "embed": Tap("gpt_neox.embed_in", Side.OUT),
    "resid_pre": Tap("", Side.IN, "hidden_states"),
    "attn_norm": Tap("input_layernorm", Side.OUT),
    "attn_in": Tap("attention", Side.IN, "hidden_states"),
    "q": Tap("attention.query_key_value", Side.OUT, view=HeadsView(_FUSED, 0, grouped=True)),
    "k": Tap("attention.query_key_value", Side.OUT, view=HeadsView(_FUSED, 1, grouped=True)),
    "v": Tap("attention.query_key_value", Side.OUT, view=HeadsView(_FUSED, 2, grouped=True)),
    "q_rot": Tap("attention", Side.INSIDE, "q_rot"),
    "k_rot": Tap("attention", Side.INSIDE, "k_rot"),
    "scores": Tap("attention", Side.INSIDE, "scores"),
    "pattern": Tap("attention", Side.INSIDE, "pattern"),
    "z": Tap("attention.dense", Side.IN, view=HeadsView(("H",))),
    "attn_out": Tap("attention.dense", Side.OUT),
    "attn_add": Tap("attention", Side.OUT, 0),
    # Where the two are side by side, it reads resid_pre.
    "mlp_norm": Tap("post_attention_layernorm", Side.OUT),
    "mlp_in": Tap("mlp", Side.IN, "hidden_states"),
    "mlp_pre": Tap("mlp.dense_h_to_4h", Side.OUT),
    "mlp_act": Tap("mlp.dense_4h_to_h", Side.IN),
    "mlp_out": Tap("mlp.dense_4h_to_h", Side.OUT),
    "mlp_add": Tap("mlp", Side.OUT),
    "resid_post": Tap("", Side.OUT),
    "final_norm": Tap("gpt_neox.final_layer_norm", Side.OUT),
    "lm_head": Tap("lm_head", Side.OUT),
    "logits": Tap("", Side.OUT, "logits"),
}
_ABSENT = {**NO_POSITION_EMBEDDING, **NO_POST_NORMS, **NO_EXPERTS, **NO_GATE, **NO_QK_NORMS}

GPT_NEOX_SEQUENTIAL = Family(
    "GPT-NeoX (sequential)",
    ("gpt_neox",),
    "gpt_neox.layers.{}",
    {**_TAPS, "resid_mid": Tap("post_attention_layernorm", Side.IN)},
    _ABSENT,
    serves=lambda config: not config.use_parallel_residual,
    these="`use_parallel_residual` is false",
)
GPT_NEOX_PARALLEL = Family(
    "GPT-NeoX (parallel; Pythia)",
    ("gpt_neox",),
    "gpt_neox.layers.{}",
    _TAPS,
    {**_ABSENT, **PARALLEL},
    carries=(),
    these="`use_parallel_residual` is true",
)
