"""Token selectors: against a row-by-row evaluation in plain Python, and what they refuse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.support.tokenizers import byte_level_bpe, sentencepiece_like
from tracelens.batch import Batch, prepare
from tracelens.errors import (
    DtypeError,
    IndexingError,
    NoTokenizerError,
    PositionAxisError,
    RaggedSelectionError,
    ShapeError,
    SpecialisedGraphError,
    TokenMatchError,
    TokenRangeError,
    TracelensError,
)
from tracelens.ir.ops import TokenAt, TokenList, TokenSelector, TokenSlice, TokenText
from tracelens.selection import Selection, mask_indices, resolve, unpadded, width, written

LENGTHS = st.lists(st.integers(1, 7), min_size=1, max_size=4)
PLACES = st.integers(-8, 8)
BOUNDS = st.none() | PLACES


def batch_of(lengths: Sequence[int]) -> Batch:
    """Rows of these lengths; no id occurs twice."""
    return prepare([list(range(10 * row, 10 * row + n)) for row, n in enumerate(lengths)], max_positions=None)


def taken(selection: Selection, values: Tensor) -> Tensor:
    """What a backend takes of ``values`` [B, P, ...], by the index where there is one; both ways are checked."""
    by_rows = values[selection.rows, selection.cols]
    if selection.uniform is not None:
        assert torch.equal(values[:, selection.uniform], by_rows)
    return by_rows


def brute_force(selector: TokenSelector, batch: Batch) -> list[Any] | None:
    """Rows of tokens by Python's own indexing; ``None`` where that is impossible, empty or ragged."""
    rows = [batch.tokens(row) for row in range(len(batch.lengths))]
    try:
        match selector:
            case TokenAt(index):
                return [row[index] for row in rows]
            case TokenList(indices):
                found = [[row[index] for index in indices] for row in rows]
            case TokenSlice(start, stop, step):
                found = [row[start:stop:step] for row in rows]
            case _:
                raise AssertionError(selector)
    except IndexError:
        return None
    return found if found[0] and len({len(row) for row in found}) == 1 else None


SELECTORS = (
    st.builds(TokenAt, PLACES)
    | st.builds(TokenList, st.lists(PLACES, max_size=4).map(tuple))
    | st.builds(TokenSlice, BOUNDS, BOUNDS, st.none() | PLACES.filter(bool), st.none())
)


@given(lengths=LENGTHS, selector=SELECTORS)
def test_selectors_equal_python_row_by_row(lengths, selector):
    batch = batch_of(lengths)
    expected = brute_force(selector, batch)
    if expected is None:
        with pytest.raises((RaggedSelectionError, TokenRangeError)) as caught:
            resolve(selector, batch)
        assert written(selector) in caught.value.problem
        return
    selection = resolve(selector, batch)
    assert taken(selection, batch.input_ids).tolist() == expected
    assert selection.rows.dtype == selection.cols.dtype == torch.long
    assert selection.width == width(selector, batch)
    assert selection.width == (None if isinstance(selector, TokenAt) else len(expected[0]))
    assert selection.repeats == (
        isinstance(selector, TokenList) and any(len(set(row)) < len(row) for row in expected)
    )


@given(lengths=LENGTHS, selector=SELECTORS)
def test_rows_that_agree_select_by_an_index(lengths, selector):
    batch = batch_of([max(lengths)] * len(lengths))
    if brute_force(selector, batch) is None:
        return
    steps = np.diff(resolve(selector, batch).columns[0])
    regular = len(set(steps.tolist())) <= 1 and (steps > 0).all()
    assert (resolve(selector, batch).uniform is not None) == regular


def test_counting_from_the_end_needs_no_index_tensors():
    batch = batch_of([5, 3, 4])
    assert resolve(TokenAt(-1), batch).uniform == 4
    assert resolve(TokenSlice(-3, None, None, None), batch).uniform == slice(2, 5, 1)
    assert resolve(TokenSlice(-3, -1, 2, None), batch).uniform == slice(2, 3, 1)
    assert resolve(TokenList((-3, -2)), batch).uniform == slice(2, 4, 1)
    assert resolve(TokenList((-1, -2)), batch).uniform is None
    first = resolve(TokenAt(0), batch)
    assert (first.uniform, first.rows.tolist(), first.cols.tolist()) == (None, [0, 1, 2], [0, 2, 1])
    two = resolve(TokenSlice(None, 2, None, 2), batch)
    assert (two.rows.tolist(), two.cols.tolist()) == ([[0, 0], [1, 1], [2, 2]], [[0, 1], [2, 3], [1, 2]])


