"""Keys that are padding never count: each expression of pattern and scores is refused, or gives what it gives alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import einops
import pytest
import torch
from torch import Tensor

import tracelens as tl
from tests.support.batches import random_rows
from tests.support.families import FAMILIES, HEADS
from tracelens.errors import PositionAxisError

ROWS = random_rows((9, 4, 6))
EVEN = random_rows((7, 7, 7))
INF = float("inf")
SMALL = torch.full((HEADS, 1, 1), 1e-7)
PER_HEAD = torch.linspace(-1.5, 2.0, HEADS)[:, None, None]

Expression = Callable[[Any, Any], Any]
"""Of pattern and scores, on values and on tensors alike."""

both_families = pytest.mark.parametrize("family", ["llama", "gpt2"])


@cache
def model(family: str, attn: str = "sdpa") -> Any:
    return tl.wrap(FAMILIES[family].build(attn=attn))


RIGHT: dict[str, Expression] = {
    "sum": lambda p, s: p.sum(-1),
    "sum, all its spellings": lambda p, s: torch.sum(input=p, dim=-1) + p.sum(dim=3) + p.sum((1, 3))[:, None],
    "kept axis": lambda p, s: p.sum(-1, keepdim=True),
    "amax": lambda p, s: p.amax(-1),
    "nansum": lambda p, s: p.nansum(-1),
    "logsumexp": lambda p, s: s.logsumexp(-1),
    "largest score": lambda p, s: s.amax(-1),
    "entropy": lambda p, s: -torch.xlogy(p, p).sum(-1),
    "entr": lambda p, s: torch.special.entr(p).sum(-1),
    "zero stays zero": lambda p, s: (p.abs().square().relu().detach().double().sqrt().tanh() * 3.0 / 2.0).sum(
        -1
    ),
    "of heads": lambda p, s: p.mean(1).sum(-1) + p.amax(1).sum(-1) + p.norm(dim=1).sum(-1),
    "one head": lambda p, s: p[:, 2].sum(-1),
    "heads by numbers": lambda p, s: p[:, [0, 2]].sum(-1),
    "the newest query": lambda p, s: p[:, :, -1].sum(-1),
    "the newest key": lambda p, s: p[..., -1] + (1 - p)[..., -1],
    "keys first": lambda p, s: p.permute(3, 0, 1, 2).sum(0),
    "heads apart": lambda p, s: p.unflatten(1, (2, 2)).sum(-1),
    "einops": lambda p, s: einops.reduce(p, "b h p s -> b h p", "sum"),
    "einsum": lambda p, s: torch.einsum("bhps->bhp", p),
    "products": lambda p, s: torch.einsum("bhps,bgps->bhgp", p, p),
    "queries with queries": lambda p, s: p @ p.mT,
    "two queries": lambda p, s: p[:, :, -1] @ p[:, :, -1].mT,
    "expected score": lambda p, s: (p * s).sum(-1),
    "expected, contracted": lambda p, s: torch.einsum("bhps,bhps->bhp", p, s),
    "by head": lambda p, s: (p * PER_HEAD).sum(-1),
    "normalised": lambda p, s: (p / p.sum(-1, keepdim=True)).sum(-1),
    "stacked": lambda p, s: torch.stack([p, p * 2], 1).sum(-1),
    "joined": lambda p, s: torch.cat([p, p * 2], 1).sum(-1),
    "softmax of scores": lambda p, s: s.softmax(-1),
    "its sum": lambda p, s: (s * 0.5).softmax(-1).square().sum(-1),
    "colder": lambda p, s: (s / 0.3 + 1.0).softmax(-1),
    "a bias for each head": lambda p, s: (s + PER_HEAD).softmax(-1),
    "less the largest": lambda p, s: (s - s.amax(-1, keepdim=True)).exp().sum(-1),
    "in another dtype": lambda p, s: torch.softmax(s, -1, dtype=torch.float64),
    "log_softmax": lambda p, s: s.log_softmax(-1).exp().sum(-1),
    "log of pattern": lambda p, s: (p.log() * 2).softmax(-1),
    "scores that are cut": lambda p, s: s.clamp(min=0.0).sum(-1) + s.relu().sum(-1) + s.exp().sum(-1),
    "scores times a mask": lambda p, s: (s * (s > -1e9)).sum(-1),
    "few, that are seen": lambda p, s: ((p > 0) & (p < 0.01)).float().sum(-1),
    "what is not looked at": lambda p, s: torch.where(p > 0, 1 - p, 0.0).sum(-1),
    "filled": lambda p, s: (1 - p).masked_fill(s < -1e9, 0.0).sum(-1),
    "scaled by head, seen": lambda p, s: torch.where(s > -1e9, s * PER_HEAD, -INF).softmax(-1),
    "smallest, seen": lambda p, s: -torch.where(p > 0, -p, -INF).amax(-1),
    "how many": lambda p, s: (s > -1e9).sum(-1),
    "one and its opposite": lambda p, s: (p + 1.0 - 1.0).sum(-1) + (p.cos() - 1.0).sum(-1),
    "any": lambda p, s: (p > 0.3).any(-1),
    "two of them": lambda p, s: torch.where(p > 0.2, p, 0.0).sum(-1) + p.masked_fill(p < 0.2, 0.0).sum(-1),
}

WRONG: dict[str, Expression] = {
    "few": lambda p, s: (p < 0.01).float().sum(-1),
    "few, as numbers": lambda p, s: (p < 0.01).sum(-1),
    "smallest": lambda p, s: (-p).amax(-1),
    "softmax of pattern": lambda p, s: (5 * p).softmax(-1)[:, :, -1, -1],
    "softmax of pattern, by name": lambda p, s: torch.softmax(input=p, dim=-1)[:, :, -1, -1],
    "complement": lambda p, s: (1 - p).sum(-1),
    "complement, by name": lambda p, s: torch.sum(input=1 - p, dim=-1),
    "exp": lambda p, s: p.exp().sum(-1),
    "clamp": lambda p, s: p.clamp(min=0.05).sum(-1),
    "where": lambda p, s: torch.where(p > 0.2, p, 1.0).sum(-1),
    "masked_fill": lambda p, s: p.masked_fill(p < 0.2, 1.0).sum(-1),
    "cos": lambda p, s: p.cos().sum(-1),
    "logsumexp of pattern": lambda p, s: p.logsumexp(-1),
    "einsum": lambda p, s: torch.einsum("bhps->bhp", 1 - p),
    "einsum of two": lambda p, s: torch.einsum("bhps,bhpt->bhp", p, 1 - p),
    "einops": lambda p, s: einops.reduce(1 - p, "b h p s -> b h p", "sum"),
    "product": lambda p, s: (1 - p) @ (1 - p).mT,
    "two queries": lambda p, s: (p[:, :, -1] + 1) @ (p[:, :, -1] + 1).mT,
    "ones": lambda p, s: torch.ones_like(p).sum(-1),
    "one head less": lambda p, s: (p - 0.1 * p.sum(-1, keepdim=True)).sum(-1),
    "spread": lambda p, s: p.sum(-1, keepdim=True).expand_as(p).sum(-1),
    "joined with ones": lambda p, s: torch.cat([p, torch.ones_like(p)], 1).sum(-1),
    "of heads": lambda p, s: (1 - p).mean(1).sum(-1),
    "over the smaller": lambda p, s: (p * -PER_HEAD.abs()).amax(-1),
    "mean": lambda p, s: p.mean(-1),
    "least": lambda p, s: p.amin(-1),
    "spread of weights": lambda p, s: p.std(-1),
    "sorted": lambda p, s: p.sort(-1).values.cumsum(-1)[..., 0],
    "tanh of scores": lambda p, s: s.tanh().sum(-1),
    "sum of scores": lambda p, s: s.sum(-1) / 1e30,
    "finite scores": lambda p, s: s.isfinite().sum(-1),
    "low scores": lambda p, s: (s < 0.0).sum(-1),
    "lowest score": lambda p, s: (-s).amax(-1),
    "largest of scores": lambda p, s: s.abs().amax(-1),
    "nansum of scores": lambda p, s: s.nansum(-1),
    "upside down": lambda p, s: (-s).softmax(-1)[:, :, -1, -1],
    "upside down by head": lambda p, s: (s * PER_HEAD).softmax(-1)[:, :, -1, -1],
    "softmax of cut scores": lambda p, s: s.clamp(min=-1.0).softmax(-1)[:, :, -1, -1],
    "over zero of either sign": lambda p, s: (s / (p * PER_HEAD)).amax(-1),
    "nan at padding": lambda p, s: (p * (p - SMALL).log())[:, :, -1].sum(-1),
    "infinite, once": lambda p, s: torch.where(PER_HEAD < 0, torch.finfo(s.dtype).min, s).softmax(-1)[:, :, -1, -1],
}  # fmt: skip


def read(name: str, rows: Any, expression: Expression, attn: str = "sdpa") -> list[Tensor]:
    """What the expression is for each row."""
    traced = model(name, attn)
    with traced.trace(rows) as t:
        expression(traced.layers[1].pattern, traced.layers[1].scores).save("x")
    found = t["x"]
    return list(found) if isinstance(found, Tensor) else [part[0] for part in found]


def alone(name: str, expression: Expression, attn: str = "sdpa") -> list[Tensor]:
    """The same expression by torch alone, on each prompt's own pattern and scores."""
    wanted: list[Tensor] = []
    for row in ROWS:
        (pattern,) = read(name, [row], lambda p, s: p, attn)
        (scores,) = read(name, [row], lambda p, s: s, attn)
        wanted.append(expression(pattern[None], scores[None]))
    return wanted


