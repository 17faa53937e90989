"""Texts of two classes that do not come in pairs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tracelens.errors import Blaming, ContrastError
from tracelens.location import here
from tracelens.view import Line, Shown, View

Prompt = str | Sequence[Mapping[str, str]]
"""A text, or a conversation."""


class Unpaired(Shown):
    """Texts that show a behaviour and texts that do not, as many of each as there are.

    ``positive``, ``negative``: texts, or conversations (lists of messages). Raises
    :class:`~tracelens.errors.ContrastError` where there are none.

    >>> Unpaired(positive=["How do I pick a lock?"], negative=["How do I bake bread?", "What is a lock?"])
    1 text of one class and 2 of the other
    """

    def __init__(self, positive: Iterable[Prompt], negative: Iterable[Prompt]) -> None:
        with Blaming(here()):
            self.positive, self.negative = _texts(positive, "positive"), _texts(negative, "negative")

    @property
    def digest(self) -> str:
        """The sha256 of all texts."""
        return hashlib.sha256(json.dumps([self.positive, self.negative]).encode()).hexdigest()

    def _view(self) -> View:
        one, other = len(self.positive), len(self.negative)
        return Line(f"{one} text{'s' if one > 1 else ''} of one class and {other} of the other")


def _texts(given: Any, name: str) -> tuple[Any, ...]:
    texts = () if isinstance(given, str) else tuple(given)
    if not texts or not all(isinstance(text, str | list | tuple) and text for text in texts):
        raise ContrastError(
            f"{name}= is no list of texts or conversations",
            instead="Unpaired([text, text], [text, text, text])",
        )
    return texts
