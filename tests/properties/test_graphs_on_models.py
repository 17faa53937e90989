"""A random graph on a tiny model equals its reference evaluation over the same modules, bit for bit: promise 4."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tracelens as tl
from tests.properties.drawn import traceable_sites
from tests.properties.plain_language import unpadded
from tests.strategies import assert_same, graphs, plain_select
from tests.support.batches import EVEN, RAGGED, batch, random_rows
from tests.support.families import FAMILIES
from tests.support.hand_forward import Intercept
from tests.support.plain import edited_at, plain_logits, untouched
from tracelens.errors import UnusedGradientError
from tracelens.ir.graph import Graph
from tracelens.ir.sites import Site
from tracelens.reference import evaluate

# The graphs that are drawn name sites of the Llama kind, and three layers.
ROTARY = ("llama", "mistral", "qwen2", "qwen3")
HF = {name: FAMILIES[name].build(attn="eager") for name in ROTARY}
MODELS = {name: tl.wrap(hf) for name, hf in HF.items()}
EVEN_ROWS, RAGGED_ROWS = random_rows(EVEN), random_rows(RAGGED)
SIZES = {"B": len(EVEN), "P": EVEN[0], "S": EVEN[0]}

GRAPHS = st.one_of(
    graphs().map(lambda graph: (graph, EVEN_ROWS)),
    graphs(sizes=SIZES).map(lambda graph: (graph, EVEN_ROWS)),
    graphs(aligned=False).map(lambda graph: (graph, RAGGED_ROWS)),
    graphs(sizes=SIZES, gradients=True).map(lambda graph: (graph, EVEN_ROWS)),
    graphs(gradients=True, aligned=False).map(lambda graph: (graph, RAGGED_ROWS)),
    graphs(lengths=EVEN).map(lambda graph: (graph, EVEN_ROWS)),
    graphs(lengths=RAGGED, aligned=False).map(lambda graph: (graph, RAGGED_ROWS)),
    graphs(lengths=RAGGED, aligned=False, gradients=True).map(lambda graph: (graph, RAGGED_ROWS)),
)


def reference(graph: Graph, name: str, rows: list[list[int]]) -> dict[str, Tensor]:
    hf, prompt = HF[name], batch(rows)

    def forward(intercept: Intercept) -> None:
        """The model itself, with a hook of its own at every site, and blocks that add up the stream in the open."""
        edits = {site: functools.partial(intercept, site) for site in traceable_sites(hf)}
        with edited_at(hf, edits):
            intercept(Site("token_mask"), prompt.mask)
            plain_logits(hf, prompt)

    return evaluate(
        graph,
        forward,
        constants=[constant.tensor for constant in graph.constants],
        parameters=hf.get_parameter,
        select=plain_select(prompt),
    )


@pytest.mark.parametrize("name", ROTARY)
@settings(max_examples=settings().max_examples // 2)
@given(found=GRAPHS)
def test_a_random_graph_equals_its_reference_to_the_last_bit(name, found):
    graph, rows = found
    program = MODELS[name].compile(graph)
    try:
        wanted = reference(graph, name, rows)
    except UnusedGradientError:  # a later write cuts the way from a site to the loss
        with untouched(HF[name]), pytest.raises(UnusedGradientError):
            program(rows)
        return
    with untouched(HF[name]):
        results = program(rows)
    assert list(results) == list(wanted)
    for save in graph.saves:
        carries_positions = bool(graph.types[save.values[0]].padded_axes)
        expected = wanted[save.name]
        if rows is RAGGED_ROWS and carries_positions:
            parts = unpadded(expected, batch(rows))
            assert isinstance(parts, list)
            for actual, part in zip(results[save.name], parts, strict=True):
                assert_same(graph, {save.name: actual}, {save.name: part})
        else:
            assert_same(graph, {save.name: results[save.name]}, {save.name: expected})
