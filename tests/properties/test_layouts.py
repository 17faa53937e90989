"""Programs for places of several ranks, run without devices, equal the reference."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.properties.test_pass_meaning import GRAPHS, HF, meaning
from tests.properties.test_places import AFTER, BEFORE, MODULES, planned, simulated
from tests.support.families import LAYERS
from tracelens.checking import check
from tracelens.ir.layout import Layout, Partial, Replicate, Shard
from tracelens.ir.verify import complaints
from tracelens.placement import Place, Placement
from tracelens.program import lower

HEADS_APART: dict[str, Layout] = {
    **dict.fromkeys(("q", "k", "v", "q_rot", "k_rot", "z"), Shard(2)),
    **dict.fromkeys(("scores", "pattern"), Shard(1)),
    **dict.fromkeys(("mlp_pre", "mlp_up", "mlp_act"), Shard(2)),
}
"""What ranks have of a model's sites where heads and neurons are spread over them."""


@st.composite
def meshes(draw: Any) -> Placement:
    """One place or two, each of some ranks; sites and parameters in parts as a model might have them."""
    ranks, stages = draw(st.sampled_from([(2, 1), (4, 1), (2, 2)]))
    cut = draw(st.integers(1, LAYERS - 1))
    layers = tuple(min(int(layer >= cut), stages - 1) for layer in range(LAYERS))
    ends = {**dict.fromkeys(BEFORE, 0), **dict.fromkeys(AFTER, stages - 1)}
    modules = {path: ends[name] for name, path in MODULES.items()}
    modules |= {f"model.layers.{layer}": place for layer, place in enumerate(layers)}
    places = tuple(Place(index, "cpu", ranks) for index in range(stages))
    names = draw(st.sets(st.sampled_from(sorted(HEADS_APART)), min_size=4))
    # Head norms and the like aside, queries and keys go together in a model, but a plan need not know.
    layouts = {name: HEADS_APART[name] for name in names}
    # As plans of users have them: what ranks add up, streams of which each rank has some positions, single layers.
    streams = ["attn_add", "attn_out", "mlp_add", "mlp_out", "resid_mid", "resid_post", "final_norm"]
    for name in draw(st.sets(st.sampled_from(streams), max_size=4)):
        layouts[name] = draw(st.sampled_from([Partial(), Shard(1)]))
    own: dict[tuple[str, int], Layout] = {
        (name, draw(st.integers(0, LAYERS - 1))): draw(st.sampled_from([Partial(), Shard(1), Replicate()]))
        for name in draw(st.sets(st.sampled_from(streams[:-1]), max_size=2))
    }
    parameters: dict[str, Layout] = {
        path: Shard(draw(st.integers(0, parameter.ndim - 1)))
        for path, parameter in HF.named_parameters()
        if draw(st.booleans())
    }
    return Placement(places, layers, ends, modules, layouts=layouts, parameters=parameters, own_layouts=own)


@settings(max_examples=150)
@given(found=GRAPHS, placement=meshes())
def test_programs_for_several_ranks_equal_the_reference(found, placement):
    graph, batch = found
    wanted = meaning(graph, batch)
    assume(wanted)
    plan = planned(graph, placement)
    assert complaints(plan.graph) == []
    programs = lower(plan)
    check(programs, plan.placement)
    actual = simulated(programs, plan, graph, batch)
    assert actual.keys() == wanted.keys()
    for name, tensor in wanted.items():
        finite = tensor[tensor.isfinite()].abs() if tensor.dtype.is_floating_point else tensor.new_ones(1)
        most = finite.max().item() if finite.numel() else 1.0
        torch.testing.assert_close(
            actual[name], tensor, rtol=1e-4, atol=2e-6 * max(most, 1.0), equal_nan=True
        )
