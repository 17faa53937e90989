"""Writes the tables of ``docs/coverage.md``: from the families' tables, and from what the tests run."""

from __future__ import annotations

from tests.parallel.coverage import BACKENDS, OUTCOMES, WHY
from tests.support.more_families import ALL
from tracelens.backends.architectures import FAMILIES
from tracelens.backends.architectures.lookup import family_of
from tracelens.backends.base import Family
from tracelens.ir.sites import KINDS, TEXT, Effect, Kind

STREAM, BRANCH, READ, SOME, ABSENT, RUNS = "●", "◐", "○", "*", "·", "✓"
_LEGEND = (
    f"{STREAM} read and written, a write changes the stream (or the output) · {BRANCH} read and written, a write "
    f"changes one branch · {READ} read only · {SOME} in some layers, or not with every configuration · {ABSENT} "
    "absent, with the number of the reason"
)


def sites() -> str:
    """Families down, sites across; the reasons of what is absent below."""
    kinds = [kind for kind in KINDS if kind.scope not in TEXT]
    reasons: dict[str, int] = {}
    lines = [
        f"| family | {' | '.join(f'`{kind.name}`' for kind in kinds)} |",
        "|---" + "|:-:" * len(kinds) + "|",
    ]
    for family in FAMILIES:
        cells = [_site(family, kind, reasons) for kind in kinds]
        lines.append(f"| {family.name} | {' | '.join(cells)} |")
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join([_LEGEND, "", *lines, "", *notes])


def _site(family: Family, kind: Kind, reasons: dict[str, int]) -> str:
    if kind.name not in family.taps:
        reason = family.absent[kind.name]
        return f"{ABSENT} {reasons.setdefault(reason, len(reasons) + 1)}"
    some = any(kind.name in each.names for each in family.in_some) or any(
        kind.name in names for names, _ in family.withheld.values()
    )
    shown = {Effect.NONE: READ, Effect.BRANCH: BRANCH}.get(kind.effect, STREAM)
    return shown + SOME if some else shown


def spread() -> str:
    """Models of the tests down, ways of running them across; the reasons of what does not run below."""
    reasons: dict[str, str] = {}
    lines = [f"| model | family | {' | '.join(BACKENDS)} |", "|---" * 2 + "|:-:" * len(BACKENDS) + "|"]
    for name, family in ALL.items():
        cells = [_backend(name, backend, reasons) for backend in BACKENDS]
        lines.append(f"| {name} | {family_of(family.config()).name} | {' | '.join(cells)} |")
    notes = [f"* ({letters}) {reason}." for reason, letters in reasons.items()]
    return "\n".join([*lines, "", *notes])


def _backend(name: str, backend: str, reasons: dict[str, str]) -> str:
    refused = OUTCOMES[name, backend].refused
    if refused is None:
        return RUNS
    reason = WHY.get((name, backend), refused.says)
    return f"{refused.mark.value} ({reasons.setdefault(reason, _letters(len(reasons)))})"


def _letters(number: int) -> str:
    """a, b, ..., z, aa, ab, ..."""
    before, last = divmod(number, 26)
    return (_letters(before - 1) if before else "") + chr(97 + last)
