"""Each operator's formula in numpy, in float64: h [..., D], the direction v [D], k [..., 1]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]


def _u(v: Array) -> Array:
    return v / np.linalg.norm(v)


def _norm(h: Array) -> Array:
    return np.linalg.norm(h, axis=-1, keepdims=True)


def _along(h: Array, v: Array) -> Array:
    return (h @ _u(v))[..., None]


def rotated(h: Array, v: Array, k: Array, w: Array, degrees: float, *, adaptive: bool) -> Array:
    """Turned by a matrix, from the angle that is there towards the one wanted, by the share k of the shorter way."""
    first = _u(v)
    second = _u(w - (w @ first) * first)
    found = np.arctan2(h @ second, h @ first)
    missing = np.radians(degrees) - found
    missing = np.arctan2(np.sin(missing), np.cos(missing))
    turn = k[..., 0] * missing
    turned = np.empty_like(h)
    for at in np.ndindex(h.shape[:-1]):
        cos, sin = np.cos(turn[at]), np.sin(turn[at])
        plane = np.stack([first, second])
        matrix = np.array([[cos, -sin], [sin, cos]])
        turned[at] = h[at] + plane.T @ (matrix @ (plane @ h[at]) - plane @ h[at])
    return np.where(_along(h, v) > 0, turned, h) if adaptive else turned


BY_HAND: dict[str, Callable[..., Array]] = {
    "add": lambda h, v, k, w: h + k * v,
    "norm_relative": lambda h, v, k, w: h + k * _norm(h) * _u(v),
    "norm_preserving": lambda h, v, k, w: (h + k * v) / _norm(h + k * v) * _norm(h),
    "scale": lambda h, v, k, w: h + k * _along(h, v) * _u(v),
    "ablate": lambda h, v, k, w: h - _along(h, v) * _u(v),
    "ablate_then_add": lambda h, v, k, w: h - _along(h, v) * _u(v) + k * v,
    "affine": lambda h, v, k, w: h - _along(h, v) * _u(v) + (w @ _u(v)) * _u(v) + k * v,
    "clamp low": lambda h, v, k, w: h + k * (np.maximum(_along(h, v), 0.5) - _along(h, v)) * _u(v),
    "clamp high": lambda h, v, k, w: h + k * (np.minimum(_along(h, v), -0.25) - _along(h, v)) * _u(v),
    "clamp both": lambda h, v, k, w: h + k * (np.clip(_along(h, v), -0.25, 0.25) - _along(h, v)) * _u(v),
    "clamp to one": lambda h, v, k, w: h + k * (2.0 - _along(h, v)) * _u(v),
    "rotate": lambda h, v, k, w: rotated(h, v, k, w, 100.0, adaptive=False),
    "rotate adaptive": lambda h, v, k, w: rotated(h, v, k, w, -30.0, adaptive=True),
}

SETTINGS: dict[str, dict[str, Any]] = {
    "affine": {"reference": "w"},
    "clamp low": {"low": 0.5},
    "clamp high": {"high": -0.25},
    "clamp both": {"low": -0.25, "high": 0.25},
    "clamp to one": {"low": 2.0, "high": 2.0},
    "rotate": {"towards": "w", "degrees": 100.0},
    "rotate adaptive": {"towards": "w", "degrees": -30, "adaptive": True},
}
"""Where ``"w"`` stands, a second vector is given."""

ABLATING = ("ablate", "ablate_then_add", "affine")
"""They take the component away whatever the strength, so they change something at 0."""


def settings_of(name: str, w: Any) -> dict[str, Any]:
    """What ``v.apply`` is given for an operator, the second vector included."""
    given = {key: w if value == "w" else value for key, value in SETTINGS.get(name, {}).items()}
    return {"operator": name.split()[0], **given}
