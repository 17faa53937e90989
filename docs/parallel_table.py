"""Writes the table of ``docs/parallel_matrix.md`` from what ``make matrix`` has measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MEASURED = Path(__file__).parent / "parallel_matrix.json"


def matrix() -> str:
    """Models down, ways of spreading them across; the reasons of what is refused below."""
    cells: dict[str, dict[str, Any]] = json.loads(MEASURED.read_text(encoding="utf-8"))
    shapes = list(dict.fromkeys(cell["shape"] for cell in cells.values()))
    models: dict[str, dict[str, dict[str, Any]]] = {}
    for cell in cells.values():
        models.setdefault(cell["model"], {})[cell["shape"]] = cell
    reasons: list[str] = []
    lines = [f"| model | {' | '.join(shapes)} |", "|---" * (len(shapes) + 1) + "|"]
    for model, row in models.items():
        lines.append(f"| {model} | {' | '.join(_shown(row[shape], reasons) for shape in shapes)} |")
    notes = [f"({chr(97 + number)}) {reason}." for number, reason in enumerate(reasons)]
    return "\n".join([*lines, "", *("\n".join(f"* {note}" for note in notes),)])


def _shown(cell: Mapping[str, Any], reasons: list[str]) -> str:
    if reason := cell.get("refused"):
        if reason not in reasons:
            reasons.append(reason)
        return f"{cell['mark']} ({chr(97 + reasons.index(reason))})"
    error = max(cell.get(key, 0.0) for key in ("read_error", "write_error", "edit_error"))
    written = f", {cell['written']} written" if "written" in cell else ""
    return f"{cell['read']} read{written}: {error:.0e}"
