"""Vectors that a steering vector is measured against: of the same norm, and about nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tracelens.errors import SteeringSweepError
from tracelens.progress import watched
from tracelens.steering.facts import Facts, Place, written
from tracelens.steering.gathering import pair_of, read_pairs
from tracelens.steering.vector import SteeringVector

if TYPE_CHECKING:
    from tracelens.model import Model
    from tracelens.steering.labels import LabelledRow


def random_vectors(vector: SteeringVector, count: int, seed: int) -> list[SteeringVector]:
    """So many vectors of the same places and norms, in directions drawn evenly from all."""
    generator = torch.Generator().manual_seed(seed)
    found: list[SteeringVector] = []
    for number in range(count):
        drawn = {
            place: torch.randn(direction.shape, generator=generator, dtype=torch.float64)
            for place, direction in vector.directions.items()
        }
        found.append(_of_norms(vector, drawn, f"random {number}"))
    return found


def shuffled_vectors(
    model: Model,
    vector: SteeringVector,
    rows: Sequence[LabelledRow],
    count: int,
    seed: int,
    *,
    batch_size: int = 8,
    progress: bool | None = None,
) -> list[SteeringVector]:
    """So many mean differences of the rows with their labels shuffled, at the same places and of the same norms.

    In each, the answers of half the rows, drawn anew, change places. One pass over the rows makes all of them; running
    sums are all that is kept.
    """
    generator = torch.Generator().manual_seed(seed)
    signs = torch.ones(len(rows), count, dtype=torch.float64)
    for number in range(count):
        signs[torch.randperm(len(rows), generator=generator)[: len(rows) // 2], number] = -1
    sums = _weighted(model, vector, rows, signs, batch_size, progress)
    return [
        _of_norms(vector, {place: total[number] for place, total in sums.items()}, f"shuffled {number}")
        for number in range(count)
    ]


def redrawn_vectors(
    model: Model,
    vector: SteeringVector,
    rows: Sequence[LabelledRow],
    count: int,
    seed: int,
    *,
    batch_size: int = 8,
    progress: bool | None = None,
) -> list[SteeringVector]:
    """The vector as other draws of its training rows would have made it: so many times, drawn with replacement.

    Where rows have the same two labels the other way round (balanced letters), each way round is drawn by itself, so
    that every draw is as balanced as the rows are.

    The vector has to be the mean difference of these rows, or a multiple of it, and they are the same multiple. Raises
    :class:`~tracelens.errors.SteeringSweepError` where it is not.
    """
    generator = np.random.default_rng(seed)
    times = np.zeros((count, len(rows)))
    for own in _strata(rows):
        times[:, own] = generator.multinomial(len(own), np.full(len(own), 1 / len(own)), size=count)
    weights = torch.from_numpy(np.concatenate([np.ones((1, len(rows))), times]).T / len(rows))
    sums = _weighted(model, vector, rows, weights, batch_size, progress)
    found: list[dict[Place, Tensor]] = [{} for _ in range(count)]
    for place, drawn in sums.items():
        own, whole = vector[place].double(), drawn[0]
        cosine = torch.nn.functional.cosine_similarity(own, whole, dim=0)
        if not cosine > _SAME:
            raise SteeringSweepError(
                f"the vector at {written(place)} is not the mean difference of the rows of train=: their cosine is "
                f"{cosine.item():.3f}",
                instead='train=data.train, of extract(model, data.train, method="mean_difference"); or none',
            )
        for number in range(count):
            found[number][place] = drawn[number + 1] * (own.norm() / whole.norm())
    return [
        SteeringVector(directions, _facts(vector, f"redrawn {number}"))
        for number, directions in enumerate(found)
    ]


def _strata(rows: Sequence[LabelledRow]) -> list[list[int]]:
    """The numbers of rows that are drawn among themselves: by their labels, where both ways round are there."""
    ways = {(row.positive_token, row.negative_token) for row in rows}
    found: dict[tuple[int, int] | None, list[int]] = {}
    for number, row in enumerate(rows):
        way = row.positive_token, row.negative_token
        found.setdefault(way if way[::-1] in ways else None, []).append(number)
    return list(found.values())


_SAME = 0.99
"""Vectors that point alike but for rounding, in bfloat16 too."""


def _weighted(
    model: Model,
    vector: SteeringVector,
    rows: Sequence[LabelledRow],
    weights: Tensor,
    batch_size: int,
    progress: bool | None,
) -> dict[Place, Tensor]:
    """By place the rows' differences summed with each of several weights [rows, count]: [count, width], in one pass."""
    count = weights.shape[1]
    sums = {
        place: torch.zeros(count, len(direction), dtype=torch.float64)
        for place, direction in vector.directions.items()
    }
    batches = [range(start, min(start + batch_size, len(rows))) for start in range(0, len(rows), batch_size)]
    for batch in watched(batches, list(map(len, batches)), "row", progress):
        differences = _differences(model, vector.places, [rows[row] for row in batch])
        for place, found in differences.items():
            sums[place] += weights[batch.start : batch.stop].T @ found
    return sums


def _differences(model: Model, places: Sequence[Place], rows: Sequence[LabelledRow]) -> dict[Place, Tensor]:
    """What is at the label with the positive answer, less that with the negative one, [rows, width] in float64."""
    layers: dict[str, tuple[int, ...]] = {}
    for site, layer in places:
        layers[site] = (*layers.get(site, ()), layer)
    one, other = zip(*(pair_of(row, "label") for row in rows), strict=True)
    found: dict[Place, Tensor] = {}
    for site, shows, lacks in read_pairs(model, layers, one, other):
        for number, layer in enumerate(layers[site]):
            found[site, layer] = shows[number].double() - lacks[number].double()
    return found


def _of_norms(vector: SteeringVector, directions: dict[Place, Tensor], method: str) -> SteeringVector:
    return SteeringVector(directions, _facts(vector, method)).to_norm(vector)


def _facts(vector: SteeringVector, method: str) -> Facts:
    """Facts about the model alone: what the vector was made of is not what these are made of."""
    facts = vector.facts
    return Facts(
        model=facts.model,
        revision=facts.revision,
        family=facts.family,
        n_layers=facts.n_layers,
        d_model=facts.d_model,
        weights=facts.weights,
        method=method,
    )
