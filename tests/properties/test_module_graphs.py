"""Random blocks over sites, heads, modules by path, modules that are not run, and gradients, equal plain torch.

The reference is the model itself with hooks placed by hand (inside attention, an eager function written by hand), and
autograd for the gradients.
"""

from __future__ import annotations

import functools
from contextlib import ExitStack
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tracelens as tl
from tests.properties.plain_language import unpadded
from tests.strategies import assert_same
from tests.support.batches import EVEN, RAGGED, batch, random_rows
from tests.support.families import FAMILIES
from tests.support.plain import (
    can_edit,
    edited,
    edited_attention,
    hook_point,
    plain_logits,
    untouched,
)
from tests.test_modules import hooked, read, write
from tracelens.errors import CausalityError, SkippedSiteError, UnusedGradientError
from tracelens.ir.module_sites import ModuleSite
from tracelens.ir.ops import Grad
from tracelens.ir.passes.pipeline import improve
from tracelens.ir.sites import Site
from tracelens.ir.verify import verify
from tracelens.reference import evaluate

# Under sdpa, the inside of attention cannot be edited by hand.
HF = {name: FAMILIES[name].build(attn="eager") for name in ("llama", "qwen3", "gpt2")}
HF["llama sdpa"] = FAMILIES["llama"].build(attn="sdpa")
MODELS: dict[str, Any] = {name: tl.wrap(hf) for name, hf in HF.items()}
ROWS = {"even": random_rows(EVEN), "ragged": random_rows(RAGGED)}
_NAMED = ("resid_pre", "attn_norm", "attn_in", "attn_out", "attn_add", "mlp_norm", "mlp_in", "mlp_pre", "mlp_up",
          "mlp_act", "mlp_out", "mlp_add", "resid_post")  # fmt: skip
_HEADS = ("q", "q_normed", "k", "k_normed", "v", "q_rot", "k_rot", "scores", "pattern", "z")
_REPLACED = ("attn_norm", "attn_add", "mlp_add", "mlp_out", "mlp_norm")


def pool(name: str) -> list[Site]:
    """The sites of layers 0 and 1 and of the end that plain torch can edit, named and by module."""
    model = MODELS[name]
    calls = [call for calls in model.anatomy.sides.survey().calls.values() for call in calls]
    leaves = [leaf for call in calls for leaf in (*call.inputs.values(), *call.outputs.values())]
    modules = [
        leaf.site for leaf in leaves
        if str(leaf.type).startswith("f32[B,P,") and str(leaf.type).count(",") == 2
        and "2" not in leaf.site.path.split(".")
        and "position_embeddings" not in leaf.site.name and "rotary" not in leaf.site.name
    ]  # fmt: skip
    named = [Site(kind, layer) for layer in (0, 1) for kind in (*_NAMED, *_HEADS)]
    named = [site for site in named if model.anatomy.has(site) and can_edit(HF[name], site)]
    named += [Site(kind) for kind in ("embed", "pos_embed") if model.anatomy.has(Site(kind))]
    return [*named, Site("final_norm"), Site("lm_head"), Site("logits"), *modules]


POOLS = {name: pool(name) for name in MODELS}


@st.composite
def statements(draw: Any, name: str) -> list[tuple[Any, ...]]:
    site = st.sampled_from(POOLS[name])
    number = st.sampled_from([0.5, -1.25, 2.0])
    one = st.one_of(
        st.tuples(st.just("scale"), site, number),
        st.tuples(st.just("from"), site, site, number),
        st.tuples(st.just("last"), site, number),
        st.tuples(st.just("save"), site),
        st.tuples(
            st.just("head"),
            st.sampled_from(
                [s for s in POOLS[name] if s.name in ("z", "pattern", "q") and s.layer is not None]
            ),
            number,
        ),
        st.tuples(st.just("grad"), st.lists(site, min_size=1, max_size=3, unique=True)),
        st.tuples(st.just("replace"), st.sampled_from(_REPLACED), st.sampled_from([0, 1]), site),
        st.tuples(
            st.just("module"), st.sampled_from([s for s in POOLS[name] if isinstance(s, ModuleSite)]), number
        ),
        st.tuples(st.just("skip"), st.sampled_from([0, 1])),
    )
    return draw(st.lists(one, min_size=3, max_size=10))


def value_of(model: Any, site: Site) -> Any:
    if isinstance(site, ModuleSite):
        return read(model, site)
    return getattr(model if site.layer is None else model.layers[site.layer], site.name)


def change(model: Any, site: Site, new: Any) -> None:
    if isinstance(site, ModuleSite):
        write(model, site, lambda _: new)
    else:
        setattr(model if site.layer is None else model.layers[site.layer], site.name, new)


