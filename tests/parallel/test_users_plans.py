"""Models that their user spread over ranks with ``parallelize_module``: every site read and written as in one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tracelens as tl
from tests.conformance.test_reads import read
from tests.parallel.writes import EDITS, Edit, seen_later
from tests.support.batches import EVEN, RAGGED, random_rows
from tests.support.hand_forward import hand_sites
from tests.support.ranks import PoolOf
from tests.support.spread_models import Both, relative_error, stored
from tracelens.errors import LayoutError, OptionError
from tracelens.ir.layout import Joined, Layout, Partial, Replicate, Shard
from tracelens.ir.ops import Redistribute
from tracelens.ir.sites import Effect, Site

TOLERANCE = 1e-5
ROWS = random_rows(EVEN)
PLANS = "tests.support.users_plans"


def loaded(family: str, plan: str, folder: Path, ranks_of: PoolOf) -> Both:
    hf = stored(family, folder)
    spread = tl.load(folder, tp=2, ranks=ranks_of(2), parallelize=f"{PLANS}:{plan}")
    return Both(spread, tl.wrap(hf), hf)


@pytest.fixture(scope="module", params=["tutorial", "logits_apart", "partial_sums", "sequence"])
def plan(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def models(plan: str, tmp_path_factory: pytest.TempPathFactory, ranks_of: PoolOf) -> Iterator[Both]:
    found = loaded("llama", plan, tmp_path_factory.mktemp("model"), ranks_of)
    yield found
    found.close()


def sites_of(models: Both) -> list[Site]:
    return hand_sites(models.hf)[1:]  # the first is an input: the mask


def all_read(model: tl.Model, sites: list[Site], rows: list[list[int]]) -> dict[Site, list[Tensor]]:
    with model.trace(rows):
        saved = {site: read(model, site).save() for site in sites}
    found = {site: handle.value for site, handle in saved.items()}
    return {site: [value] if isinstance(value, Tensor) else value for site, value in found.items()}


@pytest.mark.parametrize("lengths", [EVEN, RAGGED, [1, 1], [2, 5]], ids=str)
def test_every_site_is_read(models: Both, lengths: list[int]) -> None:
    sites, rows = sites_of(models), random_rows(lengths)
    expected, actual = (all_read(model, sites, rows) for model in (models.one, models.spread))
    for site in sites:
        for one, other in zip(actual[site], expected[site], strict=True):
            assert relative_error(one, other) <= TOLERANCE, str(site)


def test_every_site_takes_every_edit(models: Both) -> None:
    sites = [
        site for site in sites_of(models) if site.layer in (None, 1) and site.kind.effect is not Effect.NONE
    ]
    written(models, [(site, edit) for site in sites for edit in EDITS.values()])


def written(models: Both, edits: list[tuple[Site, Edit]]) -> None:
    clean = all_read(models.one, sites_of(models), ROWS)
    for site, edit in edits:
        (before,) = clean[site]
        later = seen_later(models.one, site)
        found: list[tuple[Tensor, ...]] = []
        for model in (models.one, models.spread):
            with model.trace(ROWS):
                edit.run(model, site, before.shape)
                saved = [value.save() for value in (read(model, site), read(model, later), model.logits)]
            found.append(tuple(handle.value for handle in saved))
        # An edit that does not show would show nothing either if it were done wrongly.
        assert relative_error(found[0][2], clean[Site("logits")][0]) > 100 * TOLERANCE, (str(site), edit.name)
        for what, one, other in zip(("after", str(later), "logits"), found[1], found[0], strict=True):
            assert relative_error(one, other) <= TOLERANCE, (str(site), edit.name, what)
