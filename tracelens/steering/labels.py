"""Where two answers differ: rows of contrast data as token ids, with the position of the label."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tracelens.chat import rendered
from tracelens.errors import LabelError, NoTokenizerError, PromptError
from tracelens.prompt_tokens import PromptTokens
from tracelens.steering.contrast import Contrast, ContrastRow, Refusal
from tracelens.view import Code, Line, Shown, Stack, Table, TokenRows, View

if TYPE_CHECKING:
    from tracelens.model import Model


@dataclass(frozen=True)
class LabelledRow:
    """A row of contrast data as token ids.

    ``row``: its number within the data. ``positive``, ``negative``: the ids of the prompt with each answer. ``label``:
    the first position at which they differ, ``t``; the position before it, whose logits score the label, is the
    decision. ``positive_token``, ``negative_token``: the ids there. ``options``: the ids that all answers which the
    prompt offers have there. ``joined``: no spelling of the answer leaves the prompt's tokens as they are by
    themselves, so the ids of both were put together instead of their texts.
    """

    row: int
    positive: tuple[int, ...]
    negative: tuple[int, ...]
    label: int
    positive_token: int
    negative_token: int
    options: tuple[int, ...]
    joined: bool = False

    @property
    def prompt(self) -> tuple[int, ...]:
        """The ids before the label, up to and with the decision position."""
        return self.positive[: self.label]

    @property
    def single(self) -> bool:
        """Is the label one token, with the same tokens after it for both answers?"""
        return self.positive[self.label + 1 :] == self.negative[self.label + 1 :]


class Labelled(Sequence[LabelledRow], Shown):
    """Rows of contrast data as one model's tokens, and those that do not qualify, with reasons.

    ``refused``: a :class:`Refusal` for each row that is left out, with its number in the data. ``digest``: that of the
    data.
    """

    def __init__(self, rows: Sequence[LabelledRow], refused: Sequence[Refusal], data: Contrast) -> None:
        self.rows = tuple(rows)
        self.refused = tuple(refused)
        self.data = data

    @property
    def digest(self) -> str:
        """The digest of the data."""
        return self.data.digest

    @property
    def row_digests(self) -> tuple[str, ...]:
        """:attr:`Contrast.row_digests` of the rows that qualify."""
        every = self.data.row_digests
        return tuple(every[row.row] for row in self.rows)

    @property
    def reasons(self) -> dict[str, int]:
        """How many rows are left out, by reason."""
        return dict(Counter(entry.reason for entry in self.refused).most_common())

    @property
    def joined(self) -> int:
        """In how many rows ids were put together, because no spelling of the answer left the prompt's tokens alone."""
        return sum(row.joined for row in self.rows)

    def __getitem__(self, key: int) -> LabelledRow:  # pyright: ignore[reportIncompatibleMethodOverride]  # rows, not slices
        """A row that qualifies."""
        return self.rows[key]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[LabelledRow]:
        return iter(self.rows)

    def _view(self) -> View:
        words = f"{len(self)} rows with a label"
        if self.joined:
            words += f" ({self.joined} of ids put together: the answer's spelling would change the prompt's tokens)"
        lines = [Line(words)]
        if self.refused:
            heads = ("left out", "because")
            table = Table(heads, tuple((str(count), reason) for reason, count in self.reasons.items()))
            return Stack((*lines, table))
        return Stack(tuple(lines))


def labelled(data: Contrast, model: Model, *, free: bool = False) -> Labelled:
    """The rows as ids, and the label's position found by comparing them.

    ``free``: answers may go on in different ways behind the first token that differs, as free text does; then there is
    no label, but a last token and a mean.
    """
    reader = Reader(data, model)
    rows: list[LabelledRow] = []
    refused: list[Refusal] = []
    for number, row in enumerate(data):
        found = reader.read(number, row, free=free)
        if isinstance(found, LabelledRow):
            rows.append(found)
        else:
            refused.append(Refusal(number, found))
    result = Labelled(rows, refused, data)
    if not rows:
        reason, count = next(iter(result.reasons.items()))
        raise LabelError(
            f"none of the {len(data)} rows has a label: {reason} ({count} rows)",
            instead="answers that differ in one token, such as ' (A)' and ' (B)'; data.show(model, row) shows a row; "
            'vectors of free text are made at positions="last" or "mean", and measured on other data, whose answers '
            "are one token",
        )
    return result


