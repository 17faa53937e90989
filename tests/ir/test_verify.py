"""The law of graphs: what each rule refuses, which operation it names, and that it refuses no more than that."""

from __future__ import annotations

from dataclasses import replace

import pytest

import tracelens as tl
from tests.support.families import FAMILIES
from tracelens.errors import (
    AbsentSiteError,
    DtypeError,
    LayerRangeError,
    ShapeError,
    UnknownParameterError,
    VerificationError,
)  # fmt: skip
from tracelens.ir.graph import Graph, Pin
from tracelens.ir.ops import Read, Ref, Save, Write
from tracelens.ir.parse import parse
from tracelens.ir.sites import Site
from tracelens.ir.types import parse_type
from tracelens.ir.verify import RULES, complaints, verify
from tracelens.ir.wire import StoredConstant
from tracelens.location import Location

MODEL = tl.wrap(FAMILIES["llama"].build())


def graph(body: str, *, pins: str = "") -> Graph:
    return parse(f"graph{pins} {{\n{body}\n}}")


_H = "%0 = read layers.1.resid_post@0 : f32[B,P,48]\n"
_SUM = "%1 = call torch.sum(%0) : f32[]\n"
_GRADIENTS = "gradients_are_of_sites"
_SKIPS = "modules_that_are_not_run_are_left_alone"
_SKIP = 'write layers.2.resid_post@1 <- %0 instead of module("m").input after layers.2.resid_pre+6'
_TYPES = "types_are_what_the_functions_give"

