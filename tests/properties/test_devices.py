"""Random graphs on models that accelerate spread over pretend devices: what one device gives, and only what was planned
travels."""

from __future__ import annotations

from collections import Counter
from typing import Any

import accelerate
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

import tracelens as tl
from tests.strategies import assert_same, graphs
from tests.support.batches import EVEN, RAGGED, random_rows
from tests.support.families import FAMILIES, LAYERS
from tests.support.plain import untouched
from tests.support.pretend import Copy, Seen, device_map, pretend_throughout, watched
from tracelens.errors import UnusedGradientError
from tracelens.ir.graph import Graph
from tracelens.ir.infer import torch_dtype
from tracelens.ir.ops import Grad, Keep
from tracelens.plan import Plan

__all__ = ["pretend_throughout"]

ROTARY = ("llama", "mistral", "qwen2", "qwen3")
SENDING = "tracelens/backends/execute.py"
P = [f"pretend:{index}" for index in range(5)]
EVEN_ROWS, RAGGED_ROWS = random_rows(EVEN), random_rows(RAGGED)
SIZES = {"B": len(EVEN), "P": EVEN[0], "S": EVEN[0]}
PLAIN = {name: tl.wrap(FAMILIES[name].build(attn="eager")) for name in ROTARY}

GRAPHS = st.one_of(
    graphs().map(lambda graph: (graph, EVEN_ROWS)),
    graphs(sizes=SIZES).map(lambda graph: (graph, EVEN_ROWS)),
    graphs(aligned=False).map(lambda graph: (graph, RAGGED_ROWS)),
    graphs(aligned=False, lengths=RAGGED).map(lambda graph: (graph, RAGGED_ROWS)),
    graphs(sizes=SIZES, gradients=True).map(lambda graph: (graph, EVEN_ROWS)),
)


@st.composite
def maps(draw: Any) -> dict[str, Any]:
    """Over 2, 3 or 5 devices, in runs or back and forth, the ends anywhere."""
    devices = st.sampled_from(P[: draw(st.sampled_from([2, 3, 5]))])
    layers = draw(st.lists(devices, min_size=LAYERS, max_size=LAYERS))
    return {"layers": layers, "embedding": draw(devices), "norm": draw(devices), "head": draw(devices)}


def spread(family: str, parts: dict[str, Any]) -> PreTrainedModel:
    hf = FAMILIES[family].build(attn="eager")
    if hf.config.tie_word_embeddings:
        parts = {**parts, "head": parts["embedding"]}
    return accelerate.dispatch_model(hf, device_map(hf, **parts), main_device=torch.device(P[0]))


Journey = tuple[str, str, tuple[int, ...], torch.dtype]


def journeys(copies: list[Copy]) -> list[Journey]:
    """What went from one pretend device to another one, in order."""
    return [
        (copy.source, copy.target, copy.shape, copy.dtype)
        for copy in copies
        if "cpu" not in (copy.source, copy.target)
    ]


def planned(plan: Plan, sizes: dict[str, int]) -> list[Journey]:
    places = [place.device for place in plan.placement.places]
    return [
        (places[op.source], places[op.target], op.type.sizes(sizes), torch_dtype(op.type.dtype))
        for op in plan.transfers
    ]


@pytest.mark.usefixtures("pretend_throughout")
@settings(max_examples=4 * settings().max_examples)
@given(name=st.sampled_from(ROTARY), found=GRAPHS, parts=maps())
def test_a_spread_model_gives_what_one_device_gives_and_only_what_is_planned_travels(name, found, parts):
    graph, rows = found
    try:
        wanted = PLAIN[name].compile(graph)(rows)
    except UnusedGradientError:
        return
    hf = spread(name, parts)
    model = tl.wrap(hf)
    with watched() as bare:
        whole(model, rows)
    program = model.compile(graph)
    with untouched(hf), watched() as seen:
        results = program(rows)
    compare(graph, results, wanted)
    ours = [copy for copy in seen.copies if any(SENDING in line for line in copy.lines)]
    expected = planned(program._compiled.plan, model.prepare(rows).sizes)
    assert journeys(ours) == expected, "every transfer of the plan, and in its order"
    rest = Counter(journeys(seen.copies)) - Counter(expected)
    # Where patterns are written, attention has to know the padding, on its own device: once.
    mask = {path for path in rest if path[2:] == ((len(rows), max(map(len, rows))), torch.bool)}
    assert all(rest.pop(path) == 1 for path in mask)
    if not any(isinstance(op, Grad) for op in graph.ops):  # autograd sends gradients back the way they came
        assert rest <= Counter(journeys(bare.copies)), "something travelled that no plan names"
    assert reads(seen) <= reads(bare), "a hook waits for a device"


def whole(model: tl.Model, rows: list[list[int]]) -> None:
    """A forward pass in which nobody is interested."""
    with model.trace(rows):
        model.logits[:, -1].save()


def reads(seen: Seen) -> Counter[tuple[str, str]]:
    return Counter((read.kind, read.device) for read in seen.reads if read.kind != "copy")


def compare(graph: Graph, results: Any, wanted: Any) -> None:
    assert list(results) == list(wanted)
    for name, expected in wanted.items():
        found = results[name]
        pairs = zip(found, expected, strict=True) if isinstance(expected, list) else [(found, expected)]
        kept = any(save.name == name and save.keep is Keep.DEVICE for save in graph.saves)
        for one, other in pairs:
            assert (one.device.type == "pretend") == kept
            assert_same(graph, {name: one.cpu()}, {name: other})
