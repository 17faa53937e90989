"""Sweeps: several points in one batch are what they are one by one, and one by one is the program itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import tracelens as tl
from tests.errors import IDS, LLAMA, D, refused
from tests.strategies import graphs
from tests.support.batches import EVEN, RAGGED, random_rows
from tests.support.families import FAMILIES, WITH_NEURONS
from tracelens.errors import DtypeError, OptionError, ShapeError, SweepError, UnknownConstantError
from tracelens.ir.graph import Graph
from tracelens.ir.ops import Const
from tracelens.ir.passes.lift_constants import Unliftable, lift_constants

model = LLAMA.model
V = torch.randn(D, generator=torch.Generator().manual_seed(0))
VECTORS = torch.randn(5, D, generator=torch.Generator().manual_seed(1))
STRENGTHS = [-2.0, -0.5, 0.0, 1.0, 3.0]
ROWS = {"single": [IDS], "even": random_rows(EVEN), "ragged": random_rows(RAGGED)}


def steering(m: tl.Model = model) -> tl.Program:
    """Strength and vector, each used by itself and together, in sums, products, parts of a site and writes."""
    with m.record() as r:
        strength, v = tl.constant(1.0, name="strength"), tl.constant(V, name="v")
        m.layers[0].resid_post += strength * v / v.norm()
        m.layers[1].resid_post.tok[1] += v
        m.layers[1].mlp_out[..., :7] = strength
        m.layers[2].mlp_out *= strength
        m.layers[2].attn_out = tl.where(m.layers[2].attn_out > 0.1 * strength, v, m.layers[2].attn_out)
        m.layers[:].resid_post.tok[-1].save("every layer")
        v.norm().save("norm")
        m.layers[2].resid_post.save("h")
        m.logits[:, -1].topk(3).indices.save("best")
        m.logits[:, -1].save("logits")
    return m.compile(r)


PROGRAM = steering()


def parts(saved: Any) -> list[Tensor]:
    return saved if isinstance(saved, list) else [saved]


def assert_same(found: tl.Sweep, program: tl.Program, prompt: Any, tolerance: float | None) -> None:
    """The sweep's tensors are the program's at each point: to the last bit, or within a part of the largest number."""
    for point in range(found.points):
        alone = program(prompt, **{name: tensor[point] for name, tensor in found.swept.items()})
        assert list(alone) == list(found)
        for name in alone:
            for one, together in zip(parts(alone[name]), parts(found[name]), strict=True):
                own = together[point]
                assert one.shape == own.shape
                assert one.dtype == own.dtype
                if tolerance is None or not one.is_floating_point():
                    assert torch.equal(one, own), name
                else:
                    scale = one.abs().max().item()
                    torch.testing.assert_close(own, one, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("family", WITH_NEURONS)
def test_points_together_are_what_they_are_alone(family: str, rows: list[list[int]]) -> None:
    program = steering(tl.wrap(FAMILIES[family].build()))
    found = tl.sweep(program, rows, strength=STRENGTHS, v=VECTORS, batch_size=3)
    assert found.one_by_one is None
    assert found.runs == 2
    assert found["logits"].shape == (5, len(rows), 97)
    assert_same(found, program, rows, 1e-5)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_one_by_one_is_the_program_itself(rows: list[list[int]]) -> None:
    found = tl.sweep(PROGRAM, rows, strength=STRENGTHS, v=VECTORS, batch_size=1)
    assert found.runs == 5
    assert_same(found, PROGRAM, rows, None)


def test_bfloat16_keeps_its_dtypes_and_agrees_within_its_rounding() -> None:
    program = steering(tl.wrap(FAMILIES["llama"].build(dtype=torch.bfloat16)))
    found = tl.sweep(program, IDS, strength=STRENGTHS, v=VECTORS)
    assert found.one_by_one is None
    assert found["h"].dtype is torch.bfloat16
    alone = tl.sweep(program, IDS, strength=STRENGTHS, v=VECTORS, batch_size=1)
    for name in ("every layer", "h", "logits"):
        scale = alone[name].abs().max().item()
        torch.testing.assert_close(found[name], alone[name], rtol=0, atol=1e-2 * scale)


def test_points_differ() -> None:
    found = tl.sweep(PROGRAM, IDS, strength=STRENGTHS)
    for point in range(1, 5):
        assert not torch.allclose(found["logits"][0], found["logits"][point], atol=1e-3)


@settings(max_examples=settings().max_examples // 2)
@given(
    strengths=st.lists(st.floats(-4, 4, width=32), min_size=2, max_size=5),
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 5),
    product=st.booleans(),
)
def test_a_sweep_is_its_points_one_by_one(
    strengths: list[float], seed: int, batch: int, product: bool
) -> None:
    vectors = torch.randn(len(strengths), D, generator=torch.Generator().manual_seed(seed))
    given: dict[str, Any] = {"strength": strengths, "v": vectors}
    found = tl.sweep(SIMPLE, IDS, batch_size=batch, product=product, **given)
    assert found.points == len(strengths) ** (2 if product else 1)
    assert_same(found, SIMPLE, IDS, None if batch == 1 else 1e-5)


def simple() -> tl.Program:
    with model.record() as r:
        model.layers[1].resid_post += tl.constant(1.0, name="strength") * tl.constant(V, name="v")
        model.logits[:, -1].save("logits")
        model.layers[2].resid_post.norm(dim=-1).save("norms")
    return model.compile(r)


SIMPLE = simple()
PLAIN = tl.wrap(FAMILIES["llama"].build())  # of the sizes that graphs are drawn for


# Most graphs that are drawn have no constant with a name, or mix positions.
@settings(suppress_health_check=[HealthCheck.filter_too_much])
@given(graph=st.one_of(graphs(), graphs(aligned=False)), ragged=st.booleans())
def test_what_can_be_lifted_of_random_graphs_is_the_same_at_every_point(graph: Graph, ragged: bool) -> None:
    """The graphs that are drawn also mean, sort and index over rows: those must not be lifted."""
    named = {op.name for op in graph.ops if isinstance(op, Const) and op.name is not None}
    assume(named)
    program = PLAIN.compile(graph)
    constants = {name: entry.default for name, entry in program.constants.items()}
    assume(all(tensor.is_floating_point() for tensor in constants.values()))
    rows = ROWS["ragged" if ragged else "even"]
    swept: dict[str, Any] = {
        name: [tensor * scale for scale in (1.0, -0.5, 2.0)] for name, tensor in constants.items()
    }
    try:
        alone = tl.sweep(program, rows, batch_size=1, **swept)
    except tl.TracelensError:  # positions that are mixed, where rows differ in length
        assume(False)
        raise
    found = tl.sweep(program, rows, batch_size=2, **swept)
    for name in alone:
        for one, together in zip(parts(alone[name]), parts(found[name]), strict=True):
            assert one.shape == together.shape
            assert one.dtype == together.dtype
            if one.is_floating_point():  # the order of equal numbers is nobody's business
                # Some graphs cast to halves in their middle, where a last bit of float32 can move a rounding.
                finite = one.isfinite() & together.isfinite()
                scale = max(one[finite].double().abs().max().item() if finite.any() else 0.0, 1e-3)
                close = (one.double() - together.double()).abs() <= 2e-2 * scale
                assert (close | ~finite).all(), name
    if found.one_by_one is None:
        assert found.runs == 2


# --- what keeps rows apart, and what does not ------------------------------------------------------------------------

TOGETHER: dict[str, Callable[[Any, Any, Any], Any]] = {
    "sum": lambda h, v, a: h + v,
    "product": lambda h, v, a: a * h,
    "chain": lambda h, v, a: h + a * v,
    "normalised": lambda h, v, a: h + a * v / v.norm(),
    "projection": lambda h, v, a: (h * v).sum(-1),
    "matrix before sites": lambda h, v, a: h + v @ torch.eye(D),
    "condition": lambda h, v, a: tl.where(h > a, h, 0.0),
    "position mean": lambda h, v, a: (h * a).mean(1),
    "soft-max": lambda h, v, a: (h * a).softmax(-1),
    "last": lambda h, v, a: (h + v)[:, -1],
    "token": lambda h, v, a: (h + v).tok[-1],
    "matmul after": lambda h, v, a: (h + v) @ torch.eye(D),
    "masked mean": lambda h, v, a: tl.masked_mean(h + v),
    "flattened": lambda h, v, a: (h + v).flatten(1),
    "topk": lambda h, v, a: (h + v).topk(2).values,
    "one in front": lambda h, v, a: h * v[None, None],
    "table": lambda h, v, a: model.unembed[(model.logits * a).argmax(-1)],
    "nothing of a site": lambda h, v, a: v * a,
}
ALONE: dict[str, Callable[[Any, Any, Any], Any]] = {
    "row mean": lambda h, v, a: (h * a).mean(0),
    "all mean": lambda h, v, a: (h * a).mean(),
    "row sorted": lambda h, v, a: (h * a).sort(0).values,
    "row soft-max": lambda h, v, a: (h * a).softmax(0),
    "rows summed so far": lambda h, v, a: (h * a).cumsum(0),
    "first row": lambda h, v, a: (h * a)[0],
    "last row": lambda h, v, a: (h * a)[-1:],
    "all rows against all": lambda h, v, a: (h * a)[:, -1] @ (h * a)[:, -1].T,
    "rows turned": lambda h, v, a: (h * a).transpose(0, 1),
    "rows flipped": lambda h, v, a: (h * a).flip(0),
    "rows joined": lambda h, v, a: torch.cat([h * a, h], 0),
    "rows merged": lambda h, v, a: (h * a).flatten(0, 1),
    "inner product": lambda h, v, a: h @ v,
    "stack of layers": lambda h, v, a: (model.layers[:].resid_post * a).stack(),
    "python": lambda h, v, a: tl.apply(torch.relu, h * a),
    "fill": lambda h, v, a: h.masked_fill(h > 0, a),
    "one constant is too deep": lambda h, v, a: (
        h[:, -1, 0] + v[:, None, None][:2].sum() * h[:, -1, 0] + (h[:, -1].sum(0) * v)[0]
    ),
}


def program_of(function: Callable[[Any, Any, Any], Any]) -> tl.Program:
    with model.record() as r:
        v, a = tl.constant(V, name="v"), tl.constant(1.5, name="a")
        function(model.layers[1].resid_post, v, a).save("f")
    return model.compile(r)


@pytest.mark.parametrize("function", TOGETHER.values(), ids=TOGETHER)
def test_what_runs_together(function: Callable[[Any, Any, Any], Any]) -> None:
    program = program_of(function)
    found = tl.sweep(program, ROWS["even"], v=VECTORS[:3], a=STRENGTHS[:3])
    assert found.one_by_one is None
    assert_same(found, program, ROWS["even"], 1e-5)


@pytest.mark.parametrize("function", ALONE.values(), ids=ALONE)
def test_what_runs_one_by_one(function: Callable[[Any, Any, Any], Any]) -> None:
    program = program_of(function)
    found = tl.sweep(program, ROWS["even"], v=VECTORS[:3], a=STRENGTHS[:3])
    assert found.one_by_one
    assert found.runs == 3
    assert_same(found, program, ROWS["even"], None)


@pytest.mark.parametrize("index", [-1, 0, slice(-1, None)])
def test_a_write_to_some_rows_runs_one_by_one(index: Any) -> None:
    with model.record() as r:
        model.layers[1].resid_post[index] = 0.0
        model.layers[1].resid_post += tl.constant(V, name="v")
        model.logits[:, -1].save("logits")
    program = model.compile(r)
    found = tl.sweep(program, ROWS["even"], v=VECTORS)
    assert "rows of the batch" in (found.one_by_one or "")
    assert_same(found, program, ROWS["even"], None)


def test_sites_by_module_path_run_together_where_their_axes_are_known() -> None:
    mlp = "model.layers.1.mlp"
    with model.record() as r:
        model.module(mlp).output += tl.constant(V, name="v")
        model.logits[:, -1].save("logits")
    program = model.compile(r)
    found = tl.sweep(program, ROWS["even"], v=VECTORS)
    assert found.one_by_one is None
    assert_same(found, program, ROWS["even"], 1e-5)
    with model.record() as r:
        model.module(mlp).output = tl.constant(1.0, name="a")
        model.logits[:, -1].save("logits")
    program = model.compile(r)
    found = tl.sweep(program, ROWS["even"], a=STRENGTHS)
    assert "which axes" in (found.one_by_one or "")
    assert_same(found, program, ROWS["even"], None)


def test_gradients_run_one_by_one() -> None:
    with model.record() as r:
        h = model.layers[1].resid_post
        model.layers[1].resid_post = h * tl.constant(1.0, name="a")
        tl.grad(model.logits[:, -1].amax(-1).sum(), h).save("g")
    program = model.compile(r)
    found = tl.sweep(program, ROWS["even"], a=STRENGTHS)
    assert found.one_by_one
    assert_same(found, program, ROWS["even"], None)


def test_a_graph_that_is_tied_to_a_size_runs_one_by_one() -> None:
    with model.record(IDS) as r:
        h = model.layers[1].resid_post + tl.constant(V, name="v")
        h[:, h.shape[1] - 2].save("f")
    program = model.compile(r)
    found = tl.sweep(program, IDS, v=VECTORS)
    assert found.one_by_one == "the graph is tied to prompts of one size"
    assert_same(found, program, IDS, None)
    reason = lift_constants(program.graph, frozenset({"v"}))
    assert isinstance(reason, Unliftable)
    assert reason.op is not None


# --- points ----------------------------------------------------------------------------------------------------------


def test_lists_go_together_or_cross() -> None:
    found = tl.sweep(SIMPLE, IDS, strength=[1, 2], v=VECTORS[:2])
    assert found.points == 2
    assert found.swept["strength"].tolist() == [1.0, 2.0]
    crossed = tl.sweep(SIMPLE, IDS, strength=[1, 2], v=VECTORS[:3], product=True)
    assert crossed.points == 6
    assert crossed.swept["strength"].tolist() == [1, 1, 1, 2, 2, 2]
    assert torch.equal(crossed.swept["v"], VECTORS[:3].repeat(2, 1))


def test_a_single_value_holds_at_every_point() -> None:
    found = tl.sweep(SIMPLE, IDS, strength=[1, 2, 3], v=VECTORS[0])
    assert torch.equal(found.swept["v"], VECTORS[:1].expand(3, -1))
    assert_same(found, SIMPLE, IDS, 1e-5)
    held = tl.sweep(SIMPLE, IDS, v=VECTORS, strength=2.0)
    assert held.swept["strength"].tolist() == [2.0] * 5


@pytest.mark.parametrize(
    "values",
    [
        range(3),
        (0.0, 1.0, 2.0),
        np.arange(3.0),
        np.arange(3, dtype=np.float32),
        torch.arange(3.0),
        iter([0, 1, 2]),
        list(torch.arange(3.0)),
    ],
    ids=lambda values: type(values).__name__,
)
def test_what_is_a_list_of_values(values: Any) -> None:
    assert tl.sweep(SIMPLE, IDS, strength=values).swept["strength"].tolist() == [0.0, 1.0, 2.0]


def test_results_are_a_table_with_the_swept_numbers() -> None:
    found = tl.sweep(SIMPLE, ROWS["even"], strength=[0.5, 2.0], v=VECTORS[:2])
    frame = found.to_pandas("norms")
    assert list(frame.columns) == ["point", "strength", "row", "position", "value"]
    assert len(frame) == 2 * 3 * 7
    one = frame[(frame["strength"] == 2.0) & (frame["row"] == 1) & (frame["position"] == 4)]
    assert one["value"].item() == pytest.approx(found["norms"][1, 1, 4].item())
    assert isinstance(found.to_pandas(), pandas.DataFrame)
    ragged = tl.sweep(SIMPLE, ROWS["ragged"], strength=[0.5, 2.0]).to_pandas("norms")
    assert len(ragged) == 2 * sum(RAGGED)


def test_it_shows_itself() -> None:
    found = tl.sweep(SIMPLE, IDS, strength=STRENGTHS, v=VECTORS)
    assert repr(found).startswith("sweep of 5 points in 1 run: strength -2 to 3, v [48]\n")
    assert "logits" in repr(found)
    html = found._repr_html_()
    assert "strength -2 to 3" in html
    assert "<table>" in html
    alone = tl.sweep(SIMPLE, IDS, strength=STRENGTHS, batch_size=1)
    assert repr(alone).startswith("sweep of 5 points in 5 runs (batch_size=1)")


def test_batches_are_bounded_by_tokens() -> None:
    long = [[5, 6, 7, 8, 9, 10, 11, 12] * 6] * 4
    found = tl.sweep(SIMPLE, long, strength=np.linspace(0, 1, 12))
    assert found.runs == 3  # 4 rows of 48 tokens: five points make 960 of 1024
    assert tl.sweep(SIMPLE, IDS, strength=np.linspace(0, 1, 65)).runs == 2


def test_a_bar_is_shown_on_request_only(capfd: pytest.CaptureFixture[str]) -> None:
    tl.sweep(SIMPLE, IDS, strength=STRENGTHS, batch_size=2)
    assert capfd.readouterr() == ("", "")
    tl.sweep(SIMPLE, IDS, strength=STRENGTHS, batch_size=2, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "5/5" in err or "/5" in err


def test_a_sweep_leaves_the_program_as_it_was() -> None:
    before = SIMPLE(IDS)["logits"]
    tl.sweep(SIMPLE, IDS, strength=STRENGTHS, v=VECTORS)
    assert torch.equal(SIMPLE(IDS)["logits"], before)
    LLAMA.check()


# --- refusals --------------------------------------------------------------------------------------------------------


def test_what_makes_no_points() -> None:
    with refused(SweepError, "2 values for 'strength', 5 values for 'v'", instead="product=True"):
        tl.sweep(SIMPLE, IDS, strength=[1, 2], v=VECTORS)  # <-
    with refused(SweepError, "nothing to sweep", instead="strength=[...], v=[...]"):
        tl.sweep(SIMPLE, IDS)  # <-
    with refused(SweepError, "nothing to sweep", instead="strength=[...], v=[...]"):
        tl.sweep(SIMPLE, IDS, strength=2.0)  # <-
    with refused(SweepError, "'v' is empty", instead="v=[...]"):
        tl.sweep(SIMPLE, IDS, v=[])  # <-
    with model.record() as r:
        model.logits.save()
    with refused(SweepError, "nothing to sweep", instead="tl.constant"):
        tl.sweep(model.compile(r), IDS)  # <-


def test_values_that_do_not_fit() -> None:
    with refused(UnknownConstantError, "'strenght'", "'strength', 'v'", instead="did you mean strength?"):
        tl.sweep(SIMPLE, IDS, strenght=[1, 2])  # <-
    with refused(ShapeError, "value 1 of the sweep", "'v' is f32[48]", "(47,)", instead="(48,)"):
        tl.sweep(SIMPLE, IDS, v=[V, V[:-1]])  # <-
    with refused(ShapeError, "(2, 5, 48)", instead="(48,)"):
        tl.sweep(SIMPLE, IDS, v=torch.ones(2, 5, D))  # <-
    with refused(DtypeError, "value 0 of the sweep", "True", instead="a float32"):
        tl.sweep(SIMPLE, IDS, strength=[True, False])  # <-


def test_other_arguments_that_do_not_fit(tmp_path: Any) -> None:
    with refused(OptionError, "a Record", instead="model.compile(r)"), model.record() as r:
        tl.sweep(r, IDS, v=VECTORS)  # <-
    for wrong in (0, -1, 2.0, True):
        with refused(OptionError, f"batch_size={wrong!r}", instead="batch_size=8"):
            tl.sweep(SIMPLE, IDS, strength=STRENGTHS, batch_size=wrong)  # <-
    with model.record() as r:
        (model.logits * tl.constant(1.0, name="a")).save("x", to=str(tmp_path / "x.safetensors"))
    with refused(SweepError, "'x' to a file", instead="without to="):
        tl.sweep(model.compile(r), IDS, a=STRENGTHS)  # <-


# --- plain models ----------------------------------------------------------------------------------------------------


class Sum(torch.nn.Module):
    """Two inputs, one output."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(3, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.fc(x) + y