BROKEN: list[tuple[str, int, str, str]] = [
    ("values_are_assigned_once", 1, _H + "%0 = read logits@0 : f32[B,P,97]", "assigned twice"),
    ("values_are_assigned_once", 1, _H + "%1, %1 = call torch.topk(%0, 2) : f32[B,P,2], i64[B,P,2]", "assigned twice"),
    ("values_are_defined_before_use", 0, 'save "h" <- %0\n' + _H.strip(), "%0 is used before"),
    ("values_are_defined_before_use", 1, _H + "%1 = call torch.add(%0, %1) : f32[B,P,48]", "%1 is used before"),
    ("values_are_defined_before_use", 1, _H + "%1 = call torch.cat((%0, (%7,),), 1) : f32[B]", "%7 is used before"),
    ("values_are_defined_before_use", 1, _H + "%1 = index %0[:, %9] : f32[B,P,48]", "%9 is used before"),
    ("sites_exist", 0, "write token_mask@1 <- 1", "read-only"),
    ("versions_count_the_writes", 0, "%0 = read layers.1.resid_post@1 : f32[B,P,48]", "has 0 writes before"),
    ("versions_count_the_writes", 1, _H + "write layers.1.resid_post@2 <- %0", "this is write 1"),
    ("versions_count_the_writes", 2, _H + "write logits@1 <- 0\nwrite logits@1 <- 1", "this is write 2"),
    ("versions_count_the_writes", 1, "write layers.1.resid_post@1 <- 0\n" + _H, "has 1 writes before"),
    ("nothing_travels_backwards", 1, _H + "write layers.1.resid_pre@1 <- %0", "not reached before it"),
    ("nothing_travels_backwards", 1, _H + "write layers.0.resid_post@1 <- %0", "not reached before it"),
    (
        "nothing_travels_backwards",
        3,
        _H + "%1 = read embed@0 : f32[B,P,48]\n"
        "%2 = call torch.add(%1, %0) : f32[B,P,48]\nwrite layers.1.attn_in@1 <- %2",
        "layers.1.resid_post",
    ),
    (
        "nothing_travels_backwards",
        1,
        "%0 = read layers.1.mlp_up@0 : f32[B,P,80]\nwrite layers.1.mlp_pre@1 <- %0",
        "layers.1.mlp_up",
    ),
    (
        "nothing_travels_backwards",
        3,
        "%0 = read layers.1.mlp_up@0 : f32[B,P,80]\n%1 = read layers.1.mlp_pre@0 : f32[B,P,80]\n"
        "%2 = call torch.mul(%0, %1) : f32[B,P,80]\nwrite layers.1.mlp_up@1 <- %2",
        "layers.1.mlp_pre, layers.1.mlp_up",
    ),
    (
        _SKIPS,
        1,
        "write layers.2.resid_post@1 <- 0\n" + _SKIP.replace("@1 <- %0", "@2 <- 0"),
        "is written before the module",
    ),
    (_SKIPS, 0, _SKIP.replace("%0", "0").replace('.input', '.output'), "is not the moment before"),
    (_SKIPS, 0, _SKIP.replace("%0", "0").replace("resid_pre+6", "resid_post+6"), "does not come after"),
    (_SKIPS, 1, _SKIP.replace("%0", "0") + "\n%1 = read layers.2.mlp_out@0 : f32[B,P,48]", "lies inside of"),
    (_SKIPS, 1, _SKIP.replace("%0", "0") + "\nwrite layers.2.mlp_out@1 <- 0", "lies inside of"),
    (_SKIPS, 0, "%1 = read layers.2.resid_post@0 : f32[B,P,48]\n" + _SKIP.replace("%0", "0"), "does not exist"),
    (
        "nothing_travels_backwards",
        1,
        "%0 = read layers.3.resid_pre@0 : f32[B,P,48]\n" + _SKIP,
        "written from layers.3.resid_pre",
    ),
    ("one_site_has_one_type", 1, _H + "%1 = read layers.1.resid_post@0 : f32[B,P,47]", "read as"),
    (_TYPES, 1, _H + "%1 = call torch.tanh(%0) : f32[B,P,47]", "it gives f32[B,P,48]"),
    (_TYPES, 1, _H + "%1 = call torch.tanh(%0) : f64[B,P,48]", "it gives f32[B,P,48]"),
    (_TYPES, 1, _H + "%1 = call torch.topk(%0, 2) : f32[B,P,2]", "it gives f32[B,P,2], i64"),
    (_TYPES, 1, _H + "%1 = call torch.matmul(%0, %0) : f32[B,P,48]", "matmul"),
    (_TYPES, 1, _H + "%1 = call torch.sum(%0, 7) : f32[B,P]", "sum"),
    (_TYPES, 1, _H + "%1 = call torch.sum(%0, False) : f32[]", "sum"),
    (_TYPES, 0, "%0 = call torch.tanh((<B>,)) : f32[]", "tanh"),
    (_TYPES, 1, _H + "%1 = call os.system(%0) : f32[B,P]", "cannot be recorded"),
    (_TYPES, 1, _H + "%1 = call torch.load(%0) : f32[B,P]", "cannot be recorded"),
    (_TYPES, 1, _H + "%1 = index %0[:, :, 48] : f32[B,P]", "outside an axis of size 48"),
    (_TYPES, 1, _H + "%1 = index %0[:, :, :3] : f32[B,P,4]", "it gives f32[B,P,3]"),
    (_TYPES, 1, _H + "%1 = put %0[:, :, :3] <- %0 : f32[B,P,48]", "does not broadcast"),
    (_TYPES, 1, _H + "write layers.1.resid_post@1 <- complex(0.0, 1.0)", "cannot be written"),
    (_TYPES, 2, _H + "%1 = const #0 : f32[3,1,1]\n%2 = call torch.mul(%0, %1) : f32[B,P,48]", "B"),
    (
        "nothing_travels_backwards",
        3,
        _H + f"{_SUM}%2 = grad %1 wrt %0 : f32[B,P,48]\nwrite layers.2.resid_post@1 <- %2",
        "written from a gradient",
    ),
    (_GRADIENTS, 1, _H + "%1 = grad %0 wrt %0 : f32[B,P,48]", "not one floating number"),
    (_GRADIENTS, 2, _H + _SUM + "%2 = grad %1 wrt %0 : f32[B,P,47]", "the types of the sites"),
    (
        _GRADIENTS,
        3,
        _H + _SUM + "%2 = const #0 : f32[48]\n%3 = grad %1 wrt %2 : f32[48]",
        "%2 is neither a site that can be written nor computed from sites",
    ),
    (
        _GRADIENTS,
        4,
        _H + _SUM + "%2 = const #0 : f32[48]\n%3 = call torch.tanh(%2) : f32[48]\n"
        "%4 = grad %1 wrt %3 : f32[48]",
        "%3 is not made of sites",
    ),
    (
        _GRADIENTS,
        3,
        _H + _SUM + "%2 = call torch.isnan(%0) : bool[B,P,48]\n%3 = grad %1 wrt %2 : bool[B,P,48]",
        "which is not floating",
    ),
    (
        _GRADIENTS,
        3,
        _H + _SUM + "%2 = read layers.2.resid_pre@0 : f32[B,P,48]\n%3 = grad %1 wrt %2 : f32[B,P,48]",
        "%1 is not made of layers.2.resid_pre",
    ),
    (
        _GRADIENTS,
        4,
        _H + _SUM + "%2 = grad %1 wrt %0 : f32[B,P,48]\n%3 = call torch.sum(%2) : f32[]\n"
        "%4 = grad %3 wrt %0 : f32[B,P,48]",
        "made of a gradient",
    ),
    (
        _GRADIENTS,
        3,
        _H + _SUM + "%2 = read token_mask@0 : bool[B,P]\n%3 = grad %1 wrt %2 : bool[B,P]",
        "%2 is neither a site that can be written",
    ),
    (
        "constants_have_one_name",
        1,
        '%0 = const #0 "v" : f32[3]\n%1 = const #1 "v" : f32[3]',
        "names constant #0 and constant #1",
    ),
    ("saves_are_named_apart", 2, _H + 'save "h" <- %0\nsave "h" <- %0', "two saves are named 'h'"),
    ("saves_are_named_apart", 1, _H + 'save "h" <- %0, %0', "holds one value"),
    (
        "saves_are_named_apart",
        2,
        _H + '%1 = read logits@0 : f32[B,P,97]\nsave "h" <- stack(%0, %1)',
        "different types",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "number", "body", "problem"), BROKEN)
