"""The mistakes that one can make with steering vectors; :mod:`tracelens.errors` has them beside all others."""

from __future__ import annotations

from tracelens.tracelens_error import TracelensError

__all__ = [
    "ContrastError",
    "ContrastFileError",
    "LabelError",
]

# --- contrast data -----------------------------------------------------------------------------------------------


class ContrastError(TracelensError, ValueError):
    """Contrast data were given or asked for in a way that does not fit: rows, templates, splits."""


class ContrastFileError(TracelensError, ValueError):
    """The file cannot be read, or is not one of questions with a matching and a non-matching answer."""


class LabelError(TracelensError):
    """No row of the contrast data has a label, one token in which its two answers differ."""
