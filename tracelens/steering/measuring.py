"""``tl.steering.sweep``: what a steering vector does to the choice between two answers, strength by strength."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from tracelens.errors import Blaming, RowOverlapWarning, SteeringSweepError
from tracelens.location import Location, here
from tracelens.steering.contrast import Contrast
from tracelens.steering.controls import random_vectors, redrawn_vectors, shuffled_vectors
from tracelens.steering.curve import SteeringCurve, SweepFacts
from tracelens.steering.damage import damage as damage_of
from tracelens.steering.facts import Place, written
from tracelens.steering.labels import Labelled, LabelledRow
from tracelens.steering.propensity import End, Readings, readings
from tracelens.view import Line, Shown, Stack, Table, View

if TYPE_CHECKING:
    from tracelens.model import Model
    from tracelens.steering.vector import SteeringVector

MULTIPLIERS = (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5)
"""The grid of Tan et al. 2024."""
CONTROLS = 20
DRAWS = 20
"""So many training sets are drawn anew."""


class SteeringCurves(Mapping[Place, SteeringCurve], Shown):
    """The curves of a vector of several places, by place: ``curves["resid_post", 12]``."""

    def __init__(self, curves: Mapping[Place, SteeringCurve]) -> None:
        self._curves = dict(curves)

    def __getitem__(self, place: Place) -> SteeringCurve:
        """The curve at one place."""
        if place not in self._curves:
            raise SteeringSweepError(
                f"the sweep has no place {place!r}",
                at=here(),
                instead="one of " + ", ".join(map(repr, list(self._curves)[:6])),
            )
        return self._curves[place]

    def __iter__(self) -> Iterator[Place]:
        return iter(self._curves)

    def __len__(self) -> int:
        return len(self._curves)

    def _view(self) -> View:
        level = 1 - 0.05 / len(self)
        rows = tuple(
            (
                written(place),
                f"{curve.slope:.4g}",
                str(curve.interval),
                str(curve.interval_at(level)),
                f"{curve.anti_steerable:.0%}",
                f"{curve.spearman:.2f}",
                *(str(curve.beyond(name)) for name in curve.controls),
            )
            for place, curve in self.items()
        )
        first = next(iter(self.values()))
        heads = (
            "place",
            "slope",
            "95% interval",
            f"for {len(self)} places",
            "anti-steerable",
            "Spearman",
            *(f"beyond {name}" for name in first.controls),
        )
        words = (
            f"{len(self)} places, {len(first.rows)} rows each of {first.facts.data or 'unnamed data'}. The largest of "
            "many slopes is large by chance as well: the second interval is corrected for their number (Bonferroni)"
        )
        return Stack((Line(words), Table(heads, rows)))


def sweep(
    model: Model,
    vector: SteeringVector,
    data: Contrast | Labelled | Sequence[LabelledRow],
    multipliers: Sequence[float] = MULTIPLIERS,
    *,
    controls: bool | int = True,
    train: Contrast | Labelled | Sequence[LabelledRow] | None = None,
    damage: Sequence[Any] | None = None,
    positions: Any = "decision",
    operator: str = "add",
    batch_size: int = 8,
    quick: bool | None = None,
    seed: int = 0,
    progress: bool | None = None,
    **settings: Any,
) -> SteeringCurve | SteeringCurves:
    """Measures a steering vector: the propensity of every row at every multiplier, and vectors about nothing beside it.

    The propensity is the logit of the answer that shows the behaviour less that of the other one, at the decision
    position (the one before the label). A vector of several places is measured at each of them by itself, and then
    the result is a mapping of places to curves.

    ``controls``: so many random vectors of the same norm, and as many mean differences of these very rows with their
    labels shuffled, of the same norm too; ``True`` for 20 of each. ``train``: the rows that
    the vector is the mean difference of; it is then made anew of 20 draws of them, and ``curve.training_interval`` says
    how far the slope would be with other rows of this kind to train on. ``damage``: texts about nothing in particular,
    on which KL from the unsteered model and perplexity are taken at every multiplier; there the vector is applied at
    every position where only the decision is steered. ``positions``: ``"decision"``, or what ``v.apply`` takes, in the
    prompt; ``operator`` and ``settings`` as there. ``seed``: of controls and of bootstrap draws. ``batch_size``:
    prompts in a pass.

    With ``positions="decision"`` everything before that position is computed once for all multipliers, places and
    controls, and the numbers are those of a pass for each, up to rounding; ``quick=False`` runs them one by one.

    Warns (:class:`~tracelens.errors.RowOverlapWarning`) where rows are measured that the vector was made of. Raises
    :class:`~tracelens.errors.SteeringSweepError` for multipliers that make no line and for data without rows.

    >>> curve = tl.steering.sweep(model, v, data.test)                                # doctest: +SKIP
    >>> curve.slope, curve.interval, curve.anti_steerable                             # doctest: +SKIP
    """
    with Blaming(here()):
        grid = _grid(multipliers)
        count = CONTROLS if controls is True else int(controls)
        if count < 0 or batch_size < 1:
            raise SteeringSweepError(
                f"controls={controls!r}, batch_size={batch_size!r}: there are no fewer than none",
                instead="controls=20, batch_size=8",
            )
        vector.check(model)
        rows = _rows(data, model)
        _tell_overlap(vector, data, here())
        ends = [End(None, labels=True)]
        kinds: dict[str, list[SteeringVector]] = {}
        if count:
            kinds["random"] = random_vectors(vector, count, seed)
            kinds["shuffled"] = shuffled_vectors(
                model, vector, rows, count, seed, batch_size=batch_size, progress=progress
            )
        if train is not None:
            kinds["redrawn"] = redrawn_vectors(
                model, vector, _rows(train, model), DRAWS, seed, batch_size=batch_size, progress=progress
            )
        for place in vector.places:
            own = vector.at(sites=place[0], layers=place[1])
            ends += [End(own, strength, labels=True) for strength in grid]
            for several in kinds.values():
                for control in several:
                    part = control.at(sites=place[0], layers=place[1])
                    ends += [End(part, strength) for strength in grid]
        read = readings(
            model,
            rows,
            ends,
            positions=positions,
            operator=operator,
            settings=settings,
            batch_size=batch_size,
            quick=quick,
            progress=progress,
        )
        curves = _Curves(model, vector, data, rows, grid, positions, operator, seed, settings, read)
        found: dict[Place, SteeringCurve] = {}
        width = len(grid) * (1 + sum(map(len, kinds.values())))
        for number, place in enumerate(vector.places):
            curve = curves.at(
                place, 1 + number * width, {name: len(several) for name, several in kinds.items()}
            )
            if damage is not None:
                own = vector.at(sites=place[0], layers=place[1])
                hurt = damage_of(
                    model,
                    own,
                    damage,
                    grid,
                    positions=positions,
                    operator=operator,
                    settings=settings,
                    progress=progress,
                )
                curve = replace(curve, damage=hurt)
            found[place] = curve
    return next(iter(found.values())) if len(found) == 1 else SteeringCurves(found)


def _grid(multipliers: Sequence[float]) -> list[float]:
    """The multipliers, rising; what makes no line is refused."""
    try:
        found = [float(one) for one in multipliers]
    except (TypeError, ValueError):
        found = []
    if len(found) < 2 or len(set(found)) != len(found) or not np.isfinite(found).all():
        raise SteeringSweepError(
            f"multipliers={multipliers!r} make no line: it takes two numbers at least, each of them once",
            instead=f"multipliers={list(MULTIPLIERS)}",
        )
    return sorted(found)


def _rows(data: Any, model: Model) -> Sequence[LabelledRow]:
    if isinstance(data, Contrast):
        return data.tokens(model).rows
    rows = list(cast("Sequence[LabelledRow]", data)) if isinstance(data, Sequence) else []
    if not rows or not all(isinstance(row, LabelledRow) for row in rows):
        raise SteeringSweepError(
            "there are no rows to measure on"
            if not rows
            else f"data are rows with labels, and {type(rows[0]).__name__} is none",
            instead="data.test, of tl.steering.load_contrast(...) or Contrast.pairs([...])",
        )
    return rows


def _tell_overlap(vector: SteeringVector, data: Any, at: Location) -> None:
    """Warns where rows are measured that the vector was made of, as another seed's split has them."""
    if not isinstance(data, Contrast | Labelled):
        return
    measured = data.row_digests
    shared = len(set(vector.facts.row_digests).intersection(measured))
    if shared:
        warning = RowOverlapWarning(
            f"{shared} of the {len(measured)} rows that are measured are rows that the vector was made of, and it does "
            "better there than elsewhere; data.train and data.test of one split and seed share none"
        )
        warnings.warn_explicit(warning, None, at.filename, at.line)


