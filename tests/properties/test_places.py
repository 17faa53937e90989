"""Programs for several places, run without devices, equal the reference: promise 4 of the design."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.properties.test_pass_meaning import CARRY, EVEN_BATCH, GRAPHS, HF, hooked, meaning
from tests.strategies import assert_same, plain_select, type_of
from tests.support.families import LAYERS
from tracelens.checking import check
from tracelens.errors import TracelensError, VerificationError
from tracelens.ir.graph import Graph
from tracelens.ir.ops import Call, Grad, Read, Save, Transfer, Write, moment, operands
from tracelens.ir.parse import parse
from tracelens.ir.passes.pipeline import improve
from tracelens.ir.sites import Site
from tracelens.ir.verify import complaints
from tracelens.placement import Place, Placement
from tracelens.plan import Plan, make_plan
from tracelens.program import Block, Program, Side, Step, lower, merged
from tracelens.pushing import push_indices
from tracelens.simulate import simulate

BEFORE, AFTER = ("token_mask", "embed"), ("final_norm", "lm_head", "logits")
MODULES = {"embed": "model.embed_tokens", "final_norm": "model.norm", "lm_head": "lm_head"}
# Loaded where they are needed first, so that they may be at any moment of the pass.
EVERY_WEIGHT = st.just(frozenset(dict(HF.named_parameters())))


@st.composite
def placements(draw: Any) -> Placement:
    """Any layer anywhere, in runs or not, and the ends too: a head on the first device, say."""
    count = draw(st.sampled_from([2, 3, 5]))
    numbers = st.integers(0, count - 1)
    layers = tuple(draw(st.lists(numbers, min_size=LAYERS, max_size=LAYERS)))
    ends = {name: draw(numbers) for name in (*BEFORE, *AFTER)}
    modules = {path: ends[name] for name, path in MODULES.items()}
    modules |= {f"model.layers.{layer}": place for layer, place in enumerate(layers)}
    places = tuple(Place(index, f"cuda:{index}") for index in range(count))
    offloaded = draw(st.frozensets(st.sampled_from(sorted(dict(HF.named_parameters())))) | EVERY_WEIGHT)
    return Placement(places, layers, ends, modules, brought=offloaded)


def planned(graph: Graph, placement: Placement) -> Plan:
    return make_plan(graph, placement, carries=CARRY, type_of=type_of, generating=False)


def simulated(programs: tuple[Program, ...], plan: Plan, graph: Graph, batch: Any) -> dict[str, Tensor]:
    return simulate(
        programs,
        plan.graph,
        plan.placement,
        hooked(batch),
        constants=[constant.tensor for constant in graph.constants],
        parameters=HF.get_parameter,
        select=plain_select(batch),
        layouts=plan.layouts,
    )


@settings(max_examples=1000)
@given(found=GRAPHS, placement=placements())
def test_simulated_programs_equal_the_reference(found, placement):
    graph, batch = found
    wanted = meaning(graph, batch)
    assume(wanted)  # not where a write cuts the way from a site to a loss
    plan = planned(graph, placement)
    assert complaints(plan.graph) == []
    programs = lower(plan)
    check(programs, placement)
    assert_same(graph, simulated(programs, plan, graph, batch), wanted)


@given(found=GRAPHS, placement=placements())
def test_every_operation_finds_its_operands_at_its_own_place(found, placement):
    """Said again, of the plan alone and in other words than the checker's."""
    plan = planned(found[0], placement)
    ops = plan.graph.ops
    seen: set[tuple[int, int]] = set()
    for op, there in zip(ops, plan.at, strict=True):
        if isinstance(op, Transfer):
            assert there == op.source == plan.home[op.value] != op.target == plan.home[op.out]
            assert (op.value, op.target) not in seen, "a value is sent to a place once"
            seen.add((op.value, op.target))
        elif isinstance(op, Read | Write):
            assert there == placement.place_of(moment(op) if isinstance(op, Read) else op.site).index
        if not isinstance(op, Save | Grad | Transfer):
            assert {plan.home[value] for value in operands(op)} <= {there}


