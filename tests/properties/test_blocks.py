"""Random blocks on tiny models do what they mean, however they are run: promises 2, 4, 8 and 9 of the design."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tracelens as tl
from tests.properties.drawn import permutations, programs, traceable_sites
from tests.properties.plain_language import expected
from tests.properties.programs import Program, names, perform, source
from tests.strategies import plain_select
from tests.support.batches import EVEN, RAGGED, SINGLE, Batch, batch, random_rows
from tests.support.families import FAMILIES, MOST
from tests.support.hand_forward import hand_forward
from tests.support.plain import untouched
from tracelens.ir.graph import Graph
from tracelens.ir.passes.pipeline import improve
from tracelens.ir.verify import complaints
from tracelens.reference import evaluate

ROWS = {"single": random_rows(SINGLE), "even": random_rows(EVEN), "ragged": random_rows(RAGGED)}
HF = {name: family.build() for name, family in FAMILIES.items()}
MODELS = {name: tl.wrap(hf) for name, hf in HF.items()}
SITES = {name: traceable_sites(hf) for name, hf in HF.items()}

EVERY_FAMILY = pytest.mark.parametrize("family", MOST)
# Two ways to compute the same attention (fused and written out) differ by rounding; seen: 3e-6.
RTOL, ATOL = 1e-4, 1e-5
# Each example runs a model of three layers several times; the profile's number is for cheaper ones.
SOME = settings(max_examples=settings().max_examples // 3)


def drawn(data: st.DataObject, family: str, rows: str) -> tuple[Program, Batch]:
    prompt = batch(ROWS[rows])
    return data.draw(programs(SITES[family], aligned=rows != "ragged"), label="block"), prompt


def as_lists(results: object) -> dict[str, list[Tensor]]:
    """Every result as a list: of one tensor, or of one per prompt where rows differ in length."""
    return {name: list(value) if isinstance(value, list) else [value] for name, value in results.items()}


def same(actual: object, wanted: object) -> None:
    """Equal to the last bit (a nan equals itself)."""
    found, want = as_lists(actual), as_lists(wanted)
    assert list(found) == list(want)
    for name, parts in want.items():
        for one, other in zip(found[name], parts, strict=True):
            torch.testing.assert_close(
                one, other, rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
            )


def close(actual: object, wanted: object) -> None:
    found, want = as_lists(actual), as_lists(wanted)
    assert list(found) == list(want)
    for name, parts in want.items():
        for one, other in zip(found[name], parts, strict=True):
            torch.testing.assert_close(one, other, rtol=RTOL, atol=ATOL, msg=lambda m, n=name: f"{n}: {m}")


def traced(family: str, rows: str, program: Program) -> tl.Trace:
    model = MODELS[family]
    with model.trace(ROWS[rows]) as trace:
        perform(program, model)
    return trace


def reference(graph: Graph, family: str, prompt: Batch) -> dict[str, Tensor]:
    hf = HF[family]
    return evaluate(
        graph,
        lambda intercept: hand_forward(hf, *prompt, intercept),
        constants=[constant.tensor for constant in graph.constants],
        parameters=hf.get_parameter,
        select=plain_select(prompt),
    )


@EVERY_FAMILY
@given(data=st.data(), rows=st.sampled_from(list(ROWS)))
def test_a_block_does_what_it_means(family, data, rows):
    program, prompt = drawn(data, family, rows)
    wanted = expected(program, prompt, lambda intercept: hand_forward(HF[family], *prompt, intercept))
    with untouched(HF[family]):
        trace = traced(family, rows, program)
    close(trace.results, wanted)


@EVERY_FAMILY
@SOME
@given(data=st.data(), rows=st.sampled_from(["single", "even"]))
def test_a_recorded_graph_equals_its_reference_evaluation(family, data, rows):
    program, prompt = drawn(data, family, rows)
    trace = traced(family, rows, program)
    assert complaints(trace.graph) == []
    close(trace.results, reference(trace.graph, family, prompt))
    improved = reference(improve(trace.graph, verify_each=True), family, prompt)
    close(
        trace.results, {name: improved[name] for name in trace.results}
    )  # passes may put saves in another order


@SOME
@given(data=st.data(), rows=st.sampled_from(list(ROWS)))
def test_the_same_block_as_source_text_is_the_same_to_the_last_bit(data, rows):
    program, _ = drawn(data, "llama", rows)
    model = MODELS["llama"]
    trace = traced("llama", rows, program)
    with model.trace(ROWS[rows]) as again:
        exec(compile(source(program), "<block>", "exec"), names(model))
    same(again.results, trace.results)


@SOME
@given(data=st.data(), rows=st.sampled_from(list(ROWS)))
def test_statements_that_the_version_rule_leaves_free_may_change_places(data, rows):
    program, _ = drawn(data, "qwen3", rows)
    other = data.draw(permutations(program), label="permuted")
    wanted = dict(traced("qwen3", rows, program).results)
    found = traced("qwen3", rows, other).results
    same({name: found[name] for name in wanted}, wanted)
    assert len(found) == len(wanted)


@EVERY_FAMILY
@SOME
@given(data=st.data())
def test_every_row_of_a_batch_equals_its_solo_run(family, data):
    program, _ = drawn(data, family, "ragged")
    model = MODELS[family]
    together = traced(family, "ragged", program)
    for row, tokens in enumerate(ROWS["ragged"]):
        with model.trace(tokens) as solo:
            perform(program, model)
        for name, wanted in solo.results.items():
            value = together[name]
            if isinstance(value, list):
                torch.testing.assert_close(value[row], wanted, rtol=RTOL, atol=ATOL)
            elif value.shape == wanted.shape:
                pass  # a value without rows of its own: it cannot tell them apart
            else:
                axis = next(
                    a for a, (x, y) in enumerate(zip(value.shape, wanted.shape, strict=True)) if x != y
                )
                torch.testing.assert_close(value.narrow(axis, row, 1), wanted, rtol=RTOL, atol=ATOL)


@SOME
@given(data=st.data(), rows=st.sampled_from(list(ROWS)))
def test_a_compiled_program_equals_the_trace_it_came_from(data, rows):
    program, _ = drawn(data, "llama", rows)
    model = MODELS["llama"]
    trace = traced("llama", rows, program)
    same(model.compile(trace.graph)(ROWS[rows]), trace.results)


@SOME
@given(data=st.data(), rows=st.sampled_from(list(ROWS)))
def test_a_graph_from_a_file_equals_the_trace_it_came_from(data, rows):
    program, _ = drawn(data, "gpt2", rows)
    model = MODELS["gpt2"]
    trace = traced("gpt2", rows, program)
    constants = trace.graph.constants_bytes() if trace.graph.constants else None
    graph = Graph.from_json(trace.graph.to_json(), constants=constants)
    assert graph == trace.graph
    same(model.compile(graph)(ROWS[rows]), trace.results)


@SOME
@given(data=st.data(), mode=st.sampled_from([torch.no_grad, torch.enable_grad, torch.inference_mode]))
def test_every_grad_mode_gives_the_same_bits(data, mode):
    program, _ = drawn(data, "llama", "even")
    wanted = traced("llama", "even", program).results
    with mode():
        found = traced("llama", "even", program).results
    same(found, wanted)
    assert not any(tensor.requires_grad for tensor in found.values())
