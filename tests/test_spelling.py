"""Spellings: what tokens spell, against the bytes that the vocabulary writes them in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.support.tokenizers import SENTENCES, byte_level_bpe, sentencepiece_like, words
from tracelens.pretrained import embedded_model
from tracelens.spelling import Spelling, spell

TOKENIZERS = {
    "byte_level": byte_level_bpe(),
    "byte_level_bos": byte_level_bpe(bos=True),
    "byte_level_trimmed": byte_level_bpe(bos=True, trim_offsets=True),
    "sentencepiece": sentencepiece_like(),
    "sentencepiece_legacy": sentencepiece_like(legacy=True),
}
LOSSLESS = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)

# Words that are whole tokens, words that fall apart, characters of two, three and four bytes, and every kind of gap.
TEXTS = st.lists(
    st.sampled_from(
        [
            "Paris",
            " Paris",
            "The",
            " the",
            "theory",
            " café",
            "è",
            "é",
            "🎉",
            "日本",
            " ",
            "\n",
            ".",
            "a",
            "aa",
        ]
    )
    | st.sampled_from(SENTENCES),
    min_size=1,
    max_size=12,
).map("".join)


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text)["input_ids"]


def spelt(tokenizer: PreTrainedTokenizerFast, text: str, *, knows_text: bool = True) -> Spelling:
    return spell(ids_of(tokenizer, text), tokenizer, text if knows_text else None)


def byte_pieces(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[bytes]:
    """The bytes of each token, read off the vocabulary's own way of writing them: another road to the same place."""
    # GPT-2's table: printable bytes stand for themselves, the others, in order, for the characters from 256 on.
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    own = [byte for byte in range(256) if chr(byte) in alphabet]
    table = {chr(byte): byte for byte in own}
    table |= {chr(256 + n): byte for n, byte in enumerate(byte for byte in range(256) if byte not in own)}
    pieces: list[bytes] = []
    sentencepiece = "<0x00>" in tokenizer.get_vocab()
    for token in tokenizer.convert_ids_to_tokens(ids):
        if token in tokenizer.all_special_tokens:
            pieces.append(token.encode())
        elif sentencepiece:
            pieces.append(
                bytes([int(token[3:5], 16)]) if token.startswith("<0x") else token.replace("▁", " ").encode()
            )
        else:
            pieces.append(bytes(table[char] for char in token))
    if sentencepiece:  # the space that was put before the text is nobody's
        assert pieces[1].startswith(b" ") or b" " not in pieces[1]
        pieces[1] = pieces[1].removeprefix(b" ")
    return pieces


def brute_force(pieces: list[bytes], text: str) -> list[tuple[int, int]]:
    """Every span of tokens that spells the text, or the text after a space that its first token brings."""
    found: list[tuple[int, int]] = []
    for first in range(len(pieces)):
        for last in range(first, len(pieces)):
            if not pieces[first] or not pieces[last]:
                continue
            joined = b"".join(pieces[first : last + 1])
            brought = b" " + text.encode() == joined and pieces[first] != b" " and not text.startswith(" ")
            if joined == text.encode() or brought:
                found.append((first, last + 1))
    return found


@LOSSLESS
@given(text=TEXTS, data=st.data())
def test_spans_equal_a_search_through_the_bytes_of_all_spans(tokenizer, text, data):
    if "▁" in tokenizer.get_vocab() and text.startswith(" "):
        text = (
            "x" + text
        )  # whether a space before the text survives differs between these tokenizers; tested below
    ids = ids_of(tokenizer, text)
    pieces = byte_pieces(tokenizer, ids)
    start = data.draw(st.integers(0, len(text) - 1))
    needle = text[start : data.draw(st.integers(start + 1, min(len(text), start + 30)))]
    expected = brute_force(pieces, needle)
    assert spell(ids, tokenizer, text).spans(needle) == expected
    assert spell(ids, tokenizer).spans(needle) == expected