@given(found=GRAPHS, placement=placements())
def test_one_process_does_each_operation_once_and_in_order(found, placement):
    plan = planned(found[0], placement)
    steps = [step for block in merged(lower(plan)) for step in block.steps]
    done = [step.number for step in steps if step.side is not Side.ARRIVE and not isinstance(step.op, Save)]
    assert sorted(done) == [number for number, op in enumerate(plan.graph.ops) if not isinstance(op, Save)]
    held: set[int] = set()
    for step in steps:
        if step.side is not Side.ARRIVE:
            assert held.issuperset(step.uses)
        made = (step.op.out,) if isinstance(step.op, Transfer) else step.makes
        held.update(made)
        held.difference_update(step.frees)
    assert not held


@given(found=GRAPHS, placement=placements())
def test_pushed_indices_mean_the_same(found, placement):
    graph, batch = found
    better = push_indices(improve(graph), placement)
    assert complaints(better) == []
    assert_same(graph, meaning(better, batch), meaning(graph, batch))
    assert push_indices(better, placement) == better


# --- what travels -----------------------------------------------------------------------------------------------------

SPLIT = Placement(
    tuple(Place(index, f"cuda:{index}") for index in range(3)),
    (0, 1, 2),
    {"final_norm": 2, "lm_head": 2, "logits": 2},
    {"model.layers.1": 1, "model.layers.2": 2, "model.norm": 2, "lm_head": 2},
)


def sent(text: str) -> list[tuple[str, int, int]]:
    plan = planned(parse(text), SPLIT)
    check(lower(plan), SPLIT)
    return [(str(op.type), op.source, op.target) for op in plan.transfers]


def loaded(*lines: str, norm: int = 0) -> list[str]:
    """Where the head's and the norm's weights, which are offloaded, are loaded."""
    modules = {"model.layers.1": 1, "model.layers.2": 2, "model.norm": norm}
    offloaded = frozenset({"lm_head.weight", "model.norm.weight"})
    placement = replace(SPLIT, modules=modules, brought=offloaded)
    plan = planned(parse("\n".join(["graph {", *lines, "}"])), placement)
    check(lower(plan), placement)
    return [line.strip() for line in plan.text().splitlines() if line.strip().startswith("loads")]


READS = (
    "%0 = read layers.0.resid_post@0 : f32[B,P,48]",
    "%1 = read layers.0.mlp_out@0 : f32[B,P,48]",
    "%2 = read layers.2.resid_post@0 : f32[B,P,48]",
)


def test_an_offloaded_weight_is_loaded_where_it_is_needed_first() -> None:
    weight = '%3 = param "model.norm.weight" : f32[48]'
    used = ("%4 = call torch.neg(%3) : f32[48]", "%5 = call torch.mul(%0, %4) : f32[B,P,48]")
    again = "%6 = call torch.mul(%1, %3) : f32[B,P,48]"
    said = "loads model.norm.weight f32[48] for place 0"
    assert loaded(*READS, weight, *used, 'save "h" <- %5') == [f"{said} at layers.0.resid_post"]
    assert loaded(*READS, weight, *used, again, 'save "h" <- %5', 'save "i" <- %6') == [
        f"{said} at layers.0.mlp_out"
    ]
    # What leaves by itself is there from the beginning.
    assert loaded(*READS, weight, *used, 'save "h" <- %5', 'save "w" <- %3') == [f"{said} before the pass"]


def test_what_is_sent_is_not_put_off() -> None:
    """Between two places values arrive in the order of the operations that send them, whenever they are needed."""
    lines = (
        '%3 = param "lm_head.weight" : f32[97,48]',
        '%4 = param "model.norm.weight" : f32[48]',
        "%5 = call torch.matmul(%3, %4) : f32[97]",
        '%6 = param "model.layers.2.input_layernorm.weight" : f32[48]',
        "%7 = call torch.mul(%1, %6) : f32[B,P,48]",
        "write layers.0.mlp_out@1 <- %7",
        "%8 = read layers.0.resid_post@0 : f32[B,P,48]",
        "%9 = index %5[:48] : f32[48]",
        "%10 = call torch.mul(%8, %9) : f32[B,P,48]",
        'save "h" <- %10',
    )
    assert loaded(READS[1], *lines, norm=2) == [
        "loads lm_head.weight f32[97,48] for place 0 before the pass",
        "loads model.norm.weight f32[48] for place 2 before the pass",
    ]


