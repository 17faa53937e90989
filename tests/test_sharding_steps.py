"""Functions along the axis in parts, done in steps: as those of the whole, and without the whole on any rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tracelens as tl
from tests.support.families import FAMILIES
from tracelens.backends.anatomy import ModelAnatomy
from tracelens.checking import check
from tracelens.ir.layout import Replicate, Shard
from tracelens.ir.ops import Redistribute
from tracelens.ir.verify import complaints
from tracelens.placement import Place, Placement
from tracelens.plan import Plan, make_plan
from tracelens.program import lower
from tracelens.reference import evaluate
from tracelens.simulate import simulate

HF = FAMILIES["llama"].build()
MODEL = tl.wrap(HF)
PATH = "lm_head.weight"  # [97, 48]

CALLS = {
    "softmax": lambda x: (x.softmax(1),),
    "softmax, spelt": lambda x: (torch.softmax(x, dim=-1), torch.nn.functional.softmax(x, 1)),
    "softmax of halves": lambda x: (x.bfloat16().softmax(1), x.softmax(1, dtype=torch.float64)),
    "log_softmax": lambda x: (x.log_softmax(-1), torch.special.log_softmax(x, 1)),
    "logsumexp": lambda x: (x.logsumexp(1), x.logsumexp((1,), keepdim=True), x.half().logsumexp(1)),
    "topk": lambda x: (*x.topk(3), *x.topk(5, 1, largest=False), *x.topk(11, dim=-1)),
    "argmax": lambda x: (x.argmax(1), x.argmin(-1, keepdim=True)),
    "max": lambda x: (*x.max(1), *x.min(-1, keepdim=True), *(x > 9).max(1)),
    "a score and its rank": lambda x: (x[:, 7] - x.logsumexp(1), (x > x[:, 7:8]).sum(1)),
    "infinite": lambda x: (
        tl.where(x > 0.0, float("-inf"), x).softmax(1),
        tl.where(x > -9.0, float("-inf"), x).logsumexp(1),
        tl.where(x > 0.1, float("inf"), x).logsumexp(1),
        tl.where(x > 0.1, float("nan"), x).argmax(1),
    ),
}


def _plan(call: Any, ranks: int) -> tuple[Any, Plan]:
    with MODEL.record() as r:
        for number, value in enumerate(call(MODEL.param(PATH))):
            value.save(f"v{number}")
    anatomy: ModelAnatomy = MODEL.anatomy
    placement = Placement((Place(0, "cpu", ranks),), (0,) * anatomy.n_layers, parameters={PATH: Shard(1)})
    plan = make_plan(r.graph, placement, carries=(), type_of=anatomy.type_of, generating=False)
    assert complaints(plan.graph) == []
    return r.graph, plan


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("name", CALLS)
def test_steps_make_what_the_function_makes(name: str, ranks: int) -> None:
    graph, plan = _plan(CALLS[name], ranks)
    programs = lower(plan)
    check(programs, plan.placement)
    given = {"constants": [one.tensor for one in graph.constants], "parameters": HF.get_parameter}
    wanted = evaluate(graph, lambda _: None, **given)
    found = simulate(programs, plan.graph, plan.placement, lambda _: None, layouts=plan.layouts, **given)
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        tolerance = {torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(tensor.dtype, 1e-6)
        torch.testing.assert_close(found[key], tensor, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("name", [name for name in CALLS if name != "infinite"])
def test_no_rank_sees_the_whole_axis(name: str) -> None:
    _, plan = _plan(CALLS[name], 4)
    moved = [
        op for op in plan.graph.ops if isinstance(op, Redistribute) and not isinstance(op.source, Replicate)
    ]
    assert moved
    assert all(48 not in op.type.shape for op in moved), "a whole row travels"


@pytest.mark.parametrize("ranks", [5, 47])
@pytest.mark.parametrize("name", ["topk", "max", "argmax", "softmax"])
def test_what_does_not_divide_evenly_is_right_too(name: str, ranks: int) -> None:
    test_steps_make_what_the_function_makes(name, ranks)
