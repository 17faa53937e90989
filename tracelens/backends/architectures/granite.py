"""Granite: the block of Llama, with numbers of the configuration between its modules and the stream."""

from dataclasses import replace

from tracelens.backends.architectures.llama import LLAMA
from tracelens.backends.base import ScaledView, Side, Tap

# What a sublayer returns is multiplied before it is added, and so is what the embedding returns before the first
# layer. A write to resid_mid goes into the sum after the product, so that it is exact.
_BRANCH = ScaledView("residual_multiplier")

GRANITE = replace(
    LLAMA,
    name="Granite",
    model_types=("granite",),
    taps={
        **LLAMA.taps,
        "embed": Tap("model.embed_tokens", Side.OUT, view=ScaledView("embedding_multiplier")),
        "attn_add": Tap("self_attn", Side.OUT, 0, _BRANCH),
        "mlp_add": Tap("mlp", Side.OUT, view=_BRANCH),
    },
    logits_over="logits_scaling",
    not_on_ranks={"pp": "each stage multiplies the stream with embedding_multiplier once more"},
)
