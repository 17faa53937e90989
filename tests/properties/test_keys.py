"""Random expressions of attention patterns and scores: refused, or in a ragged batch what they are alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tracelens as tl
from tests.support.families import FAMILIES, HEADS
from tracelens.errors import PositionAxisError, TracelensError

LONG, SHORT = [5, 6, 7, 8, 9, 10], [11, 12, 13]
PER_HEAD = torch.linspace(-1.5, 2.0, HEADS, dtype=torch.float64)[:, None, None]

Expression = Callable[[Any, Any], Any]
"""Of pattern and scores; it works on values and on tensors."""


@cache
def model(family: str) -> Any:
    return tl.wrap(FAMILIES[family].build(dtype=torch.float64))


@cache
def alone(family: str) -> tuple[Tensor, Tensor]:
    """Pattern and scores of the short prompt alone."""
    with model(family).trace([SHORT]) as t:
        layer = model(family).layers[1]
        layer.pattern.save("pattern")
        layer.scores.save("scores")
    return t["pattern"], t["scores"]


UNARY: dict[str, Callable[[Any], Any]] = {
    "abs": lambda x: x.abs(),
    "neg": lambda x: -x,
    "square": lambda x: x.square(),
    "exp": lambda x: x.exp(),
    "tanh": lambda x: x.tanh(),
    "relu": lambda x: x.relu(),
    "sigmoid": lambda x: x.sigmoid(),
    "cos": lambda x: x.cos(),
    "sin": lambda x: x.sin(),
    "sqrt": lambda x: x.abs().sqrt(),
    "log": lambda x: x.log(),
    "float": lambda x: x.float().double(),
    "detach": lambda x: x.detach(),
    "clamp": lambda x: x.clamp(min=0.05),
    "clamp up": lambda x: x.clamp(max=0.3),
    "clamp 0": lambda x: x.clamp(min=0.0),
    "nan_to_num": lambda x: x.nan_to_num(0.0, 1.0, -1.0),
    "isfinite": lambda x: x.isfinite().double(),
    "few": lambda x: (x < 0.0137).double(),
    "many": lambda x: (x > 0.0137).double(),
    "heads": lambda x: x.sum(1, keepdim=True),
    "mean of heads": lambda x: x.mean(1, keepdim=True),
    "largest head": lambda x: x.amax(1, keepdim=True),
    "smallest head": lambda x: x.amin(1, keepdim=True),
    "norm of heads": lambda x: x.norm(dim=1, keepdim=True),
    "cumulated": lambda x: x.cumsum(1),
    "head": lambda x: x[:, :1],
    "turned": lambda x: x.flip(1),
    "by head": lambda x: x * PER_HEAD,
    "plus head": lambda x: x + PER_HEAD,
    "over head": lambda x: x / PER_HEAD,
    "xlogx": lambda x: torch.xlogy(x, x),
}
SCALARS = (0.0, 1.0, -1.0, 0.25, 2.0, -0.5, 30.0, float("-inf"), -1e9)
BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x / y,
    "maximum": lambda x, y: x * 1.0 if isinstance(y, float) else torch.maximum(x, y),
    "xlogy": torch.xlogy,
    "where": lambda x, y: torch.where(x > 0.0137, x, y),
    "where not": lambda x, y: torch.where(x > 0.0137, y, x),
}
REDUCTIONS: dict[str, Callable[[Any, bool], Any]] = {
    "sum": lambda x, keep: x.sum(-1, keepdim=keep),
    "nansum": lambda x, keep: torch.nansum(x, -1, keepdim=keep),
    "amax": lambda x, keep: x.amax(-1, keepdim=keep),
    "logsumexp": lambda x, keep: x.logsumexp(-1, keepdim=keep),
    "any": lambda x, keep: (x > 0.0137).any(-1, keepdim=keep).double(),
    "softmax": lambda x, keep: x.softmax(-1),
    "log_softmax": lambda x, keep: x.log_softmax(-1),
    "newest": lambda x, keep: x[..., -1:] if keep else x[..., -1],
    "einsum": lambda x, keep: (
        torch.einsum("bhps->bhp", x)[..., None] if keep else torch.einsum("bhps->bhp", x)
    ),
}


@st.composite
def expressions(draw: Any, depth: int = 4) -> tuple[str, Expression]:
    kind = (
        draw(st.sampled_from(("leaf", "unary", "unary", "scalar", "binary", "visible", "reduced")))
        if depth
        else "leaf"
    )
    if kind == "leaf":
        return draw(st.sampled_from([("p", lambda p, s: p), ("p", lambda p, s: p), ("s", lambda p, s: s)]))
    name, inner = draw(expressions(depth=depth - 1))
    if kind == "unary":
        word = draw(st.sampled_from(list(UNARY)))
        return f"{word}({name})", lambda p, s: UNARY[word](inner(p, s))
    if kind == "scalar":
        word, number = draw(st.sampled_from(list(BINARY)[:4])), draw(st.sampled_from(SCALARS))
        if draw(st.booleans()):
            return f"{word}({name}, {number})", lambda p, s: BINARY[word](inner(p, s), number)
        return f"{word}({number}, {name})", lambda p, s: BINARY[word](number, inner(p, s))
    if kind == "visible":
        fill = draw(st.sampled_from(SCALARS))
        if draw(st.booleans()):
            return f"where(p>0, {name}, {fill})", lambda p, s: torch.where(p > 0, inner(p, s), fill)
        return f"where(s>-1e9, {name}, {fill})", lambda p, s: torch.where(s > -1e9, inner(p, s), fill)
    if kind == "reduced":
        word = draw(st.sampled_from(list(REDUCTIONS)))
        return f"{word}({name})", lambda p, s: REDUCTIONS[word](inner(p, s), True)
    word = draw(st.sampled_from(list(BINARY)))
    other_name, other = draw(expressions(depth=depth - 1))
    return f"{word}({name}, {other_name})", lambda p, s: BINARY[word](inner(p, s), other(p, s))


@st.composite
def reduced(draw: Any) -> tuple[str, Expression]:
    name, inner = draw(expressions())
    word = draw(st.sampled_from(list(REDUCTIONS)))
    if draw(st.integers(0, 5)) == 0:
        other_name, other = draw(expressions(depth=2))
        return (
            f"einsum({name}, {other_name})",
            lambda p, s: torch.einsum(
                "bhps,bhps->bhp", inner(p, s) + 0 * s[:, :, :, -1:], other(p, s) + 0 * s[:, :, :, -1:]
            ),
        )
    return f"{word}({name})", lambda p, s: REDUCTIONS[word](inner(p, s), False)


@given(st.sampled_from(("llama", "gpt2")), reduced())
def test_it_is_refused_or_what_it_is_alone(family: str, drawn: tuple[str, Expression]) -> None:
    check(family, drawn)


def check(family: str, drawn: tuple[str, Expression]) -> str:
    name, expression = drawn
    wanted = expression(*alone(family))
    try:
        with model(family).trace([LONG, SHORT]) as t:
            layer = model(family).layers[1]
            expression(layer.pattern, layer.scores).save("found")
    except PositionAxisError:
        return "refused"
    except TracelensError:
        return "invalid"
    found = t["found"][1] if isinstance(t["found"], Tensor) else t["found"][1][0]
    wanted = wanted[0]
    # A number that is infinite or nan alone may be the other of the two in the batch: both are no result.
    whole = wanted.isfinite()
    assert torch.equal(found.isfinite(), whole), name
    torch.testing.assert_close(
        found[whole], wanted[whole], rtol=1e-7, atol=1e-7, msg=lambda text: f"{name}: {text}"
    )
    return "equal" if whole.any() else "broken"
