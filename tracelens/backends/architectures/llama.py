"""Llama and the families that share its block: Mistral, Qwen2, Qwen3."""

from tracelens.backends.base import Family, Side, Tap

_TAPS = {
    "embed": Tap("model.embed_tokens", Side.OUT),
    "resid_pre": Tap("", Side.IN, "hidden_states"),
    "attn_norm": Tap("input_layernorm", Side.OUT),
    "attn_in": Tap("self_attn", Side.IN, "hidden_states"),
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

_ABSENT = {
    "pos_embed": "positions enter by rotation inside attention (RoPE), so there is no position embedding"
}

LLAMA = Family("Llama", ("llama",), "model.layers.{}", _TAPS, _ABSENT)
MISTRAL = Family("Mistral", ("mistral",), "model.layers.{}", _TAPS, _ABSENT)
QWEN2 = Family("Qwen2", ("qwen2",), "model.layers.{}", _TAPS, _ABSENT)
QWEN3 = Family("Qwen3", ("qwen3",), "model.layers.{}", _TAPS, _ABSENT)