@pytest.mark.parametrize(
    ("selector", "error", "says"),
    [
        (TokenAt(3), RaggedSelectionError, r"\.tok\[3\] is outside row 1 of the prompt, which has 3 tokens"),
        (
            TokenAt(-4),
            RaggedSelectionError,
            r"\.tok\[-4\] is outside row 1 of the prompt, which has 3 tokens",
        ),
        (TokenAt(5), TokenRangeError, "no token 5, row 0 has 5, row 1 has 3, row 2 has 4"),
        (TokenList((0, 4)), RaggedSelectionError, r"\.tok\[\[0, 4\]\] is outside row 1"),
        (TokenList((0, -6)), TokenRangeError, "no token -6"),
        (TokenList(()), TokenRangeError, "selects no tokens"),
        (
            TokenSlice(1, None, None, None),
            RaggedSelectionError,
            r"\.tok\[1:\] selects different .* row 0 selects 4, row 1 selects 2, row 2 selects 3",
        ),
        (TokenSlice(3, None, None, None), RaggedSelectionError, "row 0 selects 2, row 1 selects 0"),
        (TokenSlice(2, 2, None, None), TokenRangeError, r"\.tok\[2:2\] selects no tokens"),
        (TokenSlice(None, None, 0, None), IndexingError, r"\.tok\[::0\] has a step of zero"),
        (
            TokenSlice(0, 2, None, 3),
            SpecialisedGraphError,
            "selected 3 tokens when it was recorded, and selects 2",
        ),
        (TokenText("x", None, None), NoTokenizerError, "needs a tokenizer"),
    ],
)
def test_refusals_by_number(selector, error, says):
    with pytest.raises(error, match=says) as caught:
        resolve(selector, batch_of([5, 3, 4]))
    assert type(caught.value) is error


def test_many_rows_are_not_all_listed():
    with pytest.raises(RaggedSelectionError, match="row 7 selects 8, and 12 more rows") as caught:
        resolve(TokenSlice(None, None, None, None), batch_of(range(1, 21)))
    assert "row 8" not in caught.value.problem


# --- by text ---------------------------------------------------------------------------------------------------------

TEXTS = ["The capital of France is Paris.", "Is Rome older than Paris?", "Paris"]


def text_batch(texts: Sequence[str], tokenizer: Any, *, knows_text: bool = True) -> Batch:
    batch = prepare(list(texts), tokenizer, max_positions=None)
    if knows_text:
        return batch
    return prepare([batch.tokens(row) for row in range(len(texts))], max_positions=None)


def named(batch: Batch, selection: Selection, tokenizer: Any) -> list[list[str]]:
    ids = taken(selection, batch.input_ids)
    ids = ids[:, None] if selection.width is None else ids
    return [tokenizer.convert_ids_to_tokens(row) for row in ids.tolist()]


@pytest.mark.parametrize("knows_text", [True, False])
@pytest.mark.parametrize("bos", [False, True])
def test_a_text_names_its_tokens_in_every_row(bos, knows_text):
    tokenizer = byte_level_bpe(bos=bos)
    batch = text_batch(TEXTS, tokenizer, knows_text=knows_text)
    selection = resolve(TokenText("Paris", None, None), batch, tokenizer)
    assert named(batch, selection, tokenizer) == [["ĠParis"], ["ĠParis"], ["Paris"]]
    assert selection.width == 1
    with pytest.raises(TokenMatchError, match='" Paris"\\] does not stand in row 2'):
        resolve(TokenText(" Paris", None, None), batch, tokenizer)
    picked = resolve(TokenText("Paris", -1, None), batch, tokenizer)
    assert picked.width is None
    assert picked.rows.tolist() == [0, 1, 2]
    assert torch.equal(picked.cols, selection.cols[:, 0])


@pytest.mark.parametrize("legacy", [False, True])
def test_a_text_names_its_tokens_under_sentencepiece(legacy):
    tokenizer = sentencepiece_like(legacy=legacy)
    texts = ["Mary went to the store", "When Mary went", "the café of Mary"]
    batch = text_batch(texts, tokenizer)
    selection = resolve(TokenText("Mary", None, None), batch, tokenizer)
    assert named(batch, selection, tokenizer) == [["▁Mary"]] * 3
    cafe = resolve(TokenText("é", None, None), text_batch(texts[2:], tokenizer), tokenizer)
    assert named(text_batch(texts[2:], tokenizer), cafe, tokenizer) == [["<0xC3>", "<0xA9>"]]


