"""A prompt together with the tokenizer that explains it: what recordings and runs ask of a prompt."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import torch

from tracelens.batch import Batch
from tracelens.ir.ops import Selector
from tracelens.selection import Selection, mask_indices, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Prompt:
    """A batch, with its token selectors resolved at most once."""

    def __init__(self, batch: Batch, tokenizer: PreTrainedTokenizerBase | None, owner: object = None) -> None:
        self.owner = owner
        self.batch = batch
        self.tokenizer = tokenizer
        # Without a cache, attention looks at the very positions of the pass.
        self.sizes = {**batch.sizes, "S": batch.sizes["P"]}
        self.ragged = batch.ragged
        self._selections: dict[Selector, Selection] = {}

    def rows(self, start: int, stop: int) -> Prompt:
        """Some of the rows, as a prompt of their own: padded to the longest of them."""
        return Prompt(self.batch.rows(start, stop), self.tokenizer, self.owner)

    def holds(self, prompt: object) -> bool:
        """Was this made of the same token ids, given as a tensor?  Then they need not be prepared again."""
        return not self._selections and self.batch.holds(prompt)

    def select(self, selector: Selector) -> Selection:
        """Where a token selector points in every row."""
        known = self._selections.get(selector)
        if known is None:
            known = self._selections[selector] = resolve(selector, self.batch, self.tokenizer)
        return known

    def point(self, selector: Selector, selection: Selection) -> None:
        """Says where a token selector points, where that is known from elsewhere."""
        self._selections[selector] = selection

    def width(self, selector: Selector) -> int | None:
        return self.select(selector).width

    def repeats(self, selector: Selector) -> bool:
        """Does the selector name a token of some row twice?"""
        return self.select(selector).repeats

    def mask_indices(self, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return mask_indices(mask, self.batch)

    @property
    def lengths(self) -> tuple[int, ...]:
        """The number of real tokens in every row."""
        return self.batch.lengths

    @property
    def lengths_digest(self) -> int:
        """A number that differs for prompts whose rows have other lengths."""
        return zlib.crc32(repr(self.batch.lengths).encode())

    def __repr__(self) -> str:
        rows, positions = self.sizes["B"], self.sizes["P"]
        return f"{rows} row{'s' if rows > 1 else ''} x {positions} position{'s' if positions > 1 else ''}"
