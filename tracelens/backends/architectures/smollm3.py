"""SmolLM3: the block of Llama, in which every fourth layer rotates nothing."""

from dataclasses import replace
from typing import Any

from tracelens.backends.architectures.llama import LLAMA
from tracelens.backends.base import InSome


def _rotating(config: Any) -> frozenset[int]:
    return frozenset(layer for layer, rotates in enumerate(config.no_rope_layers) if rotates)


SMOLLM3 = replace(
    LLAMA,
    name="SmolLM3",
    model_types=("smollm3",),
    in_some=(
        InSome(
            ("q_rot", "k_rot"),
            _rotating,
            "layers that rotate queries and keys",
            "tells no positions apart and rotates nothing; use q and k",
        ),
    ),
)
