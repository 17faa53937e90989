"""A random graph on a model that ranks share equals its reference evaluation: promise 4, on real ranks.

What is added up by several ranks is added up in another order, so that the numbers agree within rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tracelens as tl
from tests.properties.plain_language import unpadded
from tests.properties.test_graphs_on_models import EVEN_ROWS, HF, MODELS, RAGGED_ROWS, SIZES, reference
from tests.strategies import graphs
from tests.support.batches import RAGGED, batch
from tests.support.ranks import PoolOf
from tests.support.spread_models import relative_error
from tracelens.errors import TracelensError
from tracelens.ir.graph import Graph
from tracelens.ir.ops import Keep, Save

TOLERANCE = 1e-4
EXAMPLES = settings().max_examples // 2


def brought_back(graph: Graph) -> Graph:
    """The same with nothing kept on the ranks' devices, which they refuse."""
    ops = tuple(replace(op, keep=Keep.CPU) if isinstance(op, Save) else op for op in graph.ops)
    return replace(graph, ops=ops)


GRAPHS = st.one_of(
    graphs(narrow=False).map(lambda graph: (brought_back(graph), EVEN_ROWS)),
    graphs(sizes=SIZES, narrow=False).map(lambda graph: (brought_back(graph), EVEN_ROWS)),
    graphs(aligned=False, narrow=False).map(lambda graph: (brought_back(graph), RAGGED_ROWS)),
    graphs(aligned=False, narrow=False, lengths=RAGGED).map(lambda graph: (brought_back(graph), RAGGED_ROWS)),
)
GRADIENTS = st.one_of(
    graphs(sizes=SIZES, gradients=True).map(lambda graph: (brought_back(graph), EVEN_ROWS)),
    graphs(gradients=True, aligned=False).map(lambda graph: (brought_back(graph), RAGGED_ROWS)),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("models")
    for name in ("llama", "qwen2"):
        HF[name].save_pretrained(found / name)
    return found


@pytest.fixture(scope="module")
def tensor_parallel(folder: Path, ranks_of: PoolOf) -> Iterator[tl.Model]:
    model = tl.load(folder / "llama", tp=2, ranks=ranks_of(2), attn_implementation="eager")
    yield model
    model.close()


@pytest.fixture(scope="module")
def pipeline(folder: Path, ranks_of: PoolOf) -> Iterator[tl.Model]:
    model = tl.load(folder / "qwen2", pp=2, ranks=ranks_of(2), attn_implementation="eager")
    yield model
    model.close()


@settings(max_examples=EXAMPLES)
@given(found=GRAPHS)
def test_a_random_graph_on_two_ranks_that_share_layers(found, tensor_parallel: tl.Model) -> None:
    same_as_reference(tensor_parallel, "llama", *found)


@settings(max_examples=EXAMPLES)
@given(found=GRADIENTS)
def test_gradients_of_a_random_graph_on_two_ranks(found, tensor_parallel: tl.Model) -> None:
    same_as_reference(tensor_parallel, "llama", *found)


@settings(max_examples=EXAMPLES)
@given(found=GRAPHS)
def test_a_random_graph_on_two_stages(found, pipeline: tl.Model) -> None:
    same_as_reference(pipeline, "qwen2", *found)


def same_as_reference(model: tl.Model, name: str, graph: Graph, rows: list[list[int]]) -> None:
    program = model.compile(graph)
    try:
        MODELS[name].compile(graph)(rows)
    except TracelensError as refusal:  # a write that cuts the way to a loss; an axis of ragged keys
        with pytest.raises(type(refusal)):
            program(rows)
        return
    wanted = reference(graph, name, rows)
    results = program(rows)
    assert list(results) == list(wanted)
    for save in graph.saves:
        expected, actual = wanted[save.name], results[save.name]
        if rows is RAGGED_ROWS and graph.types[save.values[0]].padded_axes:
            expected = unpadded(expected, batch(rows))
        pairs = [(actual, expected)] if isinstance(expected, Tensor) else zip(actual, expected, strict=True)
        for one, other in pairs:
            same(one, other)


def same(actual: Tensor, expected: Tensor) -> None:
    if not expected.dtype.is_floating_point:
        assert torch.equal(actual, expected)
    elif expected.numel():
        strange = ~expected.isfinite()
        torch.testing.assert_close(actual[strange], expected[strange], equal_nan=True)
        if not strange.all():
            zero = torch.zeros((), dtype=expected.dtype)
            error = relative_error(torch.where(strange, zero, actual), torch.where(strange, zero, expected))
            assert error <= TOLERANCE or actual.abs().max() == expected.abs().max() == 0
