"""Notebook views of blocks: the same text as ``explain()``, folded by section."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from tracelens.errors import TracelensError

if TYPE_CHECKING:
    from tracelens.tracing import Recording


def recording_html(recording: Recording) -> str:
    """A block in a notebook: what was saved, and behind folds the graph, the plan and the programs."""
    try:
        sections = recording.explain().split("\n\n")
    except TracelensError as error:
        return f"<pre>{escape(str(error))}</pre>"
    results = getattr(recording, "_results", None)
    shown = results._repr_html_() if results is not None and len(results) else ""
    folds = "".join(_fold(section.splitlines()[0].rstrip(" {"), section) for section in sections[1:])
    return f"<div><p>{escape(sections[0])}</p>{shown}{folds}</div>"


def _fold(title: str, text: str) -> str:
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"
