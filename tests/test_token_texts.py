"""What single tokens spell: never nothing, bytes by their values, special tokens by their names."""

from __future__ import annotations

import pytest

from tests.support.tokenizers import SENTENCES, byte_level_bpe, sentencepiece_like, words
from tracelens.token_texts import columns, padded, token_texts, visible

TOKENIZERS = {
    "byte-level": byte_level_bpe(),
    "byte-level with bos": byte_level_bpe(bos=True),
    "sentencepiece": sentencepiece_like(),
    "older sentencepiece": sentencepiece_like(legacy=True),
    "words": words(),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_every_token_spells_something(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    texts = token_texts(range(len(tokenizer)), tokenizer)
    assert len(texts) == len(tokenizer)
    assert all(texts.values())
    assert not any("\ufffd" in text for text in texts.values())
    assert all(visible(text) for text in texts.values())


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece", "older sentencepiece"])
def test_the_tokens_of_a_text_spell_it(kind: str) -> None:
    """Each by itself, with the spaces that decoders take from the first token."""
    tokenizer = TOKENIZERS[kind]
    for sentence in SENTENCES[:3]:
        ids: list[int] = tokenizer(sentence, add_special_tokens=False)["input_ids"]
        texts = token_texts(ids, tokenizer)
        assert "".join(texts[token] for token in ids).lstrip(" ") == sentence


def test_pieces_of_characters_are_written_by_their_bytes() -> None:
    """The euro sign is E2 82 AC; none of its bytes is a text."""
    for tokenizer in (byte_level_bpe(), sentencepiece_like()):
        ids: list[int] = tokenizer("€", add_special_tokens=False)["input_ids"]
        texts = token_texts(ids, tokenizer)
        assert "".join(texts[token] for token in ids).lstrip(" ") == "<0xE2><0x82><0xAC>"


def test_a_piece_keeps_the_characters_that_are_whole() -> None:
    tokenizer = byte_level_bpe()
    mixed = [
        text
        for text in token_texts(range(len(tokenizer)), tokenizer).values()
        if "<0x" in text and len(text) > 6
    ]
    assert "r<0xC3>" in mixed


def test_special_tokens_have_their_names_and_others_their_ids() -> None:
    tokenizer = byte_level_bpe()
    texts = token_texts([0, 1, len(tokenizer), 50300, -1], tokenizer)
    assert list(texts.values()) == ["<|endoftext|>", "<|im_start|>", f"<{len(tokenizer)}>", "<50300>", "<-1>"]
    assert token_texts([7, 0], None) == {7: "<7>", 0: "<0>"}


def test_what_cannot_be_seen_is_made_visible() -> None:
    assert visible(" a  b\n\t\r\u00a0") == "·a··b↵⇥\\r⍽"
    assert visible("\x00\u200b\u200d\ue000") == "\\x00\\u200b\\u200d\\ue000"
    assert visible("\u0301") == "◌\u0301"


@pytest.mark.parametrize("text", ["internationally", "東京都庁舎の上", "e\u0301" * 9])
@pytest.mark.parametrize("most", [1, 2, 5, 8])
def test_a_text_is_cut_to_columns(text: str, most: int) -> None:
    cut = visible(text, most)
    assert columns(cut) <= most
    assert cut.endswith("…")
    assert columns(padded(cut, 20)) == 20


def test_columns_are_those_of_a_terminal() -> None:
    assert [columns(text) for text in ("abc", "東京", "e\u0301", "é", "")] == [3, 4, 1, 1, 0]
