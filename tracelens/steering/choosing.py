"""``tl.steering.choose``: the place and the strength, on validation rows and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tracelens.errors import Blaming, ChoosingRowsError, OptionError
from tracelens.location import here
from tracelens.steering.contrast import Contrast
from tracelens.steering.curve import SteeringCurve
from tracelens.steering.damage import Damage
from tracelens.steering.damage import damage as damage_of
from tracelens.steering.facts import Place, written
from tracelens.steering.labels import Labelled
from tracelens.steering.measuring import MULTIPLIERS, SteeringCurves, sweep
from tracelens.view import Line, Shown, Stack, View

if TYPE_CHECKING:
    from tracelens.model import Model
    from tracelens.steering.vector import SteeringVector

CRITERIA: dict[str, Callable[[SteeringCurve], float]] = {
    "slope": lambda curve: curve.slope,
    "interval": lambda curve: curve.interval.low,
    "relative_slope": lambda curve: _relative(curve),
}


def _relative(curve: SteeringCurve) -> float:
    if curve.relative_slope is None:
        raise OptionError(
            f"the vector does not say how large activations at {written(curve.place)} are, so slopes of its places "
            "cannot be compared at their length",
            instead='by="slope"; or a vector of tl.steering.extract, which knows',
        )
    return curve.relative_slope


SHORT = 0.05
"""A vector of less than this share of the activations is told to be short."""


@dataclass(frozen=True, eq=False, repr=False)
class Choice(Shown):
    """A vector of one place and its strength, as validation rows chose them.

    ``vector``: of that place. ``strength``: the multiplier with the largest mean propensity. ``curve``: of that place,
    on the validation rows. ``curves``: of all places that were tried, by place. ``by``: what was largest. ``damage``:
    of the chosen vector, where it was asked for.
    """

    vector: SteeringVector
    strength: float
    curve: SteeringCurve
    curves: Mapping[Place, SteeringCurve]
    by: str
    damage: Damage | None = None

    @property
    def place(self) -> Place:
        """The site and layer."""
        return self.curve.place

    @property
    def tried(self) -> int:
        """How many places were tried: what a reported interval is to be corrected for."""
        return len(self.curves)

    @property
    def doubts(self) -> tuple[str, ...]:
        """What speaks against it, in words; none if nothing does."""
        found: list[str] = []
        interval = self.curve.interval_at(1 - 0.05 / self.tried)
        if interval.low <= 0:
            places = f", corrected for {self.tried} places," if self.tried > 1 else ""
            found.append(f"The slope may be chance: its interval{places} is {interval}")
        if self.strength == 0:
            found.append("No multiplier of the grid did better than none")
        scale = self.curve.facts.scale
        if scale and self.curve.facts.norm < SHORT * scale:
            share = self.curve.facts.norm / scale
            found.append(f"|v| is {share:.1%} of the activations there: larger multipliers may do more")
        return tuple(found)

    def apply(self, t: Any, strength: Any = None, **options: Any) -> None:
        """Applies the vector in an open block, at the chosen strength unless another is given.

        The other arguments are those of :meth:`SteeringVector.apply`. Raises :class:`~tracelens.errors.OptionError`
        where the chosen strength is 0, which changes nothing.
        """
        with Blaming(here()):
            if strength is None and self.strength == 0:
                raise OptionError(
                    "the chosen strength is 0: on the validation rows no multiplier did better than none",
                    instead="best.apply(t, 1.0), if it is to be applied all the same; or larger multipliers",
                )
            self.vector.apply(t, self.strength if strength is None else strength, **options)

    def _view(self) -> View:
        words = (
            f"{written(self.place)} at {self.strength:g}, chosen by {self.by} on {len(self.curve.rows)} validation "
            f"rows out of {self.tried} place{'s' * (self.tried > 1)}. What to report is a sweep over test rows"
        )
        lines = [Line(words), *(Line(doubt) for doubt in self.doubts)]
        tables = (SteeringCurves(self.curves)._view(),) if self.tried > 1 else (self.curve._view(),)
        return Stack((*lines, *tables))


def choose(
    model: Model,
    vector: SteeringVector,
    validation: Contrast | Labelled,
    multipliers: Sequence[float] = MULTIPLIERS,
    *,
    by: str | Callable[[SteeringCurve], float] = "slope",
    damage: Sequence[Any] | None = None,
    most_kl: float | None = None,
    positions: Any = "decision",
    operator: str = "add",
    batch_size: int = 8,
    seed: int = 0,
    progress: bool | None = None,
    **settings: Any,
) -> Choice:
    """The best of a vector's places, and the strength to use there, on validation rows.

    ``by``: what is to be largest: ``"slope"``; ``"interval"``, the lower end of its 95% interval; ``"relative_slope"``,
    ``curve.relative_slope``, for a vector as long as the activations there; or a function of a curve that gives a
    number. The strength is the multiplier with the largest mean propensity: further on a grid is not always more, and
    0 says that none did better; ``best.doubts`` has what speaks against the choice. With ``damage=texts`` and
    ``most_kl=0.5``, only multipliers count at which KL from the unsteered model on these texts is at most that. The
    other arguments are those of :func:`sweep`.

    Raises :class:`~tracelens.errors.ChoosingRowsError` for rows that are not ``data.validation``.

    >>> best = tl.steering.choose(model, v, data.validation)                          # doctest: +SKIP
    >>> with model.generate("Should we", max_new_tokens=20) as t:                     # doctest: +SKIP
    ...     best.apply(t, positions="generated")
    """
    with Blaming(here()):
        _require_validation(validation)
        if isinstance(by, str) and by not in CRITERIA:
            raise OptionError(
                f"by={by!r} is nothing to choose by",
                instead=f"one of {', '.join(CRITERIA)}, or a function of a curve",
            )
        if (damage is None) != (most_kl is None):
            raise OptionError(
                "damage= and most_kl= belong together: texts, and how far what is said of them may move",
                instead="damage=texts, most_kl=0.5",
            )
        grid = sorted(float(one) for one in multipliers)
        found = sweep(
            model,
            vector,
            validation,
            grid,
            controls=False,
            positions=positions,
            operator=operator,
            batch_size=batch_size,
            seed=seed,
            progress=progress,
            **settings,
        )
        curves = dict(found) if isinstance(found, SteeringCurves) else {found.place: found}
        criterion = CRITERIA[by] if isinstance(by, str) else by
        best = max(curves.values(), key=criterion)
        own = vector.at(sites=best.place[0], layers=best.place[1])
        allowed = np.ones(len(grid), dtype=bool)
        hurt: Damage | None = None
        if damage is not None and most_kl is not None:
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
            allowed = hurt.kl <= most_kl
            if not allowed.any():
                raise OptionError(
                    f"no multiplier leaves KL on these texts at {most_kl} or below: the least is {hurt.kl.min():.3g}",
                    instead="smaller multipliers, or a larger most_kl=",
                )
        strength = grid[int(np.where(allowed, best.mean, -np.inf).argmax())]
        name = by if isinstance(by, str) else getattr(by, "__name__", "a function")
        return Choice(own, strength, best, curves, name, hurt)


def _require_validation(data: Any) -> None:
    source = data.data if isinstance(data, Labelled) else data
    if not isinstance(source, Contrast):
        raise ChoosingRowsError(
            f"a {type(data).__name__} does not say which of its rows are for validation",
            instead="data.validation",
        )
    if source.part == "validation":
        return
    why = {
        "test": "these are the rows to report, and what is chosen on them looks better than it is",
        "train": "these are the rows that vectors are made of, and what is chosen on them looks better than it is",
    }.get(source.part, "these rows were not split, so those to report are among them")
    raise ChoosingRowsError(why, instead="data.validation")
