"""Estimators on planted contrasts: what each finds, what each misses, and the edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from tracelens.steering.estimators import logistic, vector_of
from tracelens.steering.moments import Moments

WIDTH, PAIRS = 24, 80


def planted(
    *, along: float = 3.0, nuisance: float = 2.0, common: float = 0.0, noise: float = 0.1
) -> list[Tensor]:
    """Pairs of activations [1, pairs, width] that differ by a constant along axis 0, and at random along axis 1.

    ``common``: how much both of a pair have along axis 2, at random.
    """
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(PAIRS, WIDTH, generator=draw, dtype=torch.float64) * noise
    base[:, 2] += common * torch.randn(PAIRS, generator=draw, dtype=torch.float64)
    difference = torch.randn(PAIRS, WIDTH, generator=draw, dtype=torch.float64) * noise
    difference[:, 0] += along
    swing = torch.randn(PAIRS, generator=draw, dtype=torch.float64)
    difference[:, 1] += nuisance * (swing - swing.mean())
    return [(base + difference / 2)[None], (base - difference / 2)[None]]


def gathered(sides: list[Tensor], step: int = 7, **needs: bool) -> Moments:
    count = sides[0].shape[1]
    moments = Moments(1, WIDTH, (count, count), sampled=frozenset(range(count)), **needs)
    for start in range(0, count, step):
        numbers = range(start, min(start + step, count))
        moments.add(numbers, *(side[:, start : start + step] for side in sides))
    return moments


NEEDS: dict[str, dict[str, bool]] = {
    "mean_difference": {},
    "pca": {"differences": True},
    "pairwise_pca": {"differences": True},
    "lda": {"within": True},
    "logistic": {"rows": True},
}


@pytest.mark.parametrize("method", NEEDS)
def test_each_finds_the_contrast(method: str) -> None:
    vector, _ = vector_of(gathered(planted(), **NEEDS[method]), 0, method, 0, "")
    assert cosine_similarity(vector, torch.eye(WIDTH, dtype=torch.float64)[0], dim=0) > 0.9


def test_centring_differences_loses_the_contrast() -> None:
    """The trap of principal components: less their mean, the differences' largest direction is the nuisance."""
    sides = planted()
    differences = (sides[0] - sides[1])[0].numpy()
    centred = np.linalg.svd(differences - differences.mean(0))[2][0]
    assert abs(centred[0]) < 0.1
    assert abs(centred[1]) > 0.99
    vector, told = vector_of(gathered(sides, differences=True), 0, "pca", 0, "")
    assert vector[0] / vector.norm() > 0.97
    assert told["cosine_with_mean"] > 0.97


def test_what_both_of_a_pair_have_does_not_matter() -> None:
    """Principal components of all activations, as they are, would find what the pairs have in common."""
    sides = planted(common=20.0)
    pooled = torch.cat([side[0] for side in sides]).numpy()
    assert abs(np.linalg.svd(pooled - pooled.mean(0))[2][0][2]) > 0.99
    vector, _ = vector_of(gathered(sides, differences=True), 0, "pairwise_pca", 0, "")
    assert vector[0] / vector.norm() > 0.97


def test_a_nuisance_larger_than_the_contrast_is_told() -> None:
    """Then the first direction is not the contrast, and its length along the mean difference says so."""
    moments = gathered(planted(along=1.0, nuisance=10.0), differences=True)
    vector, told = vector_of(moments, 0, "pca", 0, "")
    assert told["cosine_with_mean"] < 0.3
    assert vector.norm() < 0.3 * moments.mean.norm()


@pytest.mark.parametrize("method", [name for name in NEEDS if name != "mean_difference"])
def test_sign_and_length_are_those_of_the_mean_difference(method: str) -> None:
    sides = planted()
    for both in (sides, sides[::-1]):
        moments = gathered(both, **NEEDS[method])
        vector, _ = vector_of(moments, 0, method, 0, "")
        along = vector @ moments.mean[0] / vector.norm()
        assert along > 0
        assert float(along) == pytest.approx(float(vector.norm()))


@pytest.mark.parametrize("method", NEEDS)
def test_batches_make_no_difference(method: str) -> None:
    sides = planted()
    one, other = (
        vector_of(gathered(sides, step, **NEEDS[method]), 0, method, 0, "")[0] for step in (1, PAIRS)
    )
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_rows_and_matrices_give_the_same() -> None:
    sides = planted()
    few = [side[:, :30] for side in sides]
    for method in ("pca", "lda"):
        rows = Moments(1, WIDTH, (10, 10), **NEEDS[method])
        matrix = Moments(1, WIDTH, (3000, 3000), **NEEDS[method])
        assert rows.squares is None
        assert matrix.squares is not None
        for moments in (rows, matrix):
            moments.add(range(30), *few)
        one, other = (vector_of(moments, 0, method, 0, "")[0] for moments in (rows, matrix))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", NEEDS)
def test_no_difference_at_all(method: str) -> None:
    side = planted()[0]
    moments = gathered([side, side], **NEEDS[method])
    vector, _ = vector_of(moments, 0, method, 0, "")
    assert torch.isfinite(vector).all()
    assert vector.norm() < 1e-12
    assert moments.agreement(0) is None


@pytest.mark.parametrize("method", NEEDS)
def test_a_single_pair(method: str) -> None:
    sides = [side[:, :1] for side in planted()]
    moments = gathered(sides, **NEEDS[method])
    vector, _ = vector_of(moments, 0, method, 0, "")
    assert cosine_similarity(vector, moments.mean[0], dim=0) > 1 - 1e-6
    assert moments.separation(0, vector) is None
    assert moments.agreement(0) == pytest.approx(1.0)


def test_a_probe_of_classes_far_apart_has_an_end() -> None:
    """Without a penalty the weights of separable classes would grow without one."""
    for size in (1e-3, 1.0, 1e4):
        one = torch.randn(40, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * size
        weights, told = logistic(one + 50 * size, one - 50 * size)
        assert torch.isfinite(weights).all()
        assert told["accuracy"] == 1.0
        assert cosine_similarity(weights, torch.ones(WIDTH, dtype=torch.float64), dim=0) > 0.99
