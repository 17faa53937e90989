"""Notebook views of blocks: the same text as ``explain()``, folded by section."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tracelens.errors import TracelensError
from tracelens.view import Code, Line, Stack, View, folded, html

if TYPE_CHECKING:
    from tracelens.tracing import Recording


def recording_html(recording: Recording) -> str:
    """A block in a notebook: what was saved, and behind folds the graph, the plan and the programs."""
    try:
        explained = recording.explain()
    except TracelensError as error:
        return html(Code(str(error)))
    parts: list[View] = [Line(explained.partition("\n\n")[0])]
    results = getattr(recording, "_results", None)
    if results is not None and len(results):
        parts.append(results._view())
    parts += folded(explained)
    return html(Stack(tuple(parts)))
