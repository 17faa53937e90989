"""Steering vectors as values: places, arithmetic, facts, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import tracelens as tl
from tests.support.families import D_MODEL, FAMILIES, LAYERS, NEURONS
from tracelens import errors
from tracelens.steering import Facts, SteeringVector


@pytest.fixture(scope="module")
def model() -> tl.Model:
    return tl.wrap(FAMILIES["llama"].build())


def drawn(*, seed: int = 0, width: int = D_MODEL) -> torch.Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def vector(
    *layers: int, seed: int = 0, site: str = "resid_post", facts: Facts | None = None
) -> SteeringVector:
    return SteeringVector({(site, layer): drawn(seed=seed + layer) for layer in layers or (0, 1)}, facts)


def test_directions_are_copies_in_float32_on_the_host_by_layer_and_site() -> None:
    mine = drawn().double()
    v = SteeringVector(
        {
            ("resid_post", 2): mine,
            ("post_ln", 2): np.arange(4),
            ("resid_pre", 1): [1, 2.5],
            ("mlp_act", 0): drawn().bfloat16(),
        }
    )
    assert v.places == (("mlp_act", 0), ("resid_pre", 1), ("mlp_norm", 2), ("resid_post", 2))
    assert tuple(v) == v.places
    assert (v.sites, v.layers, len(v)) == (("mlp_act", "resid_pre", "mlp_norm", "resid_post"), (0, 1, 2), 4)
    assert all(direction.dtype is torch.float32 for direction in v.directions.values())
    before = mine.float()
    mine += 1
    assert torch.equal(v["resid_post", 2], before)
    assert v["post_ln", 2].tolist() == [0, 1, 2, 3]
    assert torch.equal(v["post_ln", 2], v["mlp_norm", 2])
    assert ("post_ln", 2) in v
    assert ("post_ln", 1) not in v
    alike = drawn()  # of the very dtype that is kept
    w = SteeringVector({("resid_post", 2): alike})
    alike += 1
    assert torch.equal(w["resid_post", 2], before)
    with pytest.raises(TypeError):
        v.directions["resid_post", 2] = mine


def test_a_saved_value_is_a_direction(model: tl.Model) -> None:
    with model.trace([[5, 6, 7]]):
        h = model.layers[1].resid_post[0, -1].save()
    assert torch.equal(SteeringVector({("resid_post", 1): h})["resid_post", 1], h.value)


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(torch.zeros(2, 3), id="two axes"),
        pytest.param(torch.tensor(1.0), id="no axis"),
        pytest.param(torch.tensor([]), id="no number"),
        pytest.param([1.0, float("nan")], id="nan"),
        pytest.param(torch.tensor([True]), id="bool"),
        pytest.param(torch.tensor([1j]), id="complex"),
        pytest.param(torch.ones(3, device="meta"), id="meta"),
        pytest.param("abc", id="text"),
        pytest.param([[1.0], [2.0, 3.0]], id="ragged"),
    ],
)
def test_what_is_no_direction_is_refused(given: Any) -> None:
    with pytest.raises(errors.SteeringVectorError, match=r"layers\[1\]\.resid_post"):
        SteeringVector({("resid_post", 1): given})


@pytest.mark.parametrize(
    "place",
    [
        ("resid_post", -1),
        ("resid_post", True),
        ("z", 1),
        ("pattern", 1),
        ("expert_index", 1),
        ("logits", 1),
        ("nothing", 1),
        "resid_post",
        ("resid_post",),
        (1, "resid_post"),
    ],
)
def test_what_is_no_place_is_refused(place: Any) -> None:
    with pytest.raises(errors.SteeringVectorError, match="no place"):
        SteeringVector({place: drawn()})


def test_no_direction_at_all_and_two_of_one_place_are_refused() -> None:
    with pytest.raises(errors.SteeringVectorError, match="at least one"):
        SteeringVector({})
    with pytest.raises(errors.SteeringVectorError, match="two directions"):
        SteeringVector({("post_ln", 1): drawn(), ("mlp_norm", 1): drawn()})


def test_a_part_of_a_vector() -> None:
    v = SteeringVector(
        {(site, layer): drawn(seed=layer) for site in ("resid_pre", "post_ln") for layer in range(3)},
        Facts(
            scale={("mlp_norm", 1): 2.0, ("resid_pre", 1): 3.0},
            diagnostics={("mlp_norm", 1): {"agreement": 0.5}},
        ),
    )
    part = v.at(sites="post_ln", layers=[1, 2])
    assert part.places == (("mlp_norm", 1), ("mlp_norm", 2))
    assert torch.equal(part["post_ln", 1], v["post_ln", 1])
    assert part.facts.scale == {("mlp_norm", 1): 2.0}
    assert part.facts.diagnostics == {("mlp_norm", 1): {"agreement": 0.5}}
    assert v.at(layers=1).places == (("resid_pre", 1), ("mlp_norm", 1))
    assert v.at(layers=range(1, 3)).layers == (1, 2)
    for wanted in ({"sites": "resid_post"}, {"layers": 3}, {"layers": [0, 7]}, {"layers": []}):
        with pytest.raises(errors.SteeringSelectionError):
            v.at(**wanted)
    for place in (("resid_post", 1), ("resid_pre", 3), "resid_pre", 0, ("resid_pre",)):
        with pytest.raises(errors.SteeringSelectionError, match="no direction"):
            v[place]


def test_arithmetic_is_that_of_the_directions() -> None:
    a, b = vector(0, 2), vector(0, 2, seed=9)
    c = 1.5 * a - b * np.float32(0.5) + (-b) / 4
    for place in a:
        torch.testing.assert_close(c[place], 1.5 * a[place] - 0.75 * b[place], rtol=1e-6, atol=1e-6)
    assert torch.equal((a * torch.tensor(2.0))["resid_post", 0], 2 * a["resid_post", 0])
    assert (2 * -(a - b)).facts.method == "2 * (-(vector - vector))"


def test_lengths() -> None:
    a, b = vector(0, 1), vector(0, 1, seed=5)
    for place, norm in a.normalized().norms.items():
        assert norm == pytest.approx(1, rel=1e-6)
        torch.testing.assert_close(a.normalized()[place], a.unit(place), rtol=0, atol=0)
    assert list(a.to_norm(b).norms.values()) == pytest.approx(list(b.norms.values()))
    assert list(a.to_norm(dict.fromkeys(a, 3.0)).norms.values()) == pytest.approx([3.0, 3.0])
    with pytest.raises(errors.SteeringVectorError, match="zero"):
        (0 * a).normalized()
    for wrong in ({("resid_post", 0): 1.0}, "long", -1.0, float("nan"), None):
        with pytest.raises(errors.SteeringSelectionError):
            a.to_norm(wrong)


def test_only_vectors_of_one_model_and_of_the_same_places_have_a_sum() -> None:
    one = Facts(model="one", d_model=D_MODEL, n_layers=LAYERS, weights={"float16": "a"})
    renamed = Facts(
        model="copy of one", d_model=D_MODEL, n_layers=LAYERS, weights={"float16": "a", "bfloat16": "b"}
    )
    other = Facts(model="one", d_model=D_MODEL, n_layers=LAYERS, weights={"float16": "b"})
    a = vector(0, facts=one)
    assert (a + vector(0, facts=renamed)).facts.model == "one"
    for refused in (
        vector(0, facts=other),
        vector(0, facts=Facts(n_layers=LAYERS + 1)),
        vector(0, facts=Facts(model="two")),
        vector(1),
        vector(0, 1),
        vector(0, site="resid_mid"),
        SteeringVector({("resid_post", 0): drawn(width=D_MODEL + 1)}),
    ):
        with pytest.raises(errors.SteeringMismatchError):
            a + refused
    assert len(vector(0) + a) == 1  # of a vector whose model is not known
    for wrong in (1, "a", None, torch.ones(D_MODEL)):
        with pytest.raises(TypeError):
            a + wrong
    for wrong in ("a", True, [2.0], torch.ones(2)):
        with pytest.raises(TypeError):
            a * wrong
    with pytest.raises(errors.SteeringVectorError, match="zero"):
        a / 0


def test_facts_go_with_what_is_made_of_a_vector() -> None:
    place = ("resid_post", 0)
    told: dict[str, Any] = {"rows": 10, "data": "abc", "positions": "label", "scale": {place: 4.0}}
    a = vector(0, facts=Facts(method="mean_difference", diagnostics={place: {"agreement": 0.9}}, **told))
    b = vector(0, seed=3, facts=Facts(method="pca", **{**told, "rows": 20, "scale": {place: 8.0}}))
    assert (2 * a).facts.method == "2 * mean_difference"
    assert (2 * a).facts.diagnostics == a.facts.diagnostics
    assert not (-2 * a).facts.diagnostics  # of the opposite direction
    both = (a - 2 * b).facts
    assert both.method == "mean_difference - 2 * pca"
    assert (both.rows, both.data, both.positions) == (None, "abc", "label")
    assert both.scale == {place: 6.0}
    assert (a - (a - b)).facts.method == "mean_difference - (mean_difference - pca)"


def test_facts_of_a_model_and_in_json(model: tl.Model) -> None:
    place = ("resid_post", 1)
    facts = Facts.of(
        model, method="pca", rows=3, scale={place: 2.5}, diagnostics={place: {"separation": 1.5}}
    )
    assert (facts.family, facts.n_layers, facts.d_model) == ("Llama", LAYERS, D_MODEL)
    assert set(facts.weights) == {"float16", "bfloat16"}
    told = facts.to_dict()
    assert told["scale"] == {"resid_post.1": 2.5}
    assert Facts.from_dict({**told, "of a newer version": 1}) == facts
    assert Facts.from_dict(Facts().to_dict()) == Facts()


def test_a_model_is_told_by_its_weights_whatever_its_dtype(model: tl.Model) -> None:
    facts = Facts.of(tl.wrap(FAMILIES["llama"].build(dtype=torch.bfloat16)))
    facts.check(model)
    Facts.of(model).check(tl.wrap(FAMILIES["llama"].build(dtype=torch.float16)))
    changed = FAMILIES["llama"].build()
    with torch.no_grad():
        changed.lm_head.weight[0] += 1
    for other in (changed, FAMILIES["llama"].build(seed=1), FAMILIES["gpt2"].build(n_layer=2)):
        with pytest.raises(errors.SteeringMismatchError):
            facts.check(tl.wrap(other))
    with torch.no_grad():  # of a model that was used before
        wrapped = tl.wrap(changed)
        changed.lm_head.weight[0] -= 1
        Facts.of(model).check(wrapped)
        changed.lm_head.weight[0] += 1
        with pytest.raises(errors.SteeringMismatchError):
            Facts.of(model).check(wrapped)


def test_directions_of_the_users_own(model: tl.Model) -> None:
    v = SteeringVector.from_directions(
        model, {("resid_post", -1): drawn(), ("mlp_act", 0): drawn(width=NEURONS)}, method="SAE feature 3"
    )
    assert v.places == (("mlp_act", 0), ("resid_post", LAYERS - 1))
    assert v.facts.method == "SAE feature 3"
    for wrong in ({("mlp_act", 0): drawn()}, {("resid_post", LAYERS): drawn()}):
        with pytest.raises(errors.SteeringMismatchError):
            SteeringVector.from_directions(model, wrong)
    with pytest.raises(errors.SteeringVectorError):
        SteeringVector.from_directions(model, {("resid_post", -LAYERS - 1): drawn()})


def test_a_vector_for_a_model_of_the_same_shape(model: tl.Model) -> None:
    v = SteeringVector.from_directions(model, {("resid_post", 1): drawn()}, positions="label")
    tuned = tl.wrap(FAMILIES["llama"].build(seed=2))
    with pytest.raises(errors.SteeringMismatchError, match="for_model"):
        v.check(tuned)
    taken = v.for_model(tuned)
    taken.check(tuned)
    assert torch.equal(taken["resid_post", 1], v["resid_post", 1])
    assert taken.facts.positions == "label"
    assert "directions of LlamaForCausalLM" in str(taken.facts.method)
    with pytest.raises(errors.SteeringMismatchError):
        v.for_model(tl.wrap(FAMILIES["llama"].build(hidden_size=24)))


def test_how_a_vector_shows_itself() -> None:
    v = SteeringVector(
        {("resid_post", layer): torch.ones(4) for layer in range(14)}, Facts(model="m", method="pca")
    )
    lines = repr(v).splitlines()
    assert lines[0] == "steering vector of m: 14 directions, pca"
    assert lines[2].split() == ["layers[0].resid_post", "4", "2"]
    assert lines[-1] == "and 2 more"
    assert "<table>" in v._repr_html_()


def test_a_bare_direction_and_a_bare_model_are_told_what_they_lack(model: tl.Model) -> None:
    with pytest.raises(
        errors.SteeringVectorError, match="a Tensor does not say at which site and layer"
    ) as bare:
        SteeringVector(drawn())
    assert bare.value.at is not None
    assert "SteeringVector(drawn())" in bare.value.at.text
    with pytest.raises(errors.SteeringVectorError, match="does not say at which site"):
        SteeringVector.from_directions(model, drawn())
    with pytest.raises(errors.SteeringVectorError, match="is no place"):
        SteeringVector.from_directions(model, {3: drawn()})
    hf, v = model.hf, vector(1)
    asked: list[Any] = [
        lambda: tl.steering.Steered(hf, v),
        lambda: tl.steering.extract(hf, [("a", "b", "c")]),
        lambda: SteeringVector.from_directions(hf, {("resid_post", 1): drawn()}),
        lambda: v.check(hf),
        lambda: v.for_model(hf),
    ]
    for ask in asked:
        with pytest.raises(
            errors.OptionError, match="a LlamaForCausalLM is no model with named sites"
        ) as raised:
            ask()
        assert raised.value.instead is not None
        assert "tl.wrap(model, tokenizer)" in raised.value.instead
        assert raised.value.at is not None
        assert raised.value.at.filename == __file__
    with pytest.raises(errors.NotALanguageModelError, match="modules alone"):
        v.check(tl.wrap(torch.nn.Linear(2, 2)))
