"""The mistakes that one can make in naming a part of a model; :mod:`tracelens.errors` has them beside all others."""

from __future__ import annotations

from tracelens.tracelens_error import TracelensError

__all__ = [
    "AbsentSiteError",
    "AmbiguousSiteError",
    "ExpertRangeError",
    "HeadRangeError",
    "LayerRangeError",
    "RefutedSitesWarning",
    "UnknownAttributeError",
    "UnknownModuleError",
    "UnknownParameterError",
    "UnknownSiteError",
]

# --- naming a part of the model ----------------------------------------------------------------------------------


class UnknownSiteError(TracelensError, AttributeError):
    """There is no site of that name."""


class AmbiguousSiteError(UnknownSiteError):
    """The name means more than one tensor, or one of another library that is no site here."""


class AbsentSiteError(TracelensError, AttributeError):
    """The site exists in the vocabulary, but this family of models does not have it."""


class RefutedSitesWarning(UserWarning):
    """Some sites of the model are not what they are called, and cannot be used."""


class LayerRangeError(TracelensError, IndexError):
    """The layer index is outside the model."""


class HeadRangeError(TracelensError, IndexError):
    """There is no such head, or heads cannot be chosen that way."""


class ExpertRangeError(TracelensError, IndexError):
    """There is no such expert, or experts cannot be chosen that way."""


class UnknownParameterError(TracelensError, KeyError):
    """The model has no parameter or buffer of that name."""

    __str__ = TracelensError.__str__  # KeyError would show the repr of the first argument


class UnknownModuleError(TracelensError, KeyError):
    """The model has no module of that path."""

    __str__ = TracelensError.__str__  # KeyError would show the repr of the first argument


class UnknownAttributeError(TracelensError, AttributeError):
    """The object has no attribute of that name, or none that can be assigned to."""