def same(found: list[Tensor], wanted: list[Tensor]) -> None:
    for actual, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(actual, expected[0], atol=1e-5, rtol=1e-5)


def padded(tensor: Tensor, fill: float) -> Tensor:
    """With three more keys in front."""
    return torch.nn.functional.pad(tensor, (3, 0), value=fill)


@both_families
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("expression", RIGHT.values(), ids=RIGHT)
def test_what_leaves_padding_out_gives_each_row_what_it_gives_alone(
    family: str, attn: str, expression: Expression
) -> None:
    same(read(family, ROWS, expression, attn), alone(family, expression, attn))


@both_families
@pytest.mark.parametrize("expression", WRONG.values(), ids=WRONG)
def test_what_would_count_padding_is_refused(family: str, expression: Expression) -> None:
    with pytest.raises(PositionAxisError) as caught:
        read(family, ROWS, expression)
    assert "masked_mean" not in caught.value.instead
    assert "tl.apply" in caught.value.instead
    # Alone, and among rows of one length, it is right.
    for row in ROWS:
        read(family, [row], expression)
    whole = read(family, EVEN, expression)
    same(whole, [read(family, [row], expression) for row in EVEN])


@pytest.mark.parametrize("expression", WRONG.values(), ids=WRONG)
def test_it_would_count_padding_indeed(expression: Expression) -> None:
    (pattern,) = read("llama", [ROWS[1]], lambda p, s: p)
    (scores,) = read("llama", [ROWS[1]], lambda p, s: s)
    lowest = torch.finfo(scores.dtype).min
    right = expression(pattern[None], scores[None])
    wrong = expression(padded(pattern[None], 0.0), padded(scores[None], lowest))
    assert right.shape == wrong.shape
    assert not torch.allclose(right.double(), wrong.double(), atol=1e-5, rtol=1e-5)