@LOSSLESS
@given(text=TEXTS)
def test_whole_tokens_are_found_by_what_they_spell(tokenizer, text):
    spelling = spelt(tokenizer, text)
    assert len(spelling) == len(ids_of(tokenizer, text))
    for token in range(len(spelling)):
        begin, end = spelling.cuts[token], spelling.cuts[token + 1]
        if begin % 2 == 0 and end % 2 == 0 and begin < end:
            assert (token, token + 1) in spelling.spans(spelling.surface[begin // 2 : end // 2])


@given(text=TEXTS)
def test_offsets_find_the_users_words_where_the_tokenizer_changes_them(text):
    tokenizer = byte_level_bpe(lossy=True)
    plain = byte_level_bpe()
    text = text + " CAFE\u0301 Rome"
    spelling = spelt(tokenizer, text)
    assert spelling.surface == text
    (last,) = spelling.spans("CAFE\u0301 Rome")
    assert last[1] == len(spelling)
    # Where the text is in lower case and composed already, nothing is lost and both roads lead to the same cuts.
    lower = text.lower().replace("e\u0301", "é")
    assert spelt(tokenizer, lower).cuts == spelt(tokenizer, lower, knows_text=False).cuts
    assert spelt(plain, text).surface == text


@pytest.mark.parametrize("knows_text", [True, False])
def test_words_without_their_spaces(knows_text):
    spelling = spelt(words(), "The capital of France", knows_text=knows_text)
    assert spelling.spans("capital") == spelling.spans(" capital") == [(1, 2)]
    assert spelling.spans("capital of") == [(1, 3)]
    assert spelling.spans("capit") == []


def test_a_gap_that_no_token_claims_begins_and_ends_no_span():
    spelling = spelt(words(), "The capital \n of France")
    assert spelling.spans("capital") == []
    assert spelling.spans("of") == []
    assert spelling.spans("France") == [(3, 4)]


@pytest.mark.parametrize("name", ["sentencepiece", "sentencepiece_legacy"])
def test_the_space_that_sentencepiece_puts_before_a_text_is_not_part_of_it(name):
    tokenizer = TOKENIZERS[name]
    for spelling in (spelt(tokenizer, "Paris is"), spelt(tokenizer, "Paris is", knows_text=False)):
        assert spelling.surface == "<s>Paris is"
        assert spelling.spans("Paris") == [(1, 2)]
        assert spelling.spans(" Paris") == []


def test_a_space_that_stands_alone_belongs_to_a_text_that_begins_with_it():
    tokenizer = byte_level_bpe()
    text = "x  é"  # no merge joins this space to this é
    spelling = spelt(tokenizer, text)
    assert [spelling.piece(token) for token in range(len(spelling))] == ['"x"', '" "', '" "', '"é"']
    assert spelling.spans("é") == [(3, 4)]
    assert spelling.spans(" é") == [(2, 4)]
    assert spelling.spans("  é") == [(1, 4)]


def test_a_text_that_begins_with_a_space_needs_that_very_space():
    spelling = spelt(byte_level_bpe(), "Paris, Paris")
    assert spelling.spans("Paris") == [(0, 1), (2, 3)]
    assert spelling.spans(" Paris") == [(2, 3)]


def test_one_space_is_forgiven_and_not_two():
    spelling = Spelling("x  y", (0, 2, 8))
    assert spelling.spans("y") == spelling.spans(" y") == []
    assert spelling.spans("  y") == [(1, 2)]


def test_spans_that_overlap_each_count():
    assert Spelling("aaa", (0, 2, 4, 6)).spans("aa") == [(0, 2), (1, 3)]


def test_tokens_that_spell_nothing_belong_to_no_span():
    assert Spelling("ab", (0, 0, 2, 2, 4, 4)).spans("ab") == [(1, 4)]


def test_pieces_are_readable():
    tokenizer = byte_level_bpe(bos=True)
    spelling = spelt(tokenizer, "Paris\n日\u200b")
    shown = spelling.shown()
    assert '[0] <|endoftext|>  [1] "Paris"  [2] "\\n"' in shown
    assert '[3] "日"…  [4] …"日"…  [5] …"日"' in shown
    assert '"\\u200b"' in shown
    assert "inside a character" in shown
    assert "inside a character" not in spelling.shown(0, 3)
    assert spelling.shown(1, 2).strip() == '[1] "Paris"'


@pytest.mark.parametrize("text", ["Paris\n日\u200b 🎉 é", SENTENCES[0]])
def test_the_texts_of_all_tokens_are_the_whole(text):
    spelling = spelt(byte_level_bpe(bos=True), text)
    assert any(cut % 2 for cut in spelling.cuts) == ("日" in text)
    assert "".join(spelling.text(token) for token in range(len(spelling))) == spelling.surface
    assert spelling.surface.endswith(text)
    for token in range(len(spelling)):
        if (
            not spelling.cuts[token] % 2
            and not spelling.cuts[token + 1] % 2
            and token not in spelling.special
        ):
            assert spelling.piece(token).startswith('"')
            assert spelling.text(token) in text


def test_long_rows_are_shown_in_part():
    spelling = spelt(byte_level_bpe(), SENTENCES[0] * 10)
    shown = spelling.shown(most=8)
    assert "[3] " in shown
    assert "[4] " not in shown
    assert f"... {len(spelling) - 8} more ..." in shown
    assert f"[{len(spelling) - 4}] " in shown
    assert f"[{len(spelling) - 5}] " not in shown


def test_a_prompt_that_ends_inside_a_character():
    tokenizer = byte_level_bpe()
    ids = ids_of(tokenizer, "Paris 🎉")[:-1]
    spelling = spell(ids, tokenizer)
    assert spelling.spans("Paris") == [(0, 1)]
    assert spelling.spans("🎉") == []
    assert spelling.cuts[-1] == 2 * len(spelling.surface)


def test_special_tokens_can_be_named():
    tokenizer = byte_level_bpe(bos=True)
    for knows_text in (True, False):
        spelling = spelt(tokenizer, "<|im_start|>The", knows_text=knows_text)
        assert spelling.special == {0, 1}
        assert spelling.spans("<|im_start|>") == [(1, 2)]
        assert spelling.spans("<|endoftext|>") == [(0, 1)]
        assert spelling.spans("The") == [(2, 3)]


def test_special_tokens_are_shown_as_such_also_by_offsets():
    spelling = spelt(byte_level_bpe(bos=True, lossy=True), "<|im_start|>The")
    assert spelling.special == {0, 1}
    assert spelling.shown().strip() == '[0] <|endoftext|>  [1] <|im_start|>  [2] "The"'


class SlowTokenizer:
    """A tokenizer in Python: no backend, no offsets; decodes, and that is all."""

    all_special_ids: tuple[int, ...] = ()

    def __init__(self, fast: PreTrainedTokenizerFast) -> None:
        self.decode = fast.decode


@given(text=TEXTS)
def test_tokenizers_without_offsets_are_decoded(text):
    fast = byte_level_bpe()
    ids = ids_of(fast, text)
    assert spell(ids, SlowTokenizer(fast), text) == spell(ids, fast)


@pytest.mark.smollm2
@given(text=TEXTS)
def test_a_real_tokenizer(text):
    tokenizer = real_tokenizer()
    ids = ids_of(tokenizer, text)
    for spelling in (spell(ids, tokenizer, text), spell(ids, tokenizer)):
        assert spelling.surface == text
        for token, piece in enumerate(byte_pieces(tokenizer, ids)):
            begin, end = spelling.cuts[token], spelling.cuts[token + 1]
            if begin % 2 == 0 and end % 2 == 0:
                assert spelling.surface[begin // 2 : end // 2].encode() == piece


_loaded: list[PreTrainedTokenizerFast] = []


def real_tokenizer() -> PreTrainedTokenizerFast:
    if not _loaded:
        _loaded.append(AutoTokenizer.from_pretrained(embedded_model()))
    return _loaded[0]
