"""What an estimator needs of activations, gathered row by row: running sums, which do not grow with the rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

SAMPLED = 64
"""Of so many pairs the activations themselves are kept, for the separation of the two classes."""


@dataclass
class Moments:
    """Sums over pairs of activations at one site, for all its layers at once; float64, on the host.

    ``layers``, ``width``: how many layers there are, and how many numbers the site has. ``pairs``: how many pairs there
    will be. ``differences``: second moments of the pairs' differences are wanted; ``within``: those of each class.
    Either is kept as a matrix [width, width] for each layer, or as the rows themselves where these take less.
    ``rows``: the activations themselves are wanted, whatever they take. ``signs``: +1 or -1 for each pair, for sums
    with some of the labels exchanged. ``sampled``: the numbers of the pairs that are kept for the separation.
    """

    layers: int
    width: int
    pairs: int
    differences: bool = False
    within: bool = False
    rows: bool = False
    signs: Tensor | None = None
    sampled: frozenset[int] = frozenset()

    count: int = 0
    positive: Tensor = field(init=False)
    """The sum of the activations where the behaviour shows, [layers, width]."""
    negative: Tensor = field(init=False)
    """The sum of the others."""
    units: Tensor = field(init=False)
    """The sum of the pairs' differences, each of length 1."""
    signed: Tensor = field(init=False)
    """The sum of the pairs' differences, each with its sign."""
    norms: Tensor = field(init=False)
    """The sum of the activations' norms, [layers]."""
    squares: Tensor | None = field(init=False, default=None)
    """The sum of the outer products of differences, or of activations of both classes, [layers, width, width]."""
    kept: list[tuple[Tensor, Tensor]] = field(init=False, default_factory=list[tuple[Tensor, Tensor]])
    """Pairs of activations that are kept, each [layers, rows, width], float32."""
    sample: list[tuple[Tensor, Tensor]] = field(init=False, default_factory=list[tuple[Tensor, Tensor]])
    """The sampled pairs, as above."""

    def __post_init__(self) -> None:
        self.positive, self.negative, self.units, self.signed = torch.zeros(
            4, self.layers, self.width, dtype=torch.float64
        )
        self.norms = torch.zeros(self.layers, dtype=torch.float64)
        each = (2 if self.within else 1) * 4 * self.pairs * self.width
        self.keeps_rows = self.rows or (
            (self.differences or self.within) and each <= 8 * self.width * self.width
        )
        if (self.differences or self.within) and not self.keeps_rows:
            self.squares = torch.zeros(self.layers, self.width, self.width, dtype=torch.float64)

    def add(self, numbers: Sequence[int], positive: Tensor, negative: Tensor) -> None:
        """Takes pairs with their numbers: activations [layers, rows, width] of both classes, row by row."""
        one, other = positive.double(), negative.double()
        differences = one - other
        self.count += len(numbers)
        self.positive += one.sum(1)
        self.negative += other.sum(1)
        lengths = differences.norm(dim=-1, keepdim=True)
        self.units += (differences / lengths.where(lengths > 0, 1.0)).sum(1)
        self.norms += one.norm(dim=-1).sum(1) + other.norm(dim=-1).sum(1)
        if self.signs is not None:
            self.signed += (differences * self.signs[list(numbers)].double()[:, None]).sum(1)
        if self.squares is not None:
            if self.differences:
                self.squares += differences.mT @ differences
            else:
                self.squares += one.mT @ one + other.mT @ other
        if self.keeps_rows:
            if self.differences and not self.rows:
                self.kept.append((differences.float(), positive.new_zeros(self.layers, 0, self.width)))
            else:  # copies: what was saved for both together is not held twice
                self.kept.append((_copied(positive), _copied(negative)))
        chosen = [at for at, number in enumerate(numbers) if number in self.sampled]
        if chosen:
            self.sample.append((_copied(positive[:, chosen]), _copied(negative[:, chosen])))

    @property
    def held(self) -> int:
        """How many bytes this holds."""
        sums = [self.positive, self.negative, self.units, self.signed, self.norms]
        sums += [] if self.squares is None else [self.squares]
        return sum(t.numel() * t.element_size() for t in sums) + sum(
            t.untyped_storage().nbytes() for pair in (*self.kept, *self.sample) for t in pair
        )

    # --- what they come to ---------------------------------------------------------------------------------------

    @property
    def mean(self) -> Tensor:
        """The mean of the pairs' differences, [layers, width]."""
        return (self.positive - self.negative) / self.count

    @property
    def scale(self) -> Tensor:
        """The mean norm of the activations, [layers]."""
        return self.norms / (2 * self.count)

    def rows_of(self, layer: int) -> tuple[Tensor, Tensor]:
        """The kept activations of a layer, float64: of each class [rows, width]; or differences, and nothing."""
        one, other = zip(*self.kept, strict=True)
        return torch.cat([t[layer] for t in one]).double(), torch.cat([t[layer] for t in other]).double()

    def agreement(self, layer: int) -> float | None:
        """The mean cosine of the pairs' differences with their mean (Braun et al. 2025, arXiv:2505.22637)."""
        mean = self.mean[layer]
        norm = mean.norm()
        return float(self.units[layer] @ mean / (self.count * norm)) if norm > 0 else None

    def separation(self, layer: int, direction: Tensor) -> float | None:
        """d' of the two classes along a direction, of the sampled pairs: difference of means over pooled deviation."""
        if not self.sample:
            return None
        along = [torch.cat([pair[of][layer] for pair in self.sample]).double() @ direction for of in (0, 1)]
        if len(along[0]) < 2:
            return None
        spread = (sum(part.var() for part in along) / 2) ** 0.5
        return float((along[0].mean() - along[1].mean()) / spread) if spread > 0 else None


def _copied(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32, copy=True).contiguous()
