"""Positions and sizes: rows that differ in length, selectors that find nothing, sizes that are not known."""

from __future__ import annotations

import math
import operator
from typing import Any

import pytest
import torch

import tracelens as tl
from tests.errors import IDS, LLAMA, RAGGED, D, refused
from tracelens.errors import (
    NoTokenizerError,
    PositionAxisError,
    RaggedSelectionError,
    ShapeError,
    SpecialisedGraphError,
    SymbolicSizeError,
    TokenMatchError,
    TokenRangeError,
    WriteTargetError,
)

model = LLAMA.model
TWICE = "The capital of France is Paris, Paris it is"


# --- rows of different lengths ---------------------------------------------------------------------------------------

MIXING = [
    lambda h: h[:, 0],
    lambda h: h[:, 1:],
    lambda h: h[:, -2:],
    lambda h: h[:, [0, 1]],
    lambda h: h[:, torch.tensor([0])],
    lambda h: h.__setitem__((slice(None), 0), 0),
    lambda h: h.mean(1),
    lambda h: h.mean(),
    lambda h: h.sum((1, 2)),
    lambda h: h.norm(),
    lambda h: h.max(1),
    lambda h: h.cumsum(1),
    lambda h: h.softmax(1),
    lambda h: h.flip(1),
    lambda h: h.flip(0),
    lambda h: h[0] - h[1],
    lambda h: h + torch.ones(4, D),
    lambda h: h.reshape(-1, D),
    lambda h: h.mT @ h,
    lambda h: torch.einsum("bpd,bpe->bde", h, h),
]


@pytest.mark.parametrize("compute", MIXING)
def test_mixing_positions_of_rows_that_differ_in_length(compute) -> None:
    with refused(PositionAxisError, "differ in length", instead=".tok[...]", text="lambda h:") as caught:
        with_block(RAGGED, compute)
    assert "tl.masked_mean" in caught.error.instead
    # In rows of one length the same is right.
    with_block([[5, 6, 7, 8], [9, 10, 11, 12]], compute)


def with_block(prompt: Any, compute: Any) -> None:
    with model.trace(prompt):
        compute(model.layers[0].resid_post)
        model.logits.save()


@pytest.mark.parametrize("compute", MIXING[:7])
def test_mixing_positions_of_a_mapped_value(compute) -> None:
    with (
        refused(PositionAxisError, "differ in length", instead=".tok[...]", text="lambda h:"),
        model.trace(RAGGED),
    ):
        compute(model.layers[0:2].resid_post)


@pytest.mark.parametrize("compute", [part for part in MIXING if part not in (MIXING[5], MIXING[16])])
def test_a_program_meets_rows_that_differ_in_length(compute) -> None:
    with model.record() as r:
        result = compute(model.layers[0].resid_post)
        (result[0] if isinstance(result, tuple) else result).save("x")
    program = model.compile(r)
    program([[5, 6, 7, 8], [9, 10, 11, 12]])
    with refused(PositionAxisError, "differ in length", "-->", instead="tl.masked_mean", text="lambda h:"):
        program(RAGGED)


def test_a_program_that_writes_meets_rows_that_differ_in_length() -> None:
    with model.record() as r:
        model.layers[0].resid_post[:, 0] = 0  # the write
        model.logits.save("logits")
    program = model.compile(r)
    program(IDS)
    with refused(PositionAxisError, "differ in length", "-->", instead=".tok[...]", text="# the write"):
        program(RAGGED)


