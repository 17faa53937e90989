"""What the matrix has measured: kept in a file that the table of the documentation is made from.

Only ``make matrix`` writes it, so that an ordinary run of the tests changes no file.
"""

from __future__ import annotations

import json
import os
from typing import Any

from docs.parallel_table import MEASURED
from tests.parallel.cells import CELLS, Cell

WRITES = "TRACELENS_WRITE_MATRIX"


def note(cell: Cell, **found: Any) -> None:
    """Keeps what a test has found for a cell, if this run is to write the file."""
    if not os.environ.get(WRITES):
        return
    known = stored()
    found_before = {
        key: value for key, value in known.get(str(cell), {}).items() if key not in ("mark", "refused")
    }
    known[str(cell)] = {**found_before, **static(cell), **found}
    for name, other in CELLS.items():
        if other.refused is not None:
            known[name] = static(other)
    ordered = {name: known[name] for name in CELLS if name in known}
    MEASURED.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")


def static(cell: Cell) -> dict[str, str]:
    """What is known of a cell without running it."""
    about = {"model": cell.family, "shape": cell.shape}
    why = cell.refused
    return about if why is None else {**about, "mark": why.mark.value, "refused": why.says}


def stored() -> dict[str, dict[str, Any]]:
    """What was measured last, by the name of the cell."""
    return json.loads(MEASURED.read_text(encoding="utf-8")) if MEASURED.exists() else {}
