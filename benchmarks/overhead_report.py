"""The report of the overhead benchmark, as a table for the terminal and as Markdown.

    python -m benchmarks.overhead_report benchmarks/results docs/benchmarks/overhead.md

writes both Markdown files anew from ``overhead.json``, without measuring.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.peers.subject import CASES
from benchmarks.reporting import (
    load,
    machine,
    markdown_table,
    peers,
    ratio_text,
    title,
    verdict,
    versions,
    write_files,
    write_page,
)

COLUMNS = (
    "case",
    "contestant",
    "ratio to the bare forward",
    "of work",
    "median ms",
    "min to max ms",
    "first ms",
)

AIMS: tuple[tuple[str, str, str, float], ...] = (
    ("read-one", "tracelens trace", "ratio", 1.05),
    ("read-all", "tracelens trace", "ratio", 1.05),
    ("edit-all", "tracelens trace", "ratio", 1.08),
    ("read-one", "tracelens program", "to_hooks", 1.0),
    ("read-all", "tracelens program", "to_hooks", 1.0),
    ("edit-one", "tracelens program", "to_hooks", 1.0),
    ("edit-all", "tracelens program", "to_hooks", 1.0),
    # What a pattern itself takes beside a fused kernel, at this length: a product and a softmax in each layer.
    ("pattern", "tracelens trace", "ratio", 1.05),
)
"""Case, contestant, which ratio, and what it is meant to be at most."""

AIMS_OF_MODEL = {"smollm2": (("stop", "tracelens trace", "ratio", 1 / 30),)}
"""A layer's share of the forward pass, where the layers are what it costs."""

FASTER = (("sweep", "tracelens program", 3.0),)
"""Case, contestant, and how many times faster it is meant to be than the fastest of the others."""

PAGE = """\
# What a trace costs

A trace is recorded, planned and run. This page says what that costs beside the bare forward pass of transformers,
beside torch hooks written by hand, and beside the two libraries that people use for the same: nnsight and
TransformerLens. It is made by `python -m benchmarks.overhead` (see `benchmarks/README.md`), all in one run.

* **Ratio**: the median time of a case over the median time of the bare forward pass in the same process, taken in turns
  in the same rounds; in brackets the interval that holds 95% of 2,000 bootstrap resamples of the rounds.
* **Of work**: the same ratio of the processor time that the process used, which other work on the machine disturbs
  less.
* **Cached** is what the first columns show: the trace is recorded anew each time, and its plan is found again by its
  structure. **First** is a call on a newly wrapped model: record, verify, plan, compile, run. For TransformerLens the
  making of its bridge is not in it.
* A **program** is recorded and compiled once (`model.compile`) and then called with prompts.
* All cases but "read the first layer only" need the logits, so that the whole forward pass runs. Gradients are off,
  but for attribution patching. Each answer was compared with that of the hooks before anything was timed.
* Under **inside** are the tensors inside attention, and gradients; under **sweep** one intervention at 100 strengths,
  which a program runs in batches and the others once for each strength.
"""


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the report as text."""
    start = [CASES[row["case"]], title(row["contestant"])]
    if "absent" in row:
        return [*start, f"absent: {row['absent']}", "", "", "", ""]
    first = f"{row['first_ms']:.1f}" if "first_ms" in row else ""
    return [
        *start,
        "1" if row["contestant"] == "plain" else ratio_text(row["ratio"]),
        "1" if row["contestant"] == "plain" else f"{row['work_ratio']['value']:.3f}",
        f"{row['median_ms']:.2f}",
        f"{row['min_ms']:.2f} to {row['max_ms']:.2f}",
        first,
    ]


def header(report: dict[str, Any]) -> list[str]:
    """Where and with what it was measured."""
    about = report["about"]
    return [f"{machine(about)}; {load(about)}", versions(about), *peers(report)]


def model_line(model: dict[str, Any]) -> str:
    return f"{model['shape']}; a prompt of {model['tokens']} tokens; {model['rounds']} rounds"


def table(report: dict[str, Any]) -> str:
    """The report for the terminal."""
    lines = header(report)
    for model in report["models"]:
        rows = [list(COLUMNS), *(cells(row) for row in rows_of(report, model))]
        widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
        lines += ["", f"{model['name']}: {model_line(model)}"]
        previous = ""
        for row in rows:
            if row[0] != previous:
                lines.append("")
            shown = [row[0] if row[0] != previous else "", *row[1:]]
            previous = row[0]
            lines.append(
                "  ".join(cell.ljust(width) for cell, width in zip(shown, widths, strict=True)).rstrip()
            )
        lines += ["", *(f"{note}" for note in notes(report, model)), "", *aims(report, model)]
    return "\n".join(lines)


def markdown(report: dict[str, Any], *, page: bool = False) -> str:
    """The report as Markdown; ``page``: with the text that the documentation needs around it."""
    lines = [PAGE.rstrip() if page else "# Overhead", "", *(f"* {line}" for line in header(report))]
    for model in report["models"]:
        lines += ["", f"## {model['name']}", "", model_line(model) + ".", ""]
        lines += markdown_table(COLUMNS, [cells(row) for row in rows_of(report, model)], words=3)
        lines += ["", *(f"* {line}" for line in [*notes(report, model), *aims(report, model)])]
    return "\n".join(lines) + "\n"


def write(report: dict[str, Any], folder: Path | None, page: Path | None) -> None:
    """Writes ``overhead.json`` and ``overhead.md`` into ``folder``, and the documentation's page."""
    if folder is not None:
        write_files("overhead", report, markdown(report), folder)
    if page is not None:
        write_page(page, markdown(report, page=True))


