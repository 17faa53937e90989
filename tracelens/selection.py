"""Token selectors, ``.tok[...]``, become places in a batch.

Selectors count the real tokens of each row, the special ones included; a :class:`Selection` counts padded positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tracelens.batch import Batch
from tracelens.errors import (
    DtypeError,
    IndexingError,
    PositionAxisError,
    RaggedSelectionError,
    ShapeError,
    SpecialisedGraphError,
    TokenRangeError,
)
from tracelens.ir.ops import (
    OwnTokens,
    PromptTokens,
    Selector,
    TokenAt,
    TokenChars,
    TokenId,
    TokenList,
    TokenSelector,
    TokenSlice,
    TokenText,
    drops_axis,
)
from tracelens.matching import Rows, check_widths, counts_text, of_chars, spelt, tokens_text, with_id, written

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """The places that a selector means, row by row.

    ``columns[row]`` are padded positions, in the order asked. ``drops``: one token a row, and the position axis goes.
    """

    columns: tuple[Sequence[int], ...]
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
        if step < 1 or any(after - before != step for before, after in pairwise(first)):
            return None
        return slice(first[0], first[-1] + 1, step)

    @property
    def repeats(self) -> bool:
        """Does a row select one token twice?  Then reading is fine and writing has no meaning."""
        return any(len(set(row)) < len(row) for row in self.columns)

    @property
    def cols(self) -> Tensor:
        """Padded positions, int64: [B] if the position axis goes, else [B, K]."""
        columns = torch.tensor([list(row) for row in self.columns])
        return columns[:, 0] if self.drops else columns

    @property
    def rows(self) -> Tensor:
        """The row of each place: int64, of the shape of :attr:`cols`."""
        numbers = torch.arange(len(self.columns))
        return numbers if self.drops else numbers[:, None].repeat(1, len(self.columns[0]))


def resolve(selector: Selector, batch: Batch, tokenizer: PreTrainedTokenizerBase | None = None) -> Selection:
    """Find the tokens that a selector means in each row of a batch.

    Raises ``RaggedSelectionError`` where rows would select different numbers of tokens, ``TokenRangeError`` where no
    row has such tokens, ``TokenMatchError`` where a text or an id is not there exactly once, and
    ``SpecialisedGraphError`` where the selector was recorded with another number of tokens.

    >>> from tracelens.batch import prepare
    >>> batch = prepare([[5, 6, 7], [8, 9]], max_positions=None)
    >>> resolve(TokenAt(-1), batch).uniform
    2
    >>> first = resolve(TokenAt(0), batch)
    >>> first.uniform, first.rows.tolist(), first.cols.tolist()
    (None, [0, 1], [0, 1])
    """
    if isinstance(selector, PromptTokens):
        _check_prompt(selector, batch)
        return Selection((range(batch.sizes["P"])[-selector.length :],), drops=False)
    if isinstance(selector, OwnTokens):
        _check_prompt(selector, batch)
        return _resolve(selector.selector, Rows(batch, tokenizer, (selector.row,)), (0,))
    return _resolve(selector, Rows(batch, tokenizer, range(len(batch.lengths))), batch.pads)


def _check_prompt(selector: PromptTokens | OwnTokens, batch: Batch) -> None:
    """The prompt that the graph singles out is there, and has as many tokens as it had."""
    row, rows = selector.row, len(batch.lengths)
    if not 0 <= row < rows:
        raise SpecialisedGraphError(
            f"the graph is about t.prompts[{row}], and here {'is one prompt' if rows == 1 else f'are {rows} prompts'}",
            instead="as many prompts as it was recorded with, or record again for these",
        )
    if batch.lengths[row] != selector.length:
        raise SpecialisedGraphError(
            f"t.prompts[{row}] had {tokens_text(selector.length)} when it was recorded, and has {batch.lengths[row]} "
            "here",
            instead="a prompt of as many tokens there, or record again for this one",
        )


def _resolve(selector: TokenSelector, rows: Rows, pads: Sequence[int]) -> Selection:
    real: Sequence[Sequence[int]]
    match selector:
        case TokenAt():
            real = _listed((selector.index,), rows, written(selector))
        case TokenList():
            real = _listed(selector.indices, rows, written(selector))
        case TokenSlice():
            real = _sliced(selector, rows)
        case TokenText():
            real = spelt(selector, rows)
        case TokenId():
            real = [(with_id(selector, row, rows),) for row in rows.numbers]
        case TokenChars():
            spellings = rows.spellings(written(selector))
            spans = {row: of_chars(selector, row, spelling, rows) for row, spelling in spellings.items()}
            check_widths({row: len(span) for row, span in spans.items()}, written(selector))
            real = list(spans.values())
    drops = drops_axis(selector)
    columns = tuple(_shifted(row, pad) for row, pad in zip(real, pads, strict=True))
    selection = Selection(columns, drops)
    recorded = getattr(selector, "width", None)
    if recorded is not None and not drops and recorded != selection.width:
        raise SpecialisedGraphError(
            f"{written(selector)} selected {tokens_text(recorded)} when it was recorded, "
            f"and selects {selection.width} here",
            instead="a prompt on which it selects as many, or record again for this one",
        )
    return selection


def width(selector: Selector, batch: Batch, tokenizer: PreTrainedTokenizerBase | None = None) -> int | None:
    """How many tokens the selector takes of each row; ``None`` if the position axis goes. Raises as :func:`resolve`."""
    return resolve(selector, batch, tokenizer).width


def _shifted(row: Sequence[int], by: int) -> Sequence[int]:
    if isinstance(row, range):
        return range(row.start + by, row.stop + by, row.step)
    return tuple(token + by for token in row)


# --- by number -------------------------------------------------------------------------------------------------------


def _listed(indices: Sequence[int], rows: Rows, what: str) -> list[tuple[int, ...]]:
    lengths = rows.lengths
    if not indices:
        raise TokenRangeError(f"{what} selects no tokens", instead="at least one index")
    for index in indices:
        outside = [row for row, length in lengths.items() if not -length <= index < length]
        if not outside:
            continue
        if len(outside) == len(lengths):
            only_row = len(lengths) == 1
            counts = f"it has {tokens_text(lengths[outside[0]])}" if only_row else counts_text(lengths, "has")
            raise TokenRangeError(
                f"{what} is outside the prompt: there is no token {index}, {counts}",
                instead="an index that counts the real tokens, from 0, or from -1 at the end",
            )
        row = outside[0]
        raise RaggedSelectionError(
            f"{what} is outside row {row} of the prompt, which has {tokens_text(lengths[row])}",
            instead="an index that every row has, or t.prompts[i] for one row, or one trace per prompt",
        )
    return [tuple(index % length for index in indices) for length in lengths.values()]


def _sliced(selector: TokenSlice, rows: Rows) -> list[range]:
    if selector.step == 0:
        raise IndexingError(f"{written(selector)} has a step of zero", instead=".tok[1:4]")
    slice_ = slice(selector.start, selector.stop, selector.step)
    real = {row: range(length)[slice_] for row, length in rows.lengths.items()}
    check_widths({row: len(chosen) for row, chosen in real.items()}, written(selector))
    return list(real.values())


# --- masks, and values without their padding -------------------------------------------------------------------------


def mask_indices(mask: Tensor | np.ndarray, batch: Batch) -> tuple[Tensor, Tensor]:
    """The places where a bool mask [B, P] is true, as int64 ``(rows, columns)`` in row-major order, on the CPU.

    The mask is in the padded coordinates of the batch. Raises ``DtypeError`` (not bool), ``ShapeError`` (not [B, P])
    ``PositionAxisError`` (true at padding) and ``TokenRangeError`` (true nowhere).
    """
    mask = _booleans(mask)
    if mask.shape != batch.mask.shape:
        raise ShapeError(
            f"the mask has shape {list(mask.shape)}, and the batch is {list(batch.mask.shape)}: {batch.sizes}",
            instead="one entry for each row and padded position",
        )
    mask = mask.detach().cpu()
    padding = (mask & ~batch.mask).nonzero()
    if len(padding):
        row, column = padding[0].tolist()
        raise PositionAxisError(
            f"the mask is true at row {row}, position {column}, which is padding "
            f"(the {tokens_text(batch.lengths[row])} of that row are the last ones)",
            instead="a mask that is false at padding",
        )
    return _true(mask)


def own_mask_indices(mask: Tensor | np.ndarray, row: int, length: int) -> tuple[Tensor, Tensor]:
    """The same for a mask of the ``length`` tokens of prompt ``row`` alone: [1, P_i], or [P_i]."""
    mask = _booleans(mask)
    if list(mask.shape) not in ([length], [1, length]):
        raise ShapeError(
            f"the mask has shape {list(mask.shape)}, and t.prompts[{row}] has {tokens_text(length)}",
            instead=f"one entry for each token: [1, {length}], or [{length}]",
        )
    return _true(mask.detach().cpu().reshape(1, length))


def _booleans(mask: Tensor | np.ndarray) -> Tensor:
    if isinstance(mask, np.ndarray) and mask.dtype == np.bool_:
        mask = torch.from_numpy(mask.copy())
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = f"{mask.dtype}" if isinstance(mask, Tensor | np.ndarray) else type(mask).__name__
        raise DtypeError(
            f"a mask of tokens holds booleans, not {kind}", instead="mask.bool(), or indices as a list"
        )
    return mask


def _true(mask: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = mask.nonzero(as_tuple=True)
    if not len(rows):
        raise TokenRangeError(
            "the mask is true nowhere, so it selects no tokens", instead="a mask that is true somewhere"
        )
    return rows, columns


def unpadded(tensor: Tensor, batch: Batch, batch_axis: int, position_axes: Sequence[int]) -> list[Tensor]:
    """One tensor for each prompt, without its padding and without the batch axis; each owns its memory.

    ``tensor`` has ``B`` rows on ``batch_axis`` and ``P`` padded positions on each of ``position_axes``, else
    ``ShapeError``. [B, P, D] gives tensors [P_i, D].
    """
    sizes = batch.sizes
    batch_axis %= tensor.ndim
    axes = [axis % tensor.ndim for axis in position_axes]
    for axis, name in ((batch_axis, "B"), *((axis, "P") for axis in axes)):
        if tensor.shape[axis] != sizes[name]:
            raise ShapeError(
                f"axis {axis} of a value of shape {list(tensor.shape)} should be {name} = {sizes[name]}"
            )
    parts: list[Tensor] = []
    for row, pad in enumerate(batch.pads):
        part = tensor.narrow(batch_axis, row, 1)
        for axis in axes:
            part = part.narrow(axis, pad, sizes["P"] - pad)
        parts.append(part.squeeze(batch_axis).clone(memory_format=torch.contiguous_format))
    return parts
