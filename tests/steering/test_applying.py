"""Where a vector is applied: each scope is the write that a user would have made there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import tracelens as tl
from tests.steering.operators_by_hand import BY_HAND, settings_of
from tests.support.families import D_MODEL, FAMILIES
from tests.support.spread_models import Both
from tests.support.tokenizers import byte_level_bpe
from tracelens import errors
from tracelens.steering import ActivationAddition, Steered, SteeringVector

ROWS = [[5, 6, 7, 8, 9], [6, 12, 13]]
MASK = torch.tensor([[True, False, False, True, True], [False, False, False, True, False]])
NEW = 4
CLOSE: dict[str, float] = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def model() -> tl.Model:
    return tl.wrap(FAMILIES["llama"].build(vocab_size=len(byte_level_bpe())), byte_level_bpe())


def drawn(seed: int) -> SteeringVector:
    generator = torch.Generator().manual_seed(seed)
    return SteeringVector(
        {("resid_mid", layer): torch.randn(D_MODEL, generator=generator) for layer in (0, 1)}
    )


V, W = drawn(0), drawn(1)
K = torch.tensor([0.75, -1.5])
Block = Callable[[tl.Model, Any], Any]
By = Callable[[tl.Model, Any, int, Any], None]


def traced(model: tl.Model, write: Block, rows: Any = ROWS) -> torch.Tensor:
    with model.trace(rows) as t:
        write(model, t)
        last = model.logits[:, -1].save()
    return last.value


def generated(model: tl.Model, write: Block, rows: Any = ROWS, **options: Any) -> list[torch.Tensor]:
    """What the last layer holds at each position of each row, and the tokens as numbers."""
    with model.generate(rows, max_new_tokens=NEW, eos_token_id=None, **options) as t:
        write(model, t)
        model.layers[2].resid_post.save("h")
    found = t["h"]
    return [*(found if isinstance(found, list) else found.split(1)), torch.tensor(t.tokens)]


def same(found: Any, wanted: Any, **within: float) -> None:
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, **(within or {"rtol": 0, "atol": 0}))


def of_scope(scope: Callable[[tl.Model, Any], Any], key: Any = None) -> By:
    """Adds to a site in some steps, to all of it or to some tokens."""

    def write(model: tl.Model, t: Any, layer: int, new: Any) -> None:
        layer_in_steps = scope(model, t).layers[layer]
        if key is None:
            layer_in_steps.resid_mid += new
        else:
            layer_in_steps.resid_mid.tok[key] += new

    return write


SINGLE: dict[str, tuple[dict[str, Any], By]] = {
    "all": ({}, of_scope(lambda model, t: model)),
    "prompt": ({"positions": "prompt"}, of_scope(lambda model, t: model)),
    "last prompt token": ({"positions": "last_prompt_token"}, of_scope(lambda model, t: model, -1)),
    "newest": ({"positions": "newest"}, of_scope(lambda model, t: model, -1)),
    "number": ({"positions": 1}, of_scope(lambda model, t: model, 1)),
    "from the end": ({"positions": -2}, of_scope(lambda model, t: model, -2)),
    "slice": ({"positions": slice(1, 3)}, of_scope(lambda model, t: model, slice(1, 3))),
    "list": ({"positions": [0, 2]}, of_scope(lambda model, t: model, [0, 2])),
    "id": ({"positions": tl.token_id(6)}, of_scope(lambda model, t: model, tl.token_id(6))),
    "mask": ({"positions": MASK}, of_scope(lambda model, t: model, MASK)),
    "one prompt": ({"positions": lambda t: t.prompts[1]}, of_scope(lambda model, t: t.prompts[1])),
    "function": ({"positions": lambda t: slice(0, 2)}, of_scope(lambda model, t: model, slice(0, 2))),
}


@pytest.mark.parametrize("name", SINGLE)
def test_each_scope_of_a_trace(name: str, model: tl.Model) -> None:
    given, by_hand = SINGLE[name]

    def write(model: tl.Model, t: Any) -> None:
        for layer in (0, 1):
            by_hand(model, t, layer, 2.0 * V["resid_mid", layer])

    wanted = traced(model, write)
    assert torch.equal(traced(model, lambda _, t: V.apply(t, 2.0, **given)), wanted)
    assert not torch.allclose(wanted, traced(model, lambda *_: None), atol=1e-2)


STEPS: dict[str, tuple[dict[str, Any], By]] = {
    "all": ({}, of_scope(lambda model, t: model)),
    "prompt": ({"positions": "prompt"}, of_scope(lambda model, t: t.prefill)),
    "last prompt token": ({"positions": "last_prompt_token"}, of_scope(lambda model, t: t.prefill, -1)),
    "generated": ({"positions": "generated"}, of_scope(lambda model, t: t.decode)),
    "newest": ({"positions": "newest"}, of_scope(lambda model, t: model, -1)),
    "some steps": ({"steps": slice(1, 3)}, of_scope(lambda model, t: t.steps[1:3])),
    "one step": ({"steps": 0, "positions": [0, 1]}, of_scope(lambda model, t: t.steps[0], [0, 1])),
    "a part": ({"positions": lambda t: t.decode}, of_scope(lambda model, t: t.decode)),
    "tokens of the prompt": ({"positions": slice(0, 2)}, of_scope(lambda model, t: model, slice(0, 2))),
}


@pytest.mark.parametrize("name", STEPS)
def test_each_scope_of_a_generation(name: str, model: tl.Model) -> None:
    given, by_hand = STEPS[name]

    def write(model: tl.Model, t: Any) -> None:
        for layer in (0, 1):
            by_hand(model, t, layer, 2.0 * V["resid_mid", layer])

    wanted = generated(model, write)
    same(generated(model, lambda _, t: V.apply(t, 2.0, **given)), wanted)
    assert not all(
        torch.allclose(x, y, atol=1e-2)
        for x, y in zip(wanted, generated(model, lambda *_: None), strict=True)
    )


LATE: dict[str, Callable[[tl.Model], Any]] = {
    "from a position on": lambda model: model.positions >= 3,
    "prompt and text": lambda model: model.positions < 5,
    "an id": lambda model: model.token_ids == 6,
}


@pytest.mark.parametrize("name", LATE)
def test_a_mask_that_the_run_makes_means_the_same_with_and_without_a_cache(
    name: str, model: tl.Model
) -> None:
    mask = LATE[name]

    def by_hand(model: tl.Model, t: Any) -> None:
        for layer in (0, 1):
            model.layers[layer].resid_mid.tok[mask(model)] += K[:, None, None] * V["resid_mid", layer]

    def apply(model: tl.Model, t: Any) -> None:
        V.apply(t, K, positions=mask(model))

    cached = generated(model, apply)
    same(cached, generated(model, by_hand))
    same(cached, generated(model, apply, use_cache=False), **CLOSE)
    same(cached, generated(model, lambda model, t: V.apply(t, K, positions=lambda _: mask(model))))


@pytest.mark.parametrize("name", ["norm_relative", "affine", "clamp both", "rotate"])
def test_operators_in_a_generation_with_and_without_a_cache(name: str, model: tl.Model) -> None:
    settings = settings_of(name, W)

    def apply(model: tl.Model, t: Any) -> None:
        V.apply(t, K, positions=(model.positions >= 2) & (model.positions < 6), **settings)

    same(generated(model, apply), generated(model, apply, use_cache=False), **CLOSE)


@pytest.mark.parametrize("name", BY_HAND)
def test_padding_is_of_no_matter_on_either_side(name: str, model: tl.Model) -> None:
    k = torch.ones(2) if name == "ablate" else K
    settings = settings_of(name, W)
    padded = {
        "left": ([[5, 6, 7, 8, 9], [0, 0, 6, 12, 13]], [[1] * 5, [0, 0, 1, 1, 1]]),
        "right": ([[5, 6, 7, 8, 9], [6, 12, 13, 0, 0]], [[1] * 5, [1, 1, 1, 0, 0]]),
    }
    for positions in ("all", -1, [0, 2]):

        def apply(strength: Any, positions: Any = positions) -> Block:
            return lambda _, t: V.apply(t, strength, positions=positions, **settings)

        solo = torch.cat([traced(model, apply(k[i : i + 1]), [row]) for i, row in enumerate(ROWS)])
        for ids, mask in padded.values():
            given = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
            torch.testing.assert_close(traced(model, apply(k), given), solo, **CLOSE)


@pytest.mark.parametrize("key", [" France", (" capital", -1), tl.chars(0, 3)])
def test_a_text_and_characters_of_the_prompt(key: Any, model: tl.Model) -> None:
    prompts = ["The capital of France is", "The capital of France was"]
    wanted = traced(
        model, lambda model, t: of_scope(lambda model, t: model, key)(model, t, 0, V["resid_mid", 0]), prompts
    )
    assert torch.equal(traced(model, lambda _, t: V.at(layers=0).apply(t, positions=key), prompts), wanted)
    assert not torch.allclose(wanted, traced(model, lambda *_: None, prompts), atol=1e-2)


# --- strengths -------------------------------------------------------------------------------------------------------


def test_a_strength_for_each_row_and_what_may_hold_one(model: tl.Model) -> None:
    each = torch.cat(
        [
            traced(model, lambda _, t, k=k: V.apply(t, k), [row])
            for row, k in zip(ROWS, K.tolist(), strict=True)
        ]
    )
    for given in (K, K.tolist(), K.numpy(), K.double(), tuple(K.tolist())):
        torch.testing.assert_close(traced(model, lambda _, t, given=given: V.apply(t, given)), each, **CLOSE)
    with model.trace([[5]]):
        saved = (model.logits[0, 0, 0] * 0 + 2.0).save()
    assert torch.equal(
        traced(model, lambda _, t: V.apply(t, saved)), traced(model, lambda _, t: V.apply(t, 2))
    )


def test_a_strength_for_each_row_in_a_mask(model: tl.Model) -> None:
    rows = [ROWS[0], [6, 7, 8, 12, 13]]
    spread = torch.where(MASK, K[:, None], 0.0)

    def by_hand(model: tl.Model, t: Any) -> None:
        for layer in (0, 1):
            model.layers[layer].resid_mid += spread[..., None] * V["resid_mid", layer]

    found = traced(model, lambda _, t: V.apply(t, K, positions=MASK), rows)
    torch.testing.assert_close(found, traced(model, by_hand, rows), **CLOSE)


def test_a_strength_that_the_run_computes(model: tl.Model) -> None:
    """Of each row, or of each token: how far an earlier layer goes along a probe."""
    probe = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(5))

    def token(model: tl.Model, t: Any) -> None:
        V.at(layers=1).apply(t, (model.layers[0].resid_post @ probe).tanh())

    def token_by_hand(model: tl.Model, t: Any) -> None:
        k = (model.layers[0].resid_post @ probe).tanh()
        model.layers[1].resid_mid += k[..., None] * V["resid_mid", 1]

    def row(model: tl.Model, t: Any) -> None:
        V.at(layers=1).apply(t, (model.layers[0].resid_post[:, -1] @ probe).tanh(), positions=[0, 2])

    def row_by_hand(model: tl.Model, t: Any) -> None:
        k = (model.layers[0].resid_post[:, -1] @ probe).tanh()
        model.layers[1].resid_mid.tok[[0, 2]] += k[:, None, None] * V["resid_mid", 1]

    for mine, by_hand in ((token, token_by_hand), (row, row_by_hand)):
        torch.testing.assert_close(traced(model, mine), traced(model, by_hand), **CLOSE)


def test_where_a_probe_says_so(model: tl.Model, spread: Both) -> None:
    """In the graph, for each row and token, with a cache and without one: no number goes to the host."""
    probe = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(5))

    def apply(model: tl.Model, t: Any) -> None:
        V.at(layers=1).apply(t, 2.0, positions=(model.layers[0].resid_post @ probe) > 0)

    def by_hand(model: tl.Model, t: Any) -> None:
        gate = (model.layers[0].resid_post @ probe) > 0
        model.layers[1].resid_mid += tl.where(gate[..., None], 2.0 * V["resid_mid", 1], 0.0)

    cached = generated(model, apply)
    same(cached, generated(model, by_hand), **CLOSE)
    same(cached, generated(model, apply, use_cache=False), **CLOSE)
    same(generated(spread.spread, apply), generated(spread.one, apply), **CLOSE)


def test_a_named_strength_is_swept_as_rows_of_one_batch(model: tl.Model) -> None:
    with model.record() as r:
        V.apply(r, tl.constant(1.0, name="k"))
        model.logits[:, -1].save("logits")
    found = tl.sweep(model.compile(r), ROWS, k=[-1.0, 0.0, 2.0])
    assert found.runs == 1
    for at, k in enumerate((-1.0, 0.0, 2.0)):
        wanted = traced(model, lambda _, t, k=k: V.apply(t, k))
        torch.testing.assert_close(found["logits"][at], wanted, **CLOSE)


def test_a_batch_in_slices_has_the_strengths_of_its_rows(model: tl.Model) -> None:
    with model.trace(ROWS, batch_size=1) as t:
        V.apply(t, K, operator="norm_relative")
        last = model.logits[:, -1].save()
    wanted = traced(model, lambda _, t: V.apply(t, K, operator="norm_relative"))
    torch.testing.assert_close(last.value, wanted, **CLOSE)


# --- a model with its vectors, and sequences of directions -----------------------------------------------------------


def test_generations_on_devices_and_ranks(spread: Both) -> None:
    def several(model: tl.Model, t: Any) -> None:
        V.at(layers=0).apply(t, K, positions="last_prompt_token")
        V.at(layers=1).apply(t, K, positions="generated", operator="norm_preserving")
        W.at(layers=1).apply(t, positions="prompt", operator="ablate")

    wanted = generated(spread.one, several)
    same(generated(spread.spread, several), wanted, **CLOSE)
    assert not torch.allclose(wanted[0], generated(spread.one, lambda *_: None)[0], atol=1e-2)


def test_a_steered_model_applies_its_vectors_in_order(model: tl.Model) -> None:
    first, second = V.at(layers=0), W.at(layers=0)
    steered = Steered(model, first, K).then(second, operator="ablate")
    turned = Steered(model, second, operator="ablate").then(first, K)

    def by_hand(model: tl.Model, t: Any) -> None:
        first.apply(t, K)
        second.apply(t, operator="ablate")

    wanted = traced(model, by_hand)
    with steered.trace(ROWS) as t:
        last = model.logits[:, -1].save()
        seen = model.layers[0].resid_mid[:, -1].save("seen")
    assert torch.equal(last.value, wanted)
    assert t["seen"] is not None
    u = second.unit(("resid_mid", 0))
    torch.testing.assert_close(seen.value @ u, torch.zeros(2), **CLOSE)
    assert not torch.allclose(traced(model, lambda _, t: turned.apply(t)), wanted, atol=1e-2)
    tokens = generated(model, by_hand)[-1].tolist()
    options: dict[str, Any] = {"max_new_tokens": NEW, "eos_token_id": None}
    assert steered.generate(ROWS, **options).tokens == tokens
    assert [list(event.tokens) for event in steered.stream(ROWS, **options)] == [
        list(row) for row in zip(*tokens, strict=True)
    ]
    both = Steered(model, [first, second], 0.5)
    assert torch.equal(
        traced(model, lambda _, t: both.apply(t)),
        traced(model, lambda _, t: (first.apply(t, 0.5), second.apply(t, 0.5))),
    )
    assert "ablate" in repr(steered)


def test_a_steered_model_leaves_the_model_as_it_is(model: tl.Model) -> None:
    before = traced(model, lambda *_: None)
    Steered(model, V, 3.0).generate(ROWS, max_new_tokens=2)
    with pytest.raises(ZeroDivisionError), Steered(model, V, 3.0).trace(ROWS):
        1 / 0
    assert torch.equal(traced(model, lambda *_: None), before)


def test_activation_addition_as_published(model: tl.Model) -> None:
    """Algorithm 1 by hand: both prompts alike long, the difference at the first tokens, in the prompt's pass alone."""
    love, hate = [5, 6, 7], [5, 9]
    added = ActivationAddition.of(model, love, hate, layer=1, padding=11)
    assert added.tokens == ((5, 6, 7), (5, 9, 11))
    states: list[torch.Tensor] = []
    for ids in added.tokens:
        with model.trace([list(ids)]):
            states.append(model.layers[1].resid_pre.save())
    difference = states[0].value[0] - states[1].value[0]
    torch.testing.assert_close(added.directions["resid_pre", 1], difference, rtol=1e-5, atol=1e-5)
    assert len(added) == 3

    def by_hand(model: tl.Model, t: Any) -> None:
        h = (t.prefill if t.__class__ is tl.Generation else model).layers[1].resid_pre
        h.tok[0:3] += K[:, None, None] * added.directions["resid_pre", 1]

    assert torch.equal(traced(model, lambda _, t: added.apply(t, K)), traced(model, by_hand))
    wanted = generated(model, by_hand)
    same(generated(model, lambda _, t: added.apply(t, K)), wanted)
    assert (
        Steered(model, added, K).generate(ROWS, max_new_tokens=NEW, eos_token_id=None).tokens
        == wanted[-1].tolist()
    )
    with pytest.raises(errors.RaggedSelectionError, match="outside row 1"):
        traced(model, lambda _, t: added.apply(t, 1.0, start=1))
    texts = ActivationAddition.of(model, " capital of", " Paris", layer=-1)
    assert list(texts.directions) == [("resid_pre", 2)]
    assert texts.tokens[1][-1] == model.tokenizer.encode(" ")[0]
    assert f"{len(texts)} tokens" in repr(texts)
    assert texts.words is not None
    assert "' Paris'" in repr(texts)
    assert texts.words[1][-1] == "' '"
    with pytest.raises(errors.TokenMatchError, match="has to be one"):
        ActivationAddition.of(model, " capital of", " Paris", layer=1, padding="capital of France")