class Reader:
    """Turns rows into ids, as one tokenizer does."""

    def __init__(self, data: Contrast, model: Model) -> None:
        self.data = data
        if model.tokenizer is None:
            raise NoTokenizerError(
                "contrast data are texts, and the model was given no tokenizer",
                instead="tl.wrap(model, tokenizer)",
            )
        self.tokenizer: Any = model.tokenizer
        self.limit = model.anatomy.max_positions
        self.before = _before(self.tokenizer)

    def text(self, row: ContrastRow) -> tuple[str, list[int]]:
        """The text before the answer, and the ids that the tokenizer puts before it."""
        made = self.data.rendered(row)
        if isinstance(made, str):
            return made, self.before
        texts = rendered(made, self.tokenizer)
        assert texts is not None
        return texts[0], []  # the template has written the special tokens already

    def read(self, number: int, row: ContrastRow, *, free: bool = False) -> LabelledRow | str:
        """A row as ids; or why it does not qualify."""
        text, before = self.text(row)
        if not text:
            return "the prompt is empty"
        prompt = before + self.ids(text)
        if not prompt:
            return "the prompt has no tokens"
        joined, answers = self._answers(text, row)
        rows = [prompt + ids for ids in answers]
        positive = rows[row.options.index(row.positive)]
        negative = rows[row.options.index(row.negative)]
        if self.limit is not None and max(len(positive), len(negative)) > self.limit:
            return f"it is longer than the model's {self.limit} positions"
        pairs = enumerate(zip(positive, negative, strict=False))
        label = next((at for at, (one, other) in pairs if one != other), None)
        if label is None:
            return "one answer is the beginning of the other, or has the same tokens"
        found = LabelledRow(
            number,
            tuple(positive),
            tuple(negative),
            label,
            positive[label],
            negative[label],
            tuple(ids[label] for ids in rows if len(ids) > label),
            joined,
        )
        if free:
            return found
        if not found.single:
            return "the answers differ in more than one token"
        for ids in rows:
            if ids[:label] != positive[:label] or ids[label + 1 :] != positive[label + 1 :]:
                return "an answer that the prompt offers differs from the others in more than one token"
        if len(set(found.options)) < len(rows):
            return "two of the answers that the prompt offers have the same label"
        return found

    def ids(self, text: str) -> list[int]:
        """The tokens of a text by itself, without special ones."""
        # verbose=False: what is too long for the model is refused with a reason, not by a warning.
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _answers(self, text: str, row: ContrastRow) -> tuple[bool, list[list[int]]]:
        """The ids of each option behind the prompt, spelt so that they leave the prompt's own as they are.

        Where no spelling does so, as behind a space at the prompt's end, those of the answer by itself: true as first
        entry.
        """
        prompt = self.ids(text)
        for spelling in spellings(text, row.options):
            wholes = [self.ids(text + answer) for answer in spelling]
            if all(whole[: len(prompt)] == prompt and len(whole) > len(prompt) for whole in wholes):
                return False, [whole[len(prompt) :] for whole in wholes]
        return True, [self._alone(answer) for answer in spellings(text, row.options)[0]]

    def _alone(self, answer: str) -> list[int]:
        """The ids of an answer in the middle of a text: some tokenizers put a space before the first word of one."""
        for anchor in ("\n", ":", "(", "."):
            ids = self.ids(anchor)
            whole = self.ids(anchor + answer)
            if ids and whole[: len(ids)] == ids and len(whole) > len(ids):
                return whole[len(ids) :]
        raise PromptError(
            f"the tokenizer has no tokens for the answer {answer!r} by itself",
            instead="a prompt without a space at its end",
        )


def spellings(text: str, options: Sequence[str]) -> list[list[str]]:
    """How answers may be written behind a text, the likeliest way first.

    Behind white space without a space of their own; behind an open parenthesis without theirs, too; else as they were
    written, and then with or without the space.
    """
    bare = [option.lstrip() for option in options]
    if text.endswith("(") and all(option.startswith("(") for option in bare):
        return [[option[1:] for option in bare]]
    if text[-1:].isspace():
        return [bare]
    spaced = [" " + option for option in bare]
    written = list(options)
    return [written, *(way for way in (spaced, bare) if way != written)]


def _before(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text by itself. What it puts behind one does not belong before an answer."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start]
    raise PromptError(
        "the tokenizer writes a text in other tokens when it adds special ones",
        instead="a tokenizer that puts special tokens before and behind those of the text",
    )


class RenderedRow(Shown):
    """A row as the model is given it; shows itself with the label and the decision marked.

    ``text``: what stands before the answer, the template's special tokens included. ``labelled``: the row as ids.
    """

    def __init__(self, data: Contrast, model: Model, row: int) -> None:
        reader = Reader(data, model)
        found = reader.read(row, data[row])
        if isinstance(found, str):
            raise LabelError(
                f"row {row} has no label: {found}",
                instead="another row; data.tokens(model).refused says which have none",
            )
        self.labelled = found
        self.text, self._before = reader.text(data[row])
        ids = (list(found.positive), list(found.negative))
        self._tokens = tuple(PromptTokens(model.prepare([row])).rows[0] for row in ids)
        self._name = data.name

    def _view(self) -> View:
        row, at = self.labelled, self.labelled.label
        one, other = (tokens[at] for tokens in self._tokens)
        words = (
            f"row {row.row} of {self._name}: the label is at position {at}, {one.shown} ({one.id}) where the behaviour "
            f"shows and {other.shown} ({other.id}) where not; the decision is at {at - 1}"
        )
        if self._before:
            words += f"; the tokenizer puts {len(self._before)} before the text"
        if row.joined:
            words += "; ids were put together, because the answer's spelling would change the prompt's tokens"
        marks = {at - 1: "decision", at: "label"}
        return Stack((Line(words), Code(self.text), TokenRows(self._tokens[:1], (marks,))))
