"""What is held against what: sites and edits of a model that is spread, beside the same model on one device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

import tracelens as tl
from tests.conformance.test_reads import read
from tests.parallel.writes import Edit, seen_later
from tests.support.batches import EVEN, random_rows
from tests.support.spread_models import Both, relative_error
from tracelens.ir.sites import Site

TOLERANCE = 1e-5
ROWS = random_rows(EVEN)

Rows = Sequence[Sequence[int]]


def read_alike(models: Both, sites: Sequence[Site], rows: Rows) -> float:
    """Reads sites in both models, in one pass; gives the largest error."""
    expected, actual = (all_read(model, sites, rows) for model in (models.one, models.spread))
    worst = 0.0
    for site in sites:
        for one, other in zip(actual[site], expected[site], strict=True):
            error = relative_error(one, other)
            assert error <= TOLERANCE, (str(site), error)
            worst = max(worst, error)
    return worst


def all_read(model: tl.Model, sites: Sequence[Site], rows: Rows) -> dict[Site, list[Tensor]]:
    """One tensor of each site, or one for each prompt where they differ in length."""
    with model.trace([list(row) for row in rows]):
        saved = {site: read(model, site).save() for site in sites}
    found = {site: handle.value for site, handle in saved.items()}
    return {site: [value] if isinstance(value, Tensor) else value for site, value in found.items()}


def written_alike(models: Both, edits: Iterable[tuple[Site, Edit]]) -> float:
    """Does edits one by one in both models; gives the largest error of what follows from them."""
    chosen = list(edits)
    clean = all_read(models.one, [*dict.fromkeys(site for site, _ in chosen), Site("logits")], ROWS)
    worst = 0.0
    for site, edit in chosen:
        (before,), (logits,) = clean[site], clean[Site("logits")]
        later = seen_later(models.one, site)
        expected, actual = (after(model, site, edit, later, before) for model in (models.one, models.spread))
        # An edit that does not show would show nothing either if it were done wrongly.
        assert relative_error(expected[2], logits) > 100 * TOLERANCE, (str(site), edit.name)
        for what, one, other in zip(("after", str(later), "logits"), actual, expected, strict=True):
            error = relative_error(one, other)
            assert error <= TOLERANCE, (str(site), edit.name, what, error)
            worst = max(worst, error)
    return worst


def after(model: tl.Model, site: Site, edit: Edit, later: Site, before: Tensor) -> list[Tensor]:
    """What an edit makes of the site itself, of a later one, and of the logits."""
    with model.trace(ROWS):
        edit.run(model, site, before)
        saved = [value.save() for value in (read(model, site), read(model, later), model.logits)]
    return [handle.value for handle in saved]


def gradients_alike(models: Both, names: Sequence[str]) -> None:
    """Takes the gradient of a difference of logits with respect to sites of layer 1 in both models."""
    found: list[list[Tensor]] = []
    for model in (models.one, models.spread):
        with model.trace(ROWS):
            sites = [getattr(model.layers[1], name) for name in names]
            loss = model.logits[:, -1, 5].sum() - model.logits[:, -1, 90].sum()
            saved = [grad.save() for grad in tl.grad(loss, wrt=sites)]
        found.append([handle.value for handle in saved])
    for actual, expected in zip(found[1], found[0], strict=True):
        assert expected.abs().max() > 1e-3
        assert relative_error(actual, expected) <= 10 * TOLERANCE