@pytest.mark.parametrize("given_as", ["a tuple", "a dict"])
def test_a_program_of_a_plain_model_is_swept_point_by_point(given_as: str) -> None:
    net, x, y = tl.wrap(Sum()), torch.randn(4, 3), torch.randn(4, 3)
    with net.record(x, y) as r:
        k, v = tl.constant(1.0, name="k"), tl.constant(torch.zeros(3), name="v")
        net.module("fc").output = net.module("fc").output * k + v
        net.module("").output.save("out")
    program = net.compile(r)
    inputs = (x, y) if given_as == "a tuple" else {"x": x, "y": y}
    if given_as == "a dict":
        with net.record(x=x, y=y) as r:
            k, v = tl.constant(1.0, name="k"), tl.constant(torch.zeros(3), name="v")
            net.module("fc").output = net.module("fc").output * k + v
            net.module("").output.save("out")
        program = net.compile(r)
    found = tl.sweep(program, inputs, k=[0.0, 2.0], v=torch.eye(3)[:2], product=True)
    assert found["out"].shape == (4, 4, 3)
    assert found.points == found.runs == 4
    assert found.one_by_one == "inputs of a plain model have no rows that are known"
    for point in range(4):
        constants = {name: values[point] for name, values in found.swept.items()}
        wanted = program(x, y, **constants) if given_as == "a tuple" else program(x=x, y=y, **constants)
        assert torch.equal(found["out"][point], wanted["out"])
        by_hand = net.hf.fc(x) * constants["k"] + constants["v"] + y
        torch.testing.assert_close(found["out"][point], by_hand.detach())


