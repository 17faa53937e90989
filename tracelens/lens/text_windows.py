"""Texts as windows of equally many tokens, in an order that a seed decides."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from tracelens.errors import NoTokenizerError, OptionError

if TYPE_CHECKING:
    from tracelens.model import Model


@dataclass(frozen=True)
class Windows:
    """Windows of tokens [N, context], int64.

    ``bits_per_byte``: what a number of nats per token is multiplied by to give bits per byte of the text; ``None``
    where token ids were given, whose text is not known.
    """

    ids: Tensor
    bits_per_byte: float | None

    @property
    def digest(self) -> str:
        """Two sets of windows have it in common if and only if they are the same."""
        return hashlib.sha256(repr(tuple(self.ids.shape)).encode() + self.ids.numpy().tobytes()).hexdigest()

    def drawn(self, step: int, each: int, seed: int) -> Tensor:
        """The windows of a step, [each, context]: the next ones of an order that is new in each epoch.

        It depends on the arguments alone, so a run that starts in the middle sees what the whole run would have seen.
        """
        count = len(self.ids)
        numbers: list[Tensor] = []
        first, last = step * each, (step + 1) * each
        for epoch in range(first // count, math.ceil(last / count)):
            order = torch.randperm(count, generator=torch.Generator().manual_seed(seed + epoch))
            begin = epoch * count
            numbers.append(order[max(first - begin, 0) : last - begin])
        return self.ids[torch.cat(numbers)]


def windows_of(model: Model, texts: Any, context: int) -> Windows:
    """The texts, one after the other with the token for an end between them, cut in windows of ``context`` tokens.

    Each window begins with the tokens that the tokenizer puts before a text, if it puts any. What is left over at the
    end is dropped, so nothing is padded. ``texts``: texts, or lists of token ids.
    """
    if isinstance(texts, str):
        texts = [texts]
    if not isinstance(texts, Iterable):
        raise OptionError(
            f"texts are a list of texts, not {type(texts).__name__}", instead="texts=[text, text, ...]"
        )
    limit = model.anatomy.max_positions
    if type(context) is not int or context < 2 or (limit is not None and context > limit):
        raise OptionError(
            f"context={context!r} is no number of tokens from 2 to {limit or 'the length of a prompt'}",
            instead=f"context={min(256, limit or 256)}",
        )
    tokenizer: Any = model.tokenizer
    before: list[int] = []
    end: list[int] = []
    if tokenizer is not None:
        plain, whole = _ids(tokenizer, "a", special=False), _ids(tokenizer, "a", special=True)
        before = whole[: len(whole) - len(plain)] if whole[len(whole) - len(plain) :] == plain else []
        end = [tokenizer.eos_token_id] if isinstance(tokenizer.eos_token_id, int) else []
    stream: list[int] = []
    tokens, size = 0, 0
    for number, text in enumerate(cast("Iterable[Any]", texts)):
        if isinstance(text, str):
            if tokenizer is None:
                raise NoTokenizerError(
                    "the texts are to become tokens, and the model has no tokenizer",
                    instead="tl.wrap(model, tokenizer), or lists of token ids as texts",
                )
            ids = _ids(tokenizer, text, special=False)
            size += len(text.encode())
        elif isinstance(text, Sequence) and all(type(id) is int for id in cast("Sequence[Any]", text)):
            ids, size = list(cast("Sequence[int]", text)), -(1 << 62)
        else:
            raise OptionError(
                f"texts[{number}] is a {type(text).__name__}", instead="a text, or a list of token ids"
            )
        tokens += len(ids)
        stream += ids + end
    room = context - len(before)
    count = len(stream) // room if room > 0 else 0
    if count == 0:
        raise OptionError(
            f"the texts have {tokens} tokens, and one window alone takes {room}",
            instead="more texts, or a smaller context=",
        )
    ids = torch.tensor(stream[: count * room], dtype=torch.int64).view(count, room)
    ids = torch.cat([torch.tensor(before, dtype=torch.int64).expand(count, -1), ids], dim=1)
    return Windows(ids, tokens / size / math.log(2) if size > 0 else None)


def _ids(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    # verbose=False: a text longer than the model is no mistake here.
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
