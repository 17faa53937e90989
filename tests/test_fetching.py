"""Where a parameter meets what the layers show, the lighter of the two travels; in a lens, never both ways."""

from __future__ import annotations

from itertools import product
from typing import Any

import accelerate
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tracelens as tl
from tests.support.families import EVERY, LAYERS
from tests.support.pretend import Pretend, device_map, pretend
from tracelens import fetching, placing
from tracelens.checking import check
from tracelens.ir.parse import parse
from tracelens.placement import Place, Placement
from tracelens.plan import Plan, make_plan
from tracelens.program import lower

__all__ = ["pretend"]

P = [f"pretend:{index}" for index in range(3)]
IDS = [[5, 6, 7, 8, 9], [11, 12, 13, 14, 15]]
D = 8
NOMINAL = {"B": 1, "P": 64, "S": 64}


def split(layers: tuple[int, ...], norm: int, head: int) -> Placement:
    """Layers, final norm and head on three devices."""
    modules = {f"model.layers.{layer}": place for layer, place in enumerate(layers)}
    return Placement(
        tuple(Place(index, f"cuda:{index}") for index in range(3)),
        layers,
        {"final_norm": norm, "lm_head": head, "logits": head},
        {**modules, "model.norm": norm, "lm_head": head},
    )


def planned(text: str, placement: Placement) -> Plan:
    def type_of(_: Any) -> Any:
        raise AssertionError("nothing is carried")

    plan = make_plan(parse(text), placement, carries=(), type_of=type_of, generating=False)
    check(lower(plan), placement)
    return plan


def sent(text: str, placement: Placement) -> list[tuple[str, int, int]]:
    return [(str(op.type), op.source, op.target) for op in planned(text, placement).transfers]


def lens(layers: int = 3, *, words: int = 1000, stream: str = "B,P") -> str:
    """The streams of the layers times the norm's weight, and of these the head."""
    lines = [f'%0 = param "model.norm.weight" : f32[{D}]', f'%1 = param "lm_head.weight" : f32[{words},{D}]']
    number, saved = 2, []
    for layer in range(layers):
        whole, value = number, number
        lines.append(f"%{whole} = read layers.{layer}.resid_post@0 : f32[B,P,{D}]")
        if stream == "B":
            value = (number := number + 1)
            lines.append(f"%{value} = index %{whole}[:, -1] : f32[B,{D}]")
        lines += [
            f"%{number + 1} = call torch.mul(%0, %{value}) : f32[{stream},{D}]",
            f"%{number + 2} = call torch.neg(%{number + 1}) : f32[{stream},{D}]",
            f"%{number + 3} = call torch.relu(%{number + 2}) : f32[{stream},{D}]",
            f"%{number + 4} = call torch.nn.functional.linear(%{number + 3}, %1) : f32[{stream},{words}]",
            f"%{number + 5} = call torch.argmax(%{number + 4}, -1) : i64[{stream}]",
        ]
        saved.append(f"%{number + 5}")
        number += 6
    return "graph {\n" + "\n".join([*lines, f'save "lens" <- stack({", ".join(saved)})']) + "\n}"


STREAM, NORM = f"f32[B,P,{D}]", f"f32[{D}]"


def test_the_weight_of_a_norm_is_sent_to_the_layers_once_to_each_place() -> None:
    """The head is on the first device, as where it shares its weight with the embedding."""
    found = sent(lens(6), split((0, 0, 1, 1, 2, 2), norm=2, head=0))
    streams = [(STREAM, place, 0) for place in (1, 1, 2, 2)]
    assert sorted(found) == sorted([(NORM, 2, 0), (NORM, 2, 1), *streams])


def test_streams_that_go_to_the_head_anyway_take_the_norm_on_their_way() -> None:
    found = sent(lens(6), split((0, 0, 1, 1, 2, 2), norm=2, head=2))
    assert found == [(STREAM, 0, 2)] * 2 + [(STREAM, 1, 2)] * 2


def test_a_head_that_is_small_beside_what_it_meets_is_sent_too() -> None:
    found = sent(lens(words=3), split((0, 1, 2), norm=2, head=2))
    assert sorted(found) == sorted((type_, 2, place) for type_ in (NORM, f"f32[3,{D}]") for place in (0, 1))


def test_a_parameter_is_weighed_against_all_that_it_meets_at_a_place() -> None:
    """The head of three words weighs as much as the last positions of three layers."""
    assert sent(lens(2, words=3, stream="B"), split((0, 0), norm=0, head=2)) == [(f"f32[B,{D}]", 0, 2)] * 2
    assert sent(lens(6, words=3, stream="B"), split((0,) * 6, norm=0, head=2)) == [(f"f32[3,{D}]", 2, 0)]


