"""Where the rows of a prompt have a token id, a text, or some characters: ``.tok["Paris"]`` and its relatives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tracelens.batch import Batch
from tracelens.errors import NoTokenizerError, RaggedSelectionError, TokenMatchError, TokenRangeError
from tracelens.ir.dims import bounds_text
from tracelens.ir.ops import (
    OwnTokens,
    PromptTokens,
    Selector,
    TokenAt,
    TokenChars,
    TokenId,
    TokenList,
    TokenSlice,
    TokenText,
)
from tracelens.spelling import Spelling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a batch in which tokens are looked for, by their numbers."""

    batch: Batch
    tokenizer: PreTrainedTokenizerBase | None
    numbers: Sequence[int]

    @property
    def lengths(self) -> dict[int, int]:
        return {row: self.batch.lengths[row] for row in self.numbers}

    def spellings(self, what: str) -> dict[int, Spelling]:
        if self.tokenizer is None:
            raise NoTokenizerError(
                f"{what} needs a tokenizer to know what the tokens spell, and the model was given none",
                instead="tl.wrap(model, tokenizer), or a selector that counts tokens",
            )
        spellings = self.batch.spellings(self.tokenizer)
        return {row: spellings[row] for row in self.numbers}

    def shown(self, row: int) -> str:
        """The tokens of a row, with their ids where nobody knows what they spell."""
        if self.tokenizer is not None:
            return self.batch.spellings(self.tokenizer)[row].shown()
        ids = self.batch.tokens(row)
        return (
            "    "
            + "  ".join(f"[{token}] {id}" for token, id in enumerate(ids[:32]))
            + " ..." * (len(ids) > 32)
        )


def written(selector: Selector) -> str:
    """The selector as the user wrote it: ``.tok[2:]``."""
    match selector:
        case PromptTokens():
            return f"t.prompts[{selector.row}]"
        case OwnTokens():
            return written(selector.selector)
        case TokenAt():
            inner = str(selector.index)
        case TokenList():
            inner = str(list(selector.indices))
        case TokenSlice():
            inner = bounds_text(selector.start, selector.stop, selector.step)
        case TokenText():
            inner = f'"{selector.text}"' + ("" if selector.pick is None else f", {selector.pick}")
        case TokenId():
            inner = f"tl.token_id({selector.id})"
        case TokenChars():
            inner = f"tl.chars({selector.start}, {selector.stop})"
    return f".tok[{inner}]"


def tokens_text(count: int) -> str:
    return "1 token" if count == 1 else f"{count} tokens"


def counts_text(counts: Mapping[int, int], verb: str) -> str:
    """``row 0 selects 2, row 1 selects 3``, of not too many rows."""
    shown = ", ".join(f"row {row} {verb} {count}" for row, count in list(counts.items())[:8])
    return shown + (f", and {len(counts) - 8} more rows" if len(counts) > 8 else "")


def check_widths(widths: Mapping[int, int], what: str) -> None:
    if len(set(widths.values())) > 1:
        raise RaggedSelectionError(
            f"{what} selects different numbers of tokens: {counts_text(widths, 'selects')}",
            instead="a selector that takes equally many of each row, such as [-3:]; t.prompts[i] for one row; or one "
            "trace per prompt",
        )
    if not all(widths.values()):
        raise TokenRangeError(
            f"{what} selects no tokens", instead="a selector that takes at least one token of each row"
        )


# --- by id -----------------------------------------------------------------------------------------------------------


def with_id(selector: TokenId, row: int, rows: Rows) -> int:
    """The one place of the row that has the id."""
    places = [place for place, id in enumerate(rows.batch.tokens(row)) if id == selector.id]
    if len(places) == 1:
        return places[0]
    if places:
        raise TokenMatchError(
            f"{written(selector)} stands {len(places)} times in row {row} of the prompt, as tokens "
            f"{', '.join(map(str, places[:8]))}{', ...' * (len(places) > 8)}:\n{rows.shown(row)}",
            instead=f"the token's number: .tok[{places[0]}]",
        )
    raise TokenMatchError(
        f"no token of row {row} of the prompt has the id {selector.id}:\n{rows.shown(row)}",
        instead="the id of a token that is there: model.show(prompt) shows them; or the token's number",
    )


# --- by text ---------------------------------------------------------------------------------------------------------


def spelt(selector: TokenText, rows: Rows) -> list[range]:
    spellings = rows.spellings(written(selector))
    if not selector.text:
        raise TokenMatchError(
            f"{written(selector)} names no text", instead="a text that stands in the prompt once"
        )
    spans = {row: _span(selector, row, spelling) for row, spelling in spellings.items()}
    if selector.pick is None:
        check_widths({row: len(span) for row, span in spans.items()}, written(selector))
        return list(spans.values())
    picked: list[range] = []
    for row, span in spans.items():
        if not -len(span) <= selector.pick < len(span):
            raise RaggedSelectionError(
                f"{written(selector)} is outside the span, which has {tokens_text(len(span))} in row {row} of the "
                "prompt",
                instead=f'.tok["{selector.text}", -1] for its last token',
            )
        picked.append(span[selector.pick : selector.pick + 1 or None])
    return picked


def of_chars(selector: TokenChars, row: int, spelling: Spelling, rows: Rows) -> range:
    """The tokens of the row that spell these characters of its text."""
    texts = rows.batch.texts
    text = spelling.surface if texts is None else texts[row]
    shift = 0 if texts is None else spelling.begins(text)
    if shift is None:
        raise TokenMatchError(
            f"{written(selector)} counts characters of the prompt, and the tokens of row {row} spell another text:\n"
            + spelling.shown(),
            instead="the tokens' numbers",
        )
    if selector.stop > len(text):
        raise TokenRangeError(
            f"{written(selector)} is outside row {row} of the prompt, which has {len(text)} characters",
            instead="characters that are there, counted from 0",
        )
    start, stop = selector.start + shift, selector.stop + shift
    span = spelling.span(start, stop)
    if span is not None:
        return range(*span)
    first, last = spelling.touching(start, stop)
    begin, end = spelling.cuts[first] // 2 - shift, (spelling.cuts[last] + 1) // 2 - shift
    raise TokenMatchError(
        f"{written(selector)} is {text[selector.start : selector.stop]!r} in row {row} of the prompt, and does not "
        f"begin and end where tokens do:\n{spelling.shown(first - 3, last + 3)}",
        instead=f"the characters of whole tokens, tl.chars({max(begin, 0)}, {end}), or their numbers: "
        f".tok[{first}:{last}]",
    )


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