def test_an_index_travels_before_the_sum_that_it_was_taken_of() -> None:
    text = """graph {
      %0 = read layers.0.resid_post@0 : f32[B,P,48]
      %1 = read layers.2.resid_post@0 : f32[B,P,48]
      %2 = call torch.add(%0, %1) : f32[B,P,48]
      %3 = index %2[:, -1] : f32[B,48]
      save "h" <- %3
    }"""
    assert sent(text) == [("f32[B,48]", 0, 2)]


def test_an_index_stays_behind_a_sum_whose_whole_is_needed_too() -> None:
    text = """graph {
      %0 = read layers.0.resid_post@0 : f32[B,P,48]
      %1 = read layers.2.resid_post@0 : f32[B,P,48]
      %2 = call torch.add(%0, %1) : f32[B,P,48]
      %3 = index %2[:, -1] : f32[B,48]
      save "h" <- %3
      save "all" <- %2
    }"""
    assert sent(text) == [("f32[B,P,48]", 0, 2)]


def test_an_index_that_a_broadcast_operand_has_not_is_left_out_there() -> None:
    text = """graph {
      %0 = read layers.0.resid_post@0 : f32[B,P,48]
      %1 = read layers.2.resid_post@0 : f32[B,P,48]
      %2 = call torch.mean(%1, 1, True) : f32[B,1,48]
      %3 = call torch.add(%0, %2) : f32[B,P,48]
      %4 = index %3[:, -2] : f32[B,48]
      save "h" <- %4
    }"""
    assert sent(text) == [("f32[B,48]", 0, 2)]


def test_an_index_stays_where_nothing_would_travel() -> None:
    graph = parse("""graph {
      %0 = read layers.2.mlp_out@0 : f32[B,P,48]
      %1 = read layers.2.resid_post@0 : f32[B,P,48]
      %2 = call torch.add(%0, %1) : f32[B,P,48]
      %3 = index %2[:, -1] : f32[B,48]
      save "h" <- %3
    }""")
    assert push_indices(graph, SPLIT) == graph


def test_an_index_stays_behind_what_is_not_computed_element_by_element() -> None:
    """Here the types would be the same, and the numbers those of other elements."""
    graph = parse("""graph {
      %0 = param "model.layers.0.self_attn.q_proj.weight" : f32[48,48]
      %1 = param "model.layers.2.self_attn.q_proj.weight" : f32[48,48]
      %2 = call torch.einsum("ij,ij->ji", %0, %1) : f32[48,48]
      %3 = index %2[3:5, 7:9] : f32[2,2]
      save "h" <- %3
    }""")
    placement = replace(SPLIT, modules={"model.layers.0": 0, **SPLIT.modules})
    assert push_indices(graph, placement) == graph
    times = replace(
        graph,
        ops=tuple(
            replace(op, function="torch.mul", args=op.args[1:]) if isinstance(op, Call) else op
            for op in graph.ops
        ),
    )
    assert push_indices(times, placement) != times


def test_reductions_are_done_where_the_data_is_and_stacks_leave_from_there() -> None:
    lines = [f"%{2 * i} = read layers.{i}.resid_post@0 : f32[B,P,48]" for i in range(3)]
    lines += [f"%{2 * i + 1} = call torch.norm(%{2 * i}, dim=(-1,)) : f32[B,P]" for i in range(3)]
    text = "graph {\n" + "\n".join([*lines, 'save "norms" <- stack(%1, %3, %5)']) + "\n}"
    assert sent(text) == []
    plan = planned(parse(text), SPLIT)
    assert [step.parts for program in lower(plan) for step in program.steps() if isinstance(step.op, Save)] == [
        (0,), (1,), (2,),
    ]  # fmt: skip