def test_a_span_of_several_tokens_and_its_parts():
    tokenizer = byte_level_bpe()
    batch = text_batch(["the theory", "theory"], tokenizer)
    with pytest.raises(RaggedSelectionError, match="row 0 selects 2, row 1 selects 3"):
        resolve(TokenText("theory", None, None), batch, tokenizer)
    last = resolve(TokenText("theory", -1, None), batch, tokenizer)
    assert named(batch, last, tokenizer) == [["y"], ["y"]]
    assert last.width is None
    whole = resolve(TokenText("France is", None, None), text_batch(TEXTS[:1], tokenizer), tokenizer)
    assert whole.uniform == slice(3, 5, 1)
    for pick, column in ((0, 3), (1, 4), (-1, 4), (-2, 3)):
        assert (
            resolve(TokenText("France is", pick, None), text_batch(TEXTS[:1], tokenizer), tokenizer).uniform
            == column
        )
    for pick in (2, -3):
        with pytest.raises(RaggedSelectionError, match="has 2 tokens in row 0"):
            resolve(TokenText("France is", pick, None), text_batch(TEXTS[:1], tokenizer), tokenizer)


def test_only_spans_count_as_matches():
    tokenizer = byte_level_bpe()
    batch = text_batch(["The old theory of the other thing"], tokenizer)
    assert '[2] " theor"' in batch.spellings(tokenizer)[0].shown()
    selection = resolve(TokenText(" the", None, None), batch, tokenizer)
    assert named(batch, selection, tokenizer) == [["Ġthe"]]


def test_no_match_shows_the_tokens():
    tokenizer = byte_level_bpe(bos=True)
    with pytest.raises(TokenMatchError) as caught:
        resolve(TokenText("London", None, None), text_batch(TEXTS[:2], tokenizer), tokenizer)
    assert str(caught.value) == (
        '.tok["London"] does not stand in row 0 of the prompt, whose tokens are:\n'
        '    [0] <|endoftext|>  [1] "The"  [2] " capital"  [3] " of"  [4] " France"  [5] " is"  [6] " Paris"  [7] "."\n'
        "  instead: a text as it stands in the prompt, or the token's number"
    )


def test_two_matches_show_both():
    tokenizer = byte_level_bpe()
    with pytest.raises(TokenMatchError) as caught:
        resolve(
            TokenText(" of", None, None),
            text_batch(["The capital of the theory of Rome"], tokenizer),
            tokenizer,
        )
    problem = caught.value.problem
    assert '.tok[" of"] stands 2 times in row 0 of the prompt' in problem
    assert "tokens 2 to 2" in problem
    assert "tokens 6 to 6" in problem
    assert '[2] " of"' in problem


def test_a_match_inside_tokens_shows_those_around():
    tokenizer = byte_level_bpe()
    with pytest.raises(TokenMatchError) as caught:
        resolve(TokenText("capit", None, None), text_batch(TEXTS[:1], tokenizer), tokenizer)
    assert "does not begin and end where tokens do" in caught.value.problem
    assert '[1] " capital"' in caught.value.problem
    assert ".tok[1:2]" in str(caught.value)
    with pytest.raises(TokenMatchError, match="does not begin and end"):
        resolve(TokenText("l of", None, None), text_batch(TEXTS[:1], tokenizer), tokenizer)


def test_other_refusals_by_text():
    tokenizer = byte_level_bpe()
    batch = text_batch(TEXTS[:1], tokenizer)
    with pytest.raises(TokenMatchError, match="names no text"):
        resolve(TokenText("", None, None), batch, tokenizer)
    with pytest.raises(TokenMatchError) as caught:
        resolve(TokenText("ĠParis", None, None), batch, tokenizer)
    assert "with a space where the vocabulary writes Ġ" in str(caught.value)
    with pytest.raises(SpecialisedGraphError, match="selected 2 tokens when it was recorded, and selects 1"):
        resolve(TokenText("Paris", None, 2), batch, tokenizer)
    assert resolve(TokenText("Paris", None, 1), batch, tokenizer).width == 1


