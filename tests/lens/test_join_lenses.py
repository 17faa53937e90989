"""Lenses of a pass are joined where nothing waits for one of them, and mean what each of them meant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tracelens as tl
from tests.properties.test_pass_meaning import EVEN_BATCH, HF, meaning
from tracelens.ir.graph import Graph
from tracelens.ir.ops import Call, Grad
from tracelens.ir.passes.join_lenses import join_lenses
from tracelens.ir.passes.pipeline import improve
from tracelens.ir.rules_lens import LENSES
from tracelens.ir.verify import complaints

MODEL = tl.wrap(HF)
FOLLOWING = torch.arange(EVEN_BATCH.mask.numel()).reshape(EVEN_BATCH.mask.shape) % 90 - 1


def lenses(graph: Graph) -> int:
    return sum(isinstance(op, Call) and op.function in LENSES for op in graph.ops)


def recorded(body: Callable[[], object]) -> Graph:
    with MODEL.record(EVEN_BATCH.input_ids.tolist()) as r:
        body()
    return r.graph


def require_same(graph: Graph, most: int | None = None) -> Graph:
    """The joined graph verifies, says the same, and is joined as far as it goes."""
    better = join_lenses(graph)
    assert complaints(better) == []
    wanted, found = meaning(graph, EVEN_BATCH), meaning(better, EVEN_BATCH)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        # A product with more rows may round otherwise.
        torch.testing.assert_close(found[name], tensor, atol=2e-5, rtol=1e-5, equal_nan=True, msg=name)
    assert join_lenses(better) == better
    if most is not None:
        assert lenses(graph) > lenses(better) == most
    again = improve(graph, verify_each=True)
    for name, tensor in meaning(again, EVEN_BATCH).items():
        torch.testing.assert_close(tensor, wanted[name], atol=2e-5, rtol=1e-5, equal_nan=True, msg=name)
    return better


def ask(lens: Any, what: tuple[Any, ...], others: list[Any]) -> Any:
    match what:
        case ("topk", k):
            return lens.topk(k).values
        case ("tokens", k):
            return lens.topk(k).indices
        case ("following", name):
            return getattr(lens, name)(FOLLOWING)
        case (("log_prob" | "rank" | "logit") as name, token):
            return getattr(lens, name)(token)
        case (("kl" | "js" | "tv") as name, other):
            return getattr(lens, name)(None if other is None else others[other % len(others)])
        case (name,):
            return getattr(lens, name)()
    raise AssertionError(what)


ASKED = st.one_of(
    st.tuples(st.sampled_from(["topk", "tokens"]), st.integers(1, 4)),
    st.tuples(st.just("following"), st.sampled_from(["log_prob", "rank"])),
    st.tuples(st.sampled_from(["log_prob", "rank", "logit"]), st.sampled_from([3, 50])),
    st.tuples(st.sampled_from(["kl", "js", "tv"]), st.sampled_from([None, 0, 1, 2])),
    st.sampled_from([("entropy",), ("logsumexp",)]),
)
STATES = [("resid_post", 0), ("resid_post", 1), ("resid_post", 2), ("attn_out", 1), ("mlp_out", 1)]


@st.composite
def blocks(draw: st.DrawFn) -> Callable[[], None]:
    states = draw(st.lists(st.sampled_from(STATES), min_size=1, max_size=4, unique=True))
    asked = draw(st.lists(st.tuples(st.integers(0, 3), ASKED), min_size=2, max_size=7))
    write = draw(st.sampled_from([None, None, 0, 1]))
    again = draw(st.booleans())
    order = draw(st.permutations(range(len(asked))))

    def body() -> None:
        if write is not None:
            sure = MODEL.lens(MODEL.layers[0].resid_mid).log_prob(write)
            MODEL.layers[1].resid_post += sure[..., None]
        found = [MODEL.lens(getattr(MODEL.layers[layer], name)) for name, layer in states]
        if again:
            # The state of one lens depends on what another one says.
            first = MODEL.layers[0].resid_post * found[0].entropy()[..., None]
            found.append(MODEL.lens(first))
        for place in order:
            number, what = asked[place]
            ask(found[number % len(found)], what, found).save(f"{place} {what}")

    return body


@settings(max_examples=40)
@given(blocks())
def test_joined_lenses_say_the_same(body: Callable[[], None]) -> None:
    require_same(recorded(body))


def test_all_that_is_asked_of_all_layers_is_one_call() -> None:
    def body() -> None:
        lens = MODEL.lens(MODEL.layers[:].resid_post)
        for name in ("rank", "log_prob"):
            getattr(lens, name)(FOLLOWING).save(name)
            getattr(lens, name)(7).save(f"{name} of one")
        lens.kl().save("kl")
        lens.entropy().save("entropy")
        lens.topk(3).save("top")
        lens.topk(2).save("fewer")

    graph = recorded(body)
    assert lenses(graph) == 24
    better = require_same(graph, 1)
    (call,) = [op for op in better.ops if isinstance(op, Call) and op.function in LENSES]
    assert call.args[3] is not None
    assert len(call.args[4]) == 2  # two targets, each once


def test_a_lens_that_a_write_waits_for_is_not_delayed() -> None:
    def body() -> None:
        MODEL.lens(MODEL.layers[2].resid_post).entropy().save("late")
        early = MODEL.lens(MODEL.layers[0].resid_post)
        early.entropy().save("early")
        MODEL.lens(MODEL.layers[1].resid_post).entropy().save("also late")
        MODEL.layers[1].resid_post *= early.entropy()[..., None]

    better = require_same(recorded(body))
    # The written one for itself, and of the others one for all: asked by nobody else, they may be late.
    assert lenses(better) == 2


def test_two_references_stay_apart() -> None:
    def body() -> None:
        other = MODEL.lens(MODEL.layers[0].attn_out)
        lens = MODEL.lens(MODEL.layers[:].resid_post)
        lens.kl().save("to the end")
        lens.kl(other).save("to another")
        lens.entropy().save("entropy")

    better = require_same(recorded(body), 2)
    references = [op.args[3] for op in better.ops if isinstance(op, Call) and op.function in LENSES]
    assert len(set(references)) == 2


def test_two_heads_and_two_ways_stay_apart() -> None:
    def body() -> None:
        MODEL.lens(MODEL.layers[0].resid_post).entropy().save("a")
        MODEL.lens(MODEL.layers[1].resid_post, workspace=5000).entropy().save("b")
        MODEL.lens(MODEL.layers[1].resid_post[:, -1]).entropy().save("c")

    graph = recorded(body)
    assert lenses(join_lenses(graph)) == lenses(graph) == 3
    require_same(graph)


def test_distances_of_all_layers_are_one_call_for_each_kind() -> None:
    def body() -> None:
        lens = MODEL.lens(MODEL.layers[:].resid_post)
        lens.js().save("js")
        lens.tv().save("tv")

    better = require_same(recorded(body))
    names = [op.function for op in better.ops if isinstance(op, Call) and op.function in LENSES]
    assert sorted(names) == ["tracelens.lens", *["tracelens.lens_distance"] * 2]


def test_with_gradients_nothing_is_joined() -> None:
    def body() -> None:
        h = MODEL.layers[1].resid_post
        lens = MODEL.lens(MODEL.layers[:].resid_post)
        lens.entropy().save("entropy")
        loss = lens.log_prob(7).stack().sum() if hasattr(lens.log_prob(7), "stack") else None
        assert loss is not None
        tl.grad(loss, h).save("g")

    graph = recorded(body)
    assert any(isinstance(op, Grad) for op in graph.ops)
    assert join_lenses(graph) == graph
    found = meaning(improve(graph), EVEN_BATCH)
    wanted = meaning(graph, EVEN_BATCH)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=2e-5, rtol=1e-5)
    assert isinstance(found["g"], Tensor)
    assert found["g"].abs().max() > 1e-4