@pytest.mark.parametrize("places", [(0, 1, 2), (0, 0, 0), (0, 1, 0)])
def test_a_member_of_a_stack_is_saved_as_soon_as_it_is_there(places: tuple[int, ...]) -> None:
    """And what it was read from is not needed from then on."""
    lines = [f"%{i} = read layers.{i}.resid_post@0 : f32[B,P,48]" for i in range(3)]
    lines += [f"%{3 + i} = index %{i}[:, -1] : f32[B,48]" for i in range(3)]
    text = "graph {\n" + "\n".join([*lines, 'save "h" <- stack(%5, %3, %4) dtype=bf16']) + "\n}"
    programs = lower(planned(parse(text), replace(SPLIT, layers=places)))
    check(programs, replace(SPLIT, layers=places))
    saving = sorted(
        (str(block.site), program.place.index, step.parts)
        for program in programs
        for block in program.blocks
        for step in block.steps
        if isinstance(step.op, Save)
    )
    assert saving == [(f"layers.{layer}.resid_post", places[layer], ((layer + 1) % 3,)) for layer in range(3)]
    for program in programs:
        for block in program.blocks:
            assert [step.text.split()[0] for step in block.steps][1:] in (
                [f"%{i}", "save"] for i in (3, 4, 5)
            )
            made = {value for step in block.steps for value in step.makes}
            assert made == {value for step in block.steps for value in step.frees}
    shown = "\n".join(program.text() for program in programs)
    assert 'save "h"[0] <- %5 dtype=bf16   free %5' in shown


def test_a_member_that_is_sent_is_received_after_what_was_sent_before_it() -> None:
    """It could be saved before layer 1, where the place receives what was sent earlier."""
    text = """graph {
      %0 = read layers.0.resid_mid@0 : f32[B,P,48]
      %1 = read layers.0.resid_post@0 : f32[B,P,48]
      %2 = read layers.1.resid_post@0 : f32[B,P,48]
      %3 = call torch.add(%2, %0) : f32[B,P,48]
      %4 = read layers.2.resid_post@0 : f32[B,P,48]
      save "sum" <- %3
      save "h" <- stack(%1, %4) device=keep dtype=bf16
    }"""
    placement = replace(SPLIT, layers=(0, 1, 1))
    plan = planned(parse(text), placement)
    programs = lower(plan)
    check(programs, placement)
    received = [step.op.value for step in programs[1].steps() if isinstance(step.op, Transfer)]
    assert received == [0, 1]
    saving = [
        (str(block.site), step.parts)
        for block in programs[1].blocks
        for step in block.steps
        if isinstance(step.op, Save) and step.op.name == "h"
    ]
    assert saving == [("layers.1.resid_post", (0,)), ("layers.2.resid_post", (1,))]
    wanted = meaning(parse(text), EVEN_BATCH)
    found = simulated(programs, plan, parse(text), EVEN_BATCH)
    assert all(torch.equal(found[name], wanted[name]) for name in ("sum", "h"))


def test_a_stack_that_stays_on_a_device_is_brought_together_there() -> None:
    lines = [f"%{i} = read layers.{i}.resid_post@0 : f32[B,P,48]" for i in range(3)]
    text = "graph {\n" + "\n".join([*lines, 'save "h" <- stack(%0, %1, %2) device=keep']) + "\n}"
    assert sent(text) == [("f32[B,P,48]", 0, 2), ("f32[B,P,48]", 1, 2)]


def test_constants_lie_at_every_place_and_what_is_cheaply_made_of_them() -> None:
    text = """graph {
      %0 = const #0 : f32[48]
      %1 = call torch.mul(%0, 2.0) : f32[48]
      %2 = read layers.0.resid_post@0 : f32[B,P,48]
      %3 = call torch.add(%2, %1) : f32[B,P,48]
      write layers.0.resid_post@1 <- %3
      %4 = read layers.2.resid_post@0 : f32[B,P,48]
      %5 = call torch.add(%4, %1) : f32[B,P,48]
      save "h" <- %5
    }"""
    assert sent(text) == []


def test_a_parameter_stays_where_it_is_unless_something_is_written_of_it() -> None:
    text = """graph {
      %0 = param "lm_head.weight" : f32[101,48]
      %1 = read layers.0.resid_post@0 : f32[B,P,48]
      %2 = call torch.nn.functional.linear(%1, %0) : f32[B,P,101]
      save "lens" <- %2
    }"""
    assert sent(text) == [("f32[B,P,48]", 0, 2)]
    text = """graph {
      %0 = param "lm_head.weight" : f32[101,48]
      %1 = index %0[7] : f32[48]
      %2 = read layers.0.resid_post@0 : f32[B,P,48]
      %3 = call torch.add(%2, %1) : f32[B,P,48]
      write layers.0.resid_post@1 <- %3
      %4 = read logits@0 : f32[B,P,101]
      save "logits" <- %4
    }"""
    assert sent(text) == [("f32[48]", 2, 0)]


