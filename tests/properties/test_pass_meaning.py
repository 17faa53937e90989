"""Every pass preserves what a graph means, is idempotent, and makes graphs that verify: promise 3 of the design."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.strategies import assert_same, graphs, plain_select, type_of
from tests.support.batches import EVEN, RAGGED, random_batch
from tests.support.families import FAMILIES
from tests.support.hand_forward import Intercept, hand_forward
from tracelens.errors import UnusedGradientError
from tracelens.ir.graph import Graph
from tracelens.ir.ops import Read, Save, Write, operands, results
from tracelens.ir.passes.drop_dead import drop_dead
from tracelens.ir.passes.fold_writes import fold_writes
from tracelens.ir.passes.forward_order import forward_order
from tracelens.ir.passes.mark_leaves import mark_leaves
from tracelens.ir.passes.pipeline import PASSES, Pass, improve
from tracelens.ir.passes.share_values import share_values
from tracelens.ir.sites import Site
from tracelens.ir.verify import complaints
from tracelens.placement import Placement
from tracelens.plan import Carry, carry_stream_writes, make_plan
from tracelens.program import lower
from tracelens.reference import evaluate

HF = FAMILIES["llama"].build()
EVEN_BATCH, RAGGED_BATCH = random_batch(EVEN), random_batch(RAGGED)
SIZES = {"B": len(EVEN), "P": EVEN[0], "S": EVEN[0]}
CARRY = (Carry("resid_mid", "mlp_add", "resid_post"),)

GRAPHS = st.one_of(
    graphs().map(lambda graph: (graph, EVEN_BATCH)),
    graphs(sizes=SIZES).map(lambda graph: (graph, EVEN_BATCH)),
    graphs(aligned=False).map(lambda graph: (graph, RAGGED_BATCH)),
    graphs(aligned=False, lengths=RAGGED).map(lambda graph: (graph, RAGGED_BATCH)),
    graphs(sizes=SIZES, gradients=True).map(lambda graph: (graph, EVEN_BATCH)),
    graphs(aligned=False, gradients=True).map(lambda graph: (graph, RAGGED_BATCH)),
)
Forward = Callable[[Intercept], object]


def meaning(graph: Graph, batch: object, forward: Forward | None = None) -> dict[str, Tensor]:
    try:
        return evaluate(
            graph,
            forward or (lambda intercept: hand_forward(HF, *batch, intercept)),
            constants=[constant.tensor for constant in graph.constants],
            parameters=HF.get_parameter,
            select=plain_select(batch),
        )
    except UnusedGradientError:  # a later write cuts the way from a site to the loss
        return {}


@given(GRAPHS)
def test_drawn_graphs_verify_and_their_types_are_true(found):
    graph, batch = found
    assert complaints(graph) == []
    sizes = {"B": batch.mask.shape[0], "P": batch.mask.shape[1], "S": batch.mask.shape[1]}
    for name, tensor in meaning(graph, batch).items():
        save = next(save for save in graph.saves if save.name == name)
        declared = graph.types[save.values[0]]
        stack = (len(save.values),) if save.stacked else ()
        assert tuple(tensor.shape) == (*stack, *declared.sizes(sizes))
        assert str(tensor.dtype) == f"torch.{(save.dtype or declared.dtype).value}"


@pytest.mark.parametrize("step", [*PASSES, improve, mark_leaves], ids=lambda step: step.__name__)
@given(found=GRAPHS)
def test_a_pass_preserves_meaning_verifies_and_is_idempotent(step: Pass, found):
    graph, batch = found
    better = step(graph)
    assert complaints(better) == []
    assert_same(graph, meaning(better, batch), meaning(graph, batch))
    assert step(better) == better
    assert len(better.locations) == len(better.ops)
    assert [(pin.symbol, pin.size) for pin in better.pins] == [(pin.symbol, pin.size) for pin in graph.pins]


@given(GRAPHS)
def test_passes_keep_the_line_of_every_operation(found):
    """A location names the operation of the original graph that this one was, before values were renamed."""
    graph, _ = found
    for step in PASSES:
        better = step(graph)
        for number, op in enumerate(better.ops):
            original = graph.ops[better.location(number).line - 1]
            assert type(original) is type(op)
            if isinstance(op, Read | Write):
                assert original.site == op.site


@given(GRAPHS)
def test_forward_order_is_a_forward_order(found):
    graph, _ = found
    reached = [op.site.sequence for op in forward_order(graph).ops if isinstance(op, Read | Write)]
    assert reached == sorted(reached)


@given(GRAPHS)
def test_improved_graphs_compute_nothing_twice_and_nothing_in_vain(found):
    graph, _ = found
    better = improve(graph)
    assert len(share_values(better).ops) == len(drop_dead(better).ops) == len(better.ops)
    assert all(any(better.uses[out] for out, _ in results(op)) for op in better.ops if results(op))
    assert fold_writes(better) == better


# --- what the plan adds -----------------------------------------------------------------------------------------------


def hooked(batch: object) -> Forward:
    """A forward pass as hooks see it: the block adds up a stream of its own, whatever was written to ``resid_mid``."""

    def forward(intercept: Intercept) -> None:
        own: dict[tuple[str, int | None], Tensor] = {}

        def at(site: Site, tensor: Tensor) -> Tensor:
            if site.name == "resid_post":
                tensor = own["resid_mid", site.layer] + own["mlp_add", site.layer]
            found = intercept(site, tensor)
            own[site.name, site.layer] = tensor if site.name == "resid_mid" else found
            return found

        hand_forward(HF, *batch, at)

    return forward


@given(found=GRAPHS, to_the_end=st.booleans())
def test_carried_writes_reach_the_stream_where_hooks_alone_do_not(found, to_the_end):
    graph, batch = found
    better = forward_order(graph)
    carried = carry_stream_writes(mark_leaves(better), CARRY, type_of=type_of, to_the_end=to_the_end)
    assert complaints(carried) == []
    wanted = meaning(graph, batch)
    assert_same(graph, meaning(carried, batch), wanted)
    assert_same(graph, meaning(carried, batch, hooked(batch)), wanted)


@given(GRAPHS)
def test_a_plan_means_the_same_and_its_program_does_each_operation_once(found):
    graph, batch = found
    plan = make_plan(
        graph, Placement.single("cpu", 3), carries=CARRY, type_of=type_of, generating=False, verify_each=True
    )
    assert complaints(plan.graph) == []
    assert_same(graph, meaning(plan.graph, batch, hooked(batch)), meaning(graph, batch))
    (program,) = lower(plan)
    assert all(step.op == plan.graph.ops[step.number] for step in program.steps())
    done = [(step.number, step.parts) for step in program.steps()]
    saves = [number for number, op in enumerate(plan.graph.ops) if isinstance(op, Save)]
    wanted = [(number, (part,)) for number in saves for part in range(len(plan.graph.ops[number].values))]
    assert sorted(one for one in done if one[0] in saves) == wanted, "each member of a save once"
    rest = sorted(number for number, _ in done if number not in saves)
    assert rest == [number for number in range(len(plan.graph.ops)) if number not in saves]


@given(GRAPHS)
def test_a_value_is_saved_right_after_it_is_made(found):
    graph, _ = found
    plan = make_plan(graph, Placement.single("cpu", 3), carries=CARRY, type_of=type_of, generating=False)
    (program,) = lower(plan)
    made: tuple[int, ...] = ()
    for step in program.steps():
        if isinstance(step.op, Save):
            assert set(step.uses) <= set(made)
        else:
            made = step.makes


@given(GRAPHS)
def test_a_program_uses_values_only_while_they_are_there_and_frees_them_all(found):
    graph, _ = found
    plan = make_plan(graph, Placement.single("cpu", 3), carries=CARRY, type_of=type_of, generating=False)
    (program,) = lower(plan)
    held: set[int] = set()
    written: dict[Site, int] = {}
    reached = [block.site.sequence for block in program.blocks if block.site is not None]
    assert reached == sorted(reached)
    assert [block.site for block in program.blocks].count(None) <= 1
    for block in program.blocks:
        for step in block.steps:
            assert held.issuperset(step.uses if isinstance(step.op, Save) else operands(step.op))
            if isinstance(step.op, Read | Write) and block.site is not None:
                assert step.op.site == block.site
                assert step.op.version == written.get(block.site, 0) + isinstance(step.op, Write)
            if isinstance(step.op, Write):
                written[step.op.site] = step.op.version
            held.update(value for value, _ in results(step.op))
            held.difference_update(step.frees)
    assert not held
