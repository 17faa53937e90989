"""The report of what a proof at load costs, as a table for the terminal and as Markdown.

    python -m benchmarks.probe_report benchmarks/results docs/benchmarks/probe.md

writes both Markdown files anew from ``probe.json``, without measuring.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.reporting import (
    load,
    machine,
    markdown_table,
    ratio_text,
    versions,
    write_files,
    write_page,
)

COLUMNS = (
    "model",
    "layers looked at",
    "sites verified",
    "loading its file",
    "6 tokens, bare",
    "wrap, probe=False",
    "wrap, first of its kind",
    "its ratio to 6 tokens",
    "its ratio to loading",
    "wrap, known from a file",
    "wrap, known in memory",
    "its ratio to probe=False",
)

PAGE = """\
# What the proof at load costs

`tl.load` and `tl.wrap` hold a model's sites to their names: one forward pass of six tokens, and the identities between
what is read there (see [the sites](../sites.md)). It is made by `python -m benchmarks.probe` (see
`benchmarks/README.md`), everything of a model in one run and in turns, in an order shuffled anew in each round.

* Times are milliseconds: the median, with the least and the most. A **ratio** is of medians, with the interval that
  holds 95% of its bootstrap resamples over rounds.
* **loading its file**: `from_pretrained` from a folder on disk that is in the operating system's memory already.
  **6 tokens, bare**: the forward pass of as many tokens as the proof runs, without tracelens.
* **first of its kind**: no model that is built alike was wrapped on this machine before, so the proof is made and kept
  in the cache. It reads all sites of the first layer of each kind, compiles a block for that, and compares in float64.
  **known from a file**: another process has made it. **known in memory**: this one has. With `probe=False` nothing is
  asked.
* What is built alike has one proof: by the classes of its modules, the settings of its configuration that are no sizes,
  dtype, the family's table, and the versions of transformers and of the identities. So a second size of a family, or
  other weights, costs what "known" says.
* The models are those of the tests (two or a few layers, some tens of numbers wide), one for each family and more for
  those that are built in several ways, and SmolLM2-135M. On a tiny model a pass costs next to nothing, so the ratio to
  it is of what surrounds it.
"""


def conclusions(report: Mapping[str, Any]) -> list[str]:
    """What the figures say in words."""
    tiny, said = report["tiny"], list[str]()
    if tiny is not None:
        said.append(
            f"The first `tl.wrap` of a kind takes {tiny['low']:.0f} to {tiny['high']:.0f} ms over the tiny models, "
            f"{tiny['median']:.0f} in the middle of them."
        )
    for each in report["measurements"]:
        if each["model"].startswith("SmolLM2"):
            cases = each["cases"]
            said.append(
                f"On {each['model']} that is {cases['first']['median']:.0f} ms, "
                f"{each['ratios']['first/load']['value']:.2f} of the time that loading its file takes, and "
                f"{cases['memory']['median']:.1f} ms once it is known ({cases['unproven']['median']:.1f} with "
                "`probe=False`)."
            )
        if "new process" in each:
            said.append(
                f"The very first `tl.wrap` of a new process: {_time(each['new process'])} ms on {each['model']}, "
                f"over {report['processes']} processes."
            )
    return said


def _time(case: Mapping[str, float]) -> str:
    digits = 0 if case["median"] >= 100 else 1
    return f"{case['median']:.{digits}f} ({case['low']:.{digits}f} to {case['high']:.{digits}f})"


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row of the report as text."""
    cases, ratios = row["cases"], row["ratios"]
    return [
        row["model"],
        str(row["layers"]),
        str(row["verified"]),
        _time(cases["load"]),
        _time(cases["forward"]),
        _time(cases["unproven"]),
        _time(cases["first"]),
        ratio_text(ratios["first/forward"]),
        ratio_text(ratios["first/load"]),
        _time(cases["file"]),
        _time(cases["memory"]),
        ratio_text(ratios["memory/unproven"]),
    ]


def header(report: Mapping[str, Any]) -> list[str]:
    """Where and with what it was measured."""
    about = report["about"]
    counts = sorted({each["rounds"] for each in report["measurements"]})
    return [
        f"{machine(about)}; {load(about)}",
        versions(about),
        f"{' or '.join(map(str, counts))} rounds, attention as each model has it by default",
    ]


def table(report: Mapping[str, Any]) -> str:
    """The report for the terminal."""
    rows = [list(COLUMNS), *(cells(row) for row in report["measurements"])]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return "\n".join([*header(report), "", *lines, "", *conclusions(report)])


def markdown(report: Mapping[str, Any], *, page: bool = False) -> str:
    """The report as Markdown; ``page``: with the text that the documentation needs around it."""
    lines = [
        PAGE.rstrip() if page else "# The proof at load",
        "",
        *(f"* {line}" for line in header(report)),
        "",
    ]
    lines += [*(f"* {line}" for line in conclusions(report)), ""]
    lines += markdown_table(COLUMNS, [cells(row) for row in report["measurements"]], words=1)
    return "\n".join(lines) + "\n"


def write(report: dict[str, Any], folder: Path | None, page: Path | None) -> None:
    """Writes ``probe.json`` and ``probe.md`` into ``folder``, and the documentation's page."""
    if folder is not None:
        write_files("probe", report, markdown(report), folder)
    if page is not None:
        write_page(page, markdown(report, page=True))


if __name__ == "__main__":
    results = Path(sys.argv[1])
    write(json.loads((results / "probe.json").read_text(encoding="utf-8")), results, Path(sys.argv[2]))