def test_a_broken_rule_is_named_with_its_operation(rule, number, body, problem):
    broken = graph(body)
    found = complaints(broken)
    assert (rule, number) in [(name, at) for name, at, _ in found]
    assert {name for name, _, _ in found} == {rule}
    assert any(problem in text for _, _, text in found)
    with pytest.raises(VerificationError, match=rule.replace("_", " ")) as refused:
        verify(broken)
    assert f"--> {body.splitlines()[number].strip()}"[:30] in (refused.value.excerpt or "")


def test_every_rule_is_broken_by_an_example():
    assert {rule for rule, *_ in BROKEN} | {"constants_are_there"} == {rule.__name__ for rule in RULES}


def test_sites_that_no_text_can_name_are_refused():
    type_ = parse_type("f32[B,P,48]")
    for site in (Site("resid_past", 1), Site("resid_post"), Site("logits", 2), Site("resid_post", -1)):
        assert [rule for rule, _, _ in complaints(Graph((Read(0, type_, site, 0),)))] == ["sites_exist"]


def test_constants_have_to_be_there_with_their_types():
    body = graph('%0 = const #1 : f32[3]\nsave "c" <- %0')
    constant = StoredConstant(parse_type("f32[3]"), None, b"\0" * 12)
    other = StoredConstant(parse_type("f32[4]"), None, b"\0" * 16)
    assert complaints(body) == []  # a graph as text has no constants
    assert complaints(replace(body, constants=(other, constant))) == []
    assert complaints(replace(body, constants=(constant,)))[0][2] == "there is no constant #1"
    assert complaints(replace(body, constants=(constant, other)))[0][2] == "constant #1 is f32[4], not f32[3]"
    assert complaints(Graph((replace(body.ops[0], index=-1),)))[0][0] == "constants_are_there"


VALID = [
    "",
    _H + "write layers.1.resid_post@1 <- %0",
    _H + "write layers.2.resid_pre@1 <- %0\nwrite logits@1 <- 0.5",
    _H + '%1 = call torch.add(%0, 1) : f32[B,P,48]\nwrite layers.1.resid_post@1 <- %1\n'
    '%2 = read layers.1.resid_post@1 : f32[B,P,48]\nwrite layers.1.resid_post@2 <- %2\nsave "h" <- %2',
    # A late value may be saved, and may meet an early one.
    _H + '%1 = read embed@0 : f32[B,P,48]\n%2 = call torch.sub(%1, %0) : f32[B,P,48]\nsave "d" <- %2',
    # Reads may stand in any order.
    "%1 = read logits@0 : f32[B,P,97]\n" + _H + 'save "both" <- stack(%0, %0)',
    # A site and one of the same moment may meet, but not go back there.
    "%0 = read layers.1.mlp_up@0 : f32[B,P,80]\n%1 = read layers.1.mlp_pre@0 : f32[B,P,80]\n"
    "%2 = call torch.mul(%0, %1) : f32[B,P,80]\nwrite layers.1.mlp_act@1 <- %2",
    # Cast and broadcast at the write.
    _H + "%1 = const #0 : f64[48]\nwrite layers.1.resid_post@1 <- %1",
    _H + "%1 = const #0 : bf16[]\nwrite layers.1.resid_post@1 <- %1",
]  # fmt: skip


@pytest.mark.parametrize("body", VALID)
def test_valid_graphs_are_accepted(body):
    verify(graph(body))


