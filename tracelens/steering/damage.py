"""What a vector does to texts that it is not about: KL from the model as it is, and perplexity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tracelens.errors import SteeringSweepError
from tracelens.progress import watched
from tracelens.steering.propensity import Numbers

if TYPE_CHECKING:
    from tracelens.model import Model
    from tracelens.steering.vector import SteeringVector


@dataclass(frozen=True, eq=False)
class Damage:
    """What happens to neutral texts at each multiplier, [K].

    ``kl``: KL(model as it is || steered) in nats, the mean over all tokens. ``perplexity``: of the texts, each token
    from those before it; ``unsteered`` is that of the model as it is. ``texts``, ``tokens``: how many there were.
    ``positions``: where the vector was applied.
    """

    kl: Numbers
    perplexity: Numbers
    unsteered: float
    texts: int
    tokens: int
    positions: str


def damage(
    model: Model,
    vector: SteeringVector,
    texts: Sequence[Any],
    multipliers: Sequence[float],
    *,
    positions: Any = "all",
    operator: str = "add",
    settings: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> Damage:
    """Runs every text as it is and at all multipliers, in one batch, and compares what is said of each next token.

    Texts have no decision: ``positions="decision"`` is all of theirs.
    """
    if isinstance(positions, str) and positions == "decision":
        positions = "all"
    rows = [model.prepare(text).batch.tokens(0) for text in texts]
    short = next((number for number, row in enumerate(rows) if len(row) < 2), None)
    if not rows or short is not None:
        raise SteeringSweepError(
            f"text {short} of damage= has no second token to be said" if rows else "damage= has no texts",
            instead='damage=["The train leaves at nine.", ...], some texts of any content',
        )
    strengths = torch.tensor(list(multipliers), dtype=torch.float32)
    count = len(strengths)
    divergence = torch.zeros(count, dtype=torch.float64)
    surprise, own = torch.zeros(count, dtype=torch.float64), 0.0
    for row in watched(rows, list(map(len, rows)), "token", progress):
        said = torch.tensor(row[1:])[None]
        with model.trace([row]):
            state = model.final_norm[:, :-1].save()
            lost = model.lens(model.final_norm[:, :-1]).cross_entropy(said).sum(-1).save()
        with model.trace([row] * count) as t:
            vector.apply(t, strengths, positions=positions, operator=operator, **(settings or {}))
            lens = model.lens(model.final_norm[:, :-1])
            before = model.lens(state.value.expand(count, -1, -1), norm=False)
            apart = lens.kl(before).sum(-1).save()
            found = lens.cross_entropy(said).sum(-1).save()
        divergence += apart.value.double()
        surprise += found.value.double()
        own += float(lost.value)
    tokens = sum(map(len, rows)) - len(rows)
    return Damage(
        (divergence / tokens).numpy(),
        (surprise / tokens).exp().numpy(),
        math.exp(own / tokens),
        len(rows),
        tokens,
        positions if isinstance(positions, str) else repr(positions),
    )
