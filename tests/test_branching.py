"""A prompt with several ends: each is what the same prompt gives that ends with it alone."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import tracelens as tl
from tests.support.families import D_MODEL, FAMILIES
from tests.support.more_families import ALL, EAGER_ALONE
from tracelens.errors import PromptError, PromptTooLongError

IDS = [[3, 14, 15], [9, 26], [5, 35, 8, 9]]
STEPS = (-2.0, 0.0, 0.5, 3.0)
V = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(0))


BY_DISTANCE = ("bloom", "falcon_sequential")
"""Families whose attention adds the distance of two tokens, counted in the row, to their score."""

WITHOUT_MASK = ("qwen3_next", "qwen3_5", "qwen3_5_moe", "llama4")
"""Families with layers that are given no mask: attention that is linear, or in chunks."""


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [name for name in ALL if name not in (*BY_DISTANCE, *WITHOUT_MASK)])
def test_each_branch_is_the_prompt_that_ends_with_it_alone(name: str, attn: str) -> None:
    if attn == "sdpa" and name in EAGER_ALONE:
        attn = "eager"
    model = tl.wrap(ALL[name].build(attn=attn))
    with model.trace(model.prepare(IDS, branches=len(STEPS))) as t:
        model.layers[1].resid_post.tok[-len(STEPS) :] += torch.tensor(STEPS)[:, None] * V
        model.logits.tok[-len(STEPS) :].save("logits")
    for number, step in enumerate(STEPS):
        with model.trace(IDS) as plain:
            model.layers[1].resid_post[:, -1] += step * V
            model.logits[:, -1].save("logits")
        assert_close(t["logits"][:, number], plain["logits"], atol=1e-5, rtol=1e-5)
        if step:
            untouched = t["logits"][:, STEPS.index(0.0)]
            assert (t["logits"][:, number] - untouched).abs().amax(-1).min() > 1e-2  # the write matters


@pytest.fixture(scope="module")
def llama() -> tl.Model:
    return tl.wrap(FAMILIES["llama"].build())


def test_in_bfloat16_too(llama: tl.Model) -> None:
    for attn in ("sdpa", "eager"):
        model = tl.wrap(FAMILIES["llama"].build(dtype=torch.bfloat16, attn=attn))
        with model.trace(model.prepare(IDS, branches=3)) as t:
            model.logits.tok[-3:].save("logits")
        with model.trace(IDS) as plain:
            model.logits[:, -1].save("logits")
        for branch in range(3):
            assert_close(t["logits"][:, branch], plain["logits"], atol=0.1, rtol=0.02)


def test_tokens_before_the_end_do_not_see_the_branches(llama: tl.Model) -> None:
    with llama.trace(llama.prepare(IDS[0], branches=2)) as t:
        llama.layers[0].resid_pre.tok[-1] += 100.0
        llama.layers[:].resid_post.save("h")
        llama.layers[1].pattern.save("pattern")
        llama.positions.save("positions")
        llama.next_tokens.save("next")
    with llama.trace(IDS[0]) as plain:
        llama.layers[:].resid_post.save("h")
    assert_close(t["h"][:, :, :3], plain["h"], atol=1e-5, rtol=1e-5)  # the first branch too
    assert (t["h"][:, :, 3] - plain["h"][:, :, 2]).abs().max() > 1
    assert t["positions"].tolist() == [[0, 1, 2, 2]]
    # No token follows an end; the one before it is followed by the token that all branches begin with.
    assert t["next"].tolist() == [[14, 15, -1, -1]]
    assert t["pattern"][0, :, 3, 2].abs().max() == 0
    assert t["pattern"][0, :, 3, 3].min() > 0


def test_slices_repetitions_and_one_branch(llama: tl.Model) -> None:
    prompt = llama.prepare(IDS, branches=3)
    with llama.trace(prompt, batch_size=2) as t:
        llama.logits.tok[-3:].save("logits")
    with llama.trace(prompt) as whole:
        llama.logits.tok[-3:].save("logits")
    assert_close(t["logits"], whole["logits"], atol=1e-5, rtol=1e-5)
    with llama.trace(llama.prepare(IDS, branches=1)) as one:
        llama.logits.tok[-1:].save("logits")
    assert_close(one["logits"], whole["logits"][:, :1], atol=1e-5, rtol=1e-5)

    with llama.record() as r:
        k = tl.constant(1.0, name="k")
        llama.layers[1].resid_post.tok[-1] += k * V
        llama.logits.tok[[-2, -1]].save("logits")
    swept = tl.sweep(llama.compile(r), llama.prepare(IDS, branches=2), k=[0.0, 1.0])
    assert swept.one_by_one is None
    assert_close(swept["logits"][0, :, 1], whole["logits"][:, 1], atol=1e-5, rtol=1e-5)
    assert_close(swept["logits"][1, :, 0], whole["logits"][:, 0], atol=1e-5, rtol=1e-5)
    assert (swept["logits"][1, :, 1] - whole["logits"][:, 1]).abs().max() > 1e-2


def test_what_cannot_branch_says_so(llama: tl.Model) -> None:
    with pytest.raises(PromptError, match="branches=0"):
        llama.prepare(IDS, branches=0)
    with pytest.raises(PromptError, match="one end"):
        llama.generate(llama.prepare(IDS, branches=2), max_new_tokens=0)
    gemma = tl.wrap(FAMILIES["gemma3"].build())  # a window of 4
    gemma.prepare([1, 2, 3, 4], branches=9)
    with pytest.raises(PromptError, match="window of 4, the longest prompt has 5"):
        gemma.prepare([1, 2, 3, 4, 5], branches=9)
    for name in BY_DISTANCE:
        with pytest.raises(PromptError, match="the distance"):
            tl.wrap(ALL[name].build(attn="eager")).prepare(IDS, branches=2)
    for name in WITHOUT_MASK:
        with pytest.raises(PromptError, match="where no mask says which token sees which"):
            tl.wrap(ALL[name].build(attn="eager")).prepare(IDS, branches=2)
    flexible = tl.wrap(FAMILIES["llama"].build(attn="flex_attention"))
    with pytest.raises(PromptError, match="flex_attention"):
        flexible.prepare(IDS, branches=2)


# --- tokens that may come next ---------------------------------------------------------------------------------------

ENDS = [[7, 8, 9], [10, 11, 10], [12, 7, 13]]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_each_token_that_may_come_next_is_as_if_it_came_alone(name: str, attn: str) -> None:
    model = tl.wrap(FAMILIES[name].build(attn=attn))
    with model.trace(model.prepare([row[:3] for row in IDS], branches=ENDS)) as t:
        model.layers[:].resid_post.tok[-3:].save("h")
        model.logits.tok[-3:].save("logits")
    for way in range(3):
        with model.trace([[*row[:3], ends[way]] for row, ends in zip(IDS, ENDS, strict=True)]) as plain:
            model.layers[:].resid_post[:, -1].save("h")
            model.logits[:, -1].save("logits")
        for key, at in (("h", (slice(None), slice(None), way)), ("logits", (slice(None), way))):
            assert_close(t[key][at], plain[key], atol=1e-5, rtol=1e-5)
    assert (t["h"][..., 0, :] - t["h"][..., 1, :]).abs().max() > 0.1


def test_of_several_tokens_none_is_the_next(llama: tl.Model) -> None:
    with llama.trace(llama.prepare(IDS, branches=[[7, 8], [9, 9], [7, 8]])) as t:
        llama.next_tokens.save("next")
    assert [row.tolist() for row in t["next"]] == [
        [[14, 15, -1, -1, -1]],
        [[26, 9, -1, -1]],
        [[35, 8, 9, -1, -1, -1]],
    ]


@pytest.mark.parametrize(
    ("ends", "says"),
    [
        ([[7, 8]], "are not equally many tokens for each of 3 rows"),
        ([[7, 8], [7], [7, 8]], "are not equally many tokens"),
        ([[], [], []], "are not equally many tokens"),
        ([[7.0], [7], [7]], "are not equally many tokens"),
        ([[-1], [7], [7]], "are not equally many tokens"),
        ([[7], [7], [97]], "has the id 97, and the vocabulary has 97"),
    ],
)
def test_tokens_that_cannot_come_next(llama: tl.Model, ends: list[list[int]], says: str) -> None:
    with pytest.raises(PromptError, match=says) as caught:
        llama.prepare(IDS, branches=ends)
    assert caught.value.at is not None
    assert caught.value.at.filename == __file__


def test_no_position_is_left_for_a_next_token(llama: tl.Model) -> None:
    llama.prepare([[3] * 63], branches=[[4, 5]])
    with pytest.raises(PromptTooLongError, match="beyond the model's 64 positions"):
        llama.prepare([[3] * 64], branches=[[4, 5]])