def test_a_pin_allows_what_only_one_size_allows():
    body = _H + "%1 = const #0 : f32[3,1,1]\n%2 = call torch.mul(%0, %1) : f32[B,P,48]"
    verify(graph(body, pins=" pin(B=3 by 2)"))
    assert complaints(graph(body, pins=" pin(P=3 by 2)"))
    assert complaints(graph(body, pins=" pin(B=4 by 2)"))


def test_an_error_names_the_line_that_recorded_the_operation():
    broken = replace(
        graph(_H + "write layers.0.resid_post@1 <- %0"), locations=(Location("a.py", 4), Location("a.py", 9))
    )
    with pytest.raises(VerificationError) as refused:
        verify(broken)
    assert str(refused.value.at) == "a.py:9"


# --- what a graph does not know, and the model does -----------------------------------------------------------------

FOREIGN = [
    (LayerRangeError, '%0 = read layers.3.resid_post@0 : f32[B,P,48]\nsave "h" <- %0'),
    (LayerRangeError, 'write layers.7.resid_post@1 <- 0\n%0 = read logits@0 : f32[B,P,97]\nsave "h" <- %0'),
    (AbsentSiteError, '%0 = read pos_embed@0 : f32[B,P,48]\nsave "h" <- %0'),
    (VerificationError, '%0 = read layers.1.resid_post@0 : f32[B,P,64]\nsave "h" <- %0'),
    (VerificationError, '%0 = read layers.1.resid_post@0 : bf16[B,P,48]\nsave "h" <- %0'),
    (VerificationError, '%0 = param "lm_head.weight" : f32[97,64]\nsave "h" <- %0'),
    (UnknownParameterError, '%0 = param "lm_head.wait" : f32[97,48]\nsave "h" <- %0'),
    # Writes to sites that the graph itself does not read.
    (ShapeError, _H + 'write layers.1.mlp_act@1 <- %0\nsave "h" <- %0'.replace("1.mlp_act", "2.mlp_act")),
    (
        DtypeError,
        _H + '%1 = call torch.argsort(%0) : i64[B,P,48]\nwrite layers.2.attn_in@1 <- %1\nsave "h" <- %0',
    ),
    (
        DtypeError,
        _H + '%1 = call torch.gt(%0, 0) : bool[B,P,48]\nwrite layers.2.attn_in@1 <- %1\nsave "h" <- %0',
    ),
    (DtypeError, _H + 'write layers.2.attn_in@1 <- complex(1.0, 2.0)\nsave "h" <- %0'),
    (
        ShapeError,
        _H + '%1 = index %0[:, :, :47] : f32[B,P,47]\nwrite layers.2.attn_in@1 <- %1\nsave "h" <- %0',
    ),
]


@pytest.mark.parametrize(("error", "body"), FOREIGN)
def test_a_graph_for_another_model_is_refused_before_it_runs(error, body):
    with pytest.raises(error) as refused:
        MODEL.compile(graph(body))
    assert refused.value.excerpt


def test_a_program_of_one_size_is_not_taken_for_one_of_all():
    """The two graphs have the same operations; only the pinned one is valid."""
    body = _H + '%1 = const #0 : f32[2,1,48]\n%2 = call torch.mul(%0, %1) : f32[B,P,48]\nsave "h" <- %2'
    constant = StoredConstant(parse_type("f32[2,1,48]"), None, b"\0" * 384)
    pinned = replace(graph(body, pins=" pin(B=2 by 2)"), constants=(constant,))
    program = MODEL.compile(pinned)
    assert program([[5, 6, 7], [7, 8, 9]])["h"].abs().sum() == 0
    with pytest.raises(tl.errors.SpecialisedGraphError, match="2 rows"):
        program([[5, 6, 7]])
    with pytest.raises(VerificationError, match="pinned"):
        MODEL.compile(replace(pinned, pins=()))
    with pytest.raises(VerificationError):
        MODEL.compile(replace(pinned, pins=(Pin("B", 5, 2),)))


def test_the_recorder_obeys_the_law():
    with MODEL.record() as r:
        MODEL.layers[0:3].resid_mid += 1.0
        MODEL.layers[1].mlp_act[..., 3] = 0
        MODEL.layers[2].attn_out.tok[-1] += MODEL.layers[0].attn_out.tok[0]
        tl.masked_mean(MODEL.layers[2].resid_post).save()
        MODEL.logits.log_softmax(-1).tok[[0, -1]].save()
    assert complaints(r.graph) == []
    assert [type(op) for op in r.graph.ops].count(Write) == 5
    assert [type(op) for op in r.graph.ops].count(Save) == 2
    assert all(op.value == Ref(op.value.id) for op in r.graph.writes)
