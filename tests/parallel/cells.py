"""The conformance matrix of models on ranks, as data: which model on which ranks, and what is not supported and why.

A cell without a reason has every site read and every site written; a cell with one is refused with an error that says
so. Nothing is left out: a cell that starts to work fails until it is marked here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Shape:
    """How many ranks share a layer, and how many stages follow each other."""

    tp: int
    pp: int

    @property
    def name(self) -> str:
        words = [f"{word}{size}" for word, size in (("pp", self.pp), ("tp", self.tp)) if size > 1]
        return " x ".join(words)

    @property
    def world(self) -> int:
        return self.tp * self.pp


SHAPES = {
    shape.name: shape
    for shape in (Shape(2, 1), Shape(3, 1), Shape(4, 1), Shape(1, 2), Shape(1, 3), Shape(2, 2))
}
SMOLLM2 = "smollm2-135m"
TINY = (
    *("llama", "mistral", "qwen2", "qwen3", "gpt2"),
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
    """A model on ranks; ``settings`` beside those of its family; ``refused``: what the error says."""

    family: str
    shape: str
    settings: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}), hash=False)
    refused: str | None = None

    def __str__(self) -> str:
        return f"{self.family} on {self.shape}".replace(" x ", "x")


# Four ranks need as many kv heads; twice the heads, so that they stay grouped.
_MORE_HEADS = MappingProxyType({"num_attention_heads": 8, "num_key_value_heads": 4})


def _tiny(family: str, shape: Shape) -> Cell:
    if family.startswith("gpt2"):
        what = "ranks share a layer of gpt2" if shape.tp > 1 else "gpt2 is cut into stages"
        return Cell(family, shape.name, refused=f"transformers has no plan by which {what}")
    if shape.tp == 3:
        return Cell(
            family, shape.name, refused="3 ranks cannot share the model evenly: num_attention_heads is 4"
        )
    return Cell(family, shape.name, _MORE_HEADS if shape.tp == 4 else MappingProxyType({}))


def _smollm2(shape: Shape) -> Cell:
    if shape.tp in (2, 4):
        return Cell(SMOLLM2, shape.name, refused="cannot share the model evenly: num_attention_heads is 9")
    return Cell(SMOLLM2, shape.name)


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
)
"""The supported cells that every run of the tests has: each model and each kind of spreading at least once."""
