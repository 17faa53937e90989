"""The text form of graphs: what it looks like, and what is no graph."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import tracelens as tl
from tests.support.families import FAMILIES
from tracelens.errors import GraphSyntaxError
from tracelens.ir.graph import Graph, Pin
from tracelens.ir.ops import (
    Apply,
    Call,
    Const,
    Index,
    IndexPut,
    Keep,
    Param,
    Read,
    Ref,
    Save,
    Slice,
    Special,
    TokenAt,
    TokenList,
    TokenSlice,
    TokenText,
    Write,
)
from tracelens.ir.parse import parse
from tracelens.ir.sites import Site
from tracelens.ir.text import arg_text, op_text, text
from tracelens.ir.types import DType, parse_type
from tracelens.ir.windows import StepWindow

MODEL = tl.wrap(FAMILIES["llama"].build())
STREAM = parse_type("f32[B,P,48]")
SITE = Site("resid_post", 3)


def test_a_block_as_text():
    v = torch.ones(48)
    with MODEL.record() as r:
        MODEL.layers[1].post_ln += 4.0 * v
        h = MODEL.layers[2].resid_post[:, -1].save("h")
        values, _ = torch.topk(h.softmax(-1), k=5)
        values.save("top", device="keep", dtype=torch.float64)
        MODEL.layers[0:2].mlp_act[..., :7] = 0
        MODEL.layers[0:2].attn_out.save("both")
        (MODEL.logits.tok[-1] @ MODEL.unembed).save()
    assert r.graph.text() == (
        "graph {\n"
        "  %0 = read layers.1.mlp_norm@0 : f32[B,P,48]\n"
        "  %1 = const #0 : f32[48]\n"
        "  %2 = call torch.add(%0, %1) : f32[B,P,48]\n"
        "  write layers.1.mlp_norm@1 <- %2\n"
        "  %3 = read layers.2.resid_post@0 : f32[B,P,48]\n"
        "  %4 = index %3[:, -1] : f32[B,48]\n"
        '  save "h" <- %4\n'
        "  %5 = call torch.softmax(%4, -1) : f32[B,48]\n"
        "  %6, %7 = call torch.topk(%5, k=5) : f32[B,5], i64[B,5]\n"
        '  save "top" <- %6 device=keep dtype=f64\n'
        "  %8 = read layers.0.mlp_act@0 : f32[B,P,80]\n"
        "  %9 = read layers.1.mlp_act@0 : f32[B,P,80]\n"
        "  %10 = put %8[:, :, :7] <- 0 : f32[B,P,80]\n"
        "  write layers.0.mlp_act@1 <- %10\n"
        "  %11 = put %9[:, :, :7] <- 0 : f32[B,P,80]\n"
        "  write layers.1.mlp_act@1 <- %11\n"
        "  %12 = read layers.0.attn_out@0 : f32[B,P,48]\n"
        "  %13 = read layers.1.attn_out@0 : f32[B,P,48]\n"
        '  save "both" <- stack(%12, %13)\n'
        "  %14 = read logits@0 : f32[B,P,97]\n"
        "  %15 = index %14[:, tok(-1)] : f32[B,97]\n"
        '  %16 = param "lm_head.weight" : f32[97,48]\n'
        "  %17 = call torch.matmul(%15, %16) : f32[B,48]\n"
        '  save "#3" <- %17\n'
        "}"
    )
    assert parse(r.graph.text()) == r.graph
    assert str(r.graph) == r.graph.text()


def test_pins_stand_in_the_first_line():
    with MODEL.trace([[5, 6, 7], [8, 9, 3]]) as t:
        h = MODEL.layers[0].resid_post
        h.reshape(h.shape[0] * h.shape[1], 48).save("flat")
    assert t.graph.text().splitlines()[0] == "graph pin(B=2 by 1) pin(P=3 by 1) {"
    assert parse(t.graph.text()).pins == t.graph.pins


@pytest.mark.parametrize(
    ("op", "line"),
    [
        (Const(0, parse_type("i64[]"), 2), "%0 = const #2 : i64[]"),
        (Const(0, parse_type("f32[3]"), 1, 'a "v"'), '%0 = const #1 "a \\"v\\"" : f32[3]'),
        (Param(1, parse_type("bf16[97,48]"), 'a "b"'), '%1 = param "a \\"b\\"" : bf16[97,48]'),
        (Read(2, STREAM, SITE, 1), "%2 = read layers.3.resid_post@1 : f32[B,P,48]"),
        (
            Read(2, STREAM, Site("logits", None, StepWindow(4, 5)), 0),
            "%2 = read logits@0 steps(4:5) : f32[B,P,48]",
        ),
        (Write(Site("embed", None, StepWindow(1)), 2, Ref(0)), "write embed@2 steps(1:) <- %0"),
        (
            Call((3,), (STREAM,), "torch.softmax", (Ref(2),), (("dim", -1), ("dtype", DType.FLOAT64))),
            "%3 = call torch.softmax(%2, dim=-1, dtype=dtype(f64)) : f32[B,P,48]",
        ),
        (
            Call((3,), (STREAM,), "torch.cat", ((Ref(2), Ref(1)), -1)),
            "%3 = call torch.cat((%2, %1,), -1) : f32[B,P,48]",
        ),
        (Apply((4, 5), (STREAM, STREAM), 0, (Ref(3),)), "%4, %5 = apply #0(%3) : f32[B,P,48], f32[B,P,48]"),
        (
            Index(6, STREAM, 5, (Slice(1, None, 2), None, -1, Ref(0))),
            "%6 = index %5[1::2, None, -1, %0] : f32[B,P,48]",
        ),
        (
            Index(6, STREAM, 5, (Slice(), TokenSlice(-2, None, None, 2))),
            "%6 = index %5[:, tok(-2: width=2)] : f32[B,P,48]",
        ),
        (Index(6, STREAM, 5, (TokenList((0, -1)),)), "%6 = index %5[tok([0, -1])] : f32[B,P,48]"),
        (
            Index(6, STREAM, 5, (TokenText(" Paris", -1, 1),)),
            '%6 = index %5[tok(" Paris", -1 width=1)] : f32[B,P,48]',
        ),
        (IndexPut(7, STREAM, 6, (TokenAt(0),), 0.5), "%7 = put %6[tok(0)] <- 0.5 : f32[B,P,48]"),
        (Write(SITE, 2, Special.NEGATIVE_ZERO), "write layers.3.resid_post@2 <- -0.0"),
        (
            Save("h", (1, 2), True, Keep.DEVICE, DType.FLOAT16, "a.safetensors"),
            'save "h" <- stack(%1, %2) device=keep dtype=f16 to="a.safetensors"',
        ),
    ],
)
def test_every_operation_has_one_line(op, line):
    assert op_text(op) == line
    assert parse(f"graph {{\n  {line}\n}}") == Graph((op,))


@pytest.mark.parametrize("spelt", [float("nan"), math.nan, np.float64("nan"), -float("nan")])
def test_a_graph_with_nan_reads_back(spelt):
    with MODEL.record() as r:
        h = MODEL.layers[0].mlp_out
        h[..., 0] = spelt
        MODEL.layers[1].mlp_out = spelt
        torch.nan_to_num(MODEL.layers[2].mlp_out, nan=spelt).clamp(max=float("inf")).save()
    assert parse(text(r.graph)) == r.graph
    assert parse(text(r.graph)) == parse(text(r.graph))


def test_numbers_that_python_takes_for_equal_are_told_apart():
    graphs = [Graph((Call((1,), (STREAM,), "torch.mul", (Ref(0), n)),)) for n in (1, 1.0, True, 1 + 0j)]
    assert len({text(graph) for graph in graphs}) == 4
    assert [type(parse(text(graph)).ops[0].args[1]) for graph in graphs] == [int, float, bool, complex]
    assert [arg_text(number) for number in (0.0, Special.NEGATIVE_ZERO)] == ["0.0", "-0.0"]


def test_white_space_and_empty_lines_do_not_matter():
    graph = parse('graph {\n\n   %0 = read logits@0 : f32[B,P,97]\n\tsave "l" <- %0   \n\n}\n')
    assert text(graph) == 'graph {\n  %0 = read logits@0 : f32[B,P,97]\n  save "l" <- %0\n}'


def test_sizes_beyond_symbols_read_back():
    graph = Graph((Read(0, parse_type("f32[B*P-B,len(len(len(P)[2:])[:-1])[::2],2*S+3]"), SITE, 0),))
    assert parse(text(graph)) == graph


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("", "not a graph"),
        ("graph {", "not a graph"),
        ("graf {\n}", "expected 'graph'"),
        ("graph {\n%0 = read logits@0 : f32[B,P,97]", "expected '}'"),
        ("graph {\n  jump logits\n}", "expected a value"),
        ("graph {\n  %0 = jump logits\n}", "unknown operation 'jump'"),
        ("graph {\n  %0 = read resid_post@0 : f32[B,P,97]\n}", "not a site"),
        ("graph {\n  %0 = read layers.1.nowhere@0 : f32[B,P,97]\n}", "not a site"),
        ("graph {\n  %0 = read logits : f32[B,P,97]\n}", "expected '@'"),
        ("graph {\n  %0 = read logits@0 : f31[B,P,97]\n}", "not a type"),
        ("graph {\n  %0 = read logits@0 : f32[B,Q,97]\n}", "not a size"),
        ("graph {\n  %0, %1 = read logits@0 : f32[B,P,97]\n}", "one result"),
        ("graph {\n  %0 = read logits@0 : f32[B,P,97] f32[B]\n}", "not a type|not a size"),
        ("graph {\n  write logits@1 <- \n}", "ends too early"),
        ("graph {\n  write logits@1 <- %0 %1\n}", "unexpected '%1'"),
        ('graph {\n  save "h <- %0\n}', "unreadable"),
        ("graph {\n  save h <- %0\n}", "quoted string"),
        ('graph {\n  save "h" <- %0 into=3\n}', "unknown option"),
        ("graph {\n  %0 = call torch.add(%1 %2) : f32[B]\n}", "expected ','"),
        ("graph {\n  %0 = call torch.add(x=1, %2) : f32[B]\n}", "follows a keyword"),
        ("graph {\n  %0 = call torch.add(%1, <Q>) : f32[B]\n}", "not a size"),
        ("graph {\n  %0 = call torch.add(%1, __import__) : f32[B]\n}", "unreadable argument"),
        ("graph {\n  %0 = index %1[1:2:3:4] : f32[B]\n}", "unreadable index"),
        ("graph {\n  %0 = index %1[tok(1.5)] : f32[B]\n}", "expected an integer"),
        ("graph pin(B=x by 0) {\n}", "expected an integer"),
        ("graph {\n  %0 = param lm_head : f32[B]\n}", "quoted string"),
        ("graph {\n  %0 = apply #0(x=1) : f32[B]\n}", "no keyword"),
        ("graph {\n  ;\n}", "unreadable text"),
    ],
)
def test_what_is_no_graph_is_refused_with_its_line(source, problem):
    with pytest.raises(GraphSyntaxError, match=problem) as refused:
        parse(source)
    assert "line" in str(refused.value)


def test_pins_are_part_of_a_graph_and_lines_are_not():
    graph = parse('graph {\n  %0 = read logits@0 : f32[B,P,97]\n  save "l" <- %0\n}')
    with MODEL.record() as r:
        MODEL.logits.save("l")
    assert r.graph == graph
    assert r.graph.locations
    assert Graph(graph.ops, (Pin("B", 2, 0),)) != graph


def test_an_excerpt_points_at_one_operation():
    with MODEL.record() as r:
        (MODEL.layers[0].resid_post * 2).tanh().sum(-1).save("h")
    assert r.graph.excerpt(2, around=1) == (
        "    %1 = call torch.mul(%0, 2) : f32[B,P,48]\n"
        "--> %2 = call torch.tanh(%1) : f32[B,P,48]\n"
        "    %3 = call torch.sum(%2, -1) : f32[B,P]"
    )
