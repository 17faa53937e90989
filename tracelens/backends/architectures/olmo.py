"""OLMo: the block of Llama, with norms that have no gains."""

from dataclasses import replace

from tracelens.backends.architectures.llama import LLAMA

_CLIPPED = "the model clips what the projection returns before it goes on with it (clip_qkv)"

OLMO = replace(
    LLAMA,
    name="OLMo",
    model_types=("olmo",),
    withheld={"clip_qkv": (("q", "k", "v"), f"{_CLIPPED}; use q_rot, k_rot and z")},
)
