"""``value.tok[...]``: real tokens, counted per row, whatever the padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from tracelens.errors import (
    Blaming,
    BlockEndedError,
    DynamicShapeError,
    IndexingError,
    PositionAxisError,
    SymbolicSizeError,
    TracelensError,
    WriteTargetError,
)
from tracelens.indexing import bound
from tracelens.ir import dims
from tracelens.ir.ops import (
    WHOLE,
    IndexItem,
    OwnTokens,
    Ref,
    TokenAt,
    TokenChars,
    TokenId,
    TokenList,
    TokenSelector,
    TokenSlice,
    TokenText,
)
from tracelens.location import here
from tracelens.operand import Operand
from tracelens.own_tokens import Own, own_tokens
from tracelens.selection import own_mask_indices
from tracelens.subject import PADS

if TYPE_CHECKING:
    from tracelens.values import Value


class Tokens:
    """``value.tok``: addresses real tokens of every row, whatever the padding."""

    __slots__ = ("_value",)

    def __init__(self, value: Value) -> None:
        self._value = value

    def __getitem__(self, key: Any) -> Any:
        self._require_open()
        return self._value._indexed(self._index(key), by_token=True)

    def __setitem__(self, key: Any, new: Any) -> None:
        self._require_open()
        index = self._index(key)
        self._refuse_repeats(index[-1])
        self._value._assign(index, new, by_token=True)

    def _require_open(self) -> None:
        if not self._value._is_recording():
            raise BlockEndedError(
                "tokens are addressed inside the block, which has ended",
                at=here(),
                instead="value.tok[...].save() inside the block",
            )
        self._value._require_fresh()

    def _refuse_repeats(self, item: IndexItem) -> None:
        """A token that is assigned to twice would keep one of two values, and nobody could say which."""
        prompt = self._value._recorder.prompt
        selector = item.selector if isinstance(item, OwnTokens) else item
        if (
            isinstance(selector, TokenList)
            and isinstance(item, TokenList | OwnTokens)
            and prompt is not None
            and prompt.repeats(item)
        ):
            raise WriteTargetError(
                f".tok[{list(selector.indices)}] names a token twice, so that assigning to it has no one meaning",
                at=here(),
                instead="each token once",
            )

    def _index(self, key: Any) -> tuple[IndexItem, ...]:
        value = self._value
        axes = value._type.position_axes
        recorder = value._recorder
        if recorder.generating:
            # A number counts from the start of the text, and a step holds some other part of it.
            raise PositionAxisError(
                "tokens cannot be addressed inside model.generate yet: a step holds one position, not the whole text",
                at=here(),
                instead="a write to all positions (site += v) or to the newest one (site[:, -1] += v)",
            )
        own = own_tokens(value) if not axes and recorder.prompt is not None else None
        if len(axes) != 1 and own is None:
            raise _no_token_axis(value)
        if isinstance(key, Operand) and not key._is_recording():
            key = key._result()
        if isinstance(key, torch.Tensor | np.ndarray) and str(key.dtype).rpartition(".")[2] == "bool":
            return (
                self._mask(torch.as_tensor(key)) if own is None else self._own_mask(torch.as_tensor(key), own)
            )
        if isinstance(key, Operand):
            raise DynamicShapeError(
                f"tokens cannot be addressed with {key!r}, whose numbers do not exist before the run",
                at=here(),
                instead="site = tl.where(mask, new, site) to write where the mask holds; or a concrete mask or index",
            )
        selector = _selector(key)
        if recorder.prompt is None:
            return (*([WHOLE] * axes[0]), selector)
        with Blaming(here()):
            item = selector if own is None else OwnTokens(own.row, own.length, selector)
            width = recorder.prompt.width(item)
        if isinstance(selector, TokenSlice | TokenChars) or (
            isinstance(selector, TokenText) and selector.pick is None
        ):
            selector = replace(selector, width=width)
        if own is None:
            return (*([WHOLE] * axes[0]), selector)
        return (*([WHOLE] * own.axis), OwnTokens(own.row, own.length, selector))

    def _own_mask(self, mask: torch.Tensor, own: Own) -> tuple[IndexItem, ...]:
        """The tokens of one prompt at which a mask of its own is true."""
        value = self._value
        if own.axis != 1 or value._type.shape[0] != 1:
            raise _no_token_axis(value)
        with Blaming(here()):
            rows, columns = own_mask_indices(mask, own.row, own.length)
        recorder = value._recorder
        return (Ref(recorder.constant(rows)), Ref(recorder.constant(columns)))

    def _mask(self, mask: torch.Tensor) -> tuple[IndexItem, ...]:
        value = self._value
        recorder = value._recorder
        if recorder.prompt is None:
            raise SymbolicSizeError(
                "a mask of tokens is made for one prompt, and this recording is for prompts of any size",
                at=here(),
                instead="model.record(prompt), or .tok[...] with numbers or text",
            )
        if value._type.shape[:2] != (dims.B, dims.P):
            raise _no_token_axis(value)
        try:
            rows, columns = recorder.prompt.mask_indices(mask)
        except TracelensError as error:
            error.at = error.at or here()
            raise
        recorder.pin(PADS)
        return (Ref(recorder.constant(rows)), Ref(recorder.constant(columns)))


def _no_token_axis(value: Value) -> PositionAxisError:
    return PositionAxisError(
        f".tok addresses the position axis, but {value._type} does not carry exactly one in the expected place",
        at=here(),
        instead="use .tok on a value with axes [B, P, ...], or on a site of t.prompts[i] before positions are mixed",
    )


def _selector(key: Any) -> TokenSelector:
    match key:
        case bool():
            pass
        case int() | np.integer():
            return TokenAt(int(key))
        case str():
            return TokenText(key, None, None)
        case TokenId() | TokenChars():
            return key
        case (str() as text, int() as pick):
            return TokenText(text, pick, 1)
        case slice():
            return TokenSlice(bound(key.start), bound(key.stop), bound(key.step), None)
        case list() | range() if all(isinstance(part, int | np.integer) for part in key):
            return TokenList(tuple(int(part) for part in cast("Sequence[int]", key)))
        case torch.Tensor() if key.ndim == 1 and not key.dtype.is_floating_point:
            return TokenList(tuple(int(part) for part in key.tolist()))
        case _:
            pass
    raise IndexingError(
        f"tokens cannot be addressed with {key!r}",
        at=here(),
        instead='.tok[3], .tok[-1], .tok[1:4], .tok[[0, 2]], .tok["Paris"], .tok["Paris", -1], '
        ".tok[tl.token_id(4649)], .tok[tl.chars(4, 20)] or .tok[mask]",
    )
