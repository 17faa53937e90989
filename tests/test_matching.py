"""``.tok[tl.token_id(...)]``, ``.tok[tl.chars(...)]``, one token of a text: where they point, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tracelens as tl
from tests.errors import IDS, LLAMA, D, refused
from tests.support.families import FAMILIES
from tests.support.tokenizers import SENTENCES, byte_level_bpe, sentencepiece_like, words
from tracelens.batch import prepare
from tracelens.errors import (
    IndexingError,
    RaggedSelectionError,
    SpecialisedGraphError,
    SymbolicSizeError,
    TokenMatchError,
    TokenRangeError,
)
from tracelens.ir.ops import OwnTokens, PromptTokens, TokenChars, TokenId
from tracelens.selection import resolve

model = LLAMA.model
TEXTS = ["The capital of France is Paris.", "In France it is Paris."]


def id_of(text: str) -> int:
    (found,) = LLAMA.tokenizer(text)["input_ids"]
    return found


# --- by id -----------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=1, max_size=4), st.integers(0, 9)
)
def test_an_id_is_the_one_place_that_has_it(rows: list[list[int]], wanted: int) -> None:
    batch = prepare(rows, max_positions=None)
    if all(row.count(wanted) == 1 for row in rows):
        found = resolve(TokenId(wanted), batch)
        longest = max(map(len, rows))
        assert found.cols.tolist() == [row.index(wanted) + longest - len(row) for row in rows]
        assert found.width is None
    else:
        with pytest.raises(TokenMatchError):
            resolve(TokenId(wanted), batch)
    for row, ids in enumerate(rows):
        if ids.count(wanted) == 1:
            own = resolve(OwnTokens(row, len(ids), TokenId(wanted)), batch)
            assert own.columns == ((ids.index(wanted),),)


def test_an_id_reads_and_writes_one_token_of_each_row() -> None:
    france = tl.token_id(id_of(" France"))
    with model.trace(TEXTS):
        h = model.layers[1].resid_post.tok[france]
        assert h.shape == (2, D)
        by_id, by_text = h.save(), model.layers[1].resid_post.tok[" France"].save()
        model.layers[1].resid_post.tok[france] = 0.0
        after = model.layers[1].resid_post.tok[" France"].save()
    assert torch.equal(by_id.value, by_text.value[:, 0])
    assert not after.value.any()


def test_ids_that_are_not_there_once() -> None:
    with (
        refused(
            TokenMatchError,
            "no token of row 1 of the prompt has the id",
            '[0] "',
            instead="model.show(prompt)",
        ),
        model.trace(TEXTS),
    ):
        model.embed.tok[tl.token_id(id_of(" capital"))].save()  # <-
    with (
        refused(TokenMatchError, "stands 2 times in row 0 of the prompt, as tokens 0, 2", instead=".tok[0]"),
        model.trace([[5, 6, 5, 7]]),
    ):
        model.embed.tok[tl.token_id(5)].save()  # <-
    for wrong in (-1, True, "Paris", 1.5):
        with refused(IndexingError, "is no token id", instead="tl.token_id(4649)"), model.trace(IDS):
            model.embed.tok[tl.token_id(wrong)].save()  # <-


def test_ids_need_no_tokenizer() -> None:
    bare = tl.wrap(FAMILIES["llama"].build())
    with bare.trace([[5, 6, 7]]):
        h, expected = bare.embed.tok[tl.token_id(6)].save(), bare.embed.tok[1].save()
    assert torch.equal(h.value, expected.value)
    with pytest.raises(TokenMatchError, match=r"\[0\] 5  \[1\] 6"), bare.trace([[5, 6, 7]]):
        bare.embed.tok[tl.token_id(9)].save()


def test_a_program_finds_the_id_anew() -> None:
    with model.record() as r:
        model.embed.tok[tl.token_id(6)].save("h")
    program = model.compile(r)
    table = LLAMA.hf.get_input_embeddings().weight
    for rows in ([[5, 6, 7]], [[6, 9], [1, 2, 6]]):
        assert torch.equal(program(rows)["h"], table[torch.tensor([6] * len(rows))])


# --- by characters ---------------------------------------------------------------------------------------------------

TOKENIZERS = {
    "bytes": byte_level_bpe(),
    "bytes after bos": byte_level_bpe(bos=True),
    "sentencepiece": sentencepiece_like(),
    "words": words(),
}


@given(
    st.sampled_from(sorted(TOKENIZERS)), st.sampled_from([s for s in SENTENCES if "\n" not in s]), st.data()
)
def test_characters_of_whole_tokens_are_those_tokens(name: str, text: str, data: st.DataObject) -> None:
    """By the tokenizer's own offsets."""
    tokenizer: Any = TOKENIZERS[name]
    encoded = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
    offsets: list[tuple[int, int]] = encoded["offset_mapping"]
    real = [
        token
        for token, (begin, end) in enumerate(offsets)
        if end > begin and not encoded["special_tokens_mask"][token]
    ]
    batch = prepare(text, tokenizer, max_positions=None)
    first = data.draw(st.sampled_from(real))
    last = data.draw(st.sampled_from([token for token in real if token >= first]))
    start, stop = offsets[first][0], offsets[last][1]
    try:
        found = resolve(TokenChars(start, stop, None), batch, tokenizer)
    except TokenMatchError:
        # A character in several tokens, which has no end inside of it; or a text that the tokens do not give back.
        several = [o for o in offsets if o[0] < stop and o[1] > start]
        assert name != "bytes" or len(set(several)) < len(several) or not text.isascii()
        return
    # All tokens that have a part in a character, where several do.
    wanted = [token for token in real if start <= offsets[token][0] and offsets[token][1] <= stop]
    assert list(found.columns[0]) == wanted
    assert text[start:stop].strip() in text
    own = resolve(OwnTokens(0, len(offsets), TokenChars(start, stop, None)), batch, tokenizer)
    assert own.columns == found.columns


