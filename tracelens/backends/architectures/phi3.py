"""Phi-3 and Phi-4: the block of Llama, with one matrix for q, k and v and one for both branches of the MLP."""

from tracelens.backends.architectures.llama import LLAMA
from tracelens.backends.base import Family, HeadsView, NeuronsView, Side, Tap

# Side by side; keys and values may have fewer heads.
_FUSED = ("H", "K", "K")

PHI3 = Family(
    "Phi-3",
    ("phi3",),
    LLAMA.layers,
    {
        **LLAMA.taps,
        "q": Tap("self_attn.qkv_proj", Side.OUT, view=HeadsView(_FUSED, 0)),
        "k": Tap("self_attn.qkv_proj", Side.OUT, view=HeadsView(_FUSED, 1)),
        "v": Tap("self_attn.qkv_proj", Side.OUT, view=HeadsView(_FUSED, 2)),
        "mlp_in": Tap("mlp", Side.IN, "hidden_states"),
        "mlp_pre": Tap("mlp.gate_up_proj", Side.OUT, view=NeuronsView(("M", "M"), 0)),
        "mlp_up": Tap("mlp.gate_up_proj", Side.OUT, view=NeuronsView(("M", "M"), 1)),
    },
    LLAMA.absent,
)
