"""What single tokens of a vocabulary spell, for tables and pictures in which they stand without their neighbours.

:mod:`tracelens.spelling` says what the tokens of a text spell in their places; a lens has tokens that stand in no text.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from tracelens.errors import NoTokenizerError, TokenMatchError
from tracelens.spelling import BROKEN, decoder, printable, special_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def token_texts(ids: Iterable[int], tokenizer: PreTrainedTokenizerBase | None) -> dict[int, str]:
    """What each of these tokens adds to a text; never an empty string, and special tokens by their names.

    A piece of a character, which is no text by itself, is written by its bytes, ``<0xE2><0x82>``; a token that nobody
    knows, and every one of a model without a tokenizer, by its id, ``<50300>``. Spaces and line ends are as they are:
    :func:`visible` shows them.
    """
    wanted = dict.fromkeys(ids)
    if tokenizer is None:
        return {token: _unknown(token) for token in wanted}
    names = special_names(tokenizer)
    decode = decoder(tokenizer)
    size = len(tokenizer)
    # Decoders treat the first token specially (a space before the text is lost), so each follows another one.
    first: list[int] = tokenizer.encode("a", add_special_tokens=False)[-1:]
    before = decode(first)
    texts: dict[int, str] = {}
    for token in wanted:
        if token in names:
            texts[token] = names[token] or _unknown(token)
            continue
        if not 0 <= token < size:
            texts[token] = _unknown(
                token
            )  # the unembedding often has more rows than the vocabulary has tokens
            continue
        text = decode([*first, token])
        text = text[len(before) :] if text.startswith(before) else decode([token])
        texts[token] = text if text and BROKEN not in text else _piece(token, tokenizer)
    return texts


def one_token(text: str, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """The id of a text that is one token; a named error, with what to write instead, for every other text."""
    if tokenizer is None:
        raise NoTokenizerError(
            f"{text!r} is a text, and this model has no tokenizer",
            instead="the token's id; or tl.wrap(hf_model, tokenizer)",
        )
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) == 1:
        return ids[0]
    spelt = token_texts(ids, tokenizer)
    pieces = ", ".join(f'{token} "{printable(spelt[token])}"' for token in ids) or "no token"
    other = text[1:] if text.startswith(" ") else f" {text}"
    also = len(tokenizer.encode(other, add_special_tokens=False)) == 1
    raise TokenMatchError(
        f"{text!r} is not one token: it is {pieces}",
        instead=f"{other!r}, which is one token" if also else f"one of them, {ids[0]}" if ids else "an id",
    )


def _unknown(token: int) -> str:
    return f"<{token}>"


def _piece(token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """A token that is no text by itself, by its bytes, or by the name that the vocabulary has for it."""
    raw: Any = tokenizer.convert_ids_to_tokens(token)
    if not isinstance(raw, str) or not raw:
        return _unknown(token)
    if not all(char in _BYTES for char in raw):
        return raw
    data = bytes(_BYTES[char] for char in raw)
    text = ""
    while data:
        try:
            return text + data.decode()
        except UnicodeDecodeError as broken:
            text += data[: broken.start].decode()
            text += "".join(f"<0x{byte:02X}>" for byte in data[broken.start : broken.end])
            data = data[broken.end :]
    return text


def _byte_alphabet() -> dict[str, int]:
    """The letters that byte-level vocabularies write bytes with: a byte's own letter, where it has one to be seen."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + at): byte for at, byte in enumerate(others)}


_BYTES = _byte_alphabet()

_SIGNS = str.maketrans({" ": "·", "\n": "↵", "\t": "⇥", "\u00a0": "⍽"})


def visible(text: str, most: int | None = None) -> str:
    """A token so that its spaces and line ends are seen; cut off with ``…`` after ``most`` columns of a terminal.

    >>> visible(" the"), visible("\\n\\n"), visible(" internationally", 8)
    ('·the', '↵↵', '·intern…')
    """
    shown = text.translate(_SIGNS)
    if not shown.isprintable():
        shown = printable(shown)
    if shown and unicodedata.combining(shown[0]):
        shown = "◌" + shown  # an accent alone would be drawn over what stands before it
    if most is None or columns(shown) <= most:
        return shown
    while columns(shown) > most - 1:
        shown = shown[:-1]
    return shown + "…"


def columns(text: str) -> int:
    """How many columns of a terminal the text takes: two for a wide letter, none for an accent."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1
        for char in text
    )


def padded(text: str, width: int) -> str:
    """The text with spaces after it, up to so many columns of a terminal."""
    return text + " " * (width - columns(text))
