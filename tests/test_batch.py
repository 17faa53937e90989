"""Batches: every way to write a prompt gives the same one, and the model computes on it what it computes without us."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationMixin

from tests.support.families import EVERY
from tests.support.tokenizers import SENTENCES, byte_level_bpe, sentencepiece_like
from tracelens.batch import Batch, prepare
from tracelens.errors import EmptyPromptError, NoTokenizerError, PromptError, PromptTooLongError

ROWS = st.lists(st.lists(st.integers(0, 96), min_size=1, max_size=9), min_size=1, max_size=5)


def batch(prompt: object, **options: Any) -> Batch:
    return prepare(prompt, **{"max_positions": None, **options})


def assert_same(left: Batch, right: Batch) -> None:
    for name in ("input_ids", "mask", "position_ids"):
        ours, theirs = getattr(left, name), getattr(right, name)
        assert ours.dtype == theirs.dtype
        if name == "input_ids":  # what stands under the mask is nobody's business
            assert torch.equal(left.mask, right.mask)
            ours, theirs = ours[left.mask], theirs[right.mask]
        assert torch.equal(ours, theirs), name
    assert left.lengths == right.lengths


# --- what a batch is -------------------------------------------------------------------------------------------------


def test_rows_are_padded_on_the_left():
    made = batch([[5, 6, 7], [8]], pad_id=3)
    assert made.input_ids.tolist() == [[5, 6, 7], [3, 3, 8]]
    assert made.mask.tolist() == [[True, True, True], [False, False, True]]
    assert made.position_ids.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert (made.lengths, made.pads, made.ragged, made.sizes) == ((3, 1), (0, 2), True, {"B": 2, "P": 3})
    assert [made.tokens(row) for row in (0, 1)] == [[5, 6, 7], [8]]
    assert made.input_ids.dtype == made.position_ids.dtype == torch.long
    assert made.mask.dtype == torch.bool
    assert made.texts is None


def test_equal_rows_have_no_padding():
    made = batch([[5, 6], [7, 8]])
    assert (made.lengths, made.pads, made.ragged) == ((2, 2), (0, 0), False)
    assert made.mask.all()
    assert made.position_ids.tolist() == [[0, 1], [0, 1]]


@given(rows=ROWS)
def test_rows_come_back_and_positions_are_those_that_generate_makes(rows):
    made = batch(rows)
    assert [made.tokens(row) for row in range(len(rows))] == rows
    assert made.sizes == {"B": len(rows), "P": max(map(len, rows))}
    theirs = GenerationMixin._prepare_position_ids_for_generation(
        object(), made.input_ids, {"attention_mask": made.mask.long()}
    )
    assert torch.equal(made.position_ids, theirs)


def test_the_model_is_given_numbers_not_truths():
    inputs = batch([[5, 6, 7], [8]]).model_inputs()
    assert sorted(inputs) == ["attention_mask", "input_ids", "position_ids"]
    assert {tensor.dtype for tensor in inputs.values()} == {torch.long}
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert {tensor.device.type for tensor in batch([1]).model_inputs("meta").values()} == {"meta"}


# --- ways to write a prompt ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt",
    [
        [5, 6, 7],
        (5, 6, 7),
        [[5, 6, 7]],
        ([5, 6, 7],),
        [np.int64(5), torch.tensor(6), 7],
        torch.tensor([5, 6, 7]),
        torch.tensor([[5, 6, 7]], dtype=torch.int32),
        torch.tensor([[5, 6, 7]], dtype=torch.uint8),
        torch.tensor([0, 5, 0, 6, 0, 7])[1::2],
        [torch.tensor([5, 6, 7])],
        np.array([5, 6, 7]),
        np.array([[7, 6, 5]], dtype=">i2")[:, ::-1],
        {"input_ids": [5, 6, 7]},
        {"input_ids": [[5, 6, 7]], "attention_mask": [[1, 1, 1]]},
        {
            "input_ids": torch.tensor([[9, 5, 6, 7]]),
            "attention_mask": torch.tensor([[False, True, True, True]]),
        },
        {"input_ids": np.array([5, 6, 7, 9]), "attention_mask": np.array([1, 1, 1, 0], dtype=np.uint8)},
        {"input_ids": [9, 5, 6, 7, 9], "attention_mask": [False, True, True, True, False]},
        {"input_ids": [5, 6, 7], "position_ids": [0, 1, 2]},
        {"input_ids": [9, 5, 6, 7], "attention_mask": [0, 1, 1, 1], "position_ids": [1, 0, 1, 2]},
        {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "position_ids": torch.arange(3)},
    ],
    ids=repr,
)
def test_ways_to_write_one_prompt(prompt):
    made = batch(prompt, vocab_size=97)
    assert made.input_ids.tolist() == [[5, 6, 7]]
    assert_same(made, batch([5, 6, 7]))
    assert made.input_ids.is_contiguous()


@pytest.mark.parametrize(
    "prompt",
    [
        [[5, 6, 7], [8]],
        [torch.tensor([5, 6, 7]), np.array([8])],
        {"input_ids": [[5, 6, 7], [8]]},
        {"input_ids": [[5, 6, 7], [8]], "attention_mask": [[1, 1, 1], [1]]},
        {
            "input_ids": [[5, 6, 7], [8, 9]],
            "attention_mask": [[1, 1, 1], [1, 0]],
            "position_ids": [[0, 1, 2], [0, 1]],
        },
    ],
    ids=repr,
)
def test_ways_to_write_a_ragged_prompt(prompt):
    assert_same(batch(prompt), batch([[5, 6, 7], [8]]))


FORMS: dict[str, Callable[[list[list[int]]], Any]] = {
    "lists": lambda rows: rows,
    "tensor": torch.tensor,
    "array": np.array,
}


@given(
    rows=ROWS,
    data=st.data(),
    form=st.sampled_from(sorted(FORMS)),
    truth=st.sampled_from([int, bool]),
    positions=st.booleans(),
)
def test_padding_of_the_user_on_any_side_changes_nothing(rows, data, form, truth, positions):
    longest = max(map(len, rows)) + data.draw(st.integers(0, 3))
    left = [data.draw(st.integers(0, longest - len(row))) for row in rows]
    right = [longest - len(row) - pad for row, pad in zip(rows, left, strict=True)]
    padded = zip(rows, left, right, strict=True)
    ids = [[90] * before + row + [91] * after for row, before, after in padded]
    mask = [
        [truth(0)] * before + [truth(1)] * len(row) + [truth(0)] * after
        for row, before, after in zip(rows, left, right, strict=True)
    ]
    prompt = {"input_ids": FORMS[form](ids), "attention_mask": FORMS[form](mask)}
    if positions:
        counted = [np.cumsum(row).tolist() for row in mask]
        prompt["position_ids"] = FORMS[form]([[max(0, place - 1) for place in row] for row in counted])
    made = batch(prompt)
    assert_same(made, batch(rows))
    assert made.sizes["P"] == max(map(len, rows))  # columns that are padding in every row are gone


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tensors", ["pt", "np", None])
def test_what_a_tokenizer_padded(side, tensors):
    # The shared tokenizer has no padding token, on purpose; a copy gets one.
    plain = byte_level_bpe()
    padding = type(plain)(
        tokenizer_object=plain.backend_tokenizer, pad_token="<|im_start|>", padding_side=side
    )
    texts = list(SENTENCES[:3])
    encoded = padding(texts, padding="max_length", max_length=80, return_tensors=tensors)
    assert {len(row) for row in encoded["input_ids"]} == {80}
    assert_same(batch(encoded), batch(texts, tokenizer=plain))


def test_the_batch_does_not_follow_the_users_tensor():
    for ids in (torch.tensor([[5, 6, 7]]), torch.tensor([5, 6, 7]), np.array([5, 6, 7])):
        for prompt in (ids, {"input_ids": ids}, {"input_ids": ids, "attention_mask": ids - ids + 1}):
            made = batch(prompt)
            ids[..., 0] = 50
            assert made.input_ids.tolist() == [[5, 6, 7]]
            ids[..., 0] = 5


# --- texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", [byte_level_bpe(), byte_level_bpe(bos=True), sentencepiece_like()])
def test_texts_are_tokenised_as_the_tokenizer_does_it(tokenizer):
    assert batch("The café", tokenizer=tokenizer).tokens(0) == tokenizer("The café")["input_ids"]
    made = batch(list(SENTENCES), tokenizer=tokenizer)
    assert made.texts == SENTENCES
    assert made.ragged
    for row, text in enumerate(SENTENCES):
        assert made.tokens(row) == tokenizer(text)["input_ids"]
    assert_same(made, batch(tuple(SENTENCES), tokenizer=tokenizer))


def test_a_text_that_is_only_a_beginning_of_sequence_is_a_prompt():
    assert batch("", tokenizer=byte_level_bpe(bos=True)).tokens(0) == [0]


def test_the_tokenizers_own_padding_is_neither_used_nor_changed():
    tokenizer = byte_level_bpe()
    assert tokenizer.pad_token is None
    before = tokenizer.padding_side, tokenizer.truncation_side, dict(tokenizer.special_tokens_map)
    backend = tokenizer.backend_tokenizer.to_str()
    made = batch(["The capital", "Paris"], tokenizer=tokenizer)
    assert made.ragged
    assert (tokenizer.padding_side, tokenizer.truncation_side, dict(tokenizer.special_tokens_map)) == before
    assert tokenizer.backend_tokenizer.to_str() == backend


def test_a_tokenizer_that_pads_by_itself():
    def tokenizer(texts: list[str]) -> dict[str, list[list[int]]]:
        assert texts == ["a", "bb"]
        return {"input_ids": [[5, 96], [6, 7]], "attention_mask": [[1, 0], [1, 1]]}

    assert_same(batch(["a", "bb"], tokenizer=tokenizer), batch([[5], [6, 7]]))


class Padding:
    """Only the padding of a tokenizer."""

    def __init__(self, pad_token_id: int | None, eos_token_id: int | None) -> None:
        self.pad_token_id, self.eos_token_id = pad_token_id, eos_token_id


@pytest.mark.parametrize(
    ("tokenizer", "pad_id", "expected"),
    [
        (None, None, 0),
        (None, 4, 4),
        (Padding(5, 6), None, 5),
        (Padding(None, 6), None, 6),
        (Padding(None, None), None, 0),
        (Padding(5, 6), 4, 4),
        # A padding token that was added to the tokenizer alone: the embedding has no row for it.
        (Padding(97, 6), None, 6),
        (Padding(97, 98), 99, 0),
    ],
)
def test_what_stands_under_the_mask(tokenizer, pad_id, expected):
    made = batch([[10, 11], [12]], tokenizer=tokenizer, pad_id=pad_id, vocab_size=97)
    assert made.input_ids.tolist() == [[10, 11], [expected, 12]]


# --- what the model computes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", EVERY)
def test_unpadded_logits_are_bit_identical_to_the_plain_model(family, attn, use_cache):
    tokenizer = byte_level_bpe()
    model = EVERY[family].build(attn=attn, vocab_size=len(tokenizer))
    text = SENTENCES[0][:60]
    encoded = tokenizer(text, return_tensors="pt")
    generator = torch.Generator().manual_seed(0)
    some = [torch.randint(len(tokenizer), shape, generator=generator) for shape in ((1, 1), (1, 40), (3, 17))]
    with torch.no_grad():
        ours = model(**batch(text, tokenizer=tokenizer).model_inputs(), use_cache=use_cache).logits
        assert torch.equal(ours, model(**encoded, use_cache=use_cache).logits)
        assert torch.equal(ours, model(encoded["input_ids"], use_cache=use_cache).logits)
        for ids in some:
            ours = model(**batch(ids).model_inputs(), use_cache=use_cache).logits
            assert torch.equal(ours, model(ids, use_cache=use_cache).logits)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", EVERY)
def test_padded_rows_equal_the_rows_alone(family, attn):
    model = EVERY[family].build(attn=attn)
    rows = [list(range(3, 15)), [20, 30, 40], [50], list(range(60, 69))]
    made = batch(rows)
    with torch.no_grad():
        logits = model(**made.model_inputs(), use_cache=False).logits
        for row, ids in enumerate(rows):
            alone = model(torch.tensor([ids]), use_cache=False).logits[0]
            torch.testing.assert_close(logits[row, made.pads[row] :], alone, rtol=1e-5, atol=1e-5)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("", "the prompt has no tokens"),
        (["Paris", ""], "row 1 of the prompt has no tokens"),
        ([], "empty list"),
        ((), "empty list"),
        ([[]], "the prompt has no tokens"),
        ([[5], []], "row 1 of the prompt has no tokens"),
        (torch.zeros(0, dtype=torch.long), "the prompt has no tokens"),
        (torch.zeros(2, 0, dtype=torch.long), "row 0 of the prompt has no tokens"),
        (torch.zeros(0, 2, dtype=torch.long), "no rows"),
        (np.zeros((1, 0), dtype=int), "the prompt has no tokens"),
        (
            {"input_ids": [[5, 6], [7, 8]], "attention_mask": [[1, 1], [0, 0]]},
            "row 1 of the prompt has no tokens",
        ),
        ({"input_ids": []}, "input_ids is an empty list"),
    ],
    ids=repr,
)
def test_prompts_without_tokens(prompt, says):
    with pytest.raises(EmptyPromptError, match=says):
        batch(prompt, tokenizer=byte_level_bpe())


def test_prompts_that_are_too_long():
    assert batch([[1] * 8], max_positions=8).lengths == (8,)
    with pytest.raises(PromptTooLongError, match=r"^the prompt has 9 tokens, and the model has 8 positions"):
        batch([1] * 9, max_positions=8)
    with pytest.raises(PromptTooLongError, match="row 1 of the prompt has 9 tokens"):
        batch([[1], [1] * 9, [1, 2]], max_positions=8)
    # What counts is the tokens, not the width that the user padded to.
    assert batch({"input_ids": [[1] * 9], "attention_mask": [[0] + [1] * 8]}, max_positions=8).lengths == (8,)


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("Paris", "no tokenizer"),
        (["Paris", 5], "mixes texts with other things: entry 1 is 5"),
        ([5, "Paris"], "holds a str, where a token id belongs"),
        ([[5, 6], 7], "row 1 of the prompt is 7"),
        ([5, [6, 7]], "holds a list"),
        (None, "it is None"),
        (5, "it is 5"),
        (b"Paris", "it is a bytes"),
        ({5, 6}, "it is a set"),
        ([5.0, 6.0], "holds 5.0, where a token id belongs"),
        ([True, False], "holds True"),
        ([5, None], "holds None"),
        ([torch.tensor(5.0)], "holds a torch.float32 tensor"),
        ([torch.tensor(True)], "holds a torch.bool tensor"),
        ([[[5]]], "holds a list"),
        ([torch.tensor([[5]])], "row 0 of the prompt is nested too deeply"),
        (torch.tensor([5.0]), "torch.float32 tensor of shape"),
        (torch.tensor([True]), "torch.bool tensor"),
        (torch.tensor(5), r"torch.int64 tensor of shape \(\)"),
        (torch.zeros(1, 1, 1, dtype=torch.long), r"shape \(1, 1, 1\)"),
        (torch.zeros(1, 3, dtype=torch.long, device="meta"), "without data"),
        (np.array([5.0]), "float64 array"),
        (np.array(["5"]), "<U1 array"),
        ([5, -1], r"token 1 of the prompt has the id -1, which is outside the model's vocabulary of 97"),
        ([[5], [6, 97]], r"token 1 of row 1 of the prompt has the id 97"),
        ([[5, 6], [97]], r"token 0 of row 1 of the prompt has the id 97"),
        ([2**63], "no token id"),
        (np.array([2**64 - 1], dtype=np.uint64), "vocabulary"),
        ({}, "without input_ids"),
        ({"attention_mask": [1]}, "without input_ids"),
        ({"input_ids": [5], "token_type_ids": [0]}, "'token_type_ids'"),
        ({"input_ids": "Paris"}, "input_ids cannot be read: it is a str"),
        ({"input_ids": [5.5]}, "input_ids holds 5.5"),
        (
            {"input_ids": [5, 6], "attention_mask": [1]},
            r"attention_mask has shape \[1, 1\] and input_ids shape \[1, 2\]",
        ),
        ({"input_ids": [[5, 6], [7]], "attention_mask": [[1, 1], [1, 1]]}, "input_ids rows of 2, 1"),
        (
            {"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.ones(2, 1, 3, 3).long()},
            "one or two dim",
        ),
        (
            {"input_ids": [5, 6], "attention_mask": [1.0, 1.0]},
            "attention_mask holds 1.0, where a zero or a one",
        ),
        ({"input_ids": [5, 6], "attention_mask": torch.tensor([0.0, -1e9])}, "zeros and ones belong"),
        ({"input_ids": [5, 6], "attention_mask": [1, 2]}, "something else than zeros and ones"),
        ({"input_ids": [5, 6, 7], "attention_mask": [1, 0, 1]}, "the mask of the prompt has a hole"),
        (
            {"input_ids": [[5, 6, 7]] * 2, "attention_mask": [[1, 1, 0], [1, 0, 1]]},
            "mask of row 1 of the prompt",
        ),
        ({"input_ids": [5, 6], "position_ids": [1, 2]}, "the position_ids of the prompt do not count"),
        ({"input_ids": [5, 6], "position_ids": [0]}, "position_ids has shape"),
        (
            {
                "input_ids": [[5, 6], [7, 8]],
                "attention_mask": [[1, 1], [0, 1]],
                "position_ids": [[0, 1], [0, 1]],
            },
            "the position_ids of row 1 of the prompt",
        ),
        (
            {"input_ids": [[5, 6]], "attention_mask": torch.ones(1, 2), "position_ids": [[0, 1]]},
            "attention_mask is a torch.float32 tensor",
        ),
        (
            {"input_ids": [[5, 6]], "attention_mask": torch.ones(1, 2).long(), "position_ids": [[0, 2]]},
            "the position_ids of the prompt",
        ),
    ],
    ids=repr,
)
def test_prompts_that_cannot_be_run(prompt, says):
    with pytest.raises(PromptError, match=says) as caught:
        batch(prompt, vocab_size=97)
    assert type(caught.value) is (NoTokenizerError if says == "no tokenizer" else PromptError)
    assert caught.value.at is None


def test_negative_ids_are_refused_also_without_a_known_vocabulary():
    with pytest.raises(PromptError, match="token 1 of the prompt has the id -3, which is negative"):
        batch([5, -3])
