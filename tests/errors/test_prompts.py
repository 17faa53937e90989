"""Prompts that cannot be run, in every block that takes one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import tracelens as tl
from tests.errors import IDS, LLAMA, refused
from tracelens.errors import EmptyPromptError, NoTokenizerError, PromptError, PromptTooLongError

model = LLAMA.model


def program() -> tl.Program:
    with model.record() as r:
        model.logits.save("logits")
    return model.compile(r)


PROGRAM = program()
DOORS = {
    "trace": lambda prompt: model.trace(prompt),
    "record": lambda prompt: model.record(prompt),
    "generate": lambda prompt: model.generate(prompt, max_new_tokens=1),
    "program": lambda prompt: PROGRAM(prompt),
}
every_door = pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)


@every_door
@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("", "the prompt has no tokens"),
        ([], "empty list"),
        ([[]], "the prompt has no tokens"),
        (["The capital", ""], "row 1 of the prompt"),
        ([[1, 2], []], "row 1 of the prompt"),
        (torch.zeros(1, 0, dtype=torch.long), "no tokens"),
        (np.zeros((0,), dtype=np.int64), "no tokens"),
        ({"input_ids": [[1, 2]], "attention_mask": [[0, 0]]}, "no tokens"),
    ],
)
def test_empty_prompts(door, prompt: Any, says: str) -> None:
    with refused(EmptyPromptError, says, instead="at least one token", text="lambda prompt:"):
        door(prompt)


@every_door
@pytest.mark.parametrize(
    ("prompt", "says", "instead"),
    [
        (3.5, "it is 3.5", "a text, a list of texts"),
        ([1.5, 2.5], "1.5, where a token id belongs", "a list of token ids"),
        (["The capital", 3], "entry 1 is 3", "a list of texts"),
        (torch.zeros(4), "torch.float32", "an integer tensor"),
        (torch.zeros(1, 2, 3, dtype=torch.long), "(1, 2, 3)", "[P] or [B, P]"),
        ({"ids": [1]}, "'ids'", "input_ids, attention_mask"),
        (
            {"input_ids": [[1, 2, 3]], "attention_mask": [[1, 1]]},
            "[1, 2] and input_ids shape [1, 3]",
            "same shape",
        ),
        ({"input_ids": [[1, 2, 3]], "attention_mask": [[1, 0, 1]]}, "a hole", "before or after"),
        (
            {"input_ids": [[1, 2, 3]], "position_ids": [[1, 2, 3]]},
            "do not count 0, 1, 2",
            "leave position_ids out",
        ),
        ([1, 99_999], "token 1 of the prompt has the id 99999", "own tokenizer"),
        ([[1], [2, -1]], "token 1 of row 1 of the prompt has the id -1", "own tokenizer"),
    ],
)
def test_prompts_that_are_none(door, prompt: Any, says: str, instead: str) -> None:
    with refused(PromptError, says, instead=instead, text="lambda prompt:"):
        door(prompt)


@every_door
def test_a_prompt_longer_than_the_context(door) -> None:
    with refused(
        PromptTooLongError, "65 tokens", "64 positions", instead="a shorter prompt", text="lambda prompt:"
    ):
        door([5] * 65)
    with refused(PromptTooLongError, "row 1", "70 tokens", instead="a shorter prompt", text="lambda prompt:"):
        door([[5], [5] * 70])


def test_a_prompt_with_its_new_tokens_is_longer_than_the_context() -> None:
    with refused(PromptTooLongError, "60 tokens, 10 more", "64 positions", instead="fewer new tokens"):
        model.generate([5] * 60, max_new_tokens=10)  # <-
    with model.generate([5] * 60, max_new_tokens=4) as t:
        model.layers[0].resid_post *= 1
    assert 1 <= len(t.tokens) <= 4
    with model.trace([5] * 64):
        logits = model.logits.save()
    assert logits.value.shape[1] == 64


@pytest.mark.parametrize("prompt", ["The capital", ["The capital", "of"]])
def test_text_without_a_tokenizer(prompt: Any) -> None:
    bare = tl.wrap(LLAMA.hf)
    with refused(NoTokenizerError, "given no tokenizer", instead="tl.wrap(model, tokenizer)"):
        bare.trace(prompt)  # <-
    with bare.trace(IDS):
        logits = bare.logits.save()
    assert torch.equal(logits.value, LLAMA.logits)


def test_a_prompt_that_was_refused_opens_nothing() -> None:
    """The error comes before the block opens, so the next block is not nested in it."""
    with pytest.raises(EmptyPromptError), model.trace(""):
        pass
    with model.trace(IDS):
        logits = model.logits.save()
    assert torch.equal(logits.value, LLAMA.logits)
