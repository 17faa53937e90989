"""An error of a rank on its way to the owner: described there as data, made into an error again here."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from typing import Any

from tracelens import errors
from tracelens.errors import RankFailedError, TracelensError
from tracelens.location import Location


def described(error: BaseException) -> dict[str, Any]:
    """An error as data: its class, its text, its traceback, and the parts of one of tracelens' own."""
    about: dict[str, Any] = {
        "class": type(error).__name__,
        "text": str(error),
        "traceback": "".join(traceback.format_exception(error)),
    }
    if isinstance(error, TracelensError):
        about["fields"] = {
            "problem": error.problem,
            "at": None if error.at is None else _line(error.at),
            "also": [[role, _line(location)] for role, location in error.also],
            "excerpt": error.excerpt,
            "instead": error.instead,
        }
    return about


def rebuilt(about: Mapping[str, Any]) -> TracelensError | None:
    """The error of tracelens' that was described, or ``None`` if it was another one."""
    fields = about.get("fields")
    kind = getattr(errors, about["class"], None)
    if fields is None or not (isinstance(kind, type) and issubclass(kind, TracelensError)):
        return None
    return kind(
        fields["problem"],
        at=None if fields["at"] is None else Location(*fields["at"]),
        also=tuple((role, Location(*line)) for role, line in fields["also"]),
        excerpt=fields["excerpt"],
        instead=fields["instead"],
    )


def failure(rank: int, world: int, doing: str, about: Mapping[str, Any], *notes: str) -> RankFailedError:
    """The owner's error for what a rank described."""
    text = f"rank {rank} of {world} failed at {doing}: {about['class']}: {about['text']}"
    shown = "\n".join("    " + line for line in str(about["traceback"]).rstrip().splitlines())
    error = RankFailedError("\n".join([text, *(f"  {note}" for note in notes), "  there:", shown]))
    error.rank = rank
    error.kind = about["class"]
    error.remote_traceback = about["traceback"]
    error.original = rebuilt(about)
    return error


def _line(location: Location) -> list[Any]:
    return [location.filename, location.line, location.function]
