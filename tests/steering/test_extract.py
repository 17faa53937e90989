"""Making vectors: against activations read pair by pair, each alone, and formulas in numpy."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import tracelens as tl
from tests.support.families import FAMILIES
from tests.support.tokenizers import byte_level_bpe
from tracelens.errors import (
    AbsentSiteError,
    ContrastError,
    ExtractionError,
    LabelError,
    LeftOutWarning,
    NestedTraceError,
    OptionError,
    ZeroVectorError,
    ZeroVectorWarning,
)
from tracelens.steering import Contrast, Labelled, SteeringVector, Unpaired, extract, load_contrast, moments
from tracelens.steering.directions import require_site

DATA = Path(__file__).parents[1] / "data" / "contrast_choices.jsonl"
TOKENIZER = byte_level_bpe(answers=True)
FREE = Contrast.pairs(
    [
        ("It is", " Paris then", " Rome and not Berlin"),
        ("The capital is", " Rome", " Paris, of course"),
        ("So", " Berlin then, I know", " Paris"),
    ]
)
SITES = ("post_ln", "resid_post", "mlp_act")


@cache
def model_of(family: str = "llama") -> tl.Model:
    return tl.wrap(
        FAMILIES[family].build(vocab_size=len(TOKENIZER), max_position_embeddings=128)
        if family == "llama"
        else FAMILIES[family].build(vocab_size=len(TOKENIZER), n_positions=128),
        TOKENIZER,
    )


MODEL = model_of()
ROWS = load_contrast(DATA)


def solo(model: tl.Model, labels: Labelled, positions: str, site: str) -> tuple[np.ndarray, np.ndarray]:
    """Activations of each text by itself, [rows, layers, width], of both answers."""
    sides: list[list[np.ndarray]] = [[], []]
    for row in labels:
        for side, ids in zip(sides, (row.positive, row.negative), strict=True):
            with model.trace([list(ids)]):
                h = getattr(model.layers[:], site).save()
            states = h.value[:, 0].double().numpy()  # [layers, positions, width]
            if positions == "mean":
                side.append(states[:, row.label :].mean(1))
            else:
                at = {"label": row.label, "decision": row.label - 1, "last": -1}[positions]
                side.append(states[:, at])
    return np.stack(sides[0]), np.stack(sides[1])


def free(data: Contrast, model: tl.Model) -> Labelled:
    from tracelens.steering.labels import labelled

    return labelled(data, model, free=True)


@cache
def activations() -> tuple[np.ndarray, np.ndarray]:
    return solo(MODEL, ROWS.tokens(MODEL), "label", "resid_post")


def made(method: str, data: Any = ROWS, **options: Any) -> SteeringVector:
    return extract(MODEL, data, sites="resid_post", method=method, **options)


def stacked(vector: SteeringVector, site: str = "resid_post") -> Tensor:
    return torch.stack([vector[site, layer] for layer in range(3)]).double()


def near(found: Tensor, expected: np.ndarray, tolerance: float = 2e-5) -> None:
    assert_close(found, torch.from_numpy(expected), atol=tolerance * float(np.abs(expected).max()), rtol=0)


# --- places and positions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 50])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_padding_makes_no_difference(family: str, batch_size: int) -> None:
    """Prompts of very different lengths together give the vectors of each text by itself."""
    model = model_of(family)
    labels = ROWS.tokens(model)
    assert len({row.label for row in labels}) == 3
    vector = extract(model, ROWS, sites=SITES, batch_size=batch_size)
    assert len(vector) == 9
    for site in SITES:
        one, other = solo(model, labels, "label", site)
        near(stacked(vector, site), (one - other).mean(0))
        norms = np.linalg.norm(np.stack([one, other]), axis=-1).mean((0, 1))
        for layer in range(3):
            place = next(p for p in vector.places if vector[p] is vector[site, layer])
            assert vector.facts.scale[place] == pytest.approx(norms[layer], rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_what_comes_before_the_label_is_computed_once(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pair is one row with two ends; but two rows where a sliding window does not let it be."""
    settings = {"vocab_size": len(TOKENIZER), "max_position_embeddings": 128}
    model = tl.wrap(FAMILIES[family].build(**settings), TOKENIZER)
    labels = ROWS.tokens(model)
    sizes: list[tuple[int, int]] = []
    trace = tl.Model.trace

    def watched(self: tl.Model, prompt: Any, **options: Any) -> Any:
        block = trace(self, prompt, **options)
        sizes.append((block._prompt.sizes["B"], block._prompt.sizes["P"]))
        return block

    with monkeypatch.context() as patched:
        patched.setattr(tl.Model, "trace", watched)
        vector = extract(model, ROWS, sites="resid_post", batch_size=len(ROWS))
    longest = max(row.label for row in labels)
    sizes.remove((1, 1))  # by which the model is known
    assert sizes == [(11, longest + 2) if family == "llama" else (22, longest + 1)]
    near(stacked(vector), np.subtract(*solo(model, labels, "label", "resid_post")).mean(0))


