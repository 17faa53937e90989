"""Random graphs on models whose weights are offloaded: the bits of the model in memory, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import accelerate
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tracelens as tl
from tests.properties.test_devices import compare
from tests.strategies import graphs
from tests.support.batches import EVEN, RAGGED, random_rows
from tests.support.families import FAMILIES, LAYERS
from tests.support.offloading import WAYS, loaded
from tests.support.plain import untouched
from tests.support.pretend import device_map, pretend_throughout
from tracelens.errors import UnusedGradientError

__all__ = ["pretend_throughout"]

ROTARY = ("llama", "mistral", "qwen2", "qwen3")
EVEN_ROWS, RAGGED_ROWS = random_rows(EVEN), random_rows(RAGGED)
SIZES = {"B": len(EVEN), "P": EVEN[0], "S": EVEN[0]}

GRAPHS = st.one_of(
    graphs().map(lambda graph: (graph, EVEN_ROWS)),
    graphs(aligned=False).map(lambda graph: (graph, RAGGED_ROWS)),
    graphs(sizes=SIZES, gradients=True).map(lambda graph: (graph, EVEN_ROWS)),
)


P = ["pretend:0", "pretend:1", "pretend:2"]


@cache
def _plain(name: str) -> tl.Model:
    return tl.wrap(FAMILIES[name].build(attn="eager"))


@pytest.fixture(scope="module")
def offloaded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tl.Model]:
    @cache
    def build(name: str, way: str) -> tl.Model:
        hf = FAMILIES[name].build(attn="eager")
        return tl.wrap(WAYS[way](hf, tmp_path_factory.mktemp("weights")))

    return build


@pytest.mark.parametrize("way", WAYS)
@given(name=st.sampled_from(ROTARY), found=GRAPHS)
def test_an_offloaded_model_gives_the_same_bits(
    offloaded: Callable[[str, str], tl.Model], way: str, name: str, found: Any
) -> None:
    graph, rows = found
    try:
        wanted = _plain(name).compile(graph)(rows)
    except UnusedGradientError:
        return
    model = offloaded(name, way)
    kept = loaded(model.hf)
    with untouched(model.hf):
        results = model.compile(graph)(rows)
    assert loaded(model.hf) == kept
    assert list(results) == list(wanted)
    for key, expected in wanted.items():
        pairs = (
            zip(results[key], expected, strict=True)
            if isinstance(expected, list)
            else [(results[key], expected)]
        )
        for one, other in pairs:
            assert torch.equal(one.nan_to_num(), other.nan_to_num()), key


@st.composite
def maps(draw: Any) -> dict[str, Any]:
    """Over three devices, with parts that are kept in memory or on disk and run on the first."""
    somewhere = st.sampled_from([*P, "cpu", "disk"])
    layers = draw(st.lists(somewhere, min_size=LAYERS - 1, max_size=LAYERS - 1))
    layers.insert(draw(st.integers(0, LAYERS - 1)), draw(st.sampled_from(P)))
    return {"layers": layers, **{part: draw(somewhere) for part in ("embedding", "norm", "head")}}


@pytest.mark.usefixtures("pretend_throughout")
@settings(max_examples=2 * settings().max_examples)
@given(name=st.sampled_from(ROTARY), found=GRAPHS, parts=maps())
def test_a_model_that_is_spread_and_offloaded_gives_the_same_numbers(
    tmp_path_factory: pytest.TempPathFactory, name: str, found: Any, parts: dict[str, Any]
) -> None:
    graph, rows = found
    try:
        wanted = _plain(name).compile(graph)(rows)
    except UnusedGradientError:
        return
    hf = FAMILIES[name].build(attn="eager")
    accelerate.dispatch_model(
        hf,
        device_map(hf, **parts),
        main_device=torch.device(P[0]),
        offload_dir=tmp_path_factory.mktemp("weights"),
    )
    kept = loaded(hf)
    with untouched(hf):
        results = tl.wrap(hf).compile(graph)(rows)
    assert loaded(hf) == kept
    compare(graph, results, wanted)
