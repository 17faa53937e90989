"""Phi (Phi-1, Phi-1.5, Phi-2): attention and MLP side by side behind one norm, with biases everywhere."""

from tracelens.backends.architectures.absences import (
    NO_EXPERTS,
    NO_GATE,
    NO_POSITION_EMBEDDING,
    NO_POST_NORMS,
    NO_QK_NORMS,
    PARALLEL,
)
from tracelens.backends.architectures.llama import LLAMA
from tracelens.backends.base import Family, HeadsView, Side, Tap

_LACKS = ("resid_mid", "mlp_norm", "mlp_up")

PHI = Family(
    "Phi",
    ("phi",),
    LLAMA.layers,
    {
        **{name: tap for name, tap in LLAMA.taps.items() if name not in _LACKS},
        "z": Tap("self_attn.dense", Side.IN, view=HeadsView(("H",))),
        "attn_out": Tap("self_attn.dense", Side.OUT),
        "mlp_in": Tap("mlp", Side.IN, "hidden_states"),
        "mlp_pre": Tap("mlp.fc1", Side.OUT),
        "mlp_act": Tap("mlp.fc2", Side.IN),
        "mlp_out": Tap("mlp.fc2", Side.OUT),
        "final_norm": Tap("model.final_layernorm", Side.OUT),
    },
    {
        **NO_POSITION_EMBEDDING,
        **NO_POST_NORMS,
        **NO_EXPERTS,
        **NO_GATE,
        **NO_QK_NORMS,
        **PARALLEL,
        "mlp_norm": "the MLP reads the norm that attention reads; use attn_norm for both, or mlp_in for the MLP",
    },
    carries=(),
    refusals={
        "qk_layernorm": "it norms queries and keys, which no published Phi does, and of which its table says nothing"
    },
)