def test_a_value_travels_once_to_each_place_whoever_reads_it() -> None:
    text = """graph {
      %0 = read layers.0.resid_post@0 : f32[B,P,48]
      %1 = read layers.2.mlp_out@0 : f32[B,P,48]
      %2 = call torch.add(%0, %1) : f32[B,P,48]
      %3 = read layers.2.resid_post@0 : f32[B,P,48]
      %4 = call torch.mul(%0, %3) : f32[B,P,48]
      save "a" <- %2
      save "b" <- %4
    }"""
    assert sent(text) == [("f32[B,P,48]", 0, 2)]


# --- what the checker and the simulator catch -------------------------------------------------------------------------

MIXED = """graph {
  %0 = read layers.0.resid_post@0 : f32[B,P,48]
  %1 = call torch.mul(%0, 2.0) : f32[B,P,48]
  %2 = read layers.1.resid_post@0 : f32[B,P,48]
  %3 = call torch.add(%2, %0) : f32[B,P,48]
  %4 = call torch.mul(%3, %1) : f32[B,P,48]
  write layers.1.resid_post@1 <- %4
  %5 = read logits@0 : f32[B,P,101]
  save "logits" <- %5
}"""


OVERTAKEN = """graph {
  %0 = read layers.0.resid_post@0 : f32[B,P,48]
  %1 = call torch.mul(%0, 2.0) : f32[B,P,48]
  %2 = read layers.1.resid_post@0 : f32[B,P,48]
  %3 = call torch.add(%2, %1) : f32[B,P,48]
  %4 = call torch.mul(%3, %0) : f32[B,P,48]
  save "h" <- %4
}"""
"""What is sent first is needed last."""


def test_what_was_sent_first_is_received_first_whoever_needs_it() -> None:
    programs = lower(planned(parse(OVERTAKEN), SPLIT))
    ops = [step.op for step in programs[1].steps() if isinstance(step.op, Transfer)]
    assert [op.value for op in ops] == [0, 1]
    check(programs, SPLIT)
    with pytest.raises(VerificationError, match=r"%0 is sent where %1 is expected"):
        check(swapped(programs, Side.RECEIVE), SPLIT)


def steps_of(programs: tuple[Program, ...], side: Side) -> list[tuple[int, int, int]]:
    """Where the steps of a kind are: place, block, step."""
    return [
        (place, number, index)
        for place, program in enumerate(programs)
        for number, block in enumerate(program.blocks)
        for index, step in enumerate(block.steps)
        if step.side is side and isinstance(step.op, Transfer)
    ]


def with_steps(
    programs: tuple[Program, ...], place: int, block: int, steps: tuple[Step, ...]
) -> tuple[Program, ...]:
    changed = list(programs)
    blocks = list(changed[place].blocks)
    blocks[block] = Block(blocks[block].site, steps)
    changed[place] = replace(changed[place], blocks=tuple(blocks))
    return tuple(changed)


def without(programs: tuple[Program, ...], side: Side) -> tuple[Program, ...]:
    place, block, index = steps_of(programs, side)[0]
    steps = programs[place].blocks[block].steps
    return with_steps(programs, place, block, (*steps[:index], *steps[index + 1 :]))


def swapped(programs: tuple[Program, ...], side: Side) -> tuple[Program, ...]:
    (place, block, one), (_, _, two) = steps_of(programs, side)[:2]
    steps = list(programs[place].blocks[block].steps)
    steps[one], steps[two] = steps[two], steps[one]
    return with_steps(programs, place, block, tuple(steps))


def crossed(programs: tuple[Program, ...]) -> tuple[Program, ...]:
    """Each of two sends takes the other's value."""
    (place, block, one), (_, _, two) = steps_of(programs, Side.SEND)[:2]
    steps = list(programs[place].blocks[block].steps)
    first, second = steps[one].op, steps[two].op
    assert isinstance(first, Transfer)
    assert isinstance(second, Transfer)
    steps[one] = replace(steps[one], op=replace(first, value=second.value), frees=())
    steps[two] = replace(steps[two], op=replace(second, value=first.value))
    return with_steps(programs, place, block, tuple(steps))


