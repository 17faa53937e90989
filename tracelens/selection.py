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
    NoTokenizerError,
    PositionAxisError,
    RaggedSelectionError,
    ShapeError,
    SpecialisedGraphError,
    TokenMatchError,
    TokenRangeError,
)
from tracelens.ir.ops import TokenAt, TokenList, TokenSelector, TokenSlice, TokenText
from tracelens.spelling import Spelling

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


def resolve(
    selector: TokenSelector, batch: Batch, tokenizer: PreTrainedTokenizerBase | None = None
) -> Selection:
    """Find the tokens that a selector means in each row of a batch.

    Raises ``RaggedSelectionError`` where rows would select different numbers of tokens, ``TokenRangeError`` where no
    row has such tokens, ``TokenMatchError`` where a text is not spelt exactly once, and ``SpecialisedGraphError`` where
    the selector was recorded with another number of tokens.

    >>> from tracelens.batch import prepare
    >>> batch = prepare([[5, 6, 7], [8, 9]], max_positions=None)
    >>> resolve(TokenAt(-1), batch).uniform
    2
    >>> first = resolve(TokenAt(0), batch)
    >>> first.uniform, first.rows.tolist(), first.cols.tolist()
    (None, [0, 1], [0, 1])
    """
    real: Sequence[Sequence[int]]
    match selector:
        case TokenAt():
            real = _listed((selector.index,), batch, written(selector))
        case TokenList():
            real = _listed(selector.indices, batch, written(selector))
        case TokenSlice():
            real = _sliced(selector, batch)
        case TokenText():
            real = _spelt(selector, batch, tokenizer)
    drops = isinstance(selector, TokenAt) or (isinstance(selector, TokenText) and selector.pick is not None)
    columns = tuple(_shifted(row, pad) for row, pad in zip(real, batch.pads, strict=True))
    selection = Selection(columns, drops)
    recorded = selector.width if isinstance(selector, TokenSlice | TokenText) else None
    if recorded is not None and not drops and recorded != selection.width:
        raise SpecialisedGraphError(
            f"{written(selector)} selected {_tokens(recorded)} when it was recorded, "
            f"and selects {selection.width} here",
            instead="a prompt on which it selects as many, or record again for this one",
        )
    return selection


def width(
    selector: TokenSelector, batch: Batch, tokenizer: PreTrainedTokenizerBase | None = None
) -> int | None:
    """How many tokens the selector takes of each row; ``None`` if the position axis goes. Raises as :func:`resolve`."""
    return resolve(selector, batch, tokenizer).width


def written(selector: TokenSelector) -> str:
    """The selector as the user wrote it: ``.tok[2:]``."""
    match selector:
        case TokenAt():
            inner = str(selector.index)
        case TokenList():
            inner = str(list(selector.indices))
        case TokenSlice():
            parts = [
                "" if part is None else str(part) for part in (selector.start, selector.stop, selector.step)
            ]
            inner = ":".join(parts if parts[2] else parts[:2])
        case TokenText():
            inner = f'"{selector.text}"' + ("" if selector.pick is None else f", {selector.pick}")
    return f".tok[{inner}]"


def _shifted(row: Sequence[int], by: int) -> Sequence[int]:
    if isinstance(row, range):
        return range(row.start + by, row.stop + by, row.step)
    return tuple(token + by for token in row)


def _tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count} tokens"


def _counts(counts: Sequence[int], verb: str) -> str:
    """``row 0 selects 2, row 1 selects 3``, of not too many rows."""
    shown = ", ".join(f"row {row} {verb} {count}" for row, count in enumerate(counts[:8]))
    return shown + (f", and {len(counts) - 8} more rows" if len(counts) > 8 else "")


# --- by number -------------------------------------------------------------------------------------------------------


def _listed(indices: Sequence[int], batch: Batch, what: str) -> list[tuple[int, ...]]:
    if not indices:
        raise TokenRangeError(f"{what} selects no tokens", instead="at least one index")
    for index in indices:
        outside = [row for row, length in enumerate(batch.lengths) if not -length <= index < length]
        if not outside:
            continue
        if len(outside) == len(batch.lengths):
            only_row = len(batch.lengths) == 1
            counts = f"it has {_tokens(batch.lengths[0])}" if only_row else _counts(batch.lengths, "has")
            raise TokenRangeError(
                f"{what} is outside the prompt: there is no token {index}, {counts}",
                instead="an index that counts the real tokens, from 0, or from -1 at the end",
            )
        row = outside[0]
        raise RaggedSelectionError(
            f"{what} is outside row {row} of the prompt, which has {_tokens(batch.lengths[row])}",
            instead="an index that every row has, or one trace per prompt",
        )
    return [tuple(index % length for index in indices) for length in batch.lengths]


