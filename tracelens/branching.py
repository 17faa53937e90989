"""Prompts whose last token stands several times: so many ways to end in one pass, the tokens before computed once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tracelens.batch import Batch


@dataclass(frozen=True, slots=True, eq=False)
class Branched(Batch):
    """A batch whose rows end in ``branches`` copies of their last token, or in so many tokens that may come next.

    They have one position, and see the tokens before it and themselves, not each other. So each is computed as if the
    row ended with it alone. ``kind`` is the dtype of the mask that says so:
    bool, or the model's own where attention adds the mask to the scores.
    """

    branches: int = 1
    kind: torch.dtype = torch.bool

    @property
    def followed(self) -> Tensor:
        found = self.mask & ~self._copies
        # Of several tokens that may come next none is the one that does.
        ends = self.input_ids[:, -self.branches :]
        found[:, -self.branches - 1 : -self.branches] &= (ends == ends[:, :1]).all(1, keepdim=True)
        return found

    @property
    def _copies(self) -> Tensor:
        positions = self.input_ids.shape[1]
        return torch.arange(positions) >= positions - self.branches

    def _attention_mask(self) -> Tensor:
        """Who sees whom, [B, 1, P, P]."""
        positions = self.input_ids.shape[1]
        order = torch.ones(positions, positions, dtype=torch.bool).tril()
        copies = self._copies
        # Padding sees itself: a row of a soft-max over nothing would be nan.
        alone = torch.eye(positions, dtype=torch.bool)
        seen = ((order & ~(copies[:, None] & copies) & self.mask[:, None, :]) | alone)[:, None]
        if self.kind is torch.bool:
            return seen
        return torch.zeros(seen.shape, dtype=self.kind).masked_fill(~seen, torch.finfo(self.kind).min)

    def _of(self, rows: list[int], first: int = 0) -> Branched:
        return with_copies(super(Branched, self)._of(rows, first), self.branches, self.kind)


def branched(batch: Batch, branches: int, kind: torch.dtype) -> Branched:
    """The batch with ``branches`` of the last token of each row.

    >>> from tracelens.batch import prepare
    >>> made = branched(prepare([[5, 6, 7], [8, 9]], max_positions=16), 3, torch.bool)
    >>> made.input_ids.tolist(), made.position_ids.tolist()
    ([[5, 6, 7, 7, 7], [0, 8, 9, 9, 9]], [[0, 1, 2, 2, 2], [0, 0, 1, 1, 1]])
    """
    more = branches - 1

    def longer(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, tensor[:, -1:].expand(-1, more)], 1)

    batch = Batch(
        longer(batch.input_ids),
        longer(batch.mask),
        longer(batch.position_ids),
        tuple(length + more for length in batch.lengths),
    )
    return with_copies(batch, branches, kind)


def ending(batch: Batch, ends: Tensor, kind: torch.dtype) -> Branched:
    """The batch with each row followed by its tokens of ``ends`` [B, K], each of them as the one that comes next.

    >>> from tracelens.batch import prepare
    >>> made = ending(prepare([[5, 6], [8]], max_positions=16), torch.tensor([[3, 4], [9, 7]]), torch.bool)
    >>> made.input_ids.tolist(), made.position_ids.tolist()
    ([[5, 6, 3, 4], [0, 8, 9, 7]], [[0, 1, 2, 2], [0, 0, 1, 1]])
    """
    ways = ends.shape[1]
    longer = Batch(
        torch.cat([batch.input_ids, ends], 1),
        torch.cat([batch.mask, torch.ones(ends.shape, dtype=torch.bool)], 1),
        torch.cat([batch.position_ids, (batch.position_ids[:, -1:] + 1).expand(-1, ways)], 1),
        tuple(length + ways for length in batch.lengths),
    )
    return with_copies(longer, ways, kind)


def with_copies(batch: Batch, branches: int, kind: torch.dtype) -> Branched:
    """A batch whose rows end in copies already. They are no text, so that none goes with it."""
    return Branched(
        batch.input_ids, batch.mask, batch.position_ids, batch.lengths, branches=branches, kind=kind
    )
