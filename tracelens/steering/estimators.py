"""From sums or rows of activations to a direction: the ways to make a steering vector."""

from __future__ import annotations

import zlib
from typing import Literal, get_args

import torch
from torch import Tensor

from tracelens.steering.moments import Moments

Method = Literal[
    "mean_difference",
    "unpaired",
    "actadd",
    "pca",
    "pairwise_pca",
    "logistic",
    "lda",
    "random",
    "shuffled",
]

METHODS: tuple[str, ...] = get_args(Method)
UNPAIRED = ("unpaired", "logistic", "lda", "random")
"""What needs no pairs, but two classes."""
CONTROLS = ("random", "shuffled")
"""What has the length of a vector, and says nothing about the behaviour; its sign is its own."""


def vector_of(
    moments: Moments, layer: int, method: str, seed: int, place: str
) -> tuple[Tensor, dict[str, float]]:
    """The vector of a layer [width], float64, and what is to be told of its making.

    Of probes and principal components the direction alone counts: it gets the sign of the mean difference, and as its
    length what the mean difference has along it.
    """
    mean = moments.mean[layer]
    match method:
        case "pca" | "pairwise_pca":
            direction, told = principal(moments, layer)
        case "logistic":
            direction, told = logistic(moments.rows_of(0, layer), moments.rows_of(1, layer))
        case "lda":
            direction, told = discriminant(moments, layer)
        case "random":
            return random(mean, seed, place), {}
        case "shuffled":
            return moments.signed[layer] / moments.pairs, {}
        case _:
            return mean, {}
    size, norm = direction.norm(), mean.norm()
    if size == 0:  # the classes do not differ
        return torch.zeros_like(mean), told
    unit = direction / size
    along = unit @ mean
    told["cosine_with_mean"] = float(along.abs() / norm) if norm > 0 else 0.0
    return along * unit, told


def principal(moments: Moments, layer: int) -> tuple[Tensor, dict[str, float]]:
    """The first principal direction of the pairs' differences about zero, and its share of their squares.

    Not about their mean, which is the very contrast. That of activations from which each pair's own mean was taken is
    the same: they are the halves of the differences, with both signs.
    """
    if moments.squares is not None:
        values, vectors = torch.linalg.eigh(moments.squares[layer])
        return vectors[:, -1], {"explained": float(values[-1] / values.sum())}
    differences = moments.rows_of(0, layer)
    # Of the few rows against each other: as many eigenvalues as there are rows, and the same first direction.
    values, vectors = torch.linalg.eigh(differences @ differences.T)
    total = values.clamp(min=0).sum()
    return differences.T @ vectors[:, -1], {"explained": float(values[-1] / total) if total > 0 else 0.0}


def discriminant(moments: Moments, layer: int) -> tuple[Tensor, dict[str, float]]:
    """Fisher's linear discriminant, S^-1 (mean+ - mean-), with the pooled covariance S of the classes shrunk.

    S becomes (1 - r) S + r t I, t the mean of its diagonal, with the r of the oracle approximating shrinkage (Chen et
    al. 2010, arXiv:0907.4698, equation 23): rows are few beside the numbers of an activation.
    """
    count, width = sum(moments.counts), moments.width
    mean = moments.mean[layer]
    if moments.squares is not None:
        sums = moments.sums[:, layer]
        outer = (sums / sums.new_tensor(moments.counts)[:, None]).T @ sums
        values, vectors = torch.linalg.eigh((moments.squares[layer] - outer) / count)
        values = values.clamp(min=0)
    else:
        rows = torch.cat(
            [part - part.mean(0) for part in (moments.rows_of(0, layer), moments.rows_of(1, layer))]
        )
        _, lengths, basis = torch.linalg.svd(rows, full_matrices=False)
        values, vectors = lengths**2 / count, basis.T
    trace, squared = values.sum(), (values**2).sum()
    bottom = (count + 1 - 2 / width) * (squared - trace**2 / width)
    top = (1 - 2 / width) * squared + trace**2
    shrinkage = min(1.0, float(top / bottom)) if bottom > 0 else 1.0
    floor = shrinkage * trace / width
    if floor == 0:
        return mean, {"shrinkage": shrinkage}  # the classes have no spread at all
    inside = vectors.T @ mean
    scaled = inside / ((1 - shrinkage) * values + floor)
    return vectors @ scaled + (mean - vectors @ inside) / floor, {"shrinkage": shrinkage}


def logistic(positive: Tensor, negative: Tensor, penalty: float = 1.0) -> tuple[Tensor, dict[str, float]]:
    """The weights of a logistic regression between the classes, and its accuracy on the rows that it was made of.

    Minimises sum log(1 + exp(-y (w.x + b))) + penalty |w|^2 / 2 over the activations less their mean, in units of their
    root mean square distance from it, by Newton's method in the space that the rows span.
    """
    rows = torch.cat([positive, negative])
    rows = rows - rows.mean(0)
    size = rows.norm() / len(rows) ** 0.5
    if size == 0:
        return positive.new_zeros(rows.shape[1]), {}
    rows = rows / size
    _, lengths, basis = torch.linalg.svd(rows, full_matrices=False)
    basis = basis[lengths > 1e-10 * lengths[0]]
    inputs = torch.cat([rows @ basis.T, rows.new_ones(len(rows), 1)], dim=1)
    targets = torch.cat([rows.new_ones(len(positive)), rows.new_zeros(len(negative))])
    ridge = torch.full((inputs.shape[1],), penalty, dtype=inputs.dtype)
    ridge[-1] = 0  # the intercept
    weights = inputs.new_zeros(inputs.shape[1])
    for _ in range(100):
        chances = torch.sigmoid(inputs @ weights)
        slope = inputs.T @ (chances - targets) + ridge * weights
        if slope.abs().max() < 1e-10 * len(rows):
            break
        curvature = inputs.T @ (inputs * (chances * (1 - chances))[:, None]) + ridge.diag()
        step = torch.linalg.solve(curvature, slope)
        weights = weights - _damped(step, weights, inputs, targets, ridge) * step
    right = (inputs @ weights > 0) == (targets > 0)
    return basis.T @ weights[:-1], {"accuracy": float(right.double().mean())}


def _damped(step: Tensor, weights: Tensor, inputs: Tensor, targets: Tensor, ridge: Tensor) -> float:
    """How much of a Newton step lowers the loss: all of it, or a half as often as needed."""

    def loss(at: Tensor) -> Tensor:
        scores = inputs @ at
        fit = torch.nn.functional.binary_cross_entropy_with_logits(scores, targets, reduction="sum")
        return fit + (ridge * at**2).sum() / 2

    before, share = loss(weights), 1.0
    while share > 1e-6 and loss(weights - share * step) > before:
        share /= 2
    return share


def random(mean: Tensor, seed: int, place: str) -> Tensor:
    """A direction drawn at random, as long as the mean difference. It depends on the seed and the place alone."""
    # Of a seed the generator heeds 32 bits alone.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {place}".encode()))
    drawn = torch.randn(len(mean), dtype=torch.float64, generator=generator)
    return drawn / drawn.norm() * mean.norm()