@both_families
@pytest.mark.parametrize("recorded", ["without sizes", "on rows of one length"])
@pytest.mark.parametrize("name", ["complement", "softmax of pattern", "tanh of scores", "einsum"])
def test_a_graph_from_elsewhere_is_refused_when_it_meets_rows_of_different_lengths(
    family: str, recorded: str, name: str
) -> None:
    traced, expression = model(family), WRONG[name]
    with traced.record() if recorded == "without sizes" else traced.record(EVEN) as r:
        expression(traced.layers[1].pattern, traced.layers[1].scores).save("x")
    program = traced.compile(r)
    same(list(program(EVEN)["x"]), [read(family, [row], expression) for row in EVEN])
    with pytest.raises(PositionAxisError, match="differ in length") as caught:
        program(ROWS)
    assert caught.value.at.line > 0
    assert "tl.where(pattern > 0, x, 0.0)" in caught.value.instead


@both_families
@pytest.mark.parametrize(
    "name", ["sum", "entropy", "colder", "few, that are seen", "scaled by head, seen", "amax"]
)
def test_a_graph_from_elsewhere_that_leaves_padding_out_runs(family: str, name: str) -> None:
    traced, expression = model(family), RIGHT[name]
    with traced.record() as r:
        expression(traced.layers[1].pattern, traced.layers[1].scores).save("x")
    found = traced.compile(r)(ROWS)["x"]
    rows = [part[0] for part in found] if isinstance(found, list) else list(found)
    same(rows, alone(family, expression))


