"""Curves as JSON: every number of a sweep, what it was of, and the statistics for readers who compute nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tracelens.errors import SteeringSweepError
from tracelens.location import here
from tracelens.steering.damage import Damage

if TYPE_CHECKING:
    from tracelens.steering.curve import SteeringCurve

FORMAT = "tracelens.steering.curve"
VERSION = 1


def to_dict(curve: SteeringCurve) -> dict[str, Any]:
    """A curve in JSON's types; what is no number is null."""
    found: dict[str, Any] = {"format": FORMAT, "version": VERSION}
    for one in fields(curve):
        found[one.name] = _plain(getattr(curve, one.name))
    found["statistics"] = _plain(
        {
            "slope": curve.slope,
            "interval": curve.interval,
            "training_interval": curve.training_interval,
            "relative_slope": curve.relative_slope,
            "anti_steerable": curve.anti_steerable,
            "anti_steerable_interval": curve.anti_steerable_interval,
            "by_label": curve.by_label,
            "increasing": curve.increasing,
            "spearman": curve.spearman,
            "monotone": curve.monotone,
            "r_squared": curve.r_squared,
            "accuracy": curve.accuracy,
            "mean": curve.mean,
            "slopes": curve.slopes,
            "control_slopes": {name: curve.control_slopes(name) for name in curve.controls},
        }
    )
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, np.generic):
        return _plain(value.item())
    if hasattr(value, "__dataclass_fields__"):
        return {one.name: _plain(getattr(value, one.name)) for one in fields(value)}
    return repr(value)


def save(curve: SteeringCurve, path: Path) -> Path:
    """Writes a curve."""
    path.write_text(json.dumps(to_dict(curve), indent=1) + "\n", encoding="utf-8")
    return path


def load(path: Path) -> SteeringCurve:
    """Reads a curve."""
    from tracelens.steering.curve import SteeringCurve, SweepFacts

    text = path.read_text(encoding="utf-8")
    try:
        found = json.loads(text)
        if found["format"] != FORMAT or found["version"] > VERSION:
            raise ValueError(f"it is in the format {found['format']!r}, version {found['version']}")
        return SteeringCurve(
            place=(found["place"][0], found["place"][1]),
            multipliers=_numbers(found["multipliers"]),
            propensity=_numbers(found["propensity"]),
            unsteered=_numbers(found["unsteered"]),
            mass=_numbers(found["mass"]),
            unsteered_mass=_numbers(found["unsteered_mass"]),
            correct=np.array(found["correct"], dtype=bool),
            rows=tuple(found["rows"]),
            labels=tuple(found["labels"]),
            facts=SweepFacts(**found["facts"]),
            controls={name: _numbers(curves) for name, curves in found["controls"].items()},
            damage=None if found["damage"] is None else _damage(found["damage"]),
            redrawn=None if found.get("redrawn") is None else _numbers(found["redrawn"]),
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise SteeringSweepError(
            f"{path} is not a steering curve, or not a whole one: {type(error).__name__}: {error}",
            at=here(),
            instead=f"a file that curve.save({path.name!r}) has written",
        ) from error


def _numbers(values: Any) -> Any:
    return np.array(values, dtype=np.float64)


def _damage(found: dict[str, Any]) -> Damage:
    return Damage(**{**found, "kl": _numbers(found["kl"]), "perplexity": _numbers(found["perplexity"])})
