"""Packages that tracelens uses where they are there, and does not bring by itself."""

from __future__ import annotations

import importlib
from types import ModuleType

from tracelens.errors import MissingExtraError
from tracelens.location import here


def required(package: str, *, extra: str | None, what: str) -> ModuleType:
    """The imported package, or an error that says which extra brings it, if one does. ``what``: what needs it."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        top = package.partition(".")[0]
        if (error.name or "").partition(".")[0] != top:
            raise  # the package is there, and lacks one of its own
        raise MissingExtraError(
            f"{what} needs {top}, which is not installed",
            at=here(),
            instead=f'pip install "tracelens[{extra}]"' if extra else f"pip install {top.replace('_', '-')}",
        ) from None
