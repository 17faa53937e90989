"""A graph that was changed is refused, or it is a graph that runs as it says: promise 2 of the design."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from tests.ir.forms import ARGS, SYNTAX
from tests.strategies import WRITABLE, assert_same, graphs, plain_select, type_of
from tests.support.batches import EVEN, random_batch
from tests.support.families import FAMILIES
from tests.support.hand_forward import hand_forward
from tracelens.errors import UnusedGradientError, VerificationError
from tracelens.ir.graph import Graph
from tracelens.ir.infer import torch_dtype
from tracelens.ir.ops import Call, Const, Grad, Index, IndexPut, Op, Read, Save, Write, results
from tracelens.ir.passes.rebuild import substitute
from tracelens.ir.types import DType, TensorType
from tracelens.ir.verify import complaints, verify
from tracelens.reference import evaluate

HF = FAMILIES["llama"].build()
BATCH = random_batch(EVEN)
SIZES = {"B": len(EVEN), "P": EVEN[0], "S": EVEN[0]}
GRAPHS = graphs() | graphs(sizes=SIZES) | graphs(sizes=SIZES, gradients=True)
Draw = Callable[[st.SearchStrategy], object]


def meaning(graph: Graph) -> dict[str, Tensor]:
    """Its saves; every value on the way has to be what its type says."""
    try:
        found = evaluate(
            graph,
            lambda intercept: hand_forward(HF, *BATCH, intercept),
            constants=[constant.tensor for constant in graph.constants],
            parameters=HF.get_parameter,
            select=plain_select(BATCH),
        )
    except UnusedGradientError:  # refused by name while it runs, for a reason that no rule can see
        return {}
    for save in graph.saves:
        type_ = graph.types[save.values[0]]
        stack = (len(save.values),) if save.stacked else ()
        assert tuple(found[save.name].shape) == (*stack, *type_.sizes(SIZES))
        assert found[save.name].dtype is torch_dtype(save.dtype or type_.dtype)
    return found


def with_op(graph: Graph, number: int, op: Op) -> Graph:
    return replace(graph, ops=(*graph.ops[:number], op, *graph.ops[number + 1 :]))


def chosen(draw: Draw, graph: Graph, *kinds: type) -> tuple[int, Op]:
    fitting = [(number, op) for number, op in enumerate(graph.ops) if not kinds or isinstance(op, kinds)]
    assume(fitting)
    return draw(st.sampled_from(fitting))


def knowing_its_sites(graph: Graph) -> Graph:
    """A graph knows the type of a site only if it reads it; whoever compiles it for a model knows them all."""
    written = {op.site: op.version for op in graph.writes}
    reads = (
        Read(graph.next_value + n, type_of(site), site, version)
        for n, (site, version) in enumerate(written.items())
    )
    return replace(graph, ops=(*graph.ops, *reads))


# --- changes that leave either the same meaning or no graph ---------------------------------------------------------


@given(graph=GRAPHS, data=st.data())
def test_operations_that_change_places_are_refused_or_mean_the_same(graph, data):
    here, there = (data.draw(st.integers(0, len(graph.ops) - 1)) for _ in range(2))
    ops = list(graph.ops)
    ops[here], ops[there] = ops[there], ops[here]
    mutated = replace(graph, ops=tuple(ops))
    if not complaints(mutated):
        assert_same(graph, meaning(mutated), meaning(graph))


@given(graph=GRAPHS, data=st.data())
def test_an_operation_that_stands_twice_is_refused(graph, data):
    _, op = chosen(data.draw, graph)
    to = data.draw(st.integers(0, len(graph.ops)))
    assert complaints(replace(graph, ops=(*graph.ops[:to], op, *graph.ops[to:])))


@given(graph=GRAPHS, data=st.data())
def test_another_version_is_refused(graph, data):
    number, op = chosen(data.draw, graph, Read, Write)
    version = data.draw(st.integers(-1, 5).filter(lambda version: version != op.version))
    found = complaints(with_op(graph, number, replace(op, version=version)))
    assert ("versions_count_the_writes", number) in [(rule, at) for rule, at, _ in found]


# A mask of uint8 is deprecated in torch, and inference asks torch.
@pytest.mark.filterwarnings("ignore:where received a uint8 condition")
@given(graph=GRAPHS, data=st.data())
def test_another_type_of_a_result_is_refused(graph, data):
    number, op = chosen(data.draw, graph, Const, Call, Index, IndexPut, Grad)
    outs = results(op)
    place = data.draw(st.integers(0, len(outs) - 1))
    type_ = outs[place][1]
    changed = data.draw(
        st.sampled_from(
            [TensorType(dtype, type_.shape) for dtype in DType if dtype is not type_.dtype]
            + [TensorType(type_.dtype, (*type_.shape, 1))]
            + [TensorType(type_.dtype, (7, *type_.shape[1:]))] * (type_.shape[:1] not in ((), (7,)))
        )
    )
    if isinstance(op, Call | Grad):
        types = tuple(changed if at == place else old for at, (_, old) in enumerate(outs))
        mutated = with_op(graph, number, replace(op, types=types))
    else:
        mutated = with_op(graph, number, replace(op, type=changed))
    with pytest.raises(VerificationError):
        verify(mutated)


@given(graph=GRAPHS, data=st.data())
def test_a_value_that_nothing_makes_is_refused(graph, data):
    number, op = chosen(data.draw, graph)
    used = [value for value in graph.types if substitute(op, {value: 10_000}) != op]
    assume(used)
    mutated = with_op(graph, number, substitute(op, {data.draw(st.sampled_from(used)): 10_000}))
    assert {rule for rule, _, _ in complaints(mutated)} == {"values_are_defined_before_use"}


@given(graph=GRAPHS, data=st.data())
def test_two_saves_of_one_name_are_refused(graph, data):
    _, op = chosen(data.draw, graph, Save)
    other = replace(op, values=op.values[:1], stacked=False)
    assert [rule for rule, _, _ in complaints(replace(graph, ops=(*graph.ops, other)))] == [
        "saves_are_named_apart"
    ]


@given(graph=graphs(sizes=SIZES, pinned=True), data=st.data())
def test_a_graph_without_one_of_its_pins_is_refused(graph, data):
    """The recorder pins a size only if the graph is wrong for others."""
    assume(graph.pins)
    pin = data.draw(st.sampled_from(graph.pins))
    assert complaints(replace(graph, pins=tuple(other for other in graph.pins if other is not pin)))


# --- changes that may make another graph: then it has to run, with the types that it names ---------------------------


@given(graph=GRAPHS, data=st.data())
def test_another_operand_is_refused_or_runs_as_typed(graph, data):
    number, op = chosen(data.draw, graph)
    used = [value for value in graph.types if substitute(op, {value: 10_000}) != op]
    assume(used)
    old, new = data.draw(st.sampled_from(used)), data.draw(st.sampled_from(sorted(graph.types)))
    mutated = with_op(graph, number, substitute(op, {old: new}))
    if not complaints(knowing_its_sites(mutated)):
        meaning(mutated)


@given(graph=GRAPHS, data=st.data())
def test_another_site_is_refused_or_runs_as_typed(graph, data):
    number, op = chosen(data.draw, graph, Read, Write)
    mutated = with_op(graph, number, replace(op, site=data.draw(st.sampled_from(WRITABLE))))
    assume(all(read.type == type_of(read.site) for read in mutated.reads))
    if not complaints(knowing_its_sites(mutated)):
        meaning(mutated)


@given(graph=GRAPHS, data=st.data())
def test_a_dropped_operation_is_refused_or_leaves_a_graph_that_runs(graph, data):
    number, op = chosen(data.draw, graph)
    mutated = replace(graph, ops=(*graph.ops[:number], *graph.ops[number + 1 :]))
    if not complaints(mutated):
        rest = meaning(mutated)
        if not isinstance(op, Write):
            whole = meaning(graph)
            assert_same(graph, rest, {name: value for name, value in whole.items() if name in rest})


# --- and whatever else may come out of a file -----------------------------------------------------------------------


@given(SYNTAX)
def test_the_verifier_has_an_answer_to_everything_that_can_be_written(graph):
    for rule, number, problem in complaints(graph):
        assert rule
        assert problem
        assert 0 <= number < len(graph.ops)


@given(graph=GRAPHS, data=st.data())
def test_the_verifier_has_an_answer_to_calls_with_any_arguments(graph, data):
    number, op = chosen(data.draw, graph, Call)
    mutated = with_op(graph, number, replace(op, args=(*op.args[:1], data.draw(ARGS))))
    if not complaints(mutated):
        meaning(mutated)