def perform(model: Any, statement: tuple[Any, ...]) -> None:
    match statement:
        case "scale", site, number:
            change(model, site, value_of(model, site) * number)
        case "from", source, target, number:
            value, own = value_of(model, source), value_of(model, target)
            if value._type.shape == own._type.shape:
                change(model, target, own + value * number)
        case "last", site, number:
            h = value_of(model, site)
            h[:, -1] = h[:, -1] * number
        case "save", site:
            value_of(model, site).save()
        case "head", site, number:
            head = model.layers[site.layer].head(1)
            setattr(head, site.name, number * getattr(head, site.name))
        case "grad", sites:
            found = [value_of(model, site) for site in sites]
            for gradient in tl.grad((model.logits[:, -1, :7] ** 2).sum(), found):
                gradient.save()
        case "replace", kind, layer, source:
            value = value_of(model, source)
            if value._type.shape == model.layers[layer].resid_pre._type.shape:
                model.layers[layer].replace(**{kind: value * 0.5})
        case "module", site, number:
            if site.side == "output" and site.key == () and site.path:
                model.module(site.path).replace(number)
        case _:
            model.layers[statement[1]].skip()


def recorded(name: str, found: list[tuple[Any, ...]]) -> tuple[tl.Graph, set[str]]:
    """The graph of the statements that the rules allow, and which rules forbade the others."""
    model, refused = MODELS[name], set[str]()
    with model.record() as r:
        for statement in found:
            try:
                perform(model, statement)
            except (CausalityError, SkippedSiteError, UnusedGradientError) as error:
                refused.add(type(error).__name__)
        model.module("").output["logits"].save("end")
    return r.graph, refused


def reference(graph: tl.Graph, name: str, rows: list[list[int]]) -> dict[str, Tensor]:
    hf, prompt = HF[name], batch(rows)

    def forward(intercept: Any) -> None:
        with ExitStack() as stack:
            inside: dict[str, dict[str, Any]] = {}
            for site in sorted(POOLS[name], key=lambda site: site.sequence):
                edit = functools.partial(intercept, site)
                if isinstance(site, ModuleSite):
                    stack.callback(hooked(hf, site, edit).remove)
                elif (point := hook_point(hf, site))[1] == "inside":
                    inside.setdefault(point[0], {})[site.name] = edit
                else:
                    stack.enter_context(edited(hf, site, edit))
            for path, edits in inside.items():
                stack.enter_context(edited_attention(hf, path, edits))
            intercept(Site("token_mask"), prompt.mask)
            plain_logits(hf, prompt)

    return evaluate(graph, forward, parameters=hf.get_parameter)


@given(data=st.data(), name=st.sampled_from(sorted(MODELS)), rows=st.sampled_from(sorted(ROWS)))
def test_random_blocks_equal_the_reference(data, name, rows):
    graph, _ = recorded(name, data.draw(statements(name)))
    verify(graph)
    improve(graph, verify_each=True)
    assert tl.parse(graph.text()) == graph
    try:
        wanted = reference(graph, name, ROWS[rows])
    except UnusedGradientError:  # a write, or a module that is not run, cuts the way from a site to the loss
        with untouched(HF[name]), pytest.raises(UnusedGradientError):
            MODELS[name].compile(graph)(ROWS[rows])
        return
    with untouched(HF[name]):
        results = MODELS[name].compile(graph)(ROWS[rows])
    assert list(results) == list(wanted)
    for key, expected in wanted.items():
        by_row = unpadded(expected, batch(ROWS[rows])) if rows == "ragged" else expected
        if isinstance(by_row, Tensor):
            assert_same(graph, {key: results[key]}, {key: by_row})
            continue
        for actual, part in zip(results[key], by_row, strict=True):
            assert_same(graph, {key: actual}, {key: part})


def test_the_random_blocks_leave_modules_out_and_meet_the_rules() -> None:
    skipping = recorded("llama", [("skip", 1), ("replace", "mlp_add", 0, Site("mlp_in", 0))])[0]
    assert sum(op.instead is not None for op in skipping.writes) == 2
    late = [("skip", 1), ("save", Site("mlp_in", 1)), ("from", Site("logits"), Site("lm_head"), 2.0)]
    assert recorded("llama", late)[1] == {"SkippedSiteError", "CausalityError"}


def test_the_random_blocks_mix_heads_modules_and_gradients() -> None:
    path = next(site for site in POOLS["llama"] if isinstance(site, ModuleSite) and "mlp" in site.path)
    graph = recorded(
        "llama", [("head", Site("pattern", 1), 0.5), ("grad", [path, Site("z", 0), Site("scores", 1)])]
    )[0]
    assert any(isinstance(op, Grad) for op in graph.ops)
    assert {op.site for op in graph.writes} == {Site("pattern", 1)}
    assert {Site("q_rot", 0), Site("scores", 1), Site("z", 1), path} <= set(POOLS["llama"])
