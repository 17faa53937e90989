"""Blocks of one structure share their steps, and what they record is what a recording without memory records."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tracelens as tl
from tests.properties.drawn import programs, traceable_sites
from tests.properties.programs import perform
from tests.support.batches import EVEN, RAGGED, random_rows
from tests.support.families import FAMILIES
from tracelens import errors
from tracelens.ir.graph import Graph
from tracelens.ir.ops import Call, Write
from tracelens.steps import Step, Steps

IDS = [[5, 9, 2, 7]]
HF = FAMILIES["llama"].build()
ROWS = {"even": random_rows(EVEN), "ragged": random_rows(RAGGED)}


def recorded(model: tl.Model, number: object, ids: object = IDS) -> Graph:
    with model.record(ids) as r:
        model.layers[1].resid_post *= number
        model.logits.save("logits")
    return r.graph


def same(one: Graph, other: Graph) -> None:
    assert one.ops == other.ops
    assert one.pins == other.pins
    # Equal in Python, yet of another meaning: 1, 1.0, True; 0.0, -0.0.
    assert repr(one.ops) == repr(other.ops)


def test_a_block_in_a_loop_records_the_same_objects() -> None:
    model = tl.wrap(HF)
    first, second = recorded(model, 3.0), recorded(model, 3.0)
    assert first.ops is second.ops
    assert recorded(model, 4.0).ops is not first.ops


def test_numbers_that_python_takes_for_equal_stay_apart() -> None:
    model = tl.wrap(HF)
    numbers = [1, 1.0, True, 0.0, -0.0, 0, float("nan"), 2, 2.0]
    for number in [*numbers, *reversed(numbers)]:
        same(recorded(model, number), recorded(tl.wrap(HF), number))


def test_each_recording_has_its_own_constants_and_lines() -> None:
    model = tl.wrap(HF)
    graphs: list[Graph] = []
    for scale in (1.0, 2.0):
        with model.record(IDS) as r:
            model.layers[0].resid_post += torch.full((48,), scale)
            model.logits.save()
        graphs.append(r.graph)
    with model.record(IDS) as elsewhere:
        model.layers[0].resid_post += torch.full((48,), 3.0)
        model.logits.save()
    assert graphs[0].ops is graphs[1].ops is elsewhere.graph.ops
    assert [float(graph.constants[0].tensor[0]) for graph in (*graphs, elsewhere.graph)] == [1.0, 2.0, 3.0]
    assert graphs[0].locations == graphs[1].locations != elsewhere.graph.locations


def test_constants_of_other_shapes_or_dtypes_are_other_steps() -> None:
    model = tl.wrap(HF)
    for constant in (torch.ones(48), torch.ones(4, 48), torch.ones(1), torch.ones(48, dtype=torch.float16)):
        same(recorded(model, constant), recorded(tl.wrap(HF), constant))


@pytest.mark.parametrize(
    "ids", [[[5, 9, 2]], [[5, 9, 2, 7], [1, 2, 3, 4]], None], ids=["3", "2 rows", "none"]
)
def test_a_size_that_is_taken_as_a_number_is_of_this_prompt(ids: object) -> None:
    def halved(model: tl.Model, prompt: object) -> Graph:
        with model.record(prompt) as r:
            h = model.layers[0].resid_post
            (h / h.shape[1]).mean().save("m")
        return r.graph

    model = tl.wrap(HF)
    same(halved(model, IDS), halved(tl.wrap(HF), IDS))
    same(halved(model, ids), halved(tl.wrap(HF), ids))


def test_a_refused_line_is_refused_each_time_with_its_line() -> None:
    model = tl.wrap(HF)
    seen: list[str] = []

    def backwards() -> None:
        with model.record(IDS):
            late = model.layers[2].resid_post
            model.layers[0].resid_post += late

    for _ in range(2):
        with pytest.raises(errors.CausalityError) as caught:
            backwards()
        seen.append(str(caught.value))
    assert seen[0] == seen[1]
    assert "late = model.layers[2].resid_post" in seen[0]


def test_a_refused_write_leaves_no_trace_among_the_steps() -> None:
    model = tl.wrap(HF)
    for _ in range(2):
        with model.record(IDS) as r:
            with pytest.raises(errors.ShapeError):
                model.layers[0].resid_post += torch.ones(47)
            model.layers[0].resid_post += torch.ones(48)
            model.logits.save()
        assert sum(isinstance(op, Write) for op in r.graph.ops) == 1
        assert sum(isinstance(op, Call) for op in r.graph.ops) == 1


def test_a_changed_default_dtype_is_not_forgotten() -> None:
    model = tl.wrap(HF)

    def ones() -> torch.dtype:
        with model.record(IDS):
            return (model.layers[0].resid_post.argmax(-1) / 2).dtype

    assert ones() is torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert ones() is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_steps_beyond_the_limit_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Steps, "LIMIT", 10)
    steps = Steps()
    start = steps.start("kind")
    for number in range(11):
        steps.add(start, number, Step())
    assert len(start.next) == 11
    assert steps.start("kind") is not start
    assert steps.start("kind").next == {}


def test_blocks_still_run_when_their_steps_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tl.wrap(HF)
    with model.trace(IDS) as plain:
        model.logits.save("logits")
    monkeypatch.setattr(Steps, "LIMIT", 3)
    for number in range(2, 9):
        with model.trace(IDS) as t:
            model.layers[1].resid_post *= float(number)
            model.logits.save("logits")
        assert not torch.equal(t["logits"], plain["logits"])
    with model.trace(IDS) as again:
        model.logits.save("logits")
    assert torch.equal(again["logits"], plain["logits"])


SHARED = tl.wrap(HF)


@pytest.mark.parametrize("rows", ROWS)
@settings(max_examples=settings().max_examples // 2)
@given(data=st.data())
def test_random_blocks_record_the_same_with_and_without_memory(rows: str, data: st.DataObject) -> None:
    program = data.draw(programs(traceable_sites(HF), aligned=rows != "ragged"), label="block")
    graphs: list[Graph] = []
    for model in (SHARED, SHARED, tl.wrap(HF)):
        with model.record(ROWS[rows]) as r:
            perform(program, model)
        graphs.append(r.graph)
    same(graphs[0], graphs[2])
    same(graphs[1], graphs[2])
