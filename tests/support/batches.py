"""Prompts as the library feeds them: padded on the left, with a mask and position ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tests.support.families import VOCABULARY

PAD = 0


class Batch(NamedTuple):
    """``input_ids`` [B, P], ``mask`` [B, P] bool, True at real tokens, ``position_ids`` [B, P] from 0 at the first."""

    input_ids: Tensor
    mask: Tensor
    position_ids: Tensor

    @property
    def lengths(self) -> list[int]:
        """How many real tokens each row has."""
        return self.mask.sum(dim=1).tolist()

    def row(self, index: int) -> Batch:
        """One row alone, without its padding."""
        real = self.mask[index]
        return Batch(*(part[index][real][None] for part in self))


def batch(rows: Sequence[Sequence[int]]) -> Batch:
    """Token ids, padded on the left to the longest row."""
    width = max(len(row) for row in rows)
    input_ids = torch.tensor([[PAD] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
    return Batch(input_ids, mask, (mask.long().cumsum(dim=1) - 1).clamp(min=0))


def random_rows(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Random tokens, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def random_batch(lengths: Sequence[int], seed: int = 0) -> Batch:
    return batch(random_rows(lengths, seed))


# The shapes of prompt that tests run on: one row, equal rows, and rows padded to different depths.
SINGLE, EVEN, RAGGED = (9,), (7, 7, 7), (9, 4, 6)