@given(st.text(st.characters(codec="ascii", categories=["L", "Zs"]), min_size=1, max_size=20), st.data())
def test_characters_spell_what_is_asked_or_are_refused(text: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS["bytes after bos"]
    batch = prepare(text, tokenizer, max_positions=None)
    start = data.draw(st.integers(0, len(text) - 1))
    stop = data.draw(st.integers(start + 1, len(text)))
    try:
        (columns,) = resolve(TokenChars(start, stop, None), batch, tokenizer).columns
    except TokenMatchError:
        return
    spelt = tokenizer.decode([batch.tokens(0)[column] for column in columns])
    assert spelt in (text[start:stop], " " + text[start:stop])


def test_characters_in_each_rows_own_text() -> None:
    same = ["Paris it is", "Italy it is"]
    with model.trace(same):
        h = model.embed.tok[tl.chars(5, 11)].save()
        expected = model.embed.tok[" it is"].save()
    assert torch.equal(h.value, expected.value)
    with (
        refused(TokenMatchError, "does not begin and end where tokens do", instead="tl.chars(5, 11)"),
        model.trace(same),
    ):
        model.embed.tok[tl.chars(5, 10)].save()  # <-


def test_characters_that_are_none() -> None:
    with refused(TokenRangeError, "which has 31 characters", instead="counted from 0"), model.trace(TEXTS[0]):
        model.embed.tok[tl.chars(4, 90)].save()  # <-
    for start, stop in ((4, 4), (5, 2), (-3, 2), (0, 1.5)):
        with refused(IndexingError, "is no span of characters", instead="tl.chars(4, 20)"), model.trace(IDS):
            model.embed.tok[tl.chars(start, stop)].save()  # <-
    with (
        refused(SymbolicSizeError, "how many tokens that selects", instead="record with a prompt"),
        model.record(),
    ):
        model.embed.tok[tl.chars(0, 3)].save("h")  # <-


def test_rows_with_other_numbers_of_tokens_there() -> None:
    texts = ["The capital of France", "Qq zx vw kj hg"]
    with (
        refused(RaggedSelectionError, "tl.chars(0, 11)] selects different numbers", instead="t.prompts[i]"),
        model.trace(texts),
    ):
        model.embed.tok[tl.chars(0, 11)].save()  # <-


def test_a_program_with_characters_is_for_as_many_tokens() -> None:
    with model.record("The capital of France") as r:
        model.embed.tok[tl.chars(0, 11)].save("h")
    with pytest.raises(SpecialisedGraphError, match=r"tl\.chars\(0, 11\)\] selected 2 tokens"):
        model.compile(r)("Qq zx vw kj hg")


# --- one token of a text ---------------------------------------------------------------------------------------------


def test_one_token_of_a_text_has_no_axis_of_positions() -> None:
    """It was recorded as [B, 1, D] and computed as [B, D]: ``[:, -1]`` of it was the last feature."""
    with model.trace(TEXTS):
        h = model.layers[1].resid_post.tok[" France", -1]
        assert h.shape == (2, D)
        whole, last = h.save(), h[:, -1].save()
    assert whole.value.shape == (2, D)
    assert torch.equal(last.value, whole.value[:, -1])


def test_selectors_of_prompts_are_held_to_their_length() -> None:
    batch = prepare([[5, 6, 7], [8, 9]], max_positions=None)
    assert resolve(PromptTokens(1, 2), batch).columns == (range(1, 3),)
    for wrong in (PromptTokens(1, 3), PromptTokens(2, 2), OwnTokens(0, 2, TokenId(5)), PromptTokens(-1, 2)):
        with pytest.raises(SpecialisedGraphError, match=r"t\.prompts\["):
            resolve(wrong, batch)


def test_patterns_of_a_double_precision_model_are_no_nan() -> None:
    """The softmax of a padding query was taken in float32, in which the lowest float64 is minus infinity."""
    double = tl.wrap(FAMILIES["llama"].build(dtype=torch.float64))
    with double.trace([[5], [6, 7]]):
        double.layers[0].pattern = double.layers[0].pattern * 0.5
        logits = double.logits.tok[-1].save()
    with double.trace([[5]]):
        double.layers[0].pattern = double.layers[0].pattern * 0.5
        alone = double.logits.tok[-1].save()
    torch.testing.assert_close(logits.value[:1], alone.value, rtol=1e-9, atol=1e-9)