def test_what_is_sent_for_a_write_can_be_used_by_all() -> None:
    text = """graph {{
      %0 = param "lm_head.weight" : f32[1000,8]
      %1 = read layers.0.resid_post@0 : f32[B,P,8]
      %2 = call torch.nn.functional.linear(%1, %0) : f32[B,P,1000]
      save "lens" <- %2
      {writing}
      %9 = read logits@0 : f32[B,P,1000]
      save "logits" <- %9
    }}"""
    placement = split((0, 1, 2), norm=2, head=2)
    assert sent(text.format(writing=""), placement) == [(STREAM, 0, 2)]
    writing = """%3 = call torch.matmul(%2, %0) : f32[B,P,8]
      write layers.0.resid_post@1 <- %3"""
    assert sent(text.format(writing=writing), placement) == [("f32[1000,8]", 2, 0)]
    writing = """%3 = read layers.0.mlp_out@0 : f32[B,P,8]
      %4 = call torch.nn.functional.linear(%3, %0) : f32[B,P,1000]
      %5 = call torch.matmul(%4, %0) : f32[B,P,8]
      write layers.0.mlp_out@1 <- %5"""
    assert sent(text.format(writing=writing), placement) == [("f32[1000,8]", 2, 0)]


def test_nothing_but_parameters_is_sent_against_the_pass_where_they_are_light() -> None:
    text = """graph {
      %0 = param "model.layers.0.input_layernorm.weight" : f32[8]
      %1 = read layers.2.resid_post@0 : f32[B,P,8]
      %2 = call torch.mul(%0, %1) : f32[B,P,8]
      save "h" <- %2
    }"""
    assert sent(text, split((0, 1, 2), norm=2, head=2)) == [(NORM, 0, 2)]


def test_a_slice_longer_than_any_nominal_prompt_is_weighed_as_empty() -> None:
    text = """graph {
      %0 = param "model.norm.weight" : f32[8]
      %1 = read layers.0.resid_post@0 : f32[B,P,8]
      %2 = index %1[:, 100:] : f32[B,len(P)[100:],8]
      %3 = call torch.mul(%0, %2) : f32[B,len(P)[100:],8]
      save "h" <- %3
    }"""
    assert [pair for _, *pair in sent(text, split((0, 1, 2), norm=2, head=2))] == [[0, 2]]


def total(plan: Plan) -> int:
    return sum(op.type.nbytes(NOMINAL) for op in plan.transfers)


PLACES = st.integers(0, 2)


@given(
    layers=st.lists(PLACES, min_size=6, max_size=6).map(tuple),
    norm=PLACES,
    head=PLACES,
    shape=st.sampled_from([(1000, "B,P"), (1000, "B"), (3, "B,P")]),
)
def test_no_other_way_to_compute_a_lens_sends_less(
    layers: tuple[int, ...], norm: int, head: int, shape: tuple[int, str]
) -> None:
    placement = split(layers, norm, head)
    text = lens(6, words=shape[0], stream=shape[1])
    found = total(planned(text, placement))
    groups: dict[tuple[int, int], set[int]] = {}

    def look(*given: Any) -> frozenset[int]:
        for number, meeting in fetching._Fetching(*given).meetings.items():
            groups.setdefault((meeting.largest, meeting.there), set()).add(number)
        return frozenset()

    others: list[int] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(placing, "fetching", look)
        planned(text, placement)
        for choice in product((False, True), repeat=len(groups)):
            chosen = frozenset[int]().union(
                *(numbers for numbers, taken in zip(groups.values(), choice, strict=True) if taken)
            )
            patched.setattr(placing, "fetching", lambda *_, chosen=chosen: chosen)
            others.append(total(planned(text, placement)))
    assert len(groups) == 2 * len(set(layers))
    assert found == min(others)


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2"])
def test_a_lens_of_every_layer_sends_what_was_planned(pretend: Pretend, family: str) -> None:
    found: list[torch.Tensor] = []
    for spread in (False, True):
        hf = EVERY[family].build()
        if spread:
            accelerate.dispatch_model(hf, device_map(hf, P), main_device=torch.device(P[0]))
        model = tl.wrap(hf)
        norm = hf.base_model.norm if hasattr(hf.base_model, "norm") else hf.base_model.ln_f
        with pretend.watched() as seen, model.trace(IDS) as t:
            h = model.layers[:].resid_post
            hf.lm_head(norm(h)).save("lens")
        found.append(t["lens"])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
    between = [one for one in t.report.moved if one.what == "transfers"]
    copies = [
        copy
        for copy in seen.copies
        if any("backends/execute.py" in line for line in copy.lines) and copy.target != "cpu"
    ]
    assert sum(one.bytes for one in between) == sum(copy.bytes for copy in copies)
    stream, weight = (2, 5, 48), (48,)
    shapes = sorted((copy.source, copy.target, tuple(copy.shape)) for copy in copies)
    if hf.config.tie_word_embeddings:  # the head is on the first device, the norm on the last
        weights = [(P[2], target, weight) for target in P[:2]] * (2 if family == "gpt2" else 1)
        assert shapes == sorted([*weights, (P[1], P[0], stream), (P[2], P[0], stream)])
    else:
        assert shapes == [(P[0], P[2], stream), (P[1], P[2], stream)]
    assert len(t["lens"]) == LAYERS
