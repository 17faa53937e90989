"""GLM-4: `glm` (GLM-4-9B of 2024) has the block of Llama, `glm4` (GLM-4-0414) a norm behind each sublayer as well."""

from dataclasses import replace

from tracelens.backends.architectures.absences import NO_EXPERTS, NO_POSITION_EMBEDDING, NO_QK_NORMS
from tracelens.backends.architectures.llama import LLAMA
from tracelens.backends.architectures.phi3 import PHI3
from tracelens.backends.base import Side, Tap

# Both branches of the MLP come of one matrix. A part of each head is rotated, its numbers in neighbouring pairs.
GLM = replace(
    LLAMA,
    name="GLM-4 (2024)",
    model_types=("glm",),
    taps={**LLAMA.taps, **{name: PHI3.taps[name] for name in ("mlp_in", "mlp_pre", "mlp_up")}},
)
GLM4 = replace(
    GLM,
    name="GLM-4 (0414)",
    model_types=("glm4",),
    taps={
        **GLM.taps,
        "attn_post_norm": Tap("post_self_attn_layernorm", Side.OUT),
        "attn_add": Tap("post_self_attn_layernorm", Side.OUT),
        # transformers' name says when it comes: it is the norm before the MLP, as in Llama, and resid_mid is before it.
        "mlp_norm": Tap("post_attention_layernorm", Side.OUT),
        "mlp_post_norm": Tap("post_mlp_layernorm", Side.OUT),
        "mlp_add": Tap("post_mlp_layernorm", Side.OUT),
    },
    absent={**NO_POSITION_EMBEDDING, **NO_EXPERTS, **NO_QK_NORMS},
)