@pytest.mark.parametrize("positions", ["last", "mean"])
def test_answers_of_free_text(positions: str) -> None:
    with pytest.raises(LabelError):
        FREE.tokens(MODEL)
    labels = free(FREE, MODEL)
    assert len({len(row.positive) - row.label for row in labels}) > 1
    one, other = solo(MODEL, labels, positions, "resid_post")
    for batch_size in (1, 2, 8):
        near(
            stacked(made("mean_difference", FREE, positions=positions, batch_size=batch_size)),
            (one - other).mean(0),
        )


def test_the_label_is_one_token_of_the_answer_and_last_another() -> None:
    """In ``(A)`` the letter is the label, and the parenthesis the last token."""
    at_label, at_last = (stacked(made("mean_difference", positions=where)) for where in ("label", "last"))
    assert (at_label - at_last).norm() > 0.1 * at_label.norm()
    near(at_last, np.subtract(*solo(MODEL, free(ROWS, MODEL), "last", "resid_post")).mean(0))


def test_places_are_those_that_were_asked_for() -> None:
    vector = extract(MODEL, ROWS, sites=["resid_post", "post_ln"], layers=[2, -3])
    assert vector.layers == (0, 2)
    assert len(vector) == 4
    assert torch.equal(vector["resid_post", 2], made("mean_difference")["resid_post", 2])
    assert extract(MODEL, ROWS, sites="resid_post", layers=1).places == (("resid_post", 1),)
    assert extract(MODEL, ROWS.tokens(MODEL), sites="resid_post", layers=range(2)).layers == (0, 1)
    pairs = [("Is it? Answer:", " A", " B")]
    assert len(extract(MODEL, pairs)) == 6


def test_what_is_told_of_the_making() -> None:
    facts = made("pca", ROWS.train, seed=3).facts
    assert (facts.method, facts.positions, facts.rows, facts.seed) == ("pca", "label", len(ROWS.train), 3)
    assert facts.data == ROWS.train.digest
    assert facts.template == "plain"
    assert facts.n_layers == 3


# --- methods ---------------------------------------------------------------------------------------------------------