def test_one_argument_of_a_plain_model() -> None:
    net, x = tl.wrap(torch.nn.Linear(3, 3)), torch.randn(4, 3)
    with net.record(x) as r:
        (net.module("").output * tl.constant(1.0, name="k")).save("out")
    found = tl.sweep(net.compile(r), x, k=[0.0, 2.0])
    assert torch.equal(found["out"][1], 2 * net.hf(x).detach())
    with pytest.raises(UnknownConstantError):
        tl.sweep(net.compile(r), x, j=[0.0, 2.0])


# --- constants without effect ----------------------------------------------------------------------------------------


def test_a_constant_in_no_operation_is_not_swept() -> None:
    with model.record() as r:
        tl.constant(1.0, name="idle")
        used = tl.constant(1.0, name="used")
        _ = tl.constant(2.0, name="detour") * model.layers[0].resid_post
        model.layers[0].resid_post *= used
        model.logits.save("logits")
    program = model.compile(r)
    for name in ("idle", "detour"):
        values: dict[str, Any] = {name: [0.0, 1.0], "used": 1.0}
        with pytest.raises(SweepError, match=f"'{name}' takes part in nothing") as caught:
            tl.sweep(program, IDS, product=False, **values)
        assert name in str(caught.value.at.text)
        assert name in str(caught.value.instead)
    assert not torch.equal(*tl.sweep(program, IDS, used=[0.0, 1.0])["logits"])
