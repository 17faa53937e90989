"""Which family runs in which way, worked out and not listed: what ``tl.load`` refuses, and what is known to fail.

``test_coverage.py`` and ``test_more_families_spread.py`` run all of it: what is not refused is compared with one
process, and what is marked has to fail, until its mark is taken away. ``docs/coverage.md`` shows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tests.parallel.cells import CELLS, Mark, Refused
from tests.support.more_families import ALL
from tracelens.errors import LayoutError
from tracelens.rank_loading import require_fit

BACKENDS: Mapping[str, Mapping[str, int]] = {
    "one process": {},
    "device_map": {},
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "tp2 x ep2": {"tp": 2, "ep": 2},
}
ON_RANKS = ("tp2", "pp2", "tp2 x ep2")

FAILS: Mapping[tuple[str, str], Refused] = {
    ("falcon_sequential", "device_map"): Refused(
        Mark.NOTIMPL, "Expected all tensors to be on the same device"
    ),
}
"""What is not refused, and fails in what tracelens stands on, with the words of that."""
WHY: Mapping[tuple[str, str], str] = {
    (
        "falcon_sequential",
        "device_map",
    ): "accelerate may give the tokens to another device than the embedding's, and "
    "the model makes its ALiBi of them there",
}

_MARKS = {
    "has no experts": Mark.NEVER,
    "cannot share": Mark.NEVER,
    "transformers has no plan": Mark.NOTIMPL,
    "transformers cuts models into stages at": Mark.NOTIMPL,
    "transformers computes something else of": Mark.NOTIMPL,
    "needs transformers": Mark.NOTIMPL,
}
"""What the words of a refusal mean; others have no mark, so that a new one is looked at."""


@dataclass(frozen=True)
class Outcome:
    """``refused``: with a mark and the words, where a family does not run in a way."""

    family: str
    backend: str
    refused: Refused | None

    def __str__(self) -> str:
        return f"{self.family} on {self.backend}".replace(" x ", "x")


def outcome(family: str, backend: str) -> Outcome:
    """What becomes of a family in a way of spreading it, without running it."""
    if (known := FAILS.get((family, backend))) is not None:
        return Outcome(family, backend, known)
    return Outcome(family, backend, _refused(family, backend) if backend in ON_RANKS else None)


def _refused(family: str, backend: str) -> Refused | None:
    try:
        require_fit(ALL[family].config(), {"tp": 1, "pp": 1, "ep": 1, **BACKENDS[backend]})
    except LayoutError as error:
        says = error.problem
        (mark,) = (mark for words, mark in _MARKS.items() if words in says)
        return Refused(mark, says)
    return None


OUTCOMES = {(family, backend): outcome(family, backend) for family in ALL for backend in BACKENDS}


def in_the_matrix(family: str, backend: str) -> bool:
    """Do the tests of the matrix run this already?"""
    return f"{family} on {backend}".replace(" x ", "x") in CELLS
