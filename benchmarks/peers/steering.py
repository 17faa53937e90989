"""What every contestant of the steering benchmark is given: a model, pairs of answers, and what to make of them."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors.torch import load_file

from benchmarks.peers.subject import Answer

Pair = tuple[str, str, str]
"""A prompt, and an answer that shows the behaviour and one that does not."""

STEERING: dict[str, str] = {
    "extract": "vectors of every layer at post_ln and resid_post",
    "sweep": "the propensity of every prompt at every multiplier",
}
"""The cases: pairs to mean differences, at the label; and prompts steered at the decision position."""

NEAR = {"extract": 1e-4, "sweep": 1e-3}
"""By how much an answer may differ, relative to the largest number of its tensor: a layer's vector, all propensities.

A propensity is a difference of logits that are a hundred times as large, with as many digits fewer.
"""

Answers = dict[str, Answer]


class Padded(NamedTuple):
    """Texts of several lengths in one batch, with the padding on the left: each ends in the last column."""

    ids: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor

    def options(self) -> dict[str, Any]:
        """What the model is told besides the ids."""
        return {"attention_mask": self.mask, "position_ids": self.positions, "use_cache": False}


class Row(NamedTuple):
    """A pair as ids: up to the label, which is the first token that differs, with each answer."""

    positive: list[int]
    negative: list[int]

    @property
    def prompt(self) -> list[int]:
        """The ids up to the decision position, whose logits choose the label."""
        return self.positive[:-1]


@dataclass(frozen=True)
class Steering:
    """A model of the Llama layout on the CPU with its tokenizer, pairs to learn from and pairs to measure on.

    ``vector``: [D], what the sweep adds after layer ``middle``. ``batch``: so many pairs, or prompts, in a pass.
    """

    model: Any
    tokenizer: Any
    train: tuple[Pair, ...]
    test: tuple[Pair, ...]
    multipliers: tuple[float, ...]
    batch: int
    vector: torch.Tensor

    @classmethod
    def load(cls, folder: str | Path, inputs: str | Path) -> Self:
        """The model in ``folder``, with what :func:`write` has put into the folder ``inputs``."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        told = json.loads((Path(inputs) / "inputs.json").read_text(encoding="utf-8"))
        return cls(
            AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval(),
            AutoTokenizer.from_pretrained(str(folder)),
            tuple((prompt, positive, negative) for prompt, positive, negative in told["train"]),
            tuple((prompt, positive, negative) for prompt, positive, negative in told["test"]),
            tuple(told["multipliers"]),
            told["batch"],
            load_file(Path(inputs) / "vector.safetensors")["vector"],
        )

    @cached_property
    def blocks(self) -> Any:
        return self.model.model.layers

    @property
    def n_layers(self) -> int:
        return self.model.config.num_hidden_layers

    @property
    def middle(self) -> int:
        return self.n_layers // 2

    def separate(self) -> Steering:
        """The same with a model of its own, for a library that leaves something behind on the model."""
        return replace(self, model=copy.deepcopy(self.model))

    # --- from texts to batches, as one writes it by hand ---------------------------------------------------------

    def row(self, pair: Pair) -> Row:
        """The ids of a pair up to the label; making them is part of what is timed, of everybody."""
        prompt, positive, negative = pair
        one, other = (self.tokenizer(prompt + answer)["input_ids"] for answer in (positive, negative))
        label = next(at for at, (this, that) in enumerate(zip(one, other, strict=False)) if this != that)
        return Row(one[: label + 1], other[: label + 1])

    def batches(self, pairs: Sequence[Pair]) -> Iterator[tuple[list[int], list[Row]]]:
        """The pairs as ids, those of like lengths together, with their numbers."""
        rows = [self.row(pair) for pair in pairs]
        order = sorted(range(len(rows)), key=lambda number: len(rows[number].positive))
        for start in range(0, len(order), self.batch):
            numbers = order[start : start + self.batch]
            yield numbers, [rows[number] for number in numbers]

    @staticmethod
    def padded(texts: Sequence[Sequence[int]]) -> Padded:
        longest = max(map(len, texts))
        ids = torch.zeros(len(texts), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for number, text in enumerate(texts):
            ids[number, longest - len(text) :] = torch.tensor(text)
            mask[number, longest - len(text) :] = 1
        return Padded(ids, mask, (mask.cumsum(-1) - 1).clamp(min=0))

    @staticmethod
    def propensity(logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
        """The logit of the positive label less that of the negative one, [B], of logits [B, V]."""
        one = torch.tensor([[row.positive[-1]] for row in rows])
        other = torch.tensor([[row.negative[-1]] for row in rows])
        return (logits.gather(1, one) - logits.gather(1, other))[:, 0]


def named(vectors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Vectors [L, D] of each site by site and layer, so that each is compared by itself."""
    return {
        f"{site}.{layer}": one.float().clone()
        for site, found in vectors.items()
        for layer, one in enumerate(found)
    }
