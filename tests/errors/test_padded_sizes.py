"""Sizes that count padding are for shapes; as numbers they would be wrong for all rows but the longest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import tracelens as tl
from tests.support.families import FAMILIES
from tracelens.errors import PositionAxisError, WriteTargetError

MODEL: Any = tl.wrap(FAMILIES["llama"].build())
RAGGED, EVEN = [[5, 6, 7, 8, 9], [11, 12]], [[5, 6, 7, 8, 9], [11, 12, 13, 14, 15]]

AS_NUMBERS: dict[str, Callable[[Any, Any], Any]] = {
    "divided by": lambda p, h: p.sum(-1) / p.shape[-1],
    "multiplied": lambda p, h: p.sum(-1) * p.shape[-1],
    "in a function": lambda p, h: torch.mul(p.sum(-1), p.shape[-1]),
    "after arithmetic": lambda p, h: p.sum(-1) / (p.shape[-1] - 1),
    "inverted": lambda p, h: p.sum(-1) * (1 / p.shape[-1]),
    "a root": lambda p, h: p.sum(-1) * p.shape[-1] ** -0.5,
    "as a float": lambda p, h: p.sum(-1) / float(p.shape[-1]),
    "positions": lambda p, h: h * h.shape[1],
}


@pytest.mark.parametrize("name", AS_NUMBERS)
def test_a_size_with_padding_is_no_number(name: str) -> None:
    use = AS_NUMBERS[name]

    def run(rows: list[list[int]]) -> Any:
        with MODEL.trace(rows):
            return use(MODEL.layers[1].pattern, MODEL.layers[1].resid_post).save()

    with pytest.raises(PositionAxisError, match="counts padding") as caught:
        run(RAGGED)
    assert caught.value.at is not None
    # It would have been wrong: a row alone has another size.
    alone = run(RAGGED[1:]).value
    assert not torch.allclose(alone, torch.zeros_like(alone))
    assert run(EVEN).value is not None


def test_a_size_with_padding_is_for_shapes() -> None:
    with MODEL.trace(RAGGED):
        h = MODEL.layers[1].resid_post
        rows, positions, width = h.shape
        heads = h.reshape(rows, positions, 4, width // 4).save()
        again = h.reshape(h.shape[0], h.shape[1], 2 * 2, -1).save()
    for one, other in zip(heads.value, again.value, strict=True):
        assert torch.equal(one, other)


def test_a_size_with_padding_is_not_written() -> None:
    with pytest.raises(PositionAxisError, match="counts padding"), MODEL.trace(RAGGED):
        MODEL.layers[1].resid_post[..., 0] = MODEL.layers[1].resid_post.shape[1]


def test_where_the_real_tokens_are_is_read_and_not_written() -> None:
    with MODEL.trace(RAGGED):
        mask = MODEL.token_mask.save()
    assert [part.tolist() for part in mask.value] == [[[True] * 5], [[True] * 2]]
    with pytest.raises(WriteTargetError), MODEL.trace(RAGGED):
        MODEL.token_mask = torch.ones(2, 5, dtype=torch.bool)
