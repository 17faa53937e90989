"""The numbers that a lens gives for each component, layer and position: what they mean and how they are shown."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """What kind of number a statistic is, which decides how it is written and coloured."""

    SHARE = "share"
    """Between 0 and 1."""
    NATS = "nats"
    """0 or more."""
    LOG = "log"
    """A logarithm of a share: 0 or less."""
    RANK = "rank"
    """A count from 0; small is likely."""
    SIGNED = "signed"
    """Of either sign, and nothing at 0."""
    LEVEL = "level"
    """Of any size; 0 is nothing special."""


@dataclass(frozen=True, slots=True)
class Statistic:
    """One number of each cell: the ``label`` that a reader sees, and its ``kind``."""

    name: str
    label: str
    kind: Kind


def _all(*statistics: Statistic) -> dict[str, Statistic]:
    return {statistic.name: statistic for statistic in statistics}


STORED = _all(
    Statistic("log_prob", "log-probability of the next token (nats)", Kind.LOG),
    Statistic("rank", "rank of the next token", Kind.RANK),
    Statistic("entropy", "entropy (nats)", Kind.NATS),
    Statistic("kl", "KL(final || layer) (nats)", Kind.NATS),
    Statistic("js", "Jensen-Shannon divergence from the final layer (nats)", Kind.NATS),
    Statistic("tv", "total variation from the final layer", Kind.SHARE),
    Statistic("logsumexp", "log of the sum of exp(logits)", Kind.LEVEL),
)
"""What a result may hold, ``[C, L, T]`` each."""

DERIVED = _all(
    Statistic("top_prob", "probability of the top token", Kind.SHARE),
    Statistic("top_log_prob", "log-probability of the top token (nats)", Kind.LOG),
    Statistic("prob", "probability of the next token", Kind.SHARE),
    Statistic("cross_entropy", "cross-entropy with the next token (nats)", Kind.NATS),
)
"""What follows from that, or from the top tokens."""

STATISTICS = DERIVED | STORED

OF_TOKENS = ("log_prob", "prob", "rank", "cross_entropy")
"""What there also is of a tracked token, in place of the next one."""

DIFFERENCE = "log_prob_difference"


def of_token(name: str, token: str) -> Statistic:
    """The statistic of a tracked token in place of the next one."""
    known = STATISTICS[name]
    return Statistic(name, known.label.replace("the next token", repr(token)), known.kind)


def difference(first: str, second: str) -> Statistic:
    """By how much one tracked token is likelier than another."""
    return Statistic(DIFFERENCE, f"log-probability of {first!r} minus that of {second!r} (nats)", Kind.SIGNED)


def written(value: float, kind: Kind) -> str:
    """A number for people to read."""
    if value != value:
        return "-"
    match kind:
        case Kind.RANK:
            return "-" if value < 0 else str(int(value))
        case Kind.SHARE:
            return f"{value:.3f}" if value >= 0.0005 or value == 0 else f"{value:.0e}"
        case _:
            return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