def test_what_to_write_for_rows_that_differ_in_length() -> None:
    with model.trace(RAGGED):
        h = model.layers[0].resid_post
        first = h.tok[0].save()
        last = h[:, -1].save()
        mean = tl.masked_mean(h).save()
        pointwise = (h.relu() * 2).save()
        rows = h.mean(-1).save()
        model.layers[1].resid_post.tok[0] = 0
    alone = []
    for row in RAGGED:
        with model.trace(row):
            alone.append(model.layers[0].resid_post.save())
    for row, whole in enumerate(alone):
        torch.testing.assert_close(first.value[row], whole.value[0, 0], rtol=0, atol=1e-5)
        torch.testing.assert_close(last.value[row], whole.value[0, -1], rtol=0, atol=1e-5)
        torch.testing.assert_close(mean.value[row], whole.value[0].mean(0), rtol=0, atol=1e-5)
        torch.testing.assert_close(pointwise.value[row], whole.value.relu() * 2, rtol=0, atol=1e-5)
        assert rows.value[row].shape == whole.value.shape[:2]


def test_a_mean_over_no_positions() -> None:
    with (
        refused(PositionAxisError, "tl.masked_mean", "f32[B,48]", instead="before positions"),
        model.trace(IDS),
    ):
        tl.masked_mean(model.layers[0].resid_post[:, -1])  # <-


# --- generation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", MIXING[:8])
def test_positions_in_a_generation(compute) -> None:
    block = model.generate(IDS, max_new_tokens=2)
    with refused(PositionAxisError, instead="site[:, -1] += v", text="lambda h:"), block:
        compute(model.layers[0].resid_post)


def test_tokens_from_the_end_of_a_text_that_grows() -> None:
    for compute in (lambda h: h.tok[:], lambda h: h.tok[-2], lambda h: h.tok.__setitem__([0, -1], 0)):
        block = model.generate(IDS, max_new_tokens=2)
        with (
            refused(PositionAxisError, "every step adds a token", instead="t.prefill", text="lambda h:"),
            block,
        ):
            compute(model.layers[0].resid_post)
    with (
        refused(PositionAxisError, "none of the prompt's", instead="[:, -1]"),
        model.generate(IDS, max_new_tokens=2) as t,
    ):
        t.decode.layers[0].resid_post.tok[0].save()  # <-


def test_a_masked_mean_in_a_generation() -> None:
    with (
        refused(PositionAxisError, "in generation", instead="t.prefill"),
        model.generate(IDS, max_new_tokens=2),
    ):
        tl.masked_mean(model.layers[0].resid_post)  # <-


def test_what_to_write_in_a_generation() -> None:
    v = torch.ones(D)
    with model.generate(IDS, max_new_tokens=2) as t:
        model.layers[0].resid_post += v
        model.layers[1].resid_post[:, -1] += v
    assert len(t.tokens) >= 1


def test_sizes_in_a_generation() -> None:
    with refused(SymbolicSizeError, "size P", instead="-1 in reshape"), model.generate(IDS, max_new_tokens=2):
        range(model.layers[0].resid_post.shape[1])  # <-


# --- selectors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("select", "says", "instead"),
    [
        (lambda h: h.tok[9], r"no token 9, it has 4 tokens", "real tokens"),
        (lambda h: h.tok[-5], r"no token -5", "real tokens"),
        (lambda h: h.tok[[0, 9]], r"no token 9", "real tokens"),
        (lambda h: h.tok[torch.tensor([0, 9])], r"no token 9", "real tokens"),
        (lambda h: h.tok[7:], "selects no tokens", "at least one token"),
        (lambda h: h.tok[2:2], "selects no tokens", "at least one token"),
        (lambda h: h.tok[[]], "selects no tokens", "at least one index"),
        (lambda h: h.tok[torch.zeros(1, 4, dtype=torch.bool)], "true nowhere", "true somewhere"),
        (lambda h: h.tok.__setitem__(9, 0), "no token 9", "real tokens"),
    ],
)
def test_selectors_outside_the_prompt(select, says: str, instead: str) -> None:
    for value in (lambda: model.layers[0].resid_post, lambda: model.layers[0:2].resid_post):
        with refused(TokenRangeError, says, instead=instead, text="lambda h:"), model.trace(IDS):
            select(value())