# --- what is refused -------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[type[errors.TracelensError], dict[str, Any]]] = {
    "generated": (errors.OptionError, {"positions": "generated"}),
    "steps of a trace": (errors.OptionError, {"steps": slice(1, 3)}),
    "no positions": (errors.OptionError, {"positions": None}),
    "a word of extract": (errors.OptionError, {"positions": "last"}),
    "a word of sweep": (errors.OptionError, {"positions": "decision"}),
    "true": (errors.OptionError, {"positions": True}),
    "no such text": (errors.TokenMatchError, {"positions": "promt"}),
    "no such token": (errors.TokenRangeError, {"positions": 9}),
    "three for two": (errors.OptionError, {"strength": [1.0, 2.0, 3.0]}),
    "a matrix": (errors.OptionError, {"strength": torch.ones(2, 5)}),
    "a text": (errors.OptionError, {"strength": "2"}),
    "nothing": (errors.OptionError, {"strength": None}),
    "a truth": (errors.OptionError, {"strength": True}),
    "nan": (errors.OptionError, {"strength": float("nan")}),
    "complex": (errors.OptionError, {"strength": 1j}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_meant_is_refused_on_the_users_line(name: str, model: tl.Model) -> None:
    kind, given = REFUSED[name]
    with pytest.raises(kind) as caught, model.trace(ROWS) as t:
        V.apply(t, **given)
    assert type(caught.value) is kind
    assert caught.value.at is not None
    assert caught.value.at.text == "V.apply(t, **given)"
    assert caught.value.instead


def test_steps_are_said_once(model: tl.Model) -> None:
    for positions in ("generated", "prompt", "last_prompt_token", lambda t: t.decode):
        with pytest.raises(errors.OptionError, match="both say"), model.generate(ROWS, max_new_tokens=2) as t:
            V.apply(t, steps=1, positions=positions)


def test_a_vector_is_applied_in_its_block(model: tl.Model) -> None:
    with model.trace(ROWS) as ended:
        model.logits.save()
    with pytest.raises(errors.NoTraceError, match="outside its block"):
        V.apply(ended)
    with pytest.raises(errors.NoTraceError, match="outside its block"), model.trace(ROWS):
        V.apply(ended)
    with (
        pytest.raises(errors.OptionError, match="is a part of one") as caught,
        model.generate(ROWS, max_new_tokens=2) as t,
    ):
        V.apply(t.decode)
    assert "positions=t.decode" in str(caught.value)
    with pytest.raises(errors.OptionError, match="is none"):
        V.apply("t")
    with pytest.raises(errors.OptionError, match="no steering vector"):
        Steered(model, [torch.ones(3)])
    with pytest.raises(errors.OptionError, match="no operator"):
        Steered(model, V, operator="plus")


def test_a_direction_is_taken_out_at_several_sites(model: tl.Model) -> None:
    """At all that writes to the stream, as for refusal (Arditi et al. 2024): beside hooks on the modules."""
    unit = torch.nn.functional.normalize(torch.arange(1.0, D_MODEL + 1), dim=0)
    sites = ("mlp_out", "resid_pre", "attn_out")  # whichever order the vector has
    places = {(site, layer): 5 * unit for site in sites for layer in range(model.n_layers)}

    def without(tensor: torch.Tensor) -> torch.Tensor:
        return tensor - (tensor @ unit)[..., None] * unit

    handles: list[Any] = []
    for block in model.hf.model.layers:
        handles.append(block.register_forward_pre_hook(lambda _, given: (without(given[0]), *given[1:])))
        handles += [
            part.register_forward_hook(lambda _m, _g, out: without(out))
            for part in (block.self_attn.o_proj, block.mlp.down_proj)
        ]
    try:
        expected = traced(model, lambda *_: None)
    finally:
        for handle in handles:
            handle.remove()
    assert (expected - traced(model, lambda *_: None)).abs().max() > 1e-2
    found = traced(model, lambda _, t: SteeringVector(places).apply(t, operator="ablate"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_text_that_is_not_there_is_told_with_the_words_that_mean_something(model: tl.Model) -> None:
    with (
        pytest.raises(errors.TokenMatchError, match="does not stand") as failure,
        model.trace("The capital") as t,
    ):
        V.apply(t, 1.0, positions="generatd")
    assert failure.value.instead is not None
    assert "'generated'" in failure.value.instead


def test_a_vector_of_several_sites_and_of_other_models_is_refused(model: tl.Model) -> None:
    several = SteeringVector({("resid_mid", 0): torch.ones(D_MODEL), ("resid_post", 0): torch.ones(D_MODEL)})
    with pytest.raises(errors.SteeringSelectionError, match="2 sites"), model.trace(ROWS) as t:
        several.apply(t)
    for wrong in (
        SteeringVector({("resid_mid", 0): torch.ones(D_MODEL - 1)}),
        SteeringVector({("resid_mid", 7): torch.ones(D_MODEL)}),
        SteeringVector.from_directions(
            tl.wrap(FAMILIES["llama"].build(seed=4)), {("resid_mid", 0): torch.ones(D_MODEL)}
        ),
    ):
        with pytest.raises(errors.SteeringMismatchError), model.trace(ROWS) as t:
            wrong.apply(t)


def test_a_model_without_named_sites_has_no_place_for_a_vector() -> None:
    plain = tl.wrap(torch.nn.Linear(4, 4))
    with (
        pytest.raises(errors.NotALanguageModelError, match="modules alone"),
        plain.trace(torch.ones(2, 4)) as t,
    ):
        V.apply(t)