def late(programs: tuple[Program, ...]) -> tuple[Program, ...]:
    """A value is received after its use."""
    place, block, index = steps_of(programs, Side.RECEIVE)[0]
    steps = programs[place].blocks[block].steps
    return with_steps(programs, place, block, (*steps[:index], *steps[index + 1 :], steps[index]))


STACKED = """graph {
  %0 = read layers.0.resid_post@0 : f32[B,P,48]
  %1 = read layers.1.resid_post@0 : f32[B,P,48]
  save "h" <- stack(%0, %1, %0)
}"""


@pytest.mark.parametrize(("parts", "said"), [((), "1, 2"), ((1,), "1, 1, 2")])
def test_the_checker_refuses_a_stack_of_which_a_member_is_not_saved_once(
    parts: tuple[int, ...], said: str
) -> None:
    programs = lower(planned(parse(STACKED), SPLIT))
    check(programs, SPLIT)
    *steps, first, third = programs[0].blocks[0].steps
    assert (first.parts, third.parts) == ((0,), (2,))
    changed = with_steps(programs, 0, 0, (*steps, replace(first, parts=parts), third))
    with pytest.raises(
        VerificationError, match=rf"of the 3 members of 'h' those numbered \[{said}\] are saved"
    ):
        check(changed, SPLIT)


MUTATIONS = {
    "a send is missing": lambda programs: without(programs, Side.SEND),
    "a receive is missing": lambda programs: without(programs, Side.RECEIVE),
    "two sends change places": lambda programs: swapped(programs, Side.SEND),
    "two receives change places": lambda programs: swapped(programs, Side.RECEIVE),
    "two sends take each other's values": crossed,
    "a value is used before it arrives": late,
}


@pytest.fixture
def mixed() -> tuple[Plan, tuple[Program, ...]]:
    plan = planned(parse(MIXED), SPLIT)
    programs = lower(plan)
    check(programs, SPLIT)
    assert len(plan.transfers) == 2
    return plan, programs


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_checker_refuses(name, mixed) -> None:
    with pytest.raises(VerificationError, match="the programs do not fit together"):
        check(MUTATIONS[name](mixed[1]), SPLIT)


def test_the_checker_refuses_what_would_arrive_before_the_pass_comes_to_where_it_is_sent(mixed) -> None:
    first = mixed[1][0]
    (block,) = first.blocks
    *steps, last = block.steps
    assert last.side is Side.SEND
    later = (Block(block.site, tuple(steps)), Block(Site("resid_post", 2), (last,)))
    with pytest.raises(VerificationError, match="is received from place 0 to place 1 before it is sent"):
        check((replace(first, blocks=later), *mixed[1][1:]), SPLIT)


@pytest.mark.parametrize("name", [name for name in MUTATIONS if "change places" not in name])
def test_the_simulator_refuses_or_gives_other_numbers(name, mixed) -> None:
    plan, programs = mixed
    graph = parse(MIXED)
    right = simulated(programs, plan, graph, EVEN_BATCH)
    assert torch.equal(right["logits"], meaning(graph, EVEN_BATCH)["logits"])
    try:
        found = simulated(MUTATIONS[name](programs), plan, graph, EVEN_BATCH)
    except TracelensError:
        return
    assert not torch.equal(found["logits"], right["logits"])


@settings(max_examples=2 * settings().max_examples)
@given(found=GRAPHS, placement=placements(), data=st.data())
def test_random_programs_that_lack_a_transfer_are_refused(found, placement, data):
    plan = planned(found[0], placement)
    programs = lower(plan)
    if not plan.transfers:
        return
    side = data.draw(st.sampled_from([Side.SEND, Side.RECEIVE]))
    with pytest.raises(VerificationError):
        check(without(programs, side), placement)


def test_programs_are_shown_with_what_they_send(mixed) -> None:
    plan, programs = mixed
    assert "send %0 -> place 1" in programs[0].text()
    assert "recv <- place 0 (its %0) : f32[B,P,48]" in programs[1].text()
    assert "sends %0 f32[B,P,48] from place 0 to place 1 after layers.0.resid_post" in plan.text()
    sizes = {"B": 2, "P": 5, "S": 5}
    assert "between places: 3.8 KiB" in plan.text(sizes)