@pytest.mark.parametrize(
    ("select", "says"),
    [
        (lambda h: h.tok[3], "outside row 1 of the prompt, which has 2 tokens"),
        (lambda h: h.tok[-3], "outside row 1"),
        (lambda h: h.tok[[0, 2]], "outside row 1"),
        (lambda h: h.tok[1:], "row 0 selects 3, row 1 selects 1"),
        (lambda h: h.tok[:], "row 0 selects 4, row 1 selects 2"),
        (lambda h: h.tok[:-1], "row 0 selects 3, row 1 selects 1"),
        (lambda h: h.tok.__setitem__(slice(1, None), 0), "row 0 selects 3, row 1 selects 1"),
    ],
)
def test_ragged_selections(select, says: str) -> None:
    with (
        refused(RaggedSelectionError, says, instead="one trace per prompt", text="lambda h:"),
        model.trace(RAGGED),
    ):
        select(model.layers[0].resid_post)
    with model.trace(RAGGED):
        assert model.layers[0].resid_post.tok[-2:].save().shape == (2, 2, D)


@pytest.mark.parametrize(
    ("text", "says", "instead"),
    [
        ("Rome", "does not stand in row 0", "as it stands in the prompt"),
        ("paris", "does not stand in row 0", "as it stands in the prompt"),
        ("ĠParis", "does not stand in row 0", "with a space where the vocabulary writes"),
        (" Paris", "stands 2 times in row 0", "a longer text"),
        ("apital", "does not begin and end where tokens do", ".tok[1:2]"),
        ("", "names no text", "a text that stands in the prompt once"),
    ],
)
def test_texts_that_name_no_span(text: str, says: str, instead: str) -> None:
    with refused(TokenMatchError, says, instead=instead), model.trace(TWICE):
        model.layers[0].resid_post.tok[text].save()  # <-
    with refused(TokenMatchError, says, instead=instead), model.trace(TWICE):
        model.layers[0].resid_post.tok[text] = 0  # <-


def test_the_tokens_are_shown() -> None:
    for text in ("Rome", " Paris"):
        with refused(TokenMatchError, '[5] " Paris"', instead=""), model.trace(TWICE):
            model.layers[0].resid_post.tok[text].save()  # <-


def test_texts_that_name_a_span() -> None:
    with model.trace(TWICE):
        span = model.layers[0].resid_post.tok[", Paris"].save()
        last = model.layers[0].resid_post.tok[", Paris", -1].save()
    assert span.value.shape == (1, 2, D)
    assert torch.equal(span.value[:, 1], last.value)


def test_a_row_without_the_text() -> None:
    with refused(TokenMatchError, "row 1 of the prompt", instead="as it stands"):
        with_block(["The capital of France", "The capital of Italy"], lambda h: h.tok[" France"].save())  # <-


def test_a_token_outside_the_span() -> None:
    with refused(RaggedSelectionError, '.tok[" capital", 7]', "1 token", instead='.tok[" capital", -1]'):
        with_block(TWICE, lambda h: h.tok[" capital", 7].save())  # <-
    with_block(TWICE, lambda h: h.tok[" capital", -1].save())


def test_text_without_a_tokenizer() -> None:
    bare = tl.wrap(LLAMA.hf)
    with refused(NoTokenizerError, "given none", instead="tl.wrap(model, tokenizer)"), bare.trace(IDS):
        bare.layers[0].resid_post.tok["Paris"].save()  # <-


@pytest.mark.parametrize("tokens", [[0, 0], [0, -4], [1, 2, 1]])
def test_assigning_to_a_token_twice(tokens: list[int]) -> None:
    with refused(WriteTargetError, str(tokens), "twice", instead="each token once"), model.trace(IDS):
        model.layers[0].resid_post.tok[tokens] = 0  # <-
    with refused(WriteTargetError, "twice", instead="each token once"), model.trace(IDS):
        model.layers[0].resid_post.tok[tokens] += 1  # <-
    with model.trace(IDS):
        assert model.layers[0].resid_post.tok[tokens].save().shape == (1, len(tokens), D)
    # Without a prompt nobody knows yet that -4 is 0 here: the program does.
    with model.record() as r:
        model.layers[0].resid_post.tok[tokens] = 0  # in the recording
        model.logits.save("logits")
    program = model.compile(r)
    with refused(WriteTargetError, "twice", instead="each token once", text="# in the recording"):
        program(IDS)


