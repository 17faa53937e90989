"""The report of the steering benchmark, as a table for the terminal and as Markdown.

    python -m benchmarks.steering_report benchmarks/results docs/benchmarks/steering.md

writes both Markdown files anew from ``steering.json``, without measuring.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.peers.steering import STEERING
from benchmarks.reporting import (
    load,
    machine,
    markdown_table,
    peers,
    ratio_text,
    title,
    versions,
    write_files,
    write_page,
)

TITLES = {
    "extract": {"tracelens": "tracelens", "tracelens plain": "tracelens, a row for each text"},
    "sweep": {"tracelens": "tracelens", "tracelens plain": "tracelens, quick=False"},
}
UNITS = {"extract": "pairs/s", "sweep": "prompts x multipliers/s"}
COLUMNS = (
    "contestant",
    "per second",
    "of hooks' time",
    "of hooks' work",
    "of tracelens' time",
    "of tracelens' work",
    "min to max s",
    "peak MB",
    "agrees within",
)

PAGE = """\
# What making and measuring steering vectors costs

Mean differences for every layer at two sites, and the propensity of prompts at seven multipliers: with tracelens, with
torch hooks written by hand, and with two libraries that people use for the same, steering-vectors and nnsight. It is
made by `python -m benchmarks.steering` (see `benchmarks/README.md`), all in one run.

* **Extraction**: pairs of answers (A) and (B) to questions in the form of the model-written evaluations, from texts to
  vectors of every layer at `post_ln` and `resid_post`, read at the label. Everybody finds the label by comparing ids.
  `tl.steering.extract` computes what the answers of a pair share once, and gathers norms, agreement and separation
  besides; the others run both texts of a pair. "A row for each text" is tracelens without that: the same texts as two
  classes that do not come in pairs, which run one after the other in batches of twice as many, with more padding.
  steering-vectors trains at one site at a time, so it goes over the data twice, and always computes all logits.
* **Sweep**: the vector of the middle layer at `resid_post`, added at the decision position, and the logit of one label
  less that of the other. `tl.steering.sweep` computes a prompt once for all multipliers; with `quick=False` every
  multiplier is a pass of its own, as it is for the others. tracelens also reads the label mass at every multiplier and
  the model without a vector, which makes 8 of 7 multipliers, and with `quick=False` 8 passes;
  controls are off.
* **What makes the difference** is that what texts share is computed once; by hand the same could be had with a cache of
  keys and values. Where nothing can be shared (another position than the decision, attention that goes by distance),
  tracelens takes what its plain ways take here: more than hooks, by the pass without a vector, by what it reads
  besides, and by padding. A sweep in one pass has more in memory at a time than passes one after the other.
* Batches are the same for all: texts of like lengths together, padding on the left (steering-vectors, when it trains,
  pads as the tokenizer does), logits of the last position only where the model can be told so. Hooks leave the
  unembedding out where they need no logits.
* **Of hooks' time**: the ratio of the median time over that of the hooks in the same rounds, and **of tracelens' time**
  likewise: more than 1 is slower. In brackets 95% of 2,000 bootstrap resamples of the rounds. Everybody takes turns, in
  an order shuffled anew, after a first call that is not timed; peers are in processes of their own. **Work** is
  processor time: where the load average shows other work on the machine, the clock's intervals are wide, and work is
  what is left to compare.
* **Peak MB**: the most bytes that tensors made in a call hold at a time, besides the model (see
  `benchmarks/live_memory.py`), in the call that is not timed.
* **Agrees within**: before anything was timed, every vector of every layer and every propensity was compared with those
  of the hooks; the largest difference over the largest number of that vector, or of all propensities. Above 1e-4, and
  1e-3 of propensities, which are small differences of large logits, a peer is reported as absent, and tracelens ends
  the run.
