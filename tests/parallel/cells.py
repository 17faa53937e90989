"""The conformance matrix, as data: which model spread in which way, and what is not supported and why.

A cell without a mark has every site read and every site written; a cell with one is refused with an error that says
why. Nothing is left out: a cell that starts to work fails until its mark is taken away.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from types import MappingProxyType
from typing import Any

import pytest

from tracelens.backends.rank_versions import EXPERTS, STAGES_OF_RANKS, knows

KNOWS_EP = knows(EXPERTS) and knows(STAGES_OF_RANKS)
"""Can this version of transformers both give each rank some experts and cut a model into stages of several ranks?"""
knows_ep = pytest.mark.skipif(
    not KNOWS_EP,
    reason="this version of transformers cannot both spread experts and cut a model into stages of several ranks; "
    "until transformers 5.17 to 5.22, which are so, are no longer supported",
)


class Mark(Enum):
    """Why a cell is refused."""

    NEVER = "never"
    """It cannot be: the sizes do not allow it."""
    NOTIMPL = "notimpl"
    """What this stands on does not have it."""
    NOTYET = "notyet"
    """It is ours to build."""


@dataclass(frozen=True)
class Refused:
    """A mark, and what the error says."""

    mark: Mark
    says: str


@dataclass(frozen=True)
class Shape:
    """How a model is spread.

    ``tp`` ranks share each layer, and if ``ep`` is as much, each has some of the experts whole; ``pp`` stages follow
    each other. ``by_hand``: by the plan of PyTorch's tutorial, and not by transformers. Or accelerate spreads the
    layers over ``devices`` of one process.
    """

    tp: int = 1
    pp: int = 1
    ep: int = 1
    devices: int = 1
    by_hand: bool = False

    @property
    def name(self) -> str:
        if self.devices > 1:
            return "device_map"
        if self.by_hand:
            return "parallelize_module"
        words = [
            f"{word}{size}" for word, size in (("pp", self.pp), ("tp", self.tp), ("ep", self.ep)) if size > 1
        ]
        return " x ".join(words)

    @property
    def world(self) -> int:
        return self.tp * self.pp


SHAPES = {
    shape.name: shape
    for shape in (
        *(Shape(devices=3), Shape(tp=2), Shape(tp=3), Shape(tp=4)),
        *(Shape(pp=2), Shape(pp=3), Shape(tp=2, pp=2)),
        *(Shape(tp=2, ep=2), Shape(tp=2, by_hand=True)),
    )
}
SMOLLM2 = "smollm2-135m"
TINY = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma3", "qwen3_moe", "gpt2"),
    *(
        "llama_tied",
        "llama_bias",
        "llama_wide",
        "mistral_sliding",
        "qwen2_sliding",
        "qwen3_tied",
        "gpt2_tied",
    ),
)


@dataclass(frozen=True)
class Cell:
    """A model that is spread; ``shape``: the column of the table; ``settings`` beside those of its family."""

    family: str
    shape: str
    spread: Shape
    settings: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}), hash=False)
    refused: Refused | None = None

    def __str__(self) -> str:
        return f"{self.family} on {self.shape}".replace(" x ", "x")


# Four ranks need as many kv heads; twice the heads, so that they stay grouped.
_MORE_HEADS = MappingProxyType({"num_attention_heads": 8, "num_key_value_heads": 4})


def _tiny(family: str, shape: Shape) -> Cell:
    settings = _MORE_HEADS if shape.tp == 4 else MappingProxyType({})
    return Cell(family, shape.name, shape, settings, _refused(family, shape))


def _refused(family: str, shape: Shape) -> Refused | None:
    if family.startswith("gpt2") and shape.by_hand:
        return Refused(
            Mark.NEVER, "GPT2LMHeadModel has no attribute `model`"
        )  # which the tutorial's plan names
    if family.startswith("gpt2") and shape.world > 1:
        what = "ranks share a layer of gpt2" if shape.tp > 1 else "gpt2 is cut into stages"
        return Refused(Mark.NOTIMPL, f"transformers has no plan by which {what}")
    if shape.tp == 3:
        return Refused(Mark.NEVER, "3 ranks cannot share the model evenly: num_attention_heads is 4")
    if shape.ep > 1 and family != "qwen3_moe":
        return Refused(Mark.NEVER, "has no experts")
    return None


def _smollm2(shape: Shape) -> Cell:
    """Of its nine heads two or four ranks cannot have equal shares; a plan by hand is for three."""
    if shape.by_hand:
        return Cell(SMOLLM2, shape.name, replace(shape, tp=3))
    says = "cannot share the model evenly: num_attention_heads is 9"
    refused = Refused(Mark.NEVER, says) if shape.tp in (2, 4) else None
    return Cell(SMOLLM2, shape.name, shape, refused=refused)


CELLS = {
    str(cell): cell
    for cell in (
        *(_tiny(family, shape) for family in TINY for shape in SHAPES.values()),
        *(_smollm2(shape) for shape in SHAPES.values()),
    )
}
DIAGONAL = (
    "llama on tp2",
    "qwen2 on pp2",
    "qwen3 on pp2xtp2",
    "mistral on tp4",
    "llama_tied on pp2xtp2",
    "llama_bias on tp2",
    "gemma3 on tp2",
    "qwen3_moe on pp2",
    "qwen3_moe on tp2",
    "qwen3_moe on tp2xep2",
    "qwen2 on parallelize_module",
    "gpt2 on device_map",
)
"""The supported cells that every run of the tests has: each model and each kind of spreading at least once."""
