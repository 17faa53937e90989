"""Prompts become batches: token ids padded on the left, with the mask and the positions that the model is given."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tracelens.chat import rendered
from tracelens.errors import EmptyPromptError, NoTokenizerError, PromptError, PromptTooLongError
from tracelens.spelling import Spelling, spell

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEYS = ("input_ids", "attention_mask", "position_ids")
"""What a prompt given as a dict may hold."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """A prompt, or several, in the shape that the model runs on: ``B`` rows of ``P`` positions, padded on the left.

    ``input_ids`` [B, P] int64, ``mask`` [B, P] bool (True at real tokens), ``position_ids`` [B, P] int64 (counting from
    0 at each row's first real token, 0 at padding), all on the CPU. ``lengths`` are the rows' numbers of real tokens,
    ``P`` is the largest of them. ``texts`` are the prompts, if they were given as text.
    """

    input_ids: Tensor
    mask: Tensor
    position_ids: Tensor
    lengths: tuple[int, ...]
    texts: tuple[str, ...] | None = None
    # What the rows spell is worked out when a text selector first asks: (tokenizer, one spelling a row).
    _spelled: list[tuple[object, tuple[Spelling, ...]]] = field(default_factory=list, repr=False)

    @property
    def sizes(self) -> dict[str, int]:
        """``{"B": rows, "P": positions, padding included}``."""
        return {"B": len(self.lengths), "P": self.input_ids.shape[1]}

    @property
    def pads(self) -> tuple[int, ...]:
        """How many positions of padding stand before each row's first real token."""
        longest = self.input_ids.shape[1]
        return tuple(longest - length for length in self.lengths)

    @property
    def ragged(self) -> bool:
        """Do rows differ in length?  If not, there is no padding at all."""
        return len(set(self.lengths)) > 1

    @property
    def followed(self) -> Tensor:
        return self.mask

    def holds(self, prompt: object) -> bool:
        """Was the batch made of the same token ids, given as a tensor, and has nobody asked what they spell?"""
        if type(prompt) is not Tensor or self.texts is not None or self.ragged:
            return False
        ids = self.input_ids
        return (
            not self._spelled
            and prompt.dtype is torch.long
            and prompt.device.type == "cpu"
            and prompt.shape == ids.shape
            and torch.equal(prompt, ids)
        )

    def tokens(self, row: int) -> list[int]:
        """The real token ids of one row."""
        return self.input_ids[row, self.input_ids.shape[1] - self.lengths[row] :].tolist()

    def model_inputs(
        self, device: torch.device | str = "cpu", *, non_blocking: bool = False
    ) -> dict[str, Tensor]:
        """The keyword arguments of the model's forward: ``input_ids``, ``attention_mask``, ``position_ids``.

        The mask is passed even where it is all ones. The logits are bit for bit those of ``model(input_ids)``, because
        the model drops such a mask; without one it looks for packed sequences in the position ids, which costs more
        (20 against 40 microseconds), and some families warn. It is int64, which is what tokenizers give: families that
        compute with the mask, such as those with ALiBi, expect numbers.
        """
        inputs = {
            "input_ids": self.input_ids,
            "attention_mask": self._attention_mask(),
            "position_ids": self.position_ids,
        }
        if str(device) == "cpu":
            return inputs
        return {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in inputs.items()}

    def _attention_mask(self) -> Tensor:
        return self.mask.long() if self.ragged else _ones(*self.mask.shape)[1]

    def repeated(self, times: int) -> Batch:
        """The same rows ``times`` times, all of them one after the other, and then again."""
        return self._of(list(range(len(self.lengths))) * times)

    def each(self, times: int) -> Batch:
        """Every row ``times`` times, before the next one."""
        return self._of([row for row in range(len(self.lengths)) for _ in range(times)])

    def rows(self, start: int, stop: int) -> Batch:
        """The rows from ``start`` up to ``stop``, padded to the longest of them."""
        first = self.input_ids.shape[1] - max(self.lengths[start:stop])
        return self._of(list(range(start, min(stop, len(self.lengths)))), first)

    def _of(self, rows: list[int], first: int = 0) -> Batch:
        """Some of the rows, from a column on."""
        return Batch(
            self.input_ids[rows, first:],
            self.mask[rows, first:],
            self.position_ids[rows, first:],
            tuple(self.lengths[row] for row in rows),
            None if self.texts is None else tuple(self.texts[row] for row in rows),
            [(tokenizer, tuple(spelt[row] for row in rows)) for tokenizer, spelt in self._spelled],
        )

    def spellings(self, tokenizer: PreTrainedTokenizerBase) -> tuple[Spelling, ...]:
        """What the real tokens of each row spell, under this tokenizer."""
        for known, spellings in self._spelled:
            if known is tokenizer:
                return spellings
        texts = self.texts or (None,) * len(self.lengths)
        spellings = tuple(spell(self.tokens(row), tokenizer, text) for row, text in enumerate(texts))
        self._spelled.append((tokenizer, spellings))
        return spellings


def prepare(
    prompt: object,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    max_positions: int | None,
    room: int = 0,
    pad_id: int | None = None,
    vocab_size: int | None = None,
) -> Batch:
    """Make a batch of what a user calls a prompt, or say what is wrong with it.

    ``prompt`` is a text, a list of texts, a conversation (a list of ``{"role": ..., "content": ...}``) or a list of
    these, a list of token ids, a list of such lists (of any lengths), an integer tensor or array of one or two
    dimensions, or a dict of ``input_ids`` and, if wanted, ``attention_mask`` (0/1 or bool) and ``position_ids``, padded
    on either side. Texts are tokenised as the tokenizer does it by itself, special tokens included; conversations are
    what its chat template makes of them, which has those tokens; ``room`` is how many are to be generated after them.
    Padding is ours, and the tokenizer's own settings are neither used nor changed.

    Raises ``EmptyPromptError``, ``PromptTooLongError`` (more than ``max_positions`` tokens) and ``PromptError``.

    >>> batch = prepare([[5, 6, 7], [8]], max_positions=16)
    >>> batch.input_ids.tolist()
    [[5, 6, 7], [0, 0, 8]]
    >>> batch.position_ids.tolist(), batch.lengths, batch.pads
    ([[0, 1, 2], [0, 0, 0]], (3, 1), (0, 2))
    """
    conversations = rendered(prompt, tokenizer)
    texts = _texts(prompt) if conversations is None else conversations
    if texts is not None:
        # The template has written the special tokens already.
        ids, mask, positions = _tokenised(texts, tokenizer, special=conversations is None), None, None
    elif isinstance(prompt, Mapping):
        ids, mask, positions = _from_mapping(prompt)
    else:
        ids, mask, positions = _id_rows(prompt, "the prompt"), None, None

    if mask is not None:
        ids = _real_tokens(ids, mask, positions)
    elif positions is not None:
        _check_positions(ids, positions)
    lengths = tuple(len(row) for row in ids)
    if not lengths:
        raise EmptyPromptError("the prompt has no rows")
    if 0 in lengths:
        raise EmptyPromptError(
            f"{_row(lengths.index(0), len(lengths))} has no tokens",
            instead="a prompt of at least one token; to start from nothing, give the model's first token, such as bos",
        )
    longest = max(lengths)
    if max_positions is not None and longest + room > max_positions:
        raise PromptTooLongError(
            f"{_row(lengths.index(longest), len(lengths))} has {longest} tokens"
            + (f", {room} more are to be generated," if room else ",")
            + f" and the model has {max_positions} positions",
            instead=("fewer new tokens, or " if room else "")
            + "a shorter prompt: tracelens does not cut it for you",
        )
    if isinstance(ids, Tensor):
        input_ids = ids.clone()  # the caller may go on to change theirs
        mask, _, position_ids = _ones(len(lengths), longest)
    else:
        input_ids, mask, position_ids = _padded(ids, lengths, _padding(tokenizer, pad_id, vocab_size))
    _check_vocabulary(input_ids, mask, vocab_size)
    return Batch(input_ids, mask, position_ids, lengths, texts)


@lru_cache(maxsize=512)
def _ones(rows: int, positions: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mask (bool, int64) and positions of a batch without padding: made once for each size, and never written to."""
    counts = torch.arange(positions).expand(rows, -1)
    return (
        torch.ones(rows, positions, dtype=torch.bool),
        torch.ones(rows, positions, dtype=torch.long),
        counts,
    )


def _row(index: int, rows: int) -> str:
    return "the prompt" if rows == 1 else f"row {index} of the prompt"


# --- what the user wrote, as rows of ids -----------------------------------------------------------------------------

Rows = Tensor | list[Tensor]
"""Token ids, masks or positions: one tensor [B, P] where all rows are equally long, else one tensor a row."""

_ACCEPTED = (
    "a text, a list of texts, a list of messages, a list of token ids, a list of such lists, an integer tensor or "
    "array [P] or [B, P], or a dict with input_ids"
)


def _texts(prompt: object) -> tuple[str, ...] | None:
    if isinstance(prompt, str):
        return (prompt,)
    if isinstance(prompt, list | tuple) and prompt and isinstance(prompt[0], str):
        for index, text in enumerate(prompt):
            if not isinstance(text, str):
                raise PromptError(
                    f"the prompt mixes texts with other things: entry {index} is {_named(text)}",
                    instead="a list of texts, or a list of lists of token ids",
                )
        return tuple(prompt)
    return None


def _named(thing: object) -> str:
    if isinstance(thing, Tensor):
        return f"a {thing.dtype} tensor of shape {tuple(thing.shape)}"
    if isinstance(thing, np.ndarray):
        return f"a {thing.dtype} array of shape {thing.shape}"
    return (
        f"{thing!r}"
        if thing is None or isinstance(thing, bool | int | float)
        else f"a {type(thing).__name__}"
    )


def _tokenised(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase | None, *, special: bool) -> Rows:
    if tokenizer is None:
        raise NoTokenizerError(
            "the prompt is text, and the model was given no tokenizer",
            instead="tl.wrap(model, tokenizer), or a prompt of token ids",
        )
    encoded: Mapping[str, Any] = (
        tokenizer(list(texts)) if special else tokenizer(list(texts), add_special_tokens=False)
    )
    ids = _id_rows(encoded["input_ids"], "what the tokenizer gave")
    # Some tokenizers of people's own pad by themselves; padding is known by the mask alone.
    mask = encoded.get("attention_mask")
    return (
        ids if mask is None else _real_tokens(ids, _id_rows(mask, "the tokenizer's mask", boolean=True), None)
    )


def _from_mapping(prompt: Mapping[Any, Any]) -> tuple[Rows, Rows | None, Rows | None]:
    unknown = [key for key in prompt if key not in KEYS]
    if unknown:
        raise PromptError(
            f"the prompt holds {', '.join(repr(key) for key in unknown)}, and tracelens would not know how to pad it",
            instead=f"a dict of {', '.join(KEYS)} and nothing else",
        )
    if "input_ids" not in prompt:
        raise PromptError("the prompt is a dict without input_ids", instead=_ACCEPTED)
    ids = _id_rows(prompt["input_ids"], "input_ids")
    others: list[Rows | None] = []
    for key in KEYS[1:]:
        value = prompt.get(key)
        rows = None if value is None else _id_rows(value, key, boolean=key == "attention_mask")
        if rows is not None and [len(row) for row in rows] != [len(row) for row in ids]:
            raise PromptError(
                f"{key} has {_sizes(rows)} and input_ids {_sizes(ids)}",
                instead=f"{key} of the same shape as input_ids",
            )
        others.append(rows)
    return ids, others[0], others[1]


def _sizes(rows: Rows) -> str:
    if isinstance(rows, Tensor):
        return f"shape {list(rows.shape)}"
    return f"rows of {', '.join(str(len(row)) for row in rows)}"


def _id_rows(value: object, what: str, *, boolean: bool = False) -> Rows:
    """Rows of int64 on the CPU; of a mask, where ``boolean`` is allowed, 0 and 1."""
    if isinstance(value, Tensor | np.ndarray):
        tensor = _integers(value, what, boolean)
        if tensor.ndim == 1:
            tensor = tensor[None]
        if tensor.ndim != 2:
            raise PromptError(f"{what} is {_named(value)}", instead="one or two dimensions: [P] or [B, P]")
        return tensor
    if not isinstance(value, list | tuple):
        raise PromptError(f"{what} cannot be read: it is {_named(value)}", instead=_ACCEPTED)
    if not value:
        raise EmptyPromptError(f"{what} is an empty list", instead="at least one token")
    if not isinstance(value[0], list | tuple | np.ndarray | Tensor) or _is_scalar(value[0]):
        return _integers(value, what, boolean)[None]
    rows = [_integers(row, f"row {index} of {what}", boolean) for index, row in enumerate(value)]
    for index, row in enumerate(rows):
        if row.ndim != 1:
            raise PromptError(f"row {index} of {what} is nested too deeply", instead=_ACCEPTED)
    return torch.stack(rows) if len({len(row) for row in rows}) == 1 else rows


def _is_scalar(thing: object) -> bool:
    return isinstance(thing, Tensor | np.ndarray) and thing.ndim == 0


def _integers(value: object, what: str, boolean: bool) -> Tensor:
    """One tensor of int64 on the CPU, or a named refusal: no float is rounded and no truth is taken for a number."""
    if isinstance(value, list | tuple):
        return torch.tensor([_integer(entry, what, boolean) for entry in value], dtype=torch.long)
    if isinstance(value, np.ndarray) and value.dtype.kind in ("iub" if boolean else "iu"):
        return torch.from_numpy(value.astype(np.int64))
    if isinstance(value, Tensor) and not value.is_floating_point() and not value.is_complex():
        if value.is_meta:
            raise PromptError(f"{what} is a tensor without data (on the meta device)")
        if boolean or value.dtype != torch.bool:
            return value.detach().to("cpu", torch.long)
    raise PromptError(
        f"{what} is {_named(value)}, where {'zeros and ones' if boolean else 'token ids'} belong",
        instead=_ACCEPTED,
    )


def _integer(entry: object, what: str, boolean: bool) -> int:
    if type(entry) is int:
        number = entry
    elif isinstance(entry, bool | np.bool_) or (isinstance(entry, Tensor) and entry.dtype == torch.bool):
        number = int(entry) if boolean else None
    else:
        try:
            number = operator.index(entry)  # pyright: ignore[reportArgumentType]  # what is no integer is refused here
        except TypeError:
            number = None
    if number is None:
        raise PromptError(
            f"{what} holds {_named(entry)}, where {'a zero or a one' if boolean else 'a token id'} belongs",
            instead=_ACCEPTED,
        )
    if not -(2**63) <= number < 2**63:
        raise PromptError(f"{what} holds {number}, which is no token id")
    return number


# --- rows as the model takes them ------------------------------------------------------------------------------------


def _real_tokens(ids: Rows, mask: Rows, positions: Rows | None) -> Rows:
    """The rows without the padding that the mask tells of, wherever it stands."""
    if isinstance(mask, Tensor) and bool((mask == 1).all()):
        if positions is not None:
            _check_positions(ids, positions)
        return ids
    kept: list[Tensor] = []
    kept_positions: list[Tensor] = []
    for index, (row, real) in enumerate(zip(ids, mask, strict=True)):
        if ((real != 0) & (real != 1)).any():
            raise PromptError(
                f"the mask of {_row(index, len(ids))} holds something else than zeros and ones",
                instead="1 (or True) at real tokens, 0 at padding",
            )
        where = real.nonzero()[:, 0]
        if len(where) and int(where[-1] - where[0]) + 1 != len(where):
            raise PromptError(
                f"the mask of {_row(index, len(ids))} has a hole: padding stands between real tokens",
                instead="padding before or after the tokens of a row; leave a token out by leaving it out of the ids",
            )
        kept.append(row[where])
        if positions is not None:
            kept_positions.append(positions[index][where])
    if positions is not None:
        _check_positions(kept, kept_positions)
    if len({len(row) for row in kept}) == 1:
        return torch.stack(kept)
    return kept


def _check_positions(ids: Rows, positions: Rows) -> None:
    for index, (row, given) in enumerate(zip(ids, positions, strict=True)):
        if not torch.equal(given, torch.arange(len(row))):
            raise PromptError(
                f"the position_ids of {_row(index, len(ids))} do not count 0, 1, 2 ... over its real tokens",
                instead="leave position_ids out: tracelens passes the standard ones",
            )


def _padding(tokenizer: PreTrainedTokenizerBase | None, pad_id: int | None, vocab_size: int | None) -> int:
    """What stands under the mask. Any token does, but it must be one that the embedding has."""
    candidates = (pad_id, getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None))
    for candidate in candidates:
        if isinstance(candidate, int) and candidate >= 0 and (vocab_size is None or candidate < vocab_size):
            return candidate
    return 0


def _padded(rows: Sequence[Tensor], lengths: Sequence[int], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    longest = max(lengths)
    input_ids = torch.full((len(rows), longest), pad)
    for index, row in enumerate(rows):
        input_ids[index, longest - len(row) :] = row
    # Where each column stands in its row, counted from the first real token; as generate of transformers has it.
    places = torch.arange(longest) - (longest - torch.tensor(lengths))[:, None]
    return input_ids, places >= 0, places.clamp_(min=0)


_FEW = 1024
"""So many numbers Python compares faster than a torch call takes."""


def _check_vocabulary(input_ids: Tensor, mask: Tensor, vocab_size: int | None) -> None:
    if input_ids.numel() <= _FEW:
        flat: list[int] = input_ids.reshape(-1).tolist()
        low, high = min(flat), max(flat)
    else:
        low, high = (int(bound) for bound in input_ids.aminmax())
    if low >= 0 and (vocab_size is None or high < vocab_size):
        return
    outside = (input_ids < 0) if vocab_size is None else (input_ids < 0) | (input_ids >= vocab_size)
    row, column = (outside & mask).nonzero()[0].tolist()
    token = column - int((~mask[row]).sum())
    known = "negative" if vocab_size is None else f"outside the model's vocabulary of {vocab_size}"
    raise PromptError(
        f"token {token} of {_row(row, len(mask))} has the id {int(input_ids[row, column])}, which is {known}",
        instead="ids of this model's own tokenizer",
    )