def toward(direction: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """A direction with the sign, and the length along it, of the mean difference."""
    unit = direction / np.linalg.norm(direction)
    return (unit @ mean) * unit


def test_unpaired_is_the_difference_of_means() -> None:
    one, other = activations()
    near(stacked(made("unpaired")), one.mean(0) - other.mean(0))


UNPAIRED = Unpaired(
    ["The capital of France is Paris", "Rome", "It is so", "So it is then"],
    ["Paris is the capital", "not here"],
)


@pytest.mark.parametrize("positions", ["last", "mean"])
@pytest.mark.parametrize("method", ["unpaired", "logistic", "lda", "random"])
def test_texts_that_do_not_come_in_pairs(method: str, positions: str) -> None:
    means: list[np.ndarray] = []
    for texts in (UNPAIRED.positive, UNPAIRED.negative):
        read: list[np.ndarray] = []
        for text in texts:
            with MODEL.trace(text):
                h = MODEL.layers[:].resid_post.save()
            states = h.value[:, 0].double().numpy()
            read.append(states[:, -1] if positions == "last" else states[:, 1:].mean(1))
        means.append(np.stack(read).mean(0))
    vector = made(method, UNPAIRED, positions=positions, batch_size=3)
    mean = torch.from_numpy(means[0] - means[1])
    if method == "unpaired":
        near(stacked(vector), means[0] - means[1])
    elif method == "random":
        assert_close(stacked(vector).norm(dim=-1), mean.norm(dim=-1), rtol=1e-4, atol=0)
    else:
        assert ((stacked(vector) * mean).sum(-1) > 0).all()
    assert (vector.facts.rows, vector.facts.data) == (6, UNPAIRED.digest)
    assert "agreement" not in vector.facts.diagnostics["resid_post", 0]
    assert "separation" in vector.facts.diagnostics["resid_post", 0]
    assert repr(UNPAIRED) == "4 texts of one class and 2 of the other"


def test_a_mean_leaves_the_first_token_of_a_text_out() -> None:
    """It is what heads look at that look at nothing, and in many models far larger than all others."""
    one = extract(
        MODEL,
        Unpaired(["Rome is"], ["Paris is old"]),
        sites="resid_post",
        method="unpaired",
        positions="mean",
    )
    with MODEL.trace("Rome is"):
        first = MODEL.layers[1].resid_post.save()
    with MODEL.trace("Paris is old"):
        other = MODEL.layers[1].resid_post.save()
    expected = first.value[0, 1:].mean(0) - other.value[0, 1:].mean(0)
    assert_close(one["resid_post", 1], expected, atol=1e-5, rtol=1e-5)
    assert (first.value[0].mean(0) - other.value[0].mean(0) - expected).abs().max() > 1e-2
    with pytest.raises(ExtractionError, match="a text of one token"):
        extract(MODEL, Unpaired([" capital"], ["Paris is"]), method="unpaired", positions="mean")


def test_what_needs_pairs() -> None:
    for method in ("mean_difference", "pca", "pairwise_pca", "shuffled", "actadd"):
        with pytest.raises(ExtractionError, match="made of"):
            made(method, UNPAIRED, positions="last")
    with pytest.raises(ExtractionError, match="have no label"):
        made("unpaired", UNPAIRED)
    for wrong in (([], ["a"]), (["a"], [3]), ("abc", ["a"]), (["a"], [""])):
        with pytest.raises(ContrastError, match="is no list of texts or conversations"):
            Unpaired(*wrong)
    assert Unpaired(["a"], ["b"]).digest != Unpaired(["b"], ["a"]).digest


def test_actadd_is_the_difference_of_one_pair() -> None:
    one, other = activations()
    near(stacked(made("actadd", ROWS[2:3])), one[2] - other[2])
    with pytest.raises(ExtractionError, match="actadd is made of one pair, and these are 11"):
        made("actadd")


@pytest.mark.parametrize("method", ["pca", "pairwise_pca"])
@pytest.mark.parametrize("matrices", [False, True], ids=["rows", "second moments"])
def test_principal_directions(method: str, matrices: bool) -> None:
    one, other = activations()
    data = ROWS
    if matrices:  # so many rows that a matrix is less
        data = Contrast.pairs([(ROWS.rendered(row), row.positive, row.negative) for row in ROWS] * 10)
    vector = made(method, data)
    for layer in range(3):
        differences = (one - other)[:, layer]
        if method == "pca":
            _, sizes, basis = np.linalg.svd(differences)
        else:
            middle = (one + other)[:, layer] / 2
            _, sizes, basis = np.linalg.svd(
                np.concatenate([one[:, layer] - middle, other[:, layer] - middle])
            )
        near(vector["resid_post", layer].double(), toward(basis[0], differences.mean(0)), 1e-4)
        told = vector.facts.diagnostics["resid_post", layer]
        assert told["explained"] == pytest.approx(sizes[0] ** 2 / (sizes**2).sum(), rel=1e-4)


def test_the_logistic_probe_is_where_its_loss_has_no_slope() -> None:
    one, other = activations()
    vector = made("logistic")
    for layer in range(3):
        rows = np.concatenate([one[:, layer], other[:, layer]])
        rows = rows - rows.mean(0)
        rows = rows / np.sqrt((rows**2).sum(1).mean())
        y = np.repeat([1.0, 0.0], len(one))
        weights, bias = np.zeros(rows.shape[1]), 0.0
        for _ in range(20000):  # plain gradient descent, slow and sure
            error = 1 / (1 + np.exp(-(rows @ weights + bias))) - y
            weights -= 0.03 * (rows.T @ error + weights)
            bias -= 0.03 * error.sum()
        mean = (one - other)[:, layer].mean(0)
        near(vector["resid_post", layer].double(), toward(weights, mean), 1e-4)
        right = ((rows @ weights + bias > 0) == (y > 0)).mean()
        assert vector.facts.diagnostics["resid_post", layer]["accuracy"] == pytest.approx(right)


@pytest.mark.parametrize("matrices", [False, True], ids=["rows", "second moments"])
def test_the_discriminant(matrices: bool) -> None:
    one, other = activations()
    copies = 10 if matrices else 1
    data = Contrast.pairs([(ROWS.rendered(row), row.positive, row.negative) for row in ROWS] * copies)
    vector = made("lda", data)
    count, width = 2 * len(one) * copies, one.shape[-1]
    for layer in range(3):
        parts = [part[:, layer] - part[:, layer].mean(0) for part in (one, other)]
        S = sum(part.T @ part for part in parts) * copies / count
        top = (1 - 2 / width) * np.trace(S @ S) + np.trace(S) ** 2
        bottom = (count + 1 - 2 / width) * (np.trace(S @ S) - np.trace(S) ** 2 / width)
        r = min(1.0, top / bottom)
        assert 0 < r <= 1
        shrunk = (1 - r) * S + r * np.trace(S) / width * np.eye(width)
        mean = (one - other)[:, layer].mean(0)
        near(vector["resid_post", layer].double(), toward(np.linalg.solve(shrunk, mean), mean), 1e-3)
        assert vector.facts.diagnostics["resid_post", layer]["shrinkage"] == pytest.approx(r, rel=1e-3)


def test_controls() -> None:
    one, other = activations()
    differences = one - other
    mean = made("mean_difference")
    random = [made("random", seed=seed) for seed in (0, 0, 1)]
    assert_close(stacked(random[0]).norm(dim=-1), stacked(mean).norm(dim=-1), rtol=1e-5, atol=0)
    assert torch.equal(stacked(random[0]), stacked(random[1]))
    assert not torch.equal(stacked(random[0]), stacked(random[2]))
    alone = extract(MODEL, ROWS, sites="resid_post", layers=[2], method="random")
    assert torch.equal(alone["resid_post", 2], random[0]["resid_post", 2]), "whatever else is drawn"
    angles = torch.nn.functional.cosine_similarity(stacked(random[0]), stacked(random[2]), dim=-1)
    assert angles.abs().max() < 0.6
    shuffled = stacked(made("shuffled", seed=1)).numpy()
    found = [
        signs
        for number in range(2**11)
        if (signs := np.array([1 - 2 * ((number >> bit) & 1) for bit in range(11)])).sum() == 1
        and np.allclose((signs[:, None] * differences[:, 0]).mean(0), shuffled[0], atol=1e-4)
    ]
    assert len(found) == 1, "the labels of five of eleven pairs are exchanged"
    near(torch.from_numpy(shuffled), (found[0][:, None, None] * differences).mean(0))


def test_the_sign_is_that_of_the_mean_difference() -> None:
    turned = Contrast.pairs([(ROWS.rendered(row), row.negative, row.positive) for row in ROWS])
    mean = stacked(made("mean_difference"))
    for method in ("mean_difference", "pca", "pairwise_pca", "logistic", "lda"):
        vector = stacked(made(method))
        assert ((vector * mean).sum(-1) > 0).all()
        assert_close(stacked(made(method, turned)), -vector, atol=1e-3 * float(vector.abs().max()), rtol=0)


# --- what is told beforehand -----------------------------------------------------------------------------------------


def test_agreement_and_separation() -> None:
    one, other = activations()
    for method in ("mean_difference", "lda"):
        vector = made(method)
        for layer in range(3):
            differences = (one - other)[:, layer]
            mean = differences.mean(0)
            cosines = differences @ mean / np.linalg.norm(differences, axis=1) / np.linalg.norm(mean)
            told = vector.facts.diagnostics["resid_post", layer]
            assert told["agreement"] == pytest.approx(cosines.mean(), rel=1e-4)
            v = vector["resid_post", layer].double().numpy()
            along = [part[:, layer] @ v for part in (one, other)]
            spread = np.sqrt((along[0].var(ddof=1) + along[1].var(ddof=1)) / 2)
            assert told["separation"] == pytest.approx((along[0].mean() - along[1].mean()) / spread, rel=1e-3)


def test_sums_do_not_grow_with_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tracelens.steering.gathering.SAMPLED", 4)
    held: list[moments.Moments] = []
    add = moments.Moments.add

    def watched(self: moments.Moments, *given: Any) -> None:
        add(self, *given)
        held.append(self)

    monkeypatch.setattr(moments.Moments, "add", watched)
    most: dict[str, list[int]] = {}
    pairs = [(f"{'so ' * (number % 5)}It is", " Paris", " Rome") for number in range(240)]
    for method in ("mean_difference", "shuffled", "random", "pca", "lda", "logistic"):
        for count in (60, 120, 240):
            held.clear()
            made(method, pairs[:count], layers=[1], batch_size=30)
            assert len(held) == count // 30
            most.setdefault(method, []).append(held[-1].held)
    for method in ("mean_difference", "shuffled", "random"):
        assert len(set(most[method])) == 1
        assert most[method][0] < 16_000
    matrix = 48 * 48 * 8
    for method in ("pca", "lda"):
        assert max(most[method]) <= most["mean_difference"][0] + matrix
        assert most[method][1] == most[method][2]
    assert most["pca"][0] < most["pca"][1], "few rows are less than a matrix"
    assert most["logistic"][2] - most["logistic"][1] == 120 * 2 * 48 * 4


# --- the guard -------------------------------------------------------------------------------------------------------


def test_before_the_label_there_is_no_vector() -> None:
    with pytest.raises(ZeroVectorError, match=r"less than 0\.001 of the mean activation") as caught:
        made("mean_difference", positions="decision")
    assert caught.value.at is not None
    assert caught.value.at.filename == __file__
    for method in ("random", "shuffled", "pca", "logistic", "lda"):
        with pytest.raises(ZeroVectorError):
            made(method, positions="decision")


def test_places_without_a_difference_are_told() -> None:
    """With letters exchanged in half of the rows, the label's own embedding says nothing of the behaviour."""
    data = load_contrast(DATA, letters="as_written")
    even = [data[number] for number in (0, 1, 2, 3)]
    assert [row.positive for row in even] == [" (A)", " (A)", " (B)", " (B)"]
    pairs = Contrast.pairs([(row.prompt + "\n\nAnswer:", row.positive, row.negative) for row in even])
    with pytest.warns(ZeroVectorWarning, match=r"of 1 of 6 places .*layers\[0\].resid_pre") as caught:
        vector = extract(MODEL, pairs, sites=["resid_pre", "resid_post"])
    assert caught[0].filename == __file__
    assert vector["resid_pre", 0].norm() < 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extract(MODEL, pairs, sites=["resid_pre", "resid_post"], layers=[1, 2])


def test_rows_that_are_left_out_are_told() -> None:
    data = Contrast.pairs([("It is", " Paris", " Rome"), ("It is", " Paris then", " Rome now")])
    with pytest.warns(LeftOutWarning, match=r"1 of 2 rows are left out: the answers .* \(1\)") as caught:
        vector = made("mean_difference", data)
    assert caught[0].filename == __file__
    assert vector.facts.rows == 1
    assert torch.equal(stacked(vector), stacked(made("mean_difference", data[:1])))


def test_ids_that_were_put_together_are_told() -> None:
    data = Contrast.pairs([("It is: ", " A", " B"), ("It is:", " A", " B")])
    assert made("mean_difference", data).facts.template == "none, with ids put together in 1 of 2 rows"


def test_activations_that_are_not_finite() -> None:
    hf = FAMILIES["llama"].build(vocab_size=len(TOKENIZER), max_position_embeddings=128)
    hf.model.layers[1].mlp.down_proj.weight.data.fill_(float("inf"))
    with pytest.raises(ExtractionError, match=r"layers\[1\].resid_post are not finite"):
        extract(tl.wrap(hf, TOKENIZER), ROWS, sites="resid_post")


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"method": "mean"}, ExtractionError, "method='mean' is none"),
        ({"positions": "first"}, ExtractionError, "positions='first' is none"),
        ({"sites": "pattern"}, ExtractionError, "'pattern' is no site of a layer with one axis"),
        ({"sites": "logits"}, ExtractionError, "'logits' is no site of a layer"),
        ({"sites": []}, ExtractionError, "no place was named"),
        ({"sites": "attn_post_norm"}, AbsentSiteError, "attn_post_norm"),
        ({"layers": [3]}, ExtractionError, "there is no layer 3: the model has 3"),
        ({"layers": [True]}, ExtractionError, "there is no layer True"),
        ({"layers": "some"}, ExtractionError, "layers='some' are none"),
        ({"layers": []}, ExtractionError, "no place was named"),
        ({"batch_size": 0}, OptionError, "batch_size"),
    ],
)
def test_what_there_is_not(options: dict[str, Any], error: type[tl.TracelensError], says: str) -> None:
    with pytest.raises(error, match=says) as caught:
        extract(MODEL, ROWS, **options)
    assert caught.value.at is not None
    assert caught.value.at.filename == __file__


def test_not_inside_a_block() -> None:
    with pytest.raises(NestedTraceError), MODEL.trace("It is"):
        extract(MODEL, ROWS)


def test_the_first_token_has_none_before_it() -> None:
    with pytest.raises(LabelError, match="the prompt is empty"):
        extract(MODEL, Contrast.pairs([("x", "A", "B")], template=lambda row: ""), positions="decision")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("resid_pots", "did you mean 'resid_post'"),
        ("hook_resid_post", "sites='resid_post', as that is called here"),
        ("blocks.1.hook_resid_pre", "sites='resid_pre', as"),
        ("layers_output[1]", "sites='resid_post', as"),
        ("scores", 'sites=["post_ln", "resid_post"]'),
        (3, 'sites=["post_ln", "resid_post"]'),
    ],
)
def test_a_site_of_another_name_is_told_what_it_is_called(name: object, meant: str) -> None:
    with pytest.raises(ExtractionError, match="is no site of a layer") as raised:
        require_site(name)
    assert raised.value.instead is not None
    assert raised.value.instead.startswith(meant)