def rows_of(report: dict[str, Any], model: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in report["rows"] if row["model"] == model["name"]]


def notes(report: dict[str, Any], model: dict[str, Any]) -> Iterator[str]:
    """What has to be known to read a row."""
    for row in rows_of(report, model):
        if "note" in row:
            yield f"{title(row['contestant'])}, {CASES[row['case']]}: {row['note']}"


def aims(report: dict[str, Any], model: dict[str, Any]) -> Iterator[str]:
    """What was aimed at, and whether it was met: by the clock and by the work, so that neither's noise decides."""
    rows = {(row["case"], row["contestant"]): row for row in rows_of(report, model)}
    for case, contestant, which, most in (*AIMS, *AIMS_OF_MODEL.get(model["name"], ())):
        row = rows.get((case, contestant))
        if row is None:
            continue
        clock, work = row[which], row["work_ratio" if which == "ratio" else "work_to_hooks"]
        beside = "the bare forward" if which == "ratio" else "hooks by hand"
        yield (
            f"aim, {contestant}, {CASES[case]}: at most {most:.3g} of {beside}; {ratio_text(clock)}, "
            f"of work {ratio_text(work)}: {verdict(most, clock, work)}"
        )
    for case, contestant, times in FASTER:
        if (own := rows.get((case, contestant))) is None:
            continue
        others = [
            row
            for (of, name), row in rows.items()
            if of == case and name not in ("plain", contestant) and "ratio" in row
        ]
        if others:
            best = min(others, key=lambda row: row["ratio"]["value"])
            # The least and the most that the two intervals allow.
            low = best["ratio"]["low"] / own["ratio"]["high"]
            high = best["ratio"]["high"] / own["ratio"]["low"]
            yield (
                f"aim, {contestant}, {CASES[case]}: at least {times:g} times faster than the best other, "
                f"{title(best['contestant'])}; {best['ratio']['value'] / own['ratio']['value']:.2f} "
                f"[{low:.2f}, {high:.2f}]: {verdict(1 / times, {'low': 1 / high, 'high': 1 / low})}"
            )


if __name__ == "__main__":
    results = Path(sys.argv[1])
    write(json.loads((results / "overhead.json").read_text(encoding="utf-8")), results, Path(sys.argv[2]))
