"""Token selectors, ``.tok[...]``, become places in a batch.

Selectors count the real tokens of each row, the special ones included; a :class:`Selection` counts padded positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tracelens.batch import Batch
from tracelens.errors import (
    DtypeError,
    PositionAxisError,
    RaggedSelectionError,
    ShapeError,
    SpecialisedGraphError,
    TokenMatchError,
)
from tracelens.ir.ops import TokenAt, TokenList, TokenSelector, TokenSlice, TokenText
from tracelens.spelling import Spelling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """The places that a selector means, row by row, as Python numbers.

    ``columns[row]`` are padded positions, in the order asked. ``drops``: one token a row, and the position axis goes.
    """

    columns: tuple[tuple[int, ...], ...]
    drops: bool

    @property
    def width(self) -> int | None:
        """How many tokens each row selects; ``None`` if the position axis goes."""
        return None if self.drops else len(self.columns[0])

    @property
    def uniform(self) -> int | slice | None:
        """The index of the position axis that selects this, where all rows agree and torch has such an index."""
        first = self.columns[0]
        if any(row != first for row in self.columns[1:]):
            return None
        if self.drops:
            return first[0]
        step = first[1] - first[0] if len(first) > 1 else 1
        if step < 1 or first != tuple(range(first[0], first[-1] + 1, step)):
            return None
        return slice(first[0], first[-1] + 1, step)

    @property
    def repeats(self) -> bool:
        """Does a row select one token twice?  Then reading is fine and writing has no meaning."""
        return any(len(set(row)) < len(row) for row in self.columns)

    @property
    def cols(self) -> Tensor:
        """Padded positions, int64 [B] if the position axis goes, else [B, K]."""
        columns = torch.tensor(self.columns)
        return columns[:, 0] if self.drops else columns

    @property
    def rows(self) -> Tensor:
        """The row of each place: int64, of the shape of :attr:`cols`."""
        numbers = torch.arange(len(self.columns))
        return numbers if self.drops else numbers[:, None].repeat(1, len(self.columns[0]))


def resolve(
    selector: TokenSelector, batch: Batch, tokenizer: PreTrainedTokenizerBase | None = None
) -> Selection:
    """Find the tokens that a selector means in each row of a batch.

    Raises ``RaggedSelectionError`` where rows would select different numbers of tokens, ``PositionAxisError`` where no
    row has such tokens, ``TokenMatchError`` where a text is not spelt exactly once, and ``SpecialisedGraphError`` where
    the selector was recorded with another number of tokens.
    """
    match selector:
        case TokenAt():
            real = [(place,) for place in _counted((selector.index,), batch, f".tok[{selector.index}]")]
            drops = True
        case TokenList():
            if not selector.indices:
                raise PositionAxisError(".tok[[]] selects no tokens", instead="at least one index")
            real = _listed(selector.indices, batch)
            drops = False
        case TokenSlice():
            real = _sliced(selector, batch)
            drops = False
        case TokenText():
            real = _spelt(selector, batch, tokenizer)
            drops = selector.pick is not None
    selection = Selection(
        tuple(tuple(pad + token for token in row) for pad, row in zip(batch.pads, real, strict=True)), drops
    )
    recorded = selector.width if isinstance(selector, TokenSlice | TokenText) else None
    if recorded is not None and not drops and recorded != selection.width:
        raise SpecialisedGraphError(
            f"{_written(selector)} was recorded where it selects {recorded} tokens, and here it selects {selection.width}",
            instead="a prompt on which it selects as many, or record again for this one",
        )
    return selection
