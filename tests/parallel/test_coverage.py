"""Every family in every way of spreading it: what does not run is refused as the page says, and the page has all."""

from __future__ import annotations

from pathlib import Path

import pytest

import tracelens as tl
from docs import coverage_table
from tests.parallel import coverage
from tests.parallel.cells import CELLS, Mark
from tests.parallel.coverage import BACKENDS, FAILS, ON_RANKS, OUTCOMES, Outcome
from tests.parallel.test_more_families_spread import all_alike
from tests.support.more_families import ALL
from tests.support.pretend import pretend_throughout
from tests.support.spread_models import over_devices, stored
from tracelens.backends.architectures import FAMILIES
from tracelens.backends.architectures.lookup import family_of
from tracelens.errors import LayoutError
from tracelens.ir.sites import KINDS, TEXT

__all__ = ["pretend_throughout"]

REFUSED = [each for each in OUTCOMES.values() if each.refused is not None and each.backend in ON_RANKS]


def test_every_table_has_a_model_that_is_tested() -> None:
    """A new table without one fails here; a new model is in the tables and in the tests without being listed."""
    served = {family_of(family.config()).name for family in ALL.values()}
    assert served == {family.name for family in FAMILIES}
    assert {family for family, _ in OUTCOMES} == set(ALL)
    assert len(OUTCOMES) == len(ALL) * len(BACKENDS)


def test_the_matrix_says_the_same() -> None:
    shared = [each for each in OUTCOMES.values() if coverage.in_the_matrix(each.family, each.backend)]
    assert len(shared) > 40
    for each in shared:
        cell = CELLS[str(each)]
        assert (each.refused is None) == (cell.refused is None), str(each)
        if each.refused is not None and cell.refused is not None:
            assert each.refused.mark is cell.refused.mark
            assert cell.refused.says in each.refused.says


@pytest.mark.parametrize("each", REFUSED, ids=str)
def test_what_is_refused_is_refused_before_anything_is_launched(each: Outcome, tmp_path: Path) -> None:
    assert each.refused is not None
    stored(each.family, tmp_path)
    with pytest.raises(LayoutError) as caught:
        tl.load(tmp_path, **BACKENDS[each.backend]).close()
    assert caught.value.problem == each.refused.says


@pytest.mark.usefixtures("pretend_throughout")
@pytest.mark.parametrize(
    "family", [family for family, backend in FAILS if backend == "device_map"] or ["none"]
)
def test_what_is_marked_is_alike_or_fails_in_the_words_of_its_mark(family: str, tmp_path: Path) -> None:
    if family == "none":
        pytest.skip("nothing is marked; until something is")
    models = over_devices(family, tmp_path)
    # accelerate keeps devices in a set, so which one gets the tokens is another thing in each process.
    try:
        all_alike(models)
    except RuntimeError as error:
        if FAILS[family, "device_map"].says not in str(error):
            raise
    models.close()


def test_a_mark_is_about_something_that_would_run_else() -> None:
    for (family, backend), refused in FAILS.items():
        assert backend in BACKENDS
        assert refused.mark is not Mark.NEVER
        assert coverage.WHY[family, backend]


def test_the_page_has_every_family_and_every_site() -> None:
    sites, spread = coverage_table.sites(), coverage_table.spread()
    for family in FAMILIES:
        (row,) = (line for line in sites.splitlines() if line.startswith(f"| {family.name} |"))
        cells = [cell.strip() for cell in row.split("|")[2:-1]]
        kinds = [kind for kind in KINDS if kind.scope not in TEXT]
        assert len(cells) == len(kinds)
        for cell, kind in zip(cells, kinds, strict=True):
            absent = cell.startswith(coverage_table.ABSENT)
            assert absent == (kind.name not in family.taps), (family.name, kind.name)
    for name in ALL:
        assert f"| {name} |" in spread