# --- what is written --------------------------------------------------------------------------------------------------


def renormalised(pattern: Any, seen: Any) -> Any:
    """Every weight at least 0.05."""
    least = torch.where(seen, pattern.clamp(min=0.05), 0.0)
    return least / least.sum(-1, keepdim=True)


@both_families
def test_a_pattern_that_is_written_after_a_reduction(family: str) -> None:
    traced = model(family)

    def logits(rows: Any, seen: Callable[[Any], Any]) -> Any:
        with traced.trace(rows) as t:
            pattern = traced.layers[1].pattern
            traced.layers[1].pattern = renormalised(pattern, seen(traced.layers[1].pattern))
            traced.logits.save("x")
        return t["x"]

    found = logits(ROWS, lambda p: p > 0)
    for row, actual in zip(ROWS, found, strict=True):
        torch.testing.assert_close(actual, logits([row], lambda p: p > 0), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(actual, read_logits(family, row), atol=1e-3)
    with pytest.raises(PositionAxisError, match="not zero"):
        logits(ROWS, lambda p: p >= 0)


def read_logits(family: str, row: list[int]) -> Tensor:
    with model(family).trace([row]) as t:
        model(family).logits.save("x")
    return t["x"]


@both_families
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("heads", [slice(None), 1])
def test_a_head_whose_scores_are_all_the_lowest_sees_no_padding(family: str, attn: str, heads: Any) -> None:
    traced = model(family, attn)

    def logits(rows: Any) -> Any:
        with traced.trace(rows) as t:
            traced.layers[1].scores[:, heads] = torch.finfo(torch.float32).min
            traced.layers[1].pattern.save("pattern")
            traced.logits.save("x")
        return [(t["x"], t["pattern"])] if len(rows) == 1 else zip(t["x"], t["pattern"], strict=True)

    for row, (actual, pattern) in zip(ROWS, logits(ROWS), strict=True):
        ((expected, looks),) = logits([row])
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(pattern, looks, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(actual, read_logits(family, row), atol=1e-3)


@both_families
@pytest.mark.parametrize("new", [0.1, "complement", "one head"])
def test_what_was_written_is_what_a_later_version_holds(family: str, new: Any) -> None:
    traced = model(family)

    def total(rows: Any, seen: bool) -> Any:
        with traced.trace(rows) as t:
            layer = traced.layers[1]
            before = layer.pattern
            if new == "one head":
                layer.pattern[:, 1] = 0.25
            else:
                layer.pattern = 1 - before if new == "complement" else new
            after = layer.pattern
            (torch.where(before > 0, after, 0.0) if seen else after).sum(-1).save("x")
            traced.logits.save()
        return t["x"]

    found = total(ROWS, True)
    for row, actual in zip(ROWS, found, strict=True):
        torch.testing.assert_close(actual, total([row], True), atol=1e-5, rtol=1e-5)
    with pytest.raises(PositionAxisError, match="not zero"):
        total(ROWS, False)


@both_families
def test_gradients_with_respect_to_pattern(family: str) -> None:
    traced = model(family)

    def attribution(rows: Any, reduce: Callable[[Any, Any], Any]) -> Any:
        with traced.trace(rows) as t:
            pattern = traced.layers[1].pattern
            gradient = tl.grad(traced.logits[:, -1, 5].sum(), pattern)
            reduce(pattern, gradient).save("x")
        return t["x"]

    for reduce in (
        lambda p, g: (p * g).sum(-1),
        lambda p, g: torch.einsum("bhps,bhps->bhp", p, g),
        lambda p, g: torch.where(p > 0, g, 0.0).abs().sum(-1),
    ):
        found = attribution(ROWS, reduce)
        for row, actual in zip(ROWS, found, strict=True):
            torch.testing.assert_close(actual, attribution([row], reduce), atol=1e-5, rtol=1e-5)
            assert actual.abs().max() > 1e-4
    for reduce in (lambda p, g: g.sum(-1), lambda p, g: g.abs().amax(-1), lambda p, g: ((1 - p) * g).sum(-1)):
        attribution([ROWS[0]], reduce)
        with pytest.raises(PositionAxisError, match="keys that are padding"):
            attribution(ROWS, reduce)


@both_families
def test_the_users_own_function_is_called_for_each_prompt_alone(family: str) -> None:
    def count(p: Any) -> Any:
        return tl.apply(lambda x: (x < 0.01).sum(-1), p, like=(p[..., -1] > 0).long())

    with model(family).trace(ROWS) as t:
        count(model(family).layers[1].pattern).save("x")
        tl.apply(lambda x: 1 - x, model(family).layers[1].pattern).sum(-1).save("y")
    same([part[0] for part in t["x"]], alone(family, WRONG["few, as numbers"]))
    same([part[0] for part in t["y"]], alone(family, WRONG["complement"]))


@both_families
def test_in_a_generation(family: str) -> None:
    traced = model(family)

    def texts(rows: Any, seen: Callable[[Any], Any]) -> list[list[int]]:
        with traced.generate(rows, max_new_tokens=4, do_sample=False) as t:
            pattern = traced.layers[1].pattern
            traced.layers[1].pattern = 1 - renormalised(pattern, seen(pattern))
        return t.tokens

    together = texts(ROWS, lambda p: p > 0)
    assert together == [texts([row], lambda p: p > 0)[0] for row in ROWS]
    texts([ROWS[0]], lambda p: p >= 0)
    texts(EVEN, lambda p: p >= 0)
    with pytest.raises(PositionAxisError, match="not zero"):
        texts(ROWS, lambda p: p >= 0)


@both_families
def test_in_a_sweep(family: str) -> None:
    traced, few = model(family), [0.01, 0.2]
    for seen in (True, False):
        with traced.record() as r:
            pattern = traced.layers[1].pattern
            chosen = pattern < tl.constant(0.1, name="limit")
            ((pattern > 0) & chosen if seen else chosen).float().sum(-1).save("x")
        program = traced.compile(r)
        if not seen:
            with pytest.raises(PositionAxisError, match="differ in length"):
                tl.sweep(program, ROWS, limit=few)
            continue
        swept = tl.sweep(program, ROWS, limit=few)
        assert swept.runs == 1
        for row, found in zip(ROWS, swept["x"], strict=True):
            torch.testing.assert_close(found, tl.sweep(program, [row], limit=few)["x"])
            assert not torch.equal(found[0], found[1])


@both_families
def test_what_is_said_in_a_generation_can_be_written(family: str) -> None:
    traced = model(family)
    with (
        pytest.raises(PositionAxisError, match="in generation") as caught,
        traced.generate(ROWS, max_new_tokens=2, do_sample=False),
    ):
        traced.layers[1].pattern[:, :, 0] = 0.0
    assert "site[..., -1, :] = 0.0" in caught.value.instead
    with traced.generate(ROWS, max_new_tokens=2, do_sample=False) as t:
        traced.layers[1].pattern[..., -1, :] = 0.0
    assert len(t.tokens) == len(ROWS)
