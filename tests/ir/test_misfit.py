"""What is said of calls that do not fit: one short line, with the lengths that clash."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import tracelens as tl
from tests.support.families import FAMILIES
from tracelens.errors import DtypeError, ShapeError, UnsupportedFunctionError

MODEL = tl.wrap(FAMILIES["llama"].build())  # d_model 48
Call = Callable[[Any], Any]

# The call, and what is said after its name; torch counts the axes of some functions from the front and of some not.
WORDS: list[tuple[Call, str]] = [
    (lambda h: h + torch.ones(7), r"lengths 48 and 7 do not broadcast, at axis (-1|2)"),
    (lambda h: torch.where(h > 0, h, torch.ones(7)), r"lengths 48 and 7 do not broadcast, at axis (-1|2)"),
    (lambda h: h * torch.ones(3, 1, 1, 7), r"lengths 48 and 7 do not broadcast, at axis (-1|3)"),
    (lambda h: F.cosine_similarity(h, torch.ones(7)), r"lengths 48 and 7 do not broadcast, at axis (-1|2)"),
    (lambda h: h @ torch.ones(47, 3), "a matrix product .*, and here they have 48 and 47"),
    (lambda h: h[:, 0] @ torch.ones(47, 3), "a matrix product .*, and here they have 48 and 47"),
    (lambda h: F.linear(h, torch.ones(3, 47)), "a matrix product .*, and here they have 48 and 47"),
    (lambda h: torch.mm(h[:, 0], torch.ones(47, 3)), "a matrix product .*, and here they have 48 and 47"),
    (lambda h: h.mean(5), "there is no axis 5, only -3 to 2"),
    (lambda h: h.softmax(-4), "there is no axis -4, only -3 to 2"),
    (lambda h: h.unsqueeze(8), "there is no axis 8, only -4 to 3"),
    (lambda h: h[:, 0].expand(2), "sizes for 1 of the tensor's 2 axes"),
    (lambda h: h[0, 0].expand(7), "an axis of length 48 cannot be stretched to 7"),
    (lambda h: h.permute(0, 1), "an order of 2 axes for a tensor of 3"),
    (lambda h: h[0, 0].reshape(5, -1), r"\[5, -1\] does not hold the 48 elements"),
    (lambda h: h.sum("x"), r"it does not take \(Tensor, str\)"),
    (lambda h: h.sum(foo=3), r"it does not take \(Tensor, foo=int\)"),
    (lambda h: h.std(0, 1, 2, 3), r"it does not take \(Tensor, int, int, int, int\)"),
    (lambda h: torch.einsum("bpd,dk->bpk", h, torch.ones(47, 3)), "subscript d has size 47 .*"),
    (lambda h: torch.linalg.svd(h[0, 0]), "The input tensor A must have at least 2 dimensions"),
]


@pytest.mark.parametrize("symbolic", [False, True], ids=["trace", "record"])
@pytest.mark.parametrize(("call", "words"), WORDS)
def test_a_misfit_in_one_short_line(call: Call, words: str, symbolic: bool) -> None:
    with (
        pytest.raises((ShapeError, UnsupportedFunctionError)) as caught,
        MODEL.record() if symbolic else MODEL.trace([1, 2, 3, 4]),
    ):
        call(MODEL.layers[0].resid_post)
    where = "" if symbolic else r"( where (B|P) = \d.*?)?"
    assert re.fullmatch(rf"[\w.]+\(.*\){where}: {words}", caught.value.problem), caught.value.problem


# Words of torch's that are shown as they are.
OTHERS: list[Call] = [
    lambda h: torch.cat([h, torch.ones(1, 4, 3)], 1),
    lambda h: torch.stack([h, torch.ones(3)]),
    lambda h: h.topk(100),
    lambda h: h.unflatten(-1, (5, 5)),
    lambda h: h.split([3, 4], -1),
    lambda h: h.gather(1, torch.zeros(1, 2, 3, 4, dtype=torch.int64)),
    lambda h: F.layer_norm(h, (47,)),
    lambda h: F.conv1d(h, torch.ones(3, 47, 3)),
    lambda h: F.embedding(h, torch.ones(3, 4)),
    lambda h: torch.bmm(h, torch.ones(3, 47, 2)),
    lambda h: torch.linalg.solve(h, h),
    lambda h: torch.cdist(h, torch.ones(3, 3)),
    lambda h: h.movedim((0, 1), (0,)),
    lambda h: h.mean(dim=1.5),
    lambda h: h.clamp("a"),
    lambda h: h.tile("a"),
    lambda h: torch.bitwise_and(h, h),
]


@pytest.mark.parametrize("call", [*OTHERS, *(call for call, _ in WORDS)])
def test_no_misfit_is_told_with_torchs_inner_words(call: Call) -> None:
    with (
        pytest.raises((ShapeError, DtypeError, UnsupportedFunctionError)) as caught,
        MODEL.trace([1, 2, 3, 4]),
    ):
        call(MODEL.layers[0].resid_post)
    problem = caught.value.problem
    assert "\n" not in problem
    assert not re.search(r"torch\.Size|Meta\w*Type|sparse_coo|expected one of|Attempting", problem), problem
    name = problem.partition("(")[0]
    assert name.isidentifier() or "." in name
    assert problem.count(f"{name}():") == 0
    assert caught.value.at is not None
