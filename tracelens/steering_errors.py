"""The mistakes that one can make with steering vectors; :mod:`tracelens.errors` has them beside all others."""

from __future__ import annotations

from tracelens.tracelens_error import TracelensError

__all__ = [
    "ChoosingRowsError",
    "ContrastError",
    "ContrastFileError",
    "ExtractionError",
    "LabelError",
    "LeftOutWarning",
    "RowOverlapWarning",
    "SteeringFileError",
    "SteeringMismatchError",
    "SteeringSelectionError",
    "SteeringSweepError",
    "SteeringVectorError",
    "ZeroVectorError",
    "ZeroVectorWarning",
]

# --- contrast data -----------------------------------------------------------------------------------------------


class ContrastError(TracelensError, ValueError):
    """Contrast data were given or asked for in a way that does not fit: rows, templates, splits."""


class ContrastFileError(TracelensError, ValueError):
    """The file cannot be read, or is not one of questions with a matching and a non-matching answer."""


class LabelError(TracelensError):
    """No row of the contrast data has a label, one token in which its two answers differ."""


# --- making steering vectors -------------------------------------------------------------------------------------


class ExtractionError(TracelensError, ValueError):
    """A steering vector was to be made in a way, or at a place, or of data, from which it cannot be made."""


class ZeroVectorError(TracelensError):
    """The two answers do not differ where their activations were read, so every vector is nothing but rounding."""


class LeftOutWarning(UserWarning):
    """Some rows of the contrast data have no label, so a steering vector is made of the others."""


class RowOverlapWarning(UserWarning):
    """A steering vector is measured on rows that it was made of, and looks better there than it is."""


class ZeroVectorWarning(UserWarning):
    """At some places the two answers hardly differ, so the vectors there are nothing to steer with."""


# --- steering vectors --------------------------------------------------------------------------------------------


class SteeringVectorError(TracelensError, ValueError):
    """These directions make no steering vector, or none that can be used in that way."""


class SteeringSelectionError(TracelensError, KeyError):
    """The steering vector has no direction at that site and layer, or several where one was meant."""

    __str__ = TracelensError.__str__  # KeyError would show the repr of the first argument


class SteeringMismatchError(TracelensError, ValueError):
    """The steering vector was made for another model, or two vectors are not of one model and of the same places."""


class SteeringFileError(TracelensError, ValueError):
    """The file is no steering vector, or not a whole one, or it holds more than could be read without running it."""


# --- measuring steering vectors ----------------------------------------------------------------------------------


class SteeringSweepError(TracelensError, ValueError):
    """A sweep of a steering vector was asked for something that it cannot measure, or does not hold."""


class ChoosingRowsError(TracelensError, ValueError):
    """A place and a strength were to be chosen on other rows than those for validation."""