def _sliced(selector: TokenSlice, batch: Batch) -> list[range]:
    if selector.step == 0:
        raise IndexingError(f"{written(selector)} has a step of zero", instead=".tok[1:4]")
    slice_ = slice(selector.start, selector.stop, selector.step)
    real = [range(length)[slice_] for length in batch.lengths]
    _check_widths([len(row) for row in real], written(selector))
    return real


def _check_widths(widths: Sequence[int], what: str) -> None:
    if len(set(widths)) > 1:
        raise RaggedSelectionError(
            f"{what} selects different numbers of tokens: {_counts(widths, 'selects')}",
            instead="a selector that takes equally many of each row, such as [-3:], or one trace per prompt",
        )
    if not widths[0]:
        raise TokenRangeError(
            f"{what} selects no tokens", instead="a selector that takes at least one token of each row"
        )


# --- by text ---------------------------------------------------------------------------------------------------------


def _spelt(selector: TokenText, batch: Batch, tokenizer: PreTrainedTokenizerBase | None) -> list[range]:
    if tokenizer is None:
        raise NoTokenizerError(
            f"{written(selector)} needs a tokenizer to know what the tokens spell, and the model was given none",
            instead="tl.wrap(model, tokenizer), or a selector that counts tokens",
        )
    if not selector.text:
        raise TokenMatchError(
            f"{written(selector)} names no text", instead="a text that stands in the prompt once"
        )
    spans = [_span(selector, row, spelling) for row, spelling in enumerate(batch.spellings(tokenizer))]
    if selector.pick is None:
        _check_widths([len(span) for span in spans], written(selector))
        return spans
    picked: list[range] = []
    for row, span in enumerate(spans):
        if not -len(span) <= selector.pick < len(span):
            raise RaggedSelectionError(
                f"{written(selector)} is outside the span, which has {_tokens(len(span))} in row {row} of the prompt",
                instead=f'.tok["{selector.text}", -1] for its last token',
            )
        picked.append(span[selector.pick : selector.pick + 1 or None])
    return picked


def _span(selector: TokenText, row: int, spelling: Spelling) -> range:
    """The one span of the row that spells the text.

    Only spans count: in "the theory of", the text " the" is one token and the beginning of another, and means the one.
    """
    text = selector.text
    spans = spelling.spans(text)
    if len(spans) == 1:
        return range(*spans[0])
    if spans:
        places = "\n".join(
            f"  tokens {first} to {last - 1}, in\n{spelling.shown(first - 3, last + 3)}"
            for first, last in spans[:4]
        )
        raise TokenMatchError(
            f"{written(selector)} stands {len(spans)} times in row {row} of the prompt:\n{places}",
            instead="a longer text that stands there once, or the token's number",
        )
    occurrences = spelling.occurrences(text)
    if occurrences:
        first, last = spelling.touching(occurrences[0], occurrences[0] + len(text))
        raise TokenMatchError(
            f"{written(selector)} stands in row {row} of the prompt, but does not begin and end where tokens do:\n"
            + spelling.shown(first - 3, last + 3),
            instead=f"the text of whole tokens, or their numbers: .tok[{first}:{last}]",
        )
    instead = "a text as it stands in the prompt, or the token's number"
    if any(marker in text for marker in "ĠĊ▁"):
        instead = "plain text, with a space where the vocabulary writes Ġ or ▁"
    raise TokenMatchError(
        f"{written(selector)} does not stand in row {row} of the prompt, whose tokens are:\n{spelling.shown()}",
        instead=instead,
    )


# --- masks, and values without their padding -------------------------------------------------------------------------


def mask_indices(mask: Tensor | np.ndarray, batch: Batch) -> tuple[Tensor, Tensor]:
    """The places where a bool mask [B, P] is true, as int64 ``(rows, columns)`` in row-major order, on the CPU.

    The mask is in the padded coordinates of the batch. Raises ``DtypeError`` (not bool), ``ShapeError`` (not [B, P])
    ``PositionAxisError`` (true at padding) and ``TokenRangeError`` (true nowhere).
    """
    if isinstance(mask, np.ndarray) and mask.dtype == np.bool_:
        mask = torch.from_numpy(mask.copy())
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = f"{mask.dtype}" if isinstance(mask, Tensor | np.ndarray) else type(mask).__name__
        raise DtypeError(
            f"a mask of tokens holds booleans, not {kind}", instead="mask.bool(), or indices as a list"
        )
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
            f"(the {_tokens(batch.lengths[row])} of that row are the last ones)",
            instead="a mask that is false at padding",
        )
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
