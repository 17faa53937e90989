"""Sweeps: exact on a linear model, the same in one pass and in many, and held against hooks written by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import tracelens as tl
from tests.steering.toy_models import drawn_rows, linear_model, rows_of
from tests.support.families import D_MODEL, FAMILIES
from tests.support.tokenizers import byte_level_bpe
from tracelens import errors
from tracelens.steering import Contrast, Facts, SteeringCurve, SteeringCurves, SteeringVector, sweep
from tracelens.steering.controls import random_vectors, redrawn_vectors, shuffled_vectors
from tracelens.steering.measuring import MULTIPLIERS
from tracelens.steering.operators import OPERATORS

ROWS = drawn_rows(10)


def vector(*places: tuple[str, int], seed: int = 0, size: float = 1.0) -> SteeringVector:
    generator = torch.Generator().manual_seed(seed)
    return SteeringVector({place: size * torch.randn(D_MODEL, generator=generator) for place in places})


def one(found: SteeringCurve | SteeringCurves) -> SteeringCurve:
    assert isinstance(found, SteeringCurve)
    return found


@pytest.fixture(scope="module")
def llama() -> tl.Model:
    return tl.wrap(FAMILIES["llama"].build())


# --- what is known beforehand ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("quick", [None, False])
def test_the_slope_of_a_linear_model_is_the_dot_product(quick: bool | None) -> None:
    model, unembedding = linear_model()
    v = vector(("resid_post", 1), size=0.1)
    along = (unembedding @ v["resid_post", 1].double()).tolist()
    # Three of ten rows are answered by a token that the vector speaks against.
    labels = []
    for number, row in enumerate(ROWS):
        pair = sorted((row.positive_token, row.negative_token), key=lambda token: along[token])
        labels.append((pair[0], pair[1]) if number in (2, 5, 6) else (pair[1], pair[0]))
    rows = rows_of([list(row.prompt) for row in ROWS], labels)
    expected = np.array([along[positive] - along[negative] for positive, negative in labels])

    curve = one(sweep(model, v, rows, controls=False, quick=quick))
    assert (curve.facts.plainly is None) == (quick is None)
    np.testing.assert_allclose(curve.slopes, expected, atol=1e-6)
    assert curve.slope == pytest.approx(expected.mean(), abs=1e-6)
    assert curve.line.slope == pytest.approx(expected.mean(), abs=1e-6)
    assert curve.anti_steerable == 0.3
    assert 0.3 in curve.anti_steerable_interval
    assert curve.r_squared == pytest.approx(1.0, abs=1e-9)
    assert curve.increasing
    assert curve.monotone == 0.7
    assert sorted(np.sign(curve.row_spearman).tolist()) == [-1.0] * 3 + [1.0] * 7
    np.testing.assert_allclose(curve.propensity[:, MULTIPLIERS.index(0.0)], curve.unsteered, atol=1e-9)


# --- the same as by hand ---------------------------------------------------------------------------------------------


def by_hand(hf: Any, prompt: tuple[int, ...], layer: int, added: torch.Tensor) -> torch.Tensor:
    """The last logits with something added to the last position after a layer, by a hook of torch."""

    def hook(_module: Any, _args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = hidden.clone()
        hidden[:, -1] += added
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = hf.model.layers[layer].register_forward_hook(hook)
    try:
        with torch.no_grad():
            return hf(input_ids=torch.tensor([prompt])).logits[0, -1]
    finally:
        handle.remove()


def test_propensities_label_mass_and_accuracy_are_those_of_a_hook_by_hand(llama: tl.Model) -> None:
    v = vector(("resid_post", 1), size=3.0)
    rows = rows_of(
        [list(row.prompt) for row in ROWS], [(row.positive_token, row.negative_token) for row in ROWS], (1,)
    )
    curve = one(sweep(llama, v, rows, [1.5, -1.0, 0.0], controls=False, batch_size=4))
    assert curve.multipliers.tolist() == [-1.0, 0.0, 1.5]
    for number, row in enumerate(rows):
        for column, multiplier in enumerate(curve.multipliers.tolist()):
            logits = by_hand(llama.hf, row.prompt, 1, multiplier * v["resid_post", 1])
            expected = logits[row.positive_token] - logits[row.negative_token]
            assert curve.propensity[number, column] == pytest.approx(expected.item(), abs=2e-4)
            options = logits.softmax(-1)[list(row.options)]
            assert curve.mass[number, column] == pytest.approx(options.sum().item(), abs=1e-5)
            if multiplier == 0.0:
                assert curve.unsteered[number] == pytest.approx(expected.item(), abs=2e-4)
                assert curve.correct[number] == (options.argmax().item() == 0)
    assert 0 < curve.accuracy < 1  # rows of both kinds, or the line above says little
    assert np.abs(curve.propensity[:, 2] - curve.unsteered).min() > 1e-3  # the vector matters in every row


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_many_ends_in_one_pass_are_as_many_passes(name: str) -> None:
    model = tl.wrap(FAMILIES[name].build())
    rows = drawn_rows(6, longest=4)  # within the window of Gemma-3
    v = vector(("resid_post", 0), ("attn_out", 2), size=2.0)
    quick = sweep(model, v, rows, [-1.0, 0.0, 2.0], controls=2, batch_size=4, quick=True)
    plain = sweep(model, v, rows, [-1.0, 0.0, 2.0], controls=2, batch_size=4, quick=False)
    assert isinstance(quick, SteeringCurves)
    assert isinstance(plain, SteeringCurves)
    assert [*quick] == [("resid_post", 0), ("attn_out", 2)] == [*plain]
    for place in quick:
        one_, other = quick[place], plain[place]
        for field in ("propensity", "unsteered", "mass", "unsteered_mass"):
            np.testing.assert_allclose(getattr(one_, field), getattr(other, field), atol=2e-5, rtol=1e-5)
        assert (one_.correct == other.correct).all()
        for kind in ("random", "shuffled"):
            np.testing.assert_allclose(one_.controls[kind], other.controls[kind], atol=2e-5, rtol=1e-5)
            assert np.ptp(one_.controls[kind]) > 1e-3
        assert np.abs(one_.propensity[:, 2] - one_.unsteered).max() > 1e-2
    both = [quick[place].slopes for place in quick]
    assert np.abs(both[0] - both[1]).max() > 1e-2


SETTINGS: dict[str, dict[str, Any]] = {
    "affine": {"reference": vector(("resid_post", 1), seed=1)},
    "clamp": {"low": 4.0},
    "rotate": {"towards": vector(("resid_post", 1), seed=1), "degrees": 70.0},
}


@pytest.mark.parametrize("operator", [name for name in OPERATORS if name != "ablate"])
def test_every_operator_is_the_same_in_one_pass_and_in_many(llama: tl.Model, operator: str) -> None:
    v = vector(("resid_post", 1), size=0.5)
    quick, plain = (
        one(
            sweep(
                llama,
                v,
                ROWS,
                [-1.0, 0.5, 1.0],
                controls=1,
                operator=operator,
                quick=way,
                **SETTINGS.get(operator, {}),
            )
        )
        for way in (True, False)
    )
    np.testing.assert_allclose(quick.propensity, plain.propensity, atol=2e-5, rtol=1e-5)
    np.testing.assert_allclose(quick.controls["random"], plain.controls["random"], atol=2e-5, rtol=1e-5)
    assert np.abs(quick.propensity - quick.unsteered[:, None]).max() > 1e-2
    assert quick.facts.operator == operator


def test_ablation_has_no_strengths_to_sweep(llama: tl.Model) -> None:
    for quick in (True, False):
        with pytest.raises(errors.OptionError, match="has no strength"):
            sweep(llama, vector(("resid_post", 1)), ROWS, controls=False, operator="ablate", quick=quick)


def test_ends_are_dealt_out_over_passes(llama: tl.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    v = vector(("resid_post", 1))
    whole = one(sweep(llama, v, ROWS, controls=3))
    monkeypatch.setattr("tracelens.steering.propensity.ENDS", 5)
    parts = one(sweep(llama, v, ROWS, controls=3, batch_size=3))
    np.testing.assert_allclose(parts.propensity, whole.propensity, atol=2e-5)
    np.testing.assert_allclose(parts.mass, whole.mass, atol=1e-6)
    np.testing.assert_allclose(parts.controls["shuffled"], whole.controls["shuffled"], atol=2e-5)


def test_other_positions_run_plainly_and_longer_prompts_than_a_window_too(llama: tl.Model) -> None:
    v = vector(("resid_post", 1))
    everywhere = one(sweep(llama, v, ROWS, [-1.0, 1.0], controls=False, positions="all"))
    assert everywhere.facts.plainly == "not only the decision position is changed"
    with llama.trace([list(ROWS[3].prompt)]):
        llama.layers[1].resid_post += v["resid_post", 1]
        logits = llama.logits[0, -1].save()
    expected = logits.value[ROWS[3].positive_token] - logits.value[ROWS[3].negative_token]
    assert everywhere.propensity[3, 1] == pytest.approx(expected.item(), abs=2e-5)
    with pytest.raises(errors.PromptError, match="not only the decision"):
        sweep(llama, v, ROWS, controls=False, positions="all", quick=True)

    gemma = tl.wrap(FAMILIES["gemma3"].build())
    curve = one(sweep(gemma, v, ROWS, [-1.0, 1.0], controls=False))
    assert curve.facts.plainly is not None
    assert "sliding window" in curve.facts.plainly
    with gemma.trace([list(ROWS[4].prompt)]):
        gemma.layers[1].resid_post[:, -1] += v["resid_post", 1]
        logits = gemma.logits[0, -1].save()
    expected = logits.value[ROWS[4].positive_token] - logits.value[ROWS[4].negative_token]
    assert curve.propensity[4, 1] == pytest.approx(expected.item(), abs=2e-5)


# --- controls --------------------------------------------------------------------------------------------------------


def test_random_vectors_have_the_norms_and_nothing_else() -> None:
    v = vector(("resid_post", 0), ("attn_out", 2), size=2.5)
    found = random_vectors(v, 30, seed=3)
    for place, norm in v.norms.items():
        for control in found:
            assert control.norms[place] == pytest.approx(norm, rel=1e-6)
        stacked = torch.stack([control.unit(place) for control in found])
        cosines = stacked @ stacked.T - torch.eye(30)
        assert cosines.abs().max() < 0.7  # evenly drawn from 48 dimensions
    assert torch.equal(random_vectors(v, 2, seed=3)[1][v.places[0]], found[1][v.places[0]])
    assert not torch.equal(random_vectors(v, 1, seed=4)[0][v.places[0]], found[0][v.places[0]])


def test_shuffled_vectors_are_mean_differences_with_half_the_labels_exchanged(llama: tl.Model) -> None:
    v = vector(("resid_post", 1), size=2.0)
    found = shuffled_vectors(llama, v, ROWS, 4, seed=1, batch_size=3)
    with llama.trace([list(row.positive) for row in ROWS]):
        one_ = llama.layers[1].resid_post[:, -1].save()
    with llama.trace([list(row.negative) for row in ROWS]):
        other = llama.layers[1].resid_post[:, -1].save()
    differences = (one_.value - other.value).double()
    signs = torch.ones(10, 4, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    for number in range(4):
        signs[torch.randperm(10, generator=generator)[:5], number] = -1
    for number, control in enumerate(found):
        expected = signs[:, number] @ differences
        expected *= v.norms["resid_post", 1] / expected.norm()
        assert_close(control["resid_post", 1].double(), expected, atol=1e-4, rtol=1e-4)


def test_the_vector_is_made_anew_of_other_draws_of_its_rows(llama: tl.Model) -> None:
    made = shuffled_vectors(llama, vector(("resid_post", 1)), ROWS, 1, seed=0)  # about something else
    with llama.trace([list(row.positive) for row in ROWS]):
        one_ = llama.layers[1].resid_post[:, -1].save()
    with llama.trace([list(row.negative) for row in ROWS]):
        other = llama.layers[1].resid_post[:, -1].save()
    differences = (one_.value - other.value).double()
    v = SteeringVector({("resid_post", 1): 3 * differences.mean(0)})
    assert (
        len({(row.positive_token, row.negative_token) for row in ROWS}) > 2
    )  # no label stands the other way round
    times = np.random.default_rng(4).multinomial(10, np.full(10, 0.1), size=20)
    for number, drawn in enumerate(redrawn_vectors(llama, v, ROWS, 20, seed=4, batch_size=4)):
        expected = 3 * torch.from_numpy(times[number] / 10) @ differences
        assert_close(drawn["resid_post", 1].double(), expected, atol=1e-4, rtol=1e-4)

    test = drawn_rows(6, seed=9)
    curve = one(sweep(llama, v, test, [-1.0, 1.0], controls=2, train=ROWS, seed=4))
    assert curve.redrawn is not None
    assert set(curve.controls) == {"random", "shuffled"}
    slopes = []
    for number in (0, 7, 19):
        again = SteeringVector({("resid_post", 1): 3 * torch.from_numpy(times[number] / 10) @ differences})
        slopes.append(one(sweep(llama, again, test, [-1.0, 1.0], controls=False)).slope)
    found = (curve.redrawn[:, 1] - curve.redrawn[:, 0]) / 2
    np.testing.assert_allclose(found[[0, 7, 19]], slopes, atol=1e-4)
    assert curve.training_interval is not None
    assert curve.training_interval == pytest.approx(np.quantile(found, (0.025, 0.975)))
    assert "over training draws" in repr(curve)
    with pytest.raises(errors.SteeringSweepError, match="not the mean difference"):
        sweep(llama, made[0], test, train=ROWS)


def test_balanced_letters_stay_balanced_in_other_draws(llama: tl.Model) -> None:
    """A vector whose rows differ in nothing but the letters is the same for every draw: none."""
    letters = [(21, 22) if number % 2 else (22, 21) for number in range(8)]
    prompt = ROWS[0].prompt
    rows = [
        replace(
            ROWS[0], positive=(*prompt, yes), negative=(*prompt, no), positive_token=yes, negative_token=no
        )
        for yes, no in letters
    ]
    with llama.trace([list(rows[1].positive), list(rows[1].negative)]):
        h = llama.layers[1].resid_post[:, -1].save()
    difference = (h.value[0] - h.value[1]).double()
    rows = rows[:-1]  # four of one kind, and three of the other
    v = SteeringVector({("resid_post", 1): -difference / 7})
    for drawn in redrawn_vectors(llama, v, rows, 5, seed=0):
        assert_close(drawn["resid_post", 1].double(), -difference / 7, atol=1e-5, rtol=1e-4)


def test_controls_on_either_side_are_told_from_those_around(llama: tl.Model) -> None:
    curve = one(sweep(llama, vector(("resid_post", 1)), ROWS, [-1.0, 1.0], controls=3))
    for mean, words in ((1.0, "all below the slope"), (-1.0, "all above the slope")):
        flat = np.array([[-1e-9, 1e-9], [1e-9, -1e-9]])
        steep = replace(curve, propensity=np.tile([-mean, mean], (len(ROWS), 1)), controls={"random": flat})
        assert words in repr(steep)
    around = replace(curve, propensity=np.zeros((len(ROWS), 2)), controls={"random": flat})
    assert "the slope is among them" in repr(around)


def test_rows_that_the_vector_was_made_of_are_told() -> None:
    """Also by another seed, or with other letters and template: the questions are the same."""
    tokenizer = byte_level_bpe(answers=True)
    model = tl.wrap(FAMILIES["llama"].build(vocab_size=len(tokenizer)), tokenizer)
    pairs = [(f"Is {number} large?\nAnswer:", " Yes", " No") for number in range(20)]
    data = Contrast.pairs(pairs)
    v = tl.steering.extract(model, data.train, sites="resid_post", layers=1)
    assert len(v.facts.row_digests) == 8
    sweep(model, v, data.test, [-1.0, 1.0], controls=False)
    other = Contrast.pairs(pairs, seed=1, template="plain").test
    shared = len({data.train[n].prompt for n in range(8)} & {row.prompt for row in other})
    assert shared > 0
    with pytest.warns(
        errors.RowOverlapWarning, match=f"^{shared} of the 10 rows that are measured"
    ) as caught:
        sweep(model, v, other, [-1.0, 1.0], controls=False)
    assert caught[0].filename == __file__
    with pytest.warns(errors.RowOverlapWarning, match="^8 of the 8 rows"):
        sweep(model, 2 * v, data.train.tokens(model), [-1.0, 1.0], controls=False)


# --- damage ----------------------------------------------------------------------------------------------------------


def test_damage_is_kl_and_perplexity_of_texts_by_themselves(llama: tl.Model) -> None:
    texts = [[5, 9, 33, 12], [4, 80, 7, 7, 61, 30]]
    v = vector(("resid_post", 1), size=2.0)
    hurt = one(sweep(llama, v, ROWS[:2], [-1.0, 0.0, 1.0], controls=False, damage=texts)).damage
    assert hurt is not None
    assert (hurt.texts, hurt.tokens, hurt.positions) == (2, 8, "all")
    plain, steered = [], {-1.0: [], 1.0: []}
    for text in texts:
        with torch.no_grad():
            plain.append(llama.hf(input_ids=torch.tensor([text])).logits[0, :-1].double().log_softmax(-1))
        for multiplier, into in steered.items():
            with llama.trace([text]):
                llama.layers[1].resid_post += multiplier * v["resid_post", 1]
                logits = llama.logits.save()
            into.append(logits.value[0, :-1].double().log_softmax(-1))

    def lost(found: list[torch.Tensor]) -> float:
        said = [
            one_.gather(1, torch.tensor(text[1:])[:, None]).sum()
            for one_, text in zip(found, texts, strict=True)
        ]
        return float((-torch.stack(said).sum() / 8).exp())

    assert hurt.unsteered == pytest.approx(lost(plain), rel=1e-5)
    assert hurt.perplexity[1] == pytest.approx(hurt.unsteered, rel=1e-6)
    assert hurt.kl[1] == pytest.approx(0.0, abs=1e-6)
    for column, multiplier in ((0, -1.0), (2, 1.0)):
        apart = (
            sum(float((p.exp() * (p - q)).sum()) for p, q in zip(plain, steered[multiplier], strict=True)) / 8
        )
        assert hurt.kl[column] == pytest.approx(apart, rel=1e-4)
        assert hurt.perplexity[column] == pytest.approx(lost(steered[multiplier]), rel=1e-5)
        assert apart > 1e-2


# --- data and refusals -----------------------------------------------------------------------------------------------


def test_contrast_data_say_what_was_measured() -> None:
    tokenizer = byte_level_bpe(answers=True)
    model = tl.wrap(
        FAMILIES["llama"].build(vocab_size=len(tokenizer), max_position_embeddings=256), tokenizer
    )
    pairs = [
        (
            f"Is {number} large?\n (A) yes\n (B) no\n\nAnswer:",
            *((" (A)", " (B)") if number % 2 else (" (B)", " (A)")),
        )
        for number in range(8)
    ]
    data = Contrast.pairs(
        [*pairs, ("Or?", " this way", " that way round")], name="sizes", split=(0.25, 0.25, 0.5)
    )
    v = vector(("resid_post", 1))
    v = SteeringVector(
        v.directions, Facts.of(model, method="drawn", scale={("resid_post", 1): 2 * v.norms["resid_post", 1]})
    )
    curve = one(sweep(model, v, data, [-1.0, 0.0, 1.0], controls=2, seed=3))
    facts = curve.facts
    assert (facts.data, facts.digest, facts.part) == ("sizes", data.digest, "all")
    assert (facts.method, facts.seed, facts.refused, facts.operator) == ("drawn", 3, 1, "add")
    assert curve.rows == tuple(range(8))
    assert set(curve.labels) == {"A", "B"}
    assert {label: count for label, (count, _, _) in curve.by_label.items()} == {"A": 4, "B": 4}
    assert curve.relative_slope == pytest.approx(2 * curve.slope)
    labelled = data.tokens(model)
    again = one(sweep(model, v, labelled, [-1.0, 0.0, 1.0], controls=False, seed=3))
    np.testing.assert_allclose(again.propensity, curve.propensity, atol=2e-5)
    assert again.facts.refused == 1


def test_what_makes_no_sweep_is_refused(llama: tl.Model) -> None:
    v = vector(("resid_post", 1))
    for multipliers in ([1.0], [1.0, 1.0], [0.0, float("nan")], ["a", "b"]):
        with pytest.raises(errors.SteeringSweepError, match="make no line"):
            sweep(llama, v, ROWS, multipliers)
    with pytest.raises(errors.SteeringSweepError, match="no rows"):
        sweep(llama, v, [])
    with pytest.raises(errors.SteeringSweepError, match="is none"):
        sweep(llama, v, ["a text"])
    with pytest.raises(errors.SteeringSweepError, match="no texts"):
        sweep(llama, v, ROWS[:1], controls=False, damage=[])
    with pytest.raises(errors.SteeringSweepError, match=r"text 1 .* second token"):
        sweep(llama, v, ROWS[:1], controls=False, damage=[[5, 6], [7]])
    with pytest.raises(errors.SteeringSweepError, match="fewer than none"):
        sweep(llama, v, ROWS, controls=-1)
    with pytest.raises(errors.SteeringMismatchError):
        sweep(llama, SteeringVector({("resid_post", 7): torch.ones(D_MODEL)}), ROWS)
    with pytest.raises(errors.SteeringSweepError, match="no place"):
        SteeringCurves({})["resid_post", 1]