def test_what_rows_spell_is_worked_out_once(monkeypatch):
    tokenizer = byte_level_bpe()
    batch = text_batch(TEXTS, tokenizer)
    first = batch.spellings(tokenizer)
    assert batch.spellings(tokenizer) is first
    assert batch.spellings(byte_level_bpe(bos=True)) is not first


def test_selectors_read_as_they_are_written():
    cases = {
        ".tok[-1]": TokenAt(-1),
        ".tok[[0, -1]]": TokenList((0, -1)),
        ".tok[1:]": TokenSlice(1, None, None, None),
        ".tok[:-1:2]": TokenSlice(None, -1, 2, None),
        '.tok["Paris"]': TokenText("Paris", None, None),
        '.tok["Paris", -1]': TokenText("Paris", -1, None),
    }
    assert {written(selector): selector for selector in cases.values()} == cases


# --- masks -----------------------------------------------------------------------------------------------------------


@given(lengths=LENGTHS, data=st.data(), kind=st.sampled_from([torch.tensor, np.array]))
def test_mask_indices_are_in_row_major_order(lengths, data, kind):
    batch = batch_of(lengths)
    mask = [[data.draw(st.booleans()) and bool(real) for real in row] for row in batch.mask]
    expected = [(row, column) for row, line in enumerate(mask) for column, true in enumerate(line) if true]
    if not expected:
        with pytest.raises(TokenRangeError, match="true nowhere"):
            mask_indices(kind(mask), batch)
        return
    rows, columns = mask_indices(kind(mask), batch)
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == expected
    assert rows.dtype == columns.dtype == torch.long


@pytest.mark.parametrize(
    ("mask", "error", "says"),
    [
        (torch.ones(2, 3, dtype=torch.bool), PositionAxisError, "row 1, position 0, which is padding"),
        (torch.ones(2, 2, dtype=torch.bool), ShapeError, r"shape \[2, 2\], and the batch is \[2, 3\]"),
        (torch.ones(3, dtype=torch.bool), ShapeError, r"shape \[3\]"),
        (torch.ones(2, 3), DtypeError, "not torch.float32"),
        (torch.ones(2, 3, dtype=torch.long), DtypeError, "not torch.int64"),
        (np.ones((2, 3), dtype=np.uint8), DtypeError, "not uint8"),
        ([[True]], DtypeError, "not list"),
    ],
    ids=str,
)
def test_masks_that_are_refused(mask, error, says):
    with pytest.raises(error, match=says):
        mask_indices(mask, batch_of([3, 1]))


# --- without padding -------------------------------------------------------------------------------------------------


@given(lengths=LENGTHS, before=st.integers(0, 2), pairs=st.booleans())
def test_unpadded_values_are_those_of_the_real_tokens(lengths, before, pairs):
    batch = batch_of(lengths)
    rows, longest = len(lengths), max(lengths)
    # [..., B, 2, P] or [..., B, 2, P, P], as hidden states of several layers and attention patterns are.
    shape = [3] * before + [rows, 2] + [longest] * (2 if pairs else 1)
    values = torch.arange(float(np.prod(shape))).reshape(shape)
    axes = (before + 2, -1) if pairs else (-1,)
    parts = unpadded(values, batch, before, axes)
    assert len(parts) == rows
    for row, (part, pad) in enumerate(zip(parts, batch.pads, strict=True)):
        expected = values.select(before, row)
        expected = expected[..., pad:, pad:] if pairs else expected[..., pad:]
        assert torch.equal(part, expected)
        assert part.is_contiguous()
        assert part.untyped_storage().nbytes() == part.numel() * part.element_size()
        assert part.untyped_storage().data_ptr() != values.untyped_storage().data_ptr()


@pytest.mark.parametrize(("batch_axis", "axes"), [(1, (2,)), (0, (2,)), (0, (1, 2))])
def test_axes_that_do_not_fit(batch_axis, axes):
    with pytest.raises(ShapeError, match="should be"):
        unpadded(torch.zeros(2, 3, 5), batch_of([3, 1]), batch_axis, axes)


def test_errors_know_no_line_of_their_own():
    with pytest.raises(TracelensError) as caught:
        resolve(TokenAt(9), batch_of([1]))
    assert caught.value.at is None
    assert caught.value.problem == ".tok[9] is outside the prompt: there is no token 9, it has 1 token"
