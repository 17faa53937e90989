"""Tables as somebody else would write them, in a module that ranks import."""

from __future__ import annotations

from tracelens.families import NO_GATE, Family, Side, Tap, table

_LLAMA = table("llama")

STARCODER2 = Family(
    "StarCoder2",
    ("starcoder2",),
    "model.layers.{}",
    {
        **{name: tap for name, tap in _LLAMA.taps.items() if name != "mlp_up"},
        "resid_mid": Tap("post_attention_layernorm", Side.IN),
        "mlp_in": Tap("mlp", Side.IN, "hidden_states"),
        "mlp_pre": Tap("mlp.c_fc", Side.OUT),
        "mlp_act": Tap("mlp.c_proj", Side.IN),
        "mlp_out": Tap("mlp.c_proj", Side.OUT),
    },
    {**_LLAMA.absent, **NO_GATE},
)
OF_LLAMA = _LLAMA
NO_TABLE = "a text"
