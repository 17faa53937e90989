"""The mistakes that one can make with what a lens has read; :mod:`tracelens.errors` has them beside all others."""

from __future__ import annotations

from tracelens.tracelens_error import TracelensError

__all__ = [
    "LensComparisonError",
    "LensFileError",
    "LensResultError",
    "LensSelectionError",
    "MissingExtraError",
]

# --- lenses ------------------------------------------------------------------------------------------------------


class LensResultError(TracelensError, ValueError):
    """The parts of a lens result do not fit together."""


class LensSelectionError(TracelensError, KeyError):
    """A lens result does not hold what was asked of it: a component, layer, position, statistic or token."""

    __str__ = TracelensError.__str__  # KeyError would show the repr of the first argument


class LensComparisonError(TracelensError, ValueError):
    """Two lens results that were to be compared are not of the same tokens, layers and components."""


class LensFileError(TracelensError, ValueError):
    """The file is not one that a lens result was saved to, or its ending names no format that one can be saved in."""


class MissingExtraError(TracelensError, ImportError):
    """A package is needed that tracelens does not bring by itself, and it is not installed."""
