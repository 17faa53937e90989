"""``value.tok[...]``: real tokens, counted per row, whatever the padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn, cast

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
from tracelens.ir.windows import PREFILL
from tracelens.location import here
from tracelens.operand import Operand, apply_torch
from tracelens.own_tokens import Own, own_tokens
from tracelens.selection import own_mask_indices, written
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
        if _is_mask(key):
            return WhereMasked(self._value, key)
        return self._value._indexed(self._index(key), by_token=True)

    def __setitem__(self, key: Any, new: Any) -> None:
        self._require_open()
        if _is_mask(key):
            _write_where(self._value, _spread(key, self._value), new)
            return
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
        own = own_tokens(value) if not axes and recorder.prompt is not None else None
        if len(axes) != 1 and own is None:
            raise _no_token_axis(value)
        if isinstance(key, Operand) and not key._is_recording():
            key = key._result()
        if isinstance(key, torch.Tensor | np.ndarray) and str(key.dtype).rpartition(".")[2] == "bool":
            if recorder.generating and own is None and recorder.steps_of(value._id) != PREFILL:
                raise PositionAxisError(
                    "a mask of the prompt's tokens was used on a value of more steps than the prompt's own",
                    at=here(),
                    instead="t.prefill....tok[mask]; .tok[model.positions >= 5] for a mask that each step makes",
                )
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
        if recorder.generating and own is None and recorder.steps_of(value._id) != PREFILL:
            if selector == TokenAt(-1):  # of each step the newest one
                return (*([WHOLE] * axes[0]), -1)
            _require_of_the_prompt(selector)
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


def _is_mask(key: Any) -> bool:
    """Is it a mask of positions that the run makes?"""
    return (
        isinstance(key, Operand)
        and key._is_recording()
        and str(getattr(key, "dtype", "")) == "torch.bool"
        and key._type.shape == (dims.B, dims.P)  # pyright: ignore[reportAttributeAccessIssue]  # of single values
    )


def _spread(mask: Any, value: Value) -> Any:
    """A mask [B, P] with an axis for each further one of a site [B, P, ...]."""
    if value._type.shape[:2] != (dims.B, dims.P):
        raise _no_token_axis(value)
    for _ in range(value._type.ndim - 2):
        mask = mask.unsqueeze(-1)
    return mask


def _write_where(value: Value, mask: Any, new: Any) -> None:
    """Assigns to the positions of a mask: the others stay as they are."""
    site, recorder = value._site, value._recorder
    if site is None:
        raise WriteTargetError(
            "a mask chooses positions of a site; this is a value that was computed, or a part of one",
            at=here(),
            instead="model.layers[i].resid_post.tok[mask] = new",
        )
    value._require_current(site, ".tok[mask]")
    recorder.write(site, apply_torch(torch.where, (mask, new, value), {}))
    if isinstance(new, Operand) and isinstance(number := getattr(new, "_id", None), int):
        recorder.returned(number, site)
    value._stale = here()


class WhereMasked:
    """A site at the positions of a mask that the run makes: what ``site.tok[mask] += v`` changes.

    It can be changed in place and nothing else, because how many positions there are is not known before the run.
    """

    __slots__ = ("_mask", "_value")

    def __init__(self, value: Value, mask: Value) -> None:
        self._value = value
        self._mask = mask

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise DynamicShapeError(
            "how many positions a mask chooses is known only in the run, so they cannot be read as a value",
            at=here(),
            instead="tl.where(mask[..., None], value, 0.0), which has all positions; site.tok[mask] += v to write",
        )


def _in_place(name: str) -> Callable[[WhereMasked, Any], Any]:
    def method(self: WhereMasked, other: Any) -> Any:
        return getattr(self._value, name)(other)

    return method


for _word in ("add", "sub", "mul", "truediv", "pow"):
    setattr(WhereMasked, f"__i{_word}__", _in_place(f"__i{_word}__"))


def _require_of_the_prompt(selector: TokenSelector) -> None:
    """Refuses, outside of the prompt's own step, what counts from the end of a text that is still being written."""
    match selector:
        case TokenAt(index):
            counts = [index]
        case TokenList(indices):
            counts = list(indices)
        case TokenSlice(start, stop, _, _):
            counts = [-1 if stop is None else stop, start or 0]
        case _:
            return
    if any(count < 0 for count in counts):
        raise PositionAxisError(
            f"{written(selector)} depends on where the text ends, and in a generation every step adds a token",
            at=here(),
            instead="t.prefill....tok[...] for tokens of the prompt; .tok[-1] for the newest token of each step; "
            ".tok[model.positions >= 5] for positions of prompt and text",
        )


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
