"""What a lens says in the steps of a generation is what it says in one pass over the final text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import tracelens as tl
from tests.support.families import FAMILIES

ONE = [[1, 2, 3, 4]]
ROWS = [[5, 6, 7, 8, 9, 10], [11, 12, 4]]
NEW = 5
MODEL = tl.wrap(FAMILIES["llama"].build(initializer_range=0.4))
"""So sharp that one token stands out at every step."""
NUMBERS = ("log_prob", "kl", "js", "entropy", "values")
WHOLE_NUMBERS = ("rank", "indices", "next")


def looked_at(model: tl.Model, following: Any) -> None:
    lens = model.lens(model.layers[:].resid_post)
    lens.rank(following).save("rank")
    lens.log_prob(following).save("log_prob")
    lens.kl().save("kl")
    lens.js().save("js")
    lens.entropy().save("entropy")
    top = lens.topk(2)
    top.values.save("values")
    top.indices.save("indices")


def in_steps(rows: Sequence[Sequence[int]], model: tl.Model = MODEL, **options: Any) -> tl.Generation:
    with model.generate(rows, **{"max_new_tokens": NEW, "eos_token_id": None, **options}) as t:
        model.next_tokens.save("next")
        looked_at(model, model.next_tokens)
    return t


def require_same(t: tl.Generation, rows: Sequence[Sequence[int]], model: tl.Model = MODEL) -> list[list[int]]:
    """Gives the texts. Every row, every position that a pass was over."""
    tokens: Any = t.tokens if len(rows) > 1 or (t.tokens and isinstance(t.tokens[0], list)) else [t.tokens]
    texts = [[*row, *new] for row, new in zip(rows, tokens, strict=True)]
    for number, text in enumerate(texts):

        def of(name: str, number: int = number) -> Tensor:
            found: Any = t[name]
            return (
                found[number]
                if isinstance(found, list)
                else found[:, number : number + 1]
                if name != "next"
                else found[number : number + 1]
            )

        known = of("next").shape[-1]
        following = torch.tensor([*text[1:], -1][:known])
        assert torch.equal(of("next").reshape(-1), following)
        with model.trace([text[:known]]) as plain:
            looked_at(model, following[None])
        for name in (*NUMBERS, *WHOLE_NUMBERS[:-1]):
            wanted = plain[name]
            found = of(name).reshape(wanted.shape)
            if name in NUMBERS:
                assert_close(found, wanted, atol=1e-5, rtol=1e-5, equal_nan=True)
            else:
                assert torch.equal(found, wanted), name
    return texts


@pytest.mark.parametrize("rows", [ONE, ROWS], ids=["one", "of different lengths"])
@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({}, NEW),
        ({"use_cache": False}, NEW),
        ({"include_last": True}, NEW + 1),
        ({"max_new_tokens": 0}, 1),
        ({"cache_implementation": "static"}, NEW),
        ({"do_sample": True, "seed": 3, "temperature": 3.0}, NEW),
    ],
    ids=["cached", "without a cache", "over the last token too", "no new tokens", "static cache", "drawn"],
)
def test_steps_say_what_one_pass_says(rows: list[list[int]], options: dict[str, Any], passes: int) -> None:
    t = in_steps(rows, **options)
    texts = require_same(t, rows)
    for row, text in zip(rows, texts, strict=True):
        assert len(text) == len(row) + options.get("max_new_tokens", NEW)
    found = t["next"]
    widths = [found[row].shape[-1] for row in range(len(rows))]
    assert widths == [len(row) + passes - 1 for row in rows]
    if "do_sample" in options:
        assert in_steps(rows, **options).tokens == t.tokens != in_steps(rows).tokens


@pytest.mark.parametrize("options", [{}, {"use_cache": False}], ids=["cached", "without a cache"])
def test_a_row_that_has_ended(options: dict[str, Any]) -> None:
    plain: Any = in_steps(ROWS).tokens
    end = next(token for token in plain[0][:-1] if token not in plain[1] and plain[0].index(token) > 0)
    t = in_steps(ROWS, eos_token_id=end, pad_token_id=0, **options)
    texts = require_same(t, ROWS)
    assert len(texts[0]) - len(ROWS[0]) < NEW == len(texts[1]) - len(ROWS[1])
    assert t["next"][0][..., -1] == end


def test_other_things_in_other_steps() -> None:
    """The program of a step changes before its tokens are there; each step's own is told of them."""
    with MODEL.generate(ONE, max_new_tokens=NEW, eos_token_id=None) as t:
        lens = MODEL.lens(t.prefill.layers[1].resid_post)
        lens.log_prob(t.prefill.next_tokens).save("prompt")
        t.prefill.next_tokens.save("after the prompt")
        window = t.steps[2:4]
        MODEL.lens(window.layers[0].resid_post).rank(window.next_tokens).save("window")
        window.next_tokens.save("in the window")
        t.decode.next_tokens.save("decoded")
        MODEL.layers[0].resid_post.norm(dim=-1).save("else")
    tokens = t.tokens[0] if isinstance(t.tokens[0], list) else t.tokens
    text = [*ONE[0], *tokens]
    with MODEL.trace([text]):
        following = torch.tensor([[*text[1:], -1]])
        prompt = MODEL.lens(MODEL.layers[1].resid_post).log_prob(following).save()
        rank = MODEL.lens(MODEL.layers[0].resid_post).rank(following).save()
    assert t["after the prompt"].flatten().tolist() == text[1:5]
    assert t["decoded"].flatten().tolist() == text[5:]
    assert t["in the window"].flatten().tolist() == text[6:8]
    assert_close(t["prompt"].flatten(), prompt.value[0, :4], atol=1e-5, rtol=1e-5)
    assert torch.equal(t["window"].flatten(), rank.value[0, 5:7])


def test_a_stream_tells_of_each_step_what_followed_it() -> None:
    with MODEL.record(generation=True) as r:
        MODEL.next_tokens.save("next")
        MODEL.lens(MODEL.layers[1].resid_post).log_prob(MODEL.next_tokens).save("log_prob")
    events = list(MODEL.stream(ONE, r, max_new_tokens=NEW, eos_token_id=None))
    tokens = [event.tokens[0] for event in events]
    text = [*ONE[0], *tokens]
    assert [event["next"].flatten().tolist() for event in events] == [
        text[1:5],
        *[[token] for token in tokens[1:]],
    ]
    with MODEL.trace([text[:-1]]):
        found = MODEL.lens(MODEL.layers[1].resid_post).log_prob(torch.tensor([text[1:]])).save()
    streamed = torch.cat([event["log_prob"].flatten() for event in events])
    assert_close(streamed, found.value[0], atol=1e-5, rtol=1e-5)
