"""The families of ``more_families`` over several devices and on ranks: every site read and written as on one device."""

from __future__ import annotations

from pathlib import Path

import pytest

import tracelens as tl
from tests.conformance.test_reads import looks, read
from tests.parallel.compared import ROWS, read_alike
from tests.parallel.coverage import BACKENDS, ON_RANKS, OUTCOMES, Outcome
from tests.parallel.writes import numbers
from tests.support.batches import RAGGED, random_rows
from tests.support.dense_families import DENSE_SPREAD_WRONGLY
from tests.support.more_families import LAYERS, MORE
from tests.support.pretend import pretend_throughout
from tests.support.ranks import PoolOf
from tests.support.spread_models import Both, both, over_devices, relative_error, stored
from tracelens.errors import LayoutError
from tracelens.ir.sites import KINDS, TEXT, Effect, Scope, Site

__all__ = ["pretend_throughout"]

RUN = [each for each in OUTCOMES.values() if each.family in MORE and each.refused is None]
"""Worked out, so that a new family is here without being listed."""
OVER_DEVICES = [each.family for each in RUN if each.backend == "device_map"]


def sites_of(model: tl.Model) -> list[Site]:
    layers = {Scope.LAYER: range(LAYERS)}
    return [
        site
        for kind in KINDS
        if kind.scope not in TEXT
        for site in (Site(kind.name, layer) for layer in layers.get(kind.scope, (None,)))
        if model.anatomy.has(site)
    ]


def all_alike(models: Both) -> None:
    """All sites in one pass; then a write at every one of them in one pass, each seen by those that come after."""
    # What each expert makes is not there where ranks share them.
    sites = [site for site in sites_of(models.one) if models.spread.anatomy.has(site)]
    for rows in (ROWS, random_rows(RAGGED)):
        read_alike(models, sites, rows)
    with models.one.trace(ROWS) as clean:
        for site in sites:
            read(models.one, site).save(str(site))
    found: list[dict[Site, object]] = []
    for model in (models.one, models.spread):
        with model.trace(ROWS) as t:
            for number, site in enumerate(sites):
                if site.kind.effect is not Effect.NONE and site.kind.dtype is None:
                    here = model if site.layer is None else model.layers[site.layer]
                    before = clean[str(site)]
                    new = getattr(here, site.name) * 0.9
                    if not looks(site):
                        new = new + 0.3 * numbers(before, number, *before.shape[2:])
                    setattr(here, site.name, new)
                read(model, site).save(str(site))
        found.append({site: t[str(site)] for site in sites})
    for site in sites:
        one, other = (values[site] for values in found)
        assert relative_error(other, one) <= 1e-5, site
    logits = Site("logits")
    assert relative_error(found[0][logits], clean["logits"]) > 1e-2


@pytest.mark.usefixtures("pretend_throughout")
@pytest.mark.parametrize("family", OVER_DEVICES)
def test_over_three_devices(family: str, tmp_path: Path) -> None:
    models = over_devices(family, tmp_path)
    assert len({str(parameter.device) for parameter in models.spread.hf.parameters()}) == 3
    all_alike(models)
    models.close()


@pytest.mark.parametrize("each", [each for each in RUN if each.backend in ON_RANKS], ids=str)
def test_on_two_ranks(each: Outcome, tmp_path: Path, ranks_of: PoolOf) -> None:
    models = both(each.family, tmp_path, ranks_of, **BACKENDS[each.backend])
    all_alike(models)
    models.close()


@pytest.mark.parametrize(("family", "way"), DENSE_SPREAD_WRONGLY)
def test_what_transformers_would_spread_wrongly_is_refused(family: str, way: str, tmp_path: Path) -> None:
    stored(family, tmp_path)
    with pytest.raises(LayoutError, match=DENSE_SPREAD_WRONGLY[family, way]) as failure:
        tl.load(tmp_path, **{way: 2}).close()
    assert "device_map" in str(failure.value.instead)


def test_stages_that_would_each_norm_the_stream_are_refused(tmp_path: Path) -> None:
    """transformers cuts GPT-NeoX at names that its modules do not have, without an error."""
    stored("pythia", tmp_path)
    with pytest.raises(LayoutError, match="would leave 'embed_in', 'emb_dropout', 'final_layer_norm'"):
        tl.load(tmp_path, pp=2).close()
