"""What a sweep found at one place: propensities by row and multiplier, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tracelens.errors import SteeringSweepError
from tracelens.extras import required
from tracelens.location import here
from tracelens.steering import steerability
from tracelens.steering.facts import Place, written
from tracelens.steering.intervals import LEVEL, Interval, bootstrap, mean_interval, wilson
from tracelens.view import Line, Shown, Stack, Table, View

if TYPE_CHECKING:
    import pandas

    from tracelens.steering.damage import Damage

Numbers = NDArray[np.float64]

MONOTONE = 0.9
"""A row rises with the multiplier if its rank correlation is beyond this."""


@dataclass(frozen=True)
class SweepFacts:
    """What a sweep was of.

    ``model``: its name. ``data``, ``digest``, ``part``: the name of the contrast data, their sha256, and which part of
    them. ``method``: how the vector was made. ``norm``: its length; ``scale``: the mean norm of the activations at its
    place, if known. ``positions``, ``operator``, ``seed``: of the sweep. ``plainly``: why each strength was a pass of
    its own. ``refused``: rows without a label, which were left out. ``places``: how many places were swept together.
    """

    model: str | None
    data: str | None
    digest: str | None
    part: str | None
    method: str | None
    norm: float
    scale: float | None
    positions: str
    operator: str
    seed: int
    plainly: str | None = None
    refused: int = 0
    places: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, eq=False, repr=False)
class SteeringCurve(Shown):
    """What a steering vector does to the choice between two answers, at each multiplier [K] and for each row [N].

    ``place``: the site and layer. ``multipliers`` [K], rising. ``propensity`` [N, K]: the logit of the answer that
    shows the behaviour less that of the other one, at the decision position, which is also the difference of their
    log-probabilities; ``unsteered`` [N] without the vector. ``mass`` [N, K], ``unsteered_mass`` [N]: the probability of
    all label tokens together. ``correct`` [N]: whether the positive label is the likeliest one, unsteered. ``rows``
    [N]: numbers within the data; ``labels`` [N]: what the positive label spells. ``controls``: by name the mean curves
    of vectors of the same norm [vectors, K], ``"random"`` and ``"shuffled"``. ``damage``: to neutral texts, if asked.
    ``redrawn``: the mean curves of the vector made anew of other draws of its training rows [draws, K], if asked.

    The definitions are those of Tan et al. 2024 (arXiv:2407.12404). Intervals are of 95%: of means by 10,000 bootstrap
    draws of rows, of shares by Wilson's formula. In a notebook it shows itself as a figure, in a terminal as tables.
    """

    place: Place
    multipliers: Numbers
    propensity: Numbers
    unsteered: Numbers
    mass: Numbers
    unsteered_mass: Numbers
    correct: NDArray[np.bool_]
    rows: tuple[int, ...]
    labels: tuple[str, ...]
    facts: SweepFacts
    controls: Mapping[str, Numbers] = field(default_factory=dict[str, Numbers])
    damage: Damage | None = None
    redrawn: Numbers | None = None

    # --- the curve -----------------------------------------------------------------------------------------------

    @property
    def mean(self) -> Numbers:
        """The mean propensity over rows at each multiplier, [K]."""
        return self.propensity.mean(0)

    @cached_property
    def band(self) -> tuple[Numbers, Numbers]:
        """The two ends of the 95% interval of the mean at each multiplier, [K] each: whole rows are drawn."""
        return bootstrap(self.propensity, seed=self.facts.seed)

    @cached_property
    def line(self) -> steerability.Line:
        """The straight line through the mean curve: slope, intercept, R²."""
        return steerability.line(self.multipliers, self.mean)

    # --- how much it steers --------------------------------------------------------------------------------------

    @cached_property
    def slopes(self) -> Numbers:
        """The least-squares slope of each row, [N]: its steerability."""
        return steerability.slopes(self.multipliers, self.propensity)

    @property
    def slope(self) -> float:
        """The mean of the rows' slopes, which is the slope of the mean curve: the steerability of the set."""
        return float(self.slopes.mean())

    @cached_property
    def interval(self) -> Interval:
        """The 95% interval of the slope, by bootstrap over rows."""
        return self.interval_at(LEVEL)

    def interval_at(self, level: float) -> Interval:
        """The interval of the slope at another level: ``1 - 0.05 / n`` where the best of n places is looked at."""
        return mean_interval(self.slopes, seed=self.facts.seed, level=level)

    @property
    def training_interval(self) -> Interval | None:
        """Where 95% of the slopes lie of vectors of other draws of the training rows; ``None`` if not asked for."""
        if self.redrawn is None:
            return None
        low, high = np.quantile(steerability.slopes(self.multipliers, self.redrawn), (0.025, 0.975))
        return Interval(float(low), float(high))

    @property
    def relative_slope(self) -> float | None:
        """The slope for a vector as long as activations at its place are on average; ``None`` if unknown."""
        scale, norm = self.facts.scale, self.facts.norm
        return None if scale is None or not norm else self.slope * scale / norm

    @property
    def anti_steerable(self) -> float:
        """The share of rows whose slope is not positive."""
        return float((self.slopes <= 0).mean())

    @property
    def anti_steerable_interval(self) -> Interval:
        """Wilson's 95% interval of that share."""
        return wilson(int((self.slopes <= 0).sum()), len(self.slopes))

    @cached_property
    def by_label(self) -> dict[str, tuple[int, float, Interval]]:
        """For each label that is the positive one in some rows: how many, their mean slope, and its interval."""
        found: dict[str, tuple[int, float, Interval]] = {}
        for label in sorted(set(self.labels)):
            own = self.slopes[[one == label for one in self.labels]]
            found[label] = len(own), float(own.mean()), mean_interval(own, seed=self.facts.seed)
        return found

    # --- how it rises --------------------------------------------------------------------------------------------

    @property
    def increasing(self) -> bool:
        """Is the mean larger at every larger multiplier?"""
        return steerability.strictly_increasing(self.multipliers, self.mean)

    @property
    def spearman(self) -> float:
        """The rank correlation of the mean curve with the multipliers."""
        return float(steerability.spearman(self.multipliers, self.mean))

    @cached_property
    def row_spearman(self) -> Numbers:
        """The rank correlation of each row, [N]; nan for a row that does not move."""
        return steerability.spearman(self.multipliers, self.propensity)

    @property
    def monotone(self) -> float:
        """The share of rows whose rank correlation is above 0.9."""
        return float((self.row_spearman > MONOTONE).mean())

    @property
    def r_squared(self) -> float:
        """The share of the mean curve's variance that is on a straight line."""
        return self.line.r_squared

    # --- what it is held against ---------------------------------------------------------------------------------

    @property
    def accuracy(self) -> float:
        """The share of rows in which the unsteered model likes the positive label best."""
        return float(self.correct.mean())

    def control_slopes(self, name: str) -> Numbers:
        """The slopes of the mean curves of one kind of controls: ``curve.control_slopes("random")``."""
        if name not in self.controls:
            raise SteeringSweepError(
                f"the sweep has no controls {name!r}",
                at=here(),
                instead=f"one of {', '.join(map(repr, self.controls))}"
                if self.controls
                else "tl.steering.sweep(..., controls=True)",
            )
        return steerability.slopes(self.multipliers, self.controls[name])

    def beyond(self, name: str) -> bool:
        """Is the slope larger than that of every control of a kind?"""
        return bool(self.slope > self.control_slopes(name).max())

    # --- looks and files -----------------------------------------------------------------------------------------

    def _view(self) -> View:
        return Stack(
            (Line(self._title()), Table(("", "", "95% interval"), self._numbers()), self._by_strength())
        )

    def _title(self) -> str:
        facts = self.facts
        part = f" ({facts.part})" if facts.part not in (None, "all", "some") else ""
        return (
            f"{written(self.place)}, {facts.operator} at {facts.positions}: {len(self.rows)} rows of "
            f"{facts.data or 'unnamed data'}{part}, {facts.model or 'unknown model'}"
        )

    def _numbers(self) -> tuple[tuple[str, str, str], ...]:
        facts = self.facts
        rows = [("slope", f"{self.slope:.4g}", str(self.interval))]
        if self.redrawn is not None:
            rows.append(("  over training draws", f"{len(self.redrawn)} draws", str(self.training_interval)))
        if self.relative_slope is not None and facts.scale is not None:
            ratio = facts.norm / facts.scale
            rows.append(
                ("slope at the activations' norm", f"{self.relative_slope:.4g}", f"|v| is {ratio:.3g} of it")
            )
        rows.append(("anti-steerable", f"{self.anti_steerable:.0%}", str(self.anti_steerable_interval)))
        if len(self.by_label) > 1:
            rows += [
                (f"slope where {label!r} is positive", f"{slope:.4g}", f"{interval}, {count} rows")
                for label, (count, slope, interval) in self.by_label.items()
            ]
        rows.append(
            ("mean rises at every step", "yes" if self.increasing else "no", f"Spearman {self.spearman:.2f}")
        )
        rows.append((f"rows with Spearman above {MONOTONE}", f"{self.monotone:.0%}", ""))
        rows.append(("R² of the mean", f"{self.r_squared:.3f}", ""))
        for name in self.controls:
            found = self.control_slopes(name)
            verdict = "the slope is among them"
            if self.beyond(name):
                verdict = "all below the slope"
            elif self.slope < found.min():
                verdict = "all above the slope"
            span = str(Interval(float(found.min()), float(found.max())))
            rows.append((f"{len(found)} {name} vectors", span, verdict))
        share = wilson(int(self.correct.sum()), len(self.correct))
        rows.append(("unsteered accuracy", f"{self.accuracy:.0%}", str(share)))
        rows.append(("label mass, unsteered", f"{self.unsteered_mass.mean():.0%}", ""))
        if facts.refused:
            rows.append(("rows left out", str(facts.refused), "no label"))
        return tuple(rows)

    def _by_strength(self) -> Table:
        low, high = self.band
        heads = ["multiplier", "propensity", "95% interval", "label mass"]
        columns = [
            [f"{multiplier:g}" for multiplier in self.multipliers],
            [f"{mean:.3f}" for mean in self.mean],
            [str(Interval(*ends)) for ends in zip(low.tolist(), high.tolist(), strict=True)],
            [f"{mass:.0%}" for mass in self.mass.mean(0)],
        ]
        if self.damage is not None:
            heads += ["KL on neutral text", f"perplexity ({self.damage.unsteered:.1f})"]
            columns += [
                [f"{kl:.3f}" for kl in self.damage.kl],
                [f"{one:.1f}" for one in self.damage.perplexity],
            ]
        return Table(tuple(heads), tuple(zip(*columns, strict=True)))

    def _repr_html_(self) -> str:
        from tracelens.viz.steering_picture import inside

        return inside(self)

    def to_svg(self) -> str:
        """The figure: mean curve with its band and the controls, the rows' slopes, and damage where it was measured."""
        from tracelens.viz.steering_picture import picture

        return picture(self)

    def to_html(self, path: str | Path, *beside: Shown | str) -> Path:
        """Writes a page that needs nothing else: the figure and all numbers.

        ``beside``: what stands below them: how the vector was made (``v.report()``), how its place was chosen (what
        :func:`choose` gave), or words.
        """
        from tracelens.viz.steering_picture import page

        target = Path(path)
        target.write_text(page(self, beside), encoding="utf-8")
        return target

    def to_pandas(self) -> pandas.DataFrame:
        """A table with a line for each row and multiplier: row, label, multiplier, propensity, label_mass, slope."""
        pandas: Any = required("pandas", extra="pandas", what="curve.to_pandas()")
        count, multipliers = self.propensity.shape
        return pandas.DataFrame(
            {
                "row": np.repeat(np.array(self.rows), multipliers),
                "label": np.repeat(np.array(self.labels, dtype=object), multipliers),
                "multiplier": np.tile(self.multipliers, count),
                "propensity": self.propensity.ravel(),
                "label_mass": self.mass.ravel(),
                "slope": np.repeat(self.slopes, multipliers),
            }
        )

    def to_dict(self) -> dict[str, Any]:
        """All numbers and facts in JSON's types, with the statistics that follow from them."""
        from tracelens.steering.curve_files import to_dict

        return to_dict(self)

    def save(self, path: str | Path) -> Path:
        """Writes all of it as JSON; :meth:`load` reads it back."""
        from tracelens.steering.curve_files import save

        return save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> SteeringCurve:
        """Reads what :meth:`save` wrote; :class:`~tracelens.errors.SteeringSweepError` for another file."""
        from tracelens.steering.curve_files import load

        return load(Path(path))