"""


def conditions(measurement: dict[str, Any]) -> str:
    low, high = measurement["tokens"]
    return (
        f"{measurement['train']} pairs to learn from, {measurement['test']} prompts at "
        f"{len(measurement['multipliers'])} multipliers, {low} to {high} tokens, batches of {measurement['batch']}, "
        f"{measurement['layers']} layers; {measurement['rounds']} rounds"
    )


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the report as text."""
    name = TITLES[row["case"]].get(row["contestant"]) or title(row["contestant"])
    if "absent" in row:
        return [name, f"absent: {row['absent']}", *[""] * (len(COLUMNS) - 2)]
    return [
        name,
        f"{row['per_s']:.2f}",
        "1" if row["contestant"] == "hooks" else ratio_text(row["to_hooks"]),
        "1" if row["contestant"] == "hooks" else ratio_text(row["work_to_hooks"]),
        "1" if row["contestant"] == "tracelens" else ratio_text(row["to_tracelens"]),
        "1" if row["contestant"] == "tracelens" else f"{row['work_to_tracelens']['value']:.3f}",
        f"{row['min_ms'] / 1e3:.2f} to {row['max_ms'] / 1e3:.2f}",
        f"{row['bytes'] / 1e6:.1f}",
        f"{row['error']:.0e}",
    ]


def header(report: dict[str, Any]) -> list[str]:
    """Where and with what it was measured."""
    about = report["about"]
    return [f"{machine(about)}; {load(about)}", versions(about), *peers(report)]


def words(measurement: dict[str, Any]) -> Iterator[str]:
    """What the ratios say, for each case: faster or slower by the clock and by the work, so no noise decides."""
    rows = {(row["case"], row["contestant"]): row for row in measurement["rows"]}
    for case in STEERING:
        for (of, name), row in rows.items():
            if of != case or name.startswith("tracelens") or "absent" in row:
                continue
            clock, work = row["to_tracelens"], row["work_to_tracelens"]
            if min(clock["low"], work["low"]) > 1:
                verdict = f"tracelens is {clock['value']:.1f} times as fast"
            elif max(clock["high"], work["high"]) < 1:
                verdict = f"tracelens is slower, by a factor of {1 / clock['value']:.1f}"
            else:
                verdict = "no difference beyond the spread"
            yield (
                f"{STEERING[case]}, beside {title(name)}: {verdict} ({ratio_text(clock)}, of work {ratio_text(work)})"
            )
        plain = rows.get((case, "tracelens plain"))
        if plain is not None and "absent" not in plain:
            yield (
                f"{STEERING[case]}, {TITLES[case]['tracelens plain']}: {ratio_text(plain['to_hooks'])} of the time of "
                f"hooks by hand, {ratio_text(plain['work_to_hooks'])} of their work"
            )


def table(report: dict[str, Any]) -> str:
    """The report for the terminal."""
    lines = header(report)
    for measurement in report["measurements"]:
        lines += ["", f"{measurement['model']}: {conditions(measurement)}"]
        for case in STEERING:
            rows = [list(COLUMNS), *(cells(row) for row in measurement["rows"] if row["case"] == case)]
            widths = [
                max(len(row[column]) for row in rows if column != 1 or not row[1].startswith("absent"))
                for column in range(len(COLUMNS))
            ]
            lines += ["", f"{STEERING[case]}, {UNITS[case]}"]
            lines += [
                "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                for row in rows
            ]
        lines += ["", *words(measurement)]
    return "\n".join(lines)


def markdown(report: dict[str, Any], *, page: bool = False) -> str:
    """The report as Markdown; ``page``: with the text that the documentation needs around it."""
    lines = [PAGE.rstrip() if page else "# Steering", "", *(f"* {line}" for line in header(report))]
    for measurement in report["measurements"]:
        lines += ["", f"## {measurement['model']}", "", conditions(measurement) + "."]
        for case in STEERING:
            columns = (COLUMNS[0], UNITS[case], *COLUMNS[2:])
            rows = [cells(row) for row in measurement["rows"] if row["case"] == case]
            lines += ["", f"### {STEERING[case].capitalize()}", ""]
            lines += markdown_table(columns, rows, words=1)
        lines += ["", *(f"* {line}" for line in words(measurement))]
    return "\n".join(lines) + "\n"


def write(report: dict[str, Any], folder: Path | None, page: Path | None) -> None:
    """Writes ``steering.json`` and ``steering.md`` into ``folder``, and the documentation's page."""
    if folder is not None:
        write_files("steering", report, markdown(report), folder)
    if page is not None:
        write_page(page, markdown(report, page=True))


if __name__ == "__main__":
    results = Path(sys.argv[1])
    write(json.loads((results / "steering.json").read_text(encoding="utf-8")), results, Path(sys.argv[2]))