class _Curves:
    """Puts what was read into curves."""

    def __init__(
        self,
        model: Model,
        vector: SteeringVector,
        data: Any,
        rows: Sequence[LabelledRow],
        grid: Sequence[float],
        positions: Any,
        operator: str,
        seed: int,
        settings: Mapping[str, Any],
        read: Readings,
    ) -> None:
        self.vector, self.rows, self.grid, self.read = vector, rows, np.array(grid), read
        source = data.data if isinstance(data, Labelled) else data
        known = source if isinstance(source, Contrast) else None
        self.labels = tuple(_spelt(model, row.positive_token) for row in rows)
        self.common: dict[str, Any] = {
            "model": vector.facts.model or getattr(model.config, "_name_or_path", None) or None,
            "data": None if known is None else known.name,
            "digest": None if known is None else known.digest,
            "part": None if known is None else known.part,
            "positions": positions if isinstance(positions, str) else repr(positions),
            "operator": operator,
            "seed": seed,
            "plainly": read.plainly,
            "refused": 0 if known is None else len(known) - len(rows),
            "places": len(vector),
            "settings": {
                name: value if isinstance(value, int | float | str) else repr(value)
                for name, value in settings.items()
            },
        }

    def at(self, place: Place, first: int, controls: Mapping[str, int]) -> SteeringCurve:
        """The curve at a place, whose ends begin at number ``first``."""
        count = len(self.grid)
        own = slice(first, first + count)
        read = self.read
        means: dict[str, Any] = {}
        start = first + count
        for name, several in controls.items():
            stop = start + several * count
            means[name] = read.propensity[:, start:stop].mean(0).reshape(several, count)
            start = stop
        facts = self.vector.facts
        return SteeringCurve(
            place=place,
            multipliers=self.grid,
            propensity=read.propensity[:, own],
            unsteered=read.propensity[:, 0],
            mass=read.mass[:, own],
            unsteered_mass=read.mass[:, 0],
            correct=read.first[:, 0],
            rows=tuple(row.row for row in self.rows),
            labels=self.labels,
            facts=SweepFacts(
                **self.common,
                method=facts.method,
                norm=self.vector.norms[place],
                scale=facts.scale.get(place),
            ),
            redrawn=means.pop("redrawn", None),
            controls=means,
        )


def _spelt(model: Model, token: int) -> str:
    tokenizer = model.tokenizer
    return str(token) if tokenizer is None else str(tokenizer.decode([token]))
