"""Gradients that go back over devices: what the report counts is what travelled, and what the plan names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

import tracelens as tl
from tests.properties.test_devices import EVEN_ROWS, maps, spread, whole
from tests.support.families import LAYERS
from tests.support.pretend import Copy, pretend_throughout, watched
from tracelens.errors import UnusedGradientError
from tracelens.ir.ops import Grad

__all__ = ["pretend_throughout"]

BACKWARD = "backends/differentiate.py"
ORDER = (
    "resid_pre",
    "attn_norm",
    "attn_out",
    "attn_add",
    "resid_mid",
    "mlp_norm",
    "mlp_out",
    "mlp_add",
    "resid_post",
)
FUNCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: a + b,
    "mul": lambda a, b: a * b.sigmoid(),
    "detach": lambda a, b: a + b.detach(),
    "last": lambda a, b: a + b[:, -1:],
    "where": lambda a, b: tl.where(b > 0, a, 0.5 * b),
    "norm": lambda a, b: a * b.norm(dim=-1, keepdim=True),
    "sort": lambda a, b: a + b.topk(3, dim=1).values.sum(1, keepdim=True),
}


@st.composite
def blocks(draw: Any) -> Callable[[tl.Model], None]:
    """Reads and writes in the order of the pass, values of several layers in one sum, and gradients of some losses."""
    sites = st.tuples(st.integers(0, LAYERS - 1), st.sampled_from(range(len(ORDER))))
    chosen = sorted(draw(st.lists(sites, min_size=2, max_size=6, unique=True)))
    plans = [
        (
            draw(st.sampled_from(list(FUNCTIONS))),
            draw(st.integers(0, 5)),
            draw(st.sampled_from(["keep", "keep", "keep", "add", "replace"])),
        )
        for _ in chosen
    ]
    losses = draw(
        st.lists(
            st.tuples(
                st.lists(st.integers(0, 11), min_size=1, max_size=3),
                st.lists(st.integers(0, 5), min_size=1, max_size=3, unique=True),
                st.booleans(),
            ),
            min_size=1,
            max_size=2,
        )
    )

    def block(model: tl.Model) -> None:
        reads: list[Any] = []
        made: list[Any] = []
        for (layer, row), (function, other, writing) in zip(chosen, plans, strict=True):
            h = getattr(model.layers[layer], ORDER[row])
            reads.append(h)
            pool = [*reads, *made]
            value = FUNCTIONS[function](h, pool[other % len(pool)])
            made.append(value)
            if writing == "add":
                setattr(model.layers[layer], ORDER[row], h + 0.1 * value)
            elif writing == "replace":
                setattr(model.layers[layer], ORDER[row], pool[other % len(pool)] * 1.0)
        for number, (parts, wrt, logits) in enumerate(losses):
            pool = [*reads, *made]
            loss = sum(pool[part % len(pool)].sin().sum() for part in parts)
            if logits:
                loss = loss + model.logits.sum()
            for place, gradient in enumerate(
                tl.grad(loss, [reads[one] for one in {one % len(reads) for one in wrt}])
            ):
                gradient.save(f"g{number} {place}")

    return block


@pytest.mark.usefixtures("pretend_throughout")
@settings(max_examples=2 * settings().max_examples)
@given(block=blocks(), parts=maps())
def test_the_gradients_that_are_reported_are_those_that_travel(
    block: Callable[[tl.Model], None], parts: dict[str, Any]
) -> None:
    model = tl.wrap(spread("llama", parts))
    with watched() as bare:
        whole(model, EVEN_ROWS)
    try:
        with watched() as seen, model.trace(EVEN_ROWS) as t:
            block(model)
    except UnusedGradientError:
        assume(False)
    plan, sizes = t.plan().plan, model.prepare(EVEN_ROWS).sizes
    backward = copies([copy for copy in seen.copies if any(BACKWARD in line for line in copy.lines)])
    told = Counter(
        (source, target, size) for source, target, what, size in t.report._journeys if what == "gradients"
    )
    places = [place.device for place in plan.placement.places]
    named: Counter[Any] = Counter()
    for op in plan.transfers:
        named[places[op.target], places[op.source], op.type.nbytes(sizes)] += plan.returning.get(op.out, 0)
    passes = sum(isinstance(op, Grad) for op in plan.graph.ops)
    event(f"gradients came back: {bool(told)}")
    assert told == +named
    assert told <= backward
    back = Counter({way[1::-1] + way[2:]: times * passes for way, times in copies(bare.copies).items()})
    assert backward - told <= back, "all else is what the model sends, on its way back"


def copies(found: Sequence[Copy]) -> Counter[tuple[str, str, int]]:
    return Counter((copy.source, copy.target, copy.bytes) for copy in found)
