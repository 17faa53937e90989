"""How much of the logits is in hand at once, so that what is computed with them fits a workspace.

What a tile of positions takes, in bytes, for ``layers`` states of each position::

    positions * (layers * row + group * line + beside)

``row`` is kept of every state while the vocabulary goes by: the state itself, where it has to be copied next to the
others, and what it has been found to say. ``line`` is there for the layers whose logits are in hand: for each token of
a chunk of the vocabulary some numbers. ``beside`` is the same for the reference that they are compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

WORKSPACE = 16 * 2**20
"""Bytes that may be in hand, unless it is said otherwise.

The logits of a chunk are gone through several times, which is fastest where they stay in a processor's caches: with 64
MiB all takes up to a fifth longer, and with 8 MiB no less.
"""
CHUNK = 4096
"""A product with fewer tokens of the vocabulary than this would be slow."""
LEAST = 256
"""Fewer tokens at once would save next to nothing: what is kept of a row is of that size."""


class Tiles(NamedTuple):
    """How many positions, tokens of the vocabulary and layers are in hand at once."""

    positions: int
    tokens: int
    layers: int


@dataclass(frozen=True)
class Costs:
    """Bytes in hand: ``row`` for a state; and for a layer in hand and the reference so many for each token.

    ``line``: for a layer in hand besides, whatever the chunk is; ``least``: as much at least in place of the second
    half of what its tokens take.
    """

    row: int
    token: int
    line: int = 0
    least: int = 0
    of_reference: int = 0

    def of_line(self, tokens: int) -> int:
        """What a layer in hand takes, and so many tokens of it."""
        return self.line + tokens * self.token + max(0, self.least - tokens * (self.token // 2))

    def of_tiles(self, layers: int, tiles: Tiles) -> int:
        """What is in hand at most."""
        beside = tiles.tokens * self.of_reference
        return tiles.positions * (layers * self.row + tiles.layers * self.of_line(tiles.tokens) + beside)


def tiles_of(layers: int, columns: int, vocabulary: int, workspace: int, costs: Costs) -> Tiles:
    """As many positions at once as fit with all their layers, since the head is read once for each tile of them.

    Where not even one fits, a chunk of the vocabulary is gone through by some of the layers after the others; what is
    in hand then is one state, and :data:`LEAST` tokens at least, however small the workspace is.
    """
    layers, columns, vocabulary = max(1, layers), max(1, columns), max(1, vocabulary)
    tokens = min(vocabulary, CHUNK)
    fitting = workspace // costs.of_tiles(layers, Tiles(1, tokens, layers))
    if fitting:
        # Tiles of one size: a last one that is nearly empty reads the whole head for next to nothing.
        positions = -(-columns // -(-columns // min(columns, fitting)))
        group = layers
    else:
        positions = 1
        one = costs.of_tiles(layers, Tiles(1, tokens, 0))
        group = min(layers, max(1, (workspace - one) // costs.of_line(tokens)))
        while tokens > LEAST and costs.of_tiles(layers, Tiles(1, tokens, group)) > workspace:
            tokens = max(LEAST, tokens // 2)
    while tokens < vocabulary and costs.of_tiles(layers, Tiles(positions, 2 * tokens, group)) <= workspace:
        tokens *= 2
    return Tiles(positions, -(-vocabulary // -(-vocabulary // min(tokens, vocabulary))), group)


def extent(lead: Sequence[int], of_reference: Sequence[int] | None) -> tuple[int, int]:
    """How many layers and positions the rows of states [*lead, D] are: the head is read for all layers of a position.

    Those of a reference, which all layers share, are the positions; without one all but the first axis.
    """
    tokens = lead[1:] if len(lead) > 1 else lead
    if of_reference is not None:
        tokens = of_reference
    return prod(lead[: len(lead) - len(tokens)]), prod(tokens)


def costs_of_lens(
    width: int, itemsize: int, wide: int, *, floats: int, integers: int, k: int, divergence: bool
) -> Costs:
    """What is in hand for a state of so many numbers and the logits made of it, in numbers of ``wide`` bytes.

    For each logit its number and its power; the product in the dtype of the model is gone before there are powers, and
    comparisons are made in their memory. To merge the largest takes what ``least`` says, before there are powers.
    """
    return Costs(
        row=width * itemsize + floats * wide + integers * 8,
        token=2 * wide,
        line=16 * wide,
        least=k * (4 * wide + 5 * 8),
        of_reference=2 * wide if divergence else 0,
    )


def costs_of_distance(width: int, itemsize: int, wide: int, kind: str) -> Costs:
    """What is in hand: for ``js`` the logarithms of both, of their mean, and powers; for ``tv`` what powers are of."""
    of_product = itemsize if itemsize < wide else 0
    token, beside = (3 * wide, 2 * wide) if kind == "js" else (wide + of_product, wide + of_product)
    return Costs(row=width * itemsize + 2 * wide, token=token, line=8 * wide, of_reference=beside)


def rows_of_targets(width: int, itemsize: int, wide: int, workspace: int) -> tuple[int, int]:
    """How many states have the logit of a token of their own made at once, and what each of them takes.

    Of each there is the row of its token, and the same in the wide dtype.
    """
    each = width * (wide + itemsize) + 64
    return max(1, workspace // each), each