@pytest.mark.parametrize(
    ("mask", "error", "says", "instead"),
    [
        (torch.zeros(4, dtype=torch.bool), ShapeError, "[4]", "one entry for each row"),
        (
            torch.ones(2, 4, dtype=torch.bool),
            PositionAxisError,
            "row 1, position 0, which is padding",
            "false at padding",
        ),
    ],
)
def test_masks_of_tokens(mask: torch.Tensor, error: type, says: str, instead: str) -> None:
    with refused(error, says, instead=instead), model.trace(RAGGED):
        model.layers[0].resid_post.tok[mask].save()  # <-
    good = torch.tensor([[True] * 4, [False, False, True, True]])
    with model.trace(RAGGED):
        assert model.layers[0].resid_post.tok[good].save().shape == (6, D)


def test_what_holds_no_positions() -> None:
    for value in (lambda: model.layers[0].resid_post[:, -1], lambda: model.unembed):
        with refused(PositionAxisError, ".tok addresses the position axis", "48", instead="[B, P, ...]"):
            with_block(IDS, lambda h, value=value: value().tok[0])  # <-


# --- sizes that are not known ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "use",
    [
        int,
        float,
        complex,
        bool,
        range,
        round,
        abs,
        operator.index,
        operator.neg,
        math.sqrt,
        lambda size: size + 1,
        lambda size: 1 + size,
        lambda size: size - 1,
        lambda size: size * 2,
        lambda size: size // 2,
        lambda size: size / 2,
        lambda size: size % 2,
        lambda size: size**2,
        lambda size: 2**size,
        lambda size: divmod(size, 2),
        lambda size: size > 3,
        lambda size: size == 3,
        lambda size: size != 3,
        lambda size: [1, 2][size],
        lambda size: f"{size:d}",
    ],
)
@pytest.mark.parametrize("axis", [0, 1])
def test_sizes_without_a_prompt(use, axis: int) -> None:
    says = (f"size {'BP'[axis]} ", "any size")
    with refused(SymbolicSizeError, *says, instead="model.record(prompt)", text="size"), model.record():
        size = model.layers[0].resid_post.shape[axis]
        use(size)
    with model.record([[1]]):
        size = model.layers[0].resid_post.shape[axis]
        use(size)


def test_sizes_compare_with_themselves() -> None:
    with model.record():
        a, b = model.layers[0].resid_post, model.layers[1].resid_post
        assert a.shape == b.shape
        assert a.shape[1] == b.shape[1]
        assert a.shape[2] == D


def test_numbers_of_elements_without_a_prompt() -> None:
    with refused(SymbolicSizeError, "size B", instead="-1 in reshape"), model.record():
        model.layers[0].resid_post.numel()  # <-


def test_a_tensor_of_positions_without_a_prompt() -> None:
    with refused(ShapeError, "f32[4,48]", "symbol", instead="record with a prompt"), model.record():
        model.layers[0].resid_post += torch.ones(4, D)  # <-
    with model.record(IDS) as r:
        model.layers[0].resid_post += torch.ones(4, D)
        model.logits.save("logits")
    assert model.compile(r)(IDS)["logits"].shape == LLAMA.logits.shape


def test_what_fits_no_prompt_at_all() -> None:
    """The sizes that stand for B and P while shapes are tried out do not show."""
    with refused(ShapeError, "f32[7]", "[B, P, 48]", instead="value.shape"), model.record():
        model.layers[0].resid_post += torch.ones(7)  # <-


