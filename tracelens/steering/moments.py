"""What an estimator needs of activations, gathered text by text: running sums, which do not grow with the texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

SAMPLED = 64
"""Of so many texts of each class the activations themselves are kept, for the separation of the two."""


@dataclass
class Moments:
    """Sums over the activations of two classes at one site, for all its layers at once; float64, on the host.

    ``layers``, ``width``: how many layers there are, and how many numbers the site has. ``expected``: how many texts of
    each class there will be. ``differences``: second moments of the pairs' differences are wanted; ``within``: those of
    each class. Either is kept as a matrix [width, width] for each layer, or as rows where these take less. ``rows``:
    the activations themselves are wanted, whatever they take. ``signs``: +1 or -1 for each pair, for sums with some of
    the labels exchanged. ``sampled``: the numbers of the texts that are kept for the separation.
    """

    layers: int
    width: int
    expected: tuple[int, int]
    differences: bool = False
    within: bool = False
    rows: bool = False
    signs: Tensor | None = None
    sampled: frozenset[int] = frozenset()

    counts: list[int] = field(init=False)
    """How many texts of each class there were."""
    pairs: int = field(init=False, default=0)
    """How many of them came in pairs."""
    sums: Tensor = field(init=False)
    """The sum of each class's activations, [2, layers, width]: first of those that show the behaviour."""
    units: Tensor = field(init=False)
    """The sum of the pairs' differences, each of length 1, [layers, width]."""
    signed: Tensor = field(init=False)
    """The sum of the pairs' differences, each with its sign."""
    norms: Tensor = field(init=False)
    """The sum of the activations' norms, [layers]."""
    squares: Tensor | None = field(init=False, default=None)
    """The sum of the outer products of differences, or of activations of both classes, [layers, width, width]."""
    kept: tuple[list[Tensor], list[Tensor]] = field(init=False)
    """The activations that are kept of each class, or in the first list differences: [layers, rows, width], float32."""
    sample: tuple[list[Tensor], list[Tensor]] = field(init=False)
    """The sampled activations of each class, as above."""

    def __post_init__(self) -> None:
        self.counts = [0, 0]
        self.sums = torch.zeros(2, self.layers, self.width, dtype=torch.float64)
        self.units, self.signed = torch.zeros(2, self.layers, self.width, dtype=torch.float64)
        self.norms = torch.zeros(self.layers, dtype=torch.float64)
        self.kept, self.sample = ([], []), ([], [])
        wanted = self.differences or self.within
        count = self.expected[0] if self.differences else sum(self.expected)
        self.keeps_rows = self.rows or (wanted and 4 * count <= 8 * self.width)
        if wanted and not self.keeps_rows:
            self.squares = torch.zeros(self.layers, self.width, self.width, dtype=torch.float64)

    def add(self, numbers: Sequence[int], positive: Tensor, negative: Tensor) -> None:
        """Takes pairs with their numbers: activations [layers, rows, width] of both classes, row by row."""
        self.add_class(0, numbers, positive)
        self.add_class(1, numbers, negative)
        differences = positive.double() - negative.double()
        self.pairs += len(numbers)
        lengths = differences.norm(dim=-1, keepdim=True)
        self.units += (differences / lengths.where(lengths > 0, 1.0)).sum(1)
        if self.signs is not None:
            self.signed += (differences * self.signs[list(numbers)].double()[:, None]).sum(1)
        if self.differences and self.squares is not None:
            self.squares += differences.mT @ differences
        elif self.differences:
            self.kept[0].append(differences.float())

    def add_class(self, which: int, numbers: Sequence[int], activations: Tensor) -> None:
        """Takes texts of one class (0: those that show the behaviour) with their numbers."""
        found = activations.double()
        self.counts[which] += len(numbers)
        self.sums[which] += found.sum(1)
        self.norms += found.norm(dim=-1).sum(1)
        if self.within and self.squares is not None:
            self.squares += found.mT @ found
        elif self.within or self.rows:
            self.kept[which].append(_copied(activations))
        chosen = [at for at, number in enumerate(numbers) if number in self.sampled]
        if chosen:
            self.sample[which].append(_copied(activations[:, chosen]))

    @property
    def held(self) -> int:
        """How many bytes this holds."""
        held = [self.sums, self.units, self.signed, self.norms]
        held += [] if self.squares is None else [self.squares]
        held += [part for lists in (self.kept, self.sample) for parts in lists for part in parts]
        return sum(tensor.untyped_storage().nbytes() for tensor in held)

    # --- what they come to ---------------------------------------------------------------------------------------

    @property
    def mean(self) -> Tensor:
        """The difference of the classes' means, which for pairs is the mean of their differences; [layers, width]."""
        return self.sums[0] / self.counts[0] - self.sums[1] / self.counts[1]

    @property
    def scale(self) -> Tensor:
        """The mean norm of the activations, [layers]."""
        return self.norms / sum(self.counts)

    def rows_of(self, which: int, layer: int) -> Tensor:
        """The kept activations of one class at a layer, [rows, width], float64; of class 0 maybe the differences."""
        return torch.cat([part[layer] for part in self.kept[which]]).double()

    def agreement(self, layer: int) -> float | None:
        """The mean cosine of the pairs' differences with their mean (Braun et al. 2025, arXiv:2505.22637)."""
        mean = self.mean[layer]
        norm = mean.norm()
        return float(self.units[layer] @ mean / (self.pairs * norm)) if self.pairs and norm > 0 else None

    def separation(self, layer: int, direction: Tensor) -> float | None:
        """d' of the two classes along a direction, of the sampled texts: difference of means over pooled deviation."""
        if min(sum(part.shape[1] for part in parts) for parts in self.sample) < 2:
            return None
        one, other = (
            torch.cat([part[layer] for part in parts]).double() @ direction for parts in self.sample
        )
        spread = ((one.var() + other.var()) / 2) ** 0.5
        return float((one.mean() - other.mean()) / spread) if spread > 0 else None


def _copied(tensor: Tensor) -> Tensor:
    # A copy: what was saved for several is not held as a whole.
    return tensor.to(torch.float32, copy=True).contiguous()
