"""Random blocks over named sites, modules by path and modules that are not run equal the reference, bit for bit."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tracelens as tl
from tests.support.batches import EVEN, RAGGED, batch, random_rows
from tests.support.families import FAMILIES
from tests.support.plain import edited, plain_logits, untouched
from tests.test_modules import hooked, read, write
from tracelens.errors import CausalityError, SkippedSiteError
from tracelens.ir.module_sites import ModuleSite
from tracelens.ir.passes.pipeline import improve
from tracelens.ir.sites import Site
from tracelens.ir.verify import verify
from tracelens.reference import evaluate

HF = {name: FAMILIES[name].build() for name in ("llama", "qwen3", "gpt2")}
MODELS: dict[str, Any] = {name: tl.wrap(hf) for name, hf in HF.items()}
ROWS = {"even": random_rows(EVEN), "ragged": random_rows(RAGGED)}
_NAMED = ("resid_pre", "attn_norm", "attn_in", "attn_out", "attn_add", "mlp_norm", "mlp_in", "mlp_pre", "mlp_up",
          "mlp_act", "mlp_out", "mlp_add", "resid_post")  # fmt: skip
_REPLACED = ("attn_norm", "attn_add", "mlp_add", "mlp_out", "mlp_norm")


def pool(name: str) -> list[Site]:
    """The sites of layers 0 and 1 and of the end, named and by module, that hold [B, P, width]."""
    model = MODELS[name]
    calls = [call for calls in model.anatomy.sides.survey().calls.values() for call in calls]
    leaves = [leaf for call in calls for leaf in (*call.inputs.values(), *call.outputs.values())]
    modules = [
        leaf.site for leaf in leaves
        if str(leaf.type).startswith("f32[B,P,") and str(leaf.type).count(",") == 2
        and "2" not in leaf.site.path.split(".")
        and "position_embeddings" not in leaf.site.name and "rotary" not in leaf.site.name
    ]  # fmt: skip
    named = [Site(kind, layer) for layer in (0, 1) for kind in _NAMED]
    named = [site for site in named if model.anatomy.has(site)]
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
            if value.shape[-1] == own.shape[-1]:
                change(model, target, own + value * number)
        case "last", site, number:
            h = value_of(model, site)
            h[:, -1] = h[:, -1] * number
        case "save", site:
            value_of(model, site).save()
        case "replace", kind, layer, source:
            value = value_of(model, source)
            if value.shape[-1] == 48:
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
            except (CausalityError, SkippedSiteError) as error:
                refused.add(type(error).__name__)
        model.module("").output["logits"].save("end")
    return r.graph, refused


def reference(graph: tl.Graph, name: str, rows: list[list[int]]) -> dict[str, Tensor]:
    hf, prompt = HF[name], batch(rows)

    def forward(intercept: Any) -> None:
        with ExitStack() as stack:
            for site in sorted(POOLS[name], key=lambda site: site.sequence):
                if isinstance(site, ModuleSite):
                    hook = hooked(hf, site, lambda tensor, site=site: intercept(site, tensor))
                    stack.callback(hook.remove)
                else:
                    stack.enter_context(edited(hf, site, lambda tensor, site=site: intercept(site, tensor)))
            intercept(Site("token_mask"), prompt.mask)
            plain_logits(hf, prompt)

    return evaluate(graph, forward, parameters=hf.get_parameter)


@given(data=st.data(), name=st.sampled_from(sorted(MODELS)), rows=st.sampled_from(sorted(ROWS)))
def test_random_blocks_equal_the_reference_to_the_last_bit(data, name, rows):
    graph, _ = recorded(name, data.draw(statements(name)))
    verify(graph)
    improve(graph, verify_each=True)
    assert tl.parse(graph.text()) == graph
    with untouched(HF[name]):
        results = MODELS[name].compile(graph)(ROWS[rows])
    wanted = reference(graph, name, ROWS[rows])
    mask = batch(ROWS[rows]).mask
    for key, expected in wanted.items():
        parts = results[key]
        for row, part in enumerate(parts):
            real = expected[row][mask[row]]
            torch.testing.assert_close(part.reshape(real.shape), real, rtol=0, atol=0, equal_nan=True)


def test_the_random_blocks_leave_modules_out_and_meet_the_rules() -> None:
    skipping = recorded("llama", [("skip", 1), ("replace", "mlp_add", 0, Site("mlp_in", 0))])[0]
    assert sum(op.instead is not None for op in skipping.writes) == 2
    late = [("skip", 1), ("save", Site("mlp_in", 1)), ("from", Site("logits"), Site("lm_head"), 2.0)]
    assert recorded("llama", late)[1] == {"SkippedSiteError", "CausalityError"}