def test_masks_and_slices_of_tokens_without_a_prompt() -> None:
    with refused(SymbolicSizeError, "a mask of tokens", instead="model.record(prompt)"), model.record():
        model.layers[0].resid_post.tok[torch.ones(1, 4, dtype=torch.bool)]  # <-
    for key, instead in ((slice(1, None), ".tok[[0, 1, 2]]"), ("Paris", '.tok["Paris", -1]')):
        with refused(SymbolicSizeError, "how many tokens", instead=instead), model.record():
            model.layers[0].resid_post.tok[key]  # <-
    with model.record() as r:
        model.layers[0].resid_post.tok[[0, 1, 2]].save("h")
    assert model.compile(r)(IDS)["h"].shape == (1, 3, D)


# --- programs on other prompts ---------------------------------------------------------------------------------------


def test_a_program_that_is_made_for_one_size() -> None:
    with model.record(IDS) as r:
        h = model.layers[0].resid_post
        (h.sum(1) / h.shape[1]).save("mean")  # the number
    program = model.compile(r)
    assert program([1, 2, 3, 4])["mean"].shape == (1, D)
    with refused(
        SpecialisedGraphError, "4 positions", "has 3", "-->", instead="record again", text="# the number"
    ):
        program([1, 2, 3])
    with model.record() as r:
        model.layers[0].resid_post.mean(1).save("mean")
    assert model.compile(r)([1, 2, 3])["mean"].shape == (1, D)


def test_a_program_that_is_made_for_one_number_of_rows() -> None:
    with model.record([IDS, IDS]) as r:
        h = model.layers[0].resid_post
        (h * h.shape[0]).save("h")  # the number
    program = model.compile(r)
    with refused(SpecialisedGraphError, "2 rows", "has 1", instead="record again", text="# the number"):
        program(IDS)


def test_a_program_with_a_mask() -> None:
    mask = torch.tensor([[True, True, True, False]])
    for index in (lambda h: h.tok[mask], lambda h: h[mask]):
        with model.record(IDS) as r:
            index(model.layers[0].resid_post).save("h")
        program = model.compile(r)
        assert program(IDS)["h"].shape == (3, D)
        with refused(SpecialisedGraphError, instead="record again", text="lambda h:"):
            program([1, 2, 3])


def test_a_program_on_a_prompt_that_is_too_short() -> None:
    with model.record() as r:
        model.layers[0].resid_post[:, 2].save("h")  # in the recording
    program = model.compile(r)
    assert program([1, 2, 3])["h"].shape == (1, D)
    with refused(
        ShapeError, "2 is outside an axis of size 2", "-->", instead="from -2 to 1", text="# in the recording"
    ):
        program([1, 2])


@pytest.mark.parametrize(
    ("selector", "prompt", "error", "says"),
    [
        (5, [1, 2, 3], TokenRangeError, "no token 5"),
        ([0, 5], [1, 2, 3], TokenRangeError, "no token 5"),
        (2, RAGGED, RaggedSelectionError, "outside row 1"),
        ((" France", 0), "The capital of Italy", TokenMatchError, "does not stand"),
    ],
)
def test_selectors_of_a_program_are_resolved_before_it_runs(selector, prompt, error: type, says: str) -> None:
    with model.record() as r:
        model.layers[0].resid_post.tok[selector].save("h")  # in the recording
    program = model.compile(r)
    with refused(error, says, "-->", instead="", text="# in the recording"):
        program(prompt)
    good = "The capital of France is Paris, and Rome"
    assert program(good)["h"].shape[-1] == D


def test_a_program_that_selects_another_number_of_tokens() -> None:
    with model.record("The capital of France") as r:
        model.layers[0].resid_post.tok[2:].save("h")  # in the recording
    program = model.compile(r)
    says = ("selected 2 tokens", "selects 3 here")
    with refused(SpecialisedGraphError, *says, instead="record again", text="# in the recording"):
        program("The capital of France is")
    assert program("The capital of Italy")["h"].shape == (1, 2, D)
