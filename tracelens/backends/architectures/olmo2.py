"""OLMo-2 and OLMo-3: no norm before a sublayer, one after it; queries and keys are normed over all heads at once.

Most layers of OLMo-3 look back by a window.
"""

from dataclasses import replace

from tracelens.backends.architectures.absences import NO_EXPERTS, NO_POSITION_EMBEDDING
from tracelens.backends.architectures.llama import LLAMA
from tracelens.backends.base import Family, HeadsView, Side, Tap

OLMO2 = Family(
    "OLMo-2",
    ("olmo2",),
    LLAMA.layers,
    {
        **{name: tap for name, tap in LLAMA.taps.items() if name not in ("attn_norm", "mlp_norm")},
        # On [B, P, H * d].
        "q_normed": Tap("self_attn.q_norm", Side.OUT, view=HeadsView(("H",))),
        "k_normed": Tap("self_attn.k_norm", Side.OUT, view=HeadsView(("K",))),
        "attn_post_norm": Tap("post_attention_layernorm", Side.OUT),
        "attn_add": Tap("post_attention_layernorm", Side.OUT),
        # What the MLP receives is the stream itself. A write to resid_mid goes to the stream and the MLP, one to
        # mlp_in, which comes after it, to the MLP alone.
        "resid_mid": Tap("mlp", Side.IN, "x"),
        "mlp_post_norm": Tap("post_feedforward_layernorm", Side.OUT),
        "mlp_add": Tap("post_feedforward_layernorm", Side.OUT),
    },
    {
        **NO_POSITION_EMBEDDING,
        **NO_EXPERTS,
        "attn_norm": "attention reads the stream as it is, without a norm before it; use attn_in, or attn_post_norm "
        "for the norm of what attention returns",
        "mlp_norm": "the MLP reads the stream as it is, without a norm before it; use mlp_in, or mlp_post_norm for the "
        "norm of what the MLP returns",
    },
)
OLMO3 = replace(OLMO2, name="OLMo-3", model_types=("olmo3",))
