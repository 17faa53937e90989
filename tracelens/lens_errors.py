"""The mistakes that one can make with lenses; :mod:`tracelens.errors` has them beside all others."""

from __future__ import annotations

from tracelens.tracelens_error import TracelensError

__all__ = [
    "DecompositionError",
    "LensComparisonError",
    "LensError",
    "LensFileError",
    "LensFolderError",
    "LensMismatchError",
    "LensResultError",
    "LensSelectionError",
    "LensTrainingError",
    "MissingExtraError",
]

# --- lenses ------------------------------------------------------------------------------------------------------


class LensError(TracelensError):
    """A lens was put on, or asked for, something that it cannot read."""


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


class LensMismatchError(TracelensError, ValueError):
    """The tuned lens was trained for another model, or not for this site."""


class LensFolderError(TracelensError, ValueError):
    """The folder, or what the hub has under that name, is not an intact tuned lens."""


class LensTrainingError(TracelensError):
    """A tuned lens cannot be trained any further, or not for this model."""


class DecompositionError(TracelensError):
    """The contributions to a logit do not sum to what the model computes."""
