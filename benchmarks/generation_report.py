"""The report of the benchmark of generation, as a table for the terminal and as Markdown.

    python -m benchmarks.generation_report benchmarks/results docs/benchmarks/generation.md

writes both Markdown files anew from ``generation.json``, without measuring.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.overhead_report import ratio_text, title
from benchmarks.peers.laps import Laps
from benchmarks.peers.text import GENERATING
from benchmarks.ratios import RESAMPLES, Ratio, Spread

COLUMNS = (
    "case",
    "contestant",
    "of a step",
    "of a step's work",
    "µs more a step",
    "of all",
    "tokens/s",
    "plain tokens/s",
    "start ms",
    "end ms",
)
AIMS = {"read-all": 1.05, "steer-all": 1.05, "both": 1.05}
"""Of plain generation, on SmolLM2 on the CPU."""

PAGE = """\
# What reads and steering cost while text is generated

Text is generated with transformers' own loop, and the residual stream after layers is read or changed in every step.
This page says what that costs beside plain `generate` of transformers, beside torch hooks written by hand, and beside
nnsight and TransformerLens. It is made by `python -m benchmarks.generation` (see `benchmarks/README.md`).

* All contestants of a process, plain generation among them, **take turns step by step**, in an order shuffled anew: a
  generation takes seconds, in which other work comes and goes, and so the same step of all of them lies within a
  moment. Each has a model of its own whose weights are the same memory. Peers take turns with plain generation in
  their own processes.
* **Of a step**: the time of a step over that of the same step of plain generation, after the first token: the median
  over all steps, and in brackets the interval of 95% of 2,000 bootstrap resamples of the steps. **Of a step's work**:
  the same of the processor time of the thread, which other work on the machine disturbs less. **µs more a step**: the
  median of the differences.
* **Of all**: the whole generation over plain generation, from the call to the results: recording, planning and the
  pass over the prompt (**start**), the steps, and what is left when the last token is there (**end**), like putting
  what was read together. Other work that comes for a moment is in it, and in **tokens/s**, which are of all rows of
  the batch.
* Greedy, and no token ends a text, so that all write the same number of tokens. What is read is one tensor
  [layers, B, P + N - 1, D] for everybody, of the stream before anything is added to it.
* Each answer was compared with that of the hooks: the same tokens, and tensors within 1e-4 of the largest number. A
  peer with another answer is reported as absent from that case. Steering has to change the text, and reads must not.
* Without a cache fewer tokens are written, and the plain generation beside it has no cache either. Texts of 1,500
  tokens, which take minutes each, have fewer contestants.
* Everything is on the CPU, and nothing here says what a GPU would. Where the load average shows other work beside it,
  tokens per second are low for all, and the ratios are what is left to compare.
"""


def side_by_side(steps: Sequence[float], plain: Sequence[float]) -> Ratio:
    """The median over all steps of a step's time over that of the same step of plain generation, and its interval."""
    ratios = np.asarray(steps) / np.asarray(plain)
    resamples = np.random.default_rng(0).integers(0, ratios.size, (RESAMPLES, ratios.size))
    low, high = np.quantile(np.median(ratios[resamples], axis=1), [0.025, 0.975])
    return Ratio(float(np.median(ratios)), float(low), float(high))


def row(
    case: str, contestant: str, batch: int, new: int, laps: Sequence[Laps], base: Sequence[Laps]
) -> dict[str, Any]:
    """The figures of one contestant, beside those of plain generation in the same turns."""
    steps = [lap for each in laps for lap in each.steps]
    plain = [lap for each in base for lap in each.steps]
    clock, below = [lap.clock for lap in steps], [lap.clock for lap in plain]
    whole, whole_plain = [each.whole.clock for each in laps], [each.whole.clock for each in base]
    low, high = np.quantile(np.asarray(clock), [0.25, 0.75]) * 1e3
    return {
        "case": case,
        "contestant": contestant,
        "rounds": len(laps),
        "new": new,
        "step_ratio": side_by_side(clock, below).as_dict(),
        "work_ratio": side_by_side([lap.work for lap in steps], [lap.work for lap in plain]).as_dict(),
        "step_ms": Spread.of(clock).median,
        "step_quartiles_ms": [float(low), float(high)],
        "plain_step_ms": Spread.of(below).median,
        "more_us": float(np.median(np.asarray(clock) - np.asarray(below))) * 1e6,
        "whole_ratio": Ratio.of(whole, whole_plain).as_dict(),
        "whole_s": whole,
        "tokens_per_s": batch * new / float(np.median(whole)),
        "plain_tokens_per_s": batch * new / float(np.median(whole_plain)),
        "start_ms": Spread.of([each.start.clock for each in laps]).median,
        "end_ms": Spread.of([each.end.clock for each in laps]).median,
    }


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the report as text."""
    plain = row["contestant"] == "plain"
    case = "no cache" if row["case"] == "uncached" else ""
    start = [
        case if plain else GENERATING[row["case"]],
        "plain generate" if plain else title(row["contestant"]),
    ]
    if "absent" in row:
        return [*start, f"absent: {row['absent']}", *[""] * (len(COLUMNS) - 3)]
    return [
        *start,
        "1" if plain else ratio_text(row["step_ratio"]),
        "1" if plain else ratio_text(row["work_ratio"]),
        "" if plain else f"{row['more_us']:+.0f}",
        "1" if plain else f"{row['whole_ratio']['value']:.3f}",
        f"{row['tokens_per_s']:.1f}",
        f"{row['plain_tokens_per_s']:.1f}",
        f"{row['start_ms']:.0f}",
        f"{row['end_ms']:.1f}",
    ]


def ordered(measurement: dict[str, Any]) -> list[dict[str, Any]]:
    """Case by case; each plain generation before what was measured beside it in the same process."""
    order = ["plain", *GENERATING]
    return sorted(
        measurement["rows"],
        key=lambda row: (
            row["case"] == "uncached",
            row["contestant"] != "plain",
            order.index("plain" if row["contestant"] == "plain" else row["case"]),
        ),
    )


def heading(measurement: dict[str, Any]) -> str:
    name = {"smollm2": "SmolLM2-135M-Instruct", "tiny": "tiny, a random Llama of 12 layers, d_model 192"}
    return (
        f"{name.get(measurement['model'], measurement['model'])}: batch {measurement['batch']}, "
        f"{measurement['prompt']} + {measurement['new']:,} tokens"
    )


def conditions(measurement: dict[str, Any]) -> str:
    about = measurement["about"]
    rounds = sorted(
        {
            (row["contestant"] not in ("plain", "hooks", "tracelens"), row["rounds"])
            for row in measurement["rows"]
            if "rounds" in row
        }
    )
    told = ", ".join(
        f"{count} round{'s' * (count > 1)} {'of peers' if peer else 'here'}" for peer, count in rounds
    )
    return (
        f"{about['date']}, {about['processor']}, {about['cores']} cores, {about['threads']} torch thread(s), {told}; "
        f"load average {about['load_before']} before, {about['load_after']} after. Python {about['python']}, "
        f"torch {about['torch']}, transformers {about['transformers']}, tracelens {about['tracelens']}."
    )


def peers(report: dict[str, Any]) -> Iterator[str]:
    for name, peer in report["peers"].items():
        yield (
            f"{title(name)}: absent ({peer['absent']})"
            if "absent" in peer
            else f"{title(name)} {peer['version']} on Python {peer['python']}, torch {peer['torch']}, "
            f"transformers {peer['transformers']}"
        )


def aims(measurement: dict[str, Any]) -> Iterator[str]:
    """What was aimed at on SmolLM2, and whether it was met: by the clock and by the work."""
    if measurement["model"] != "smollm2":
        return
    for row in measurement["rows"]:
        most = AIMS.get(row["case"])
        if row["contestant"] != "tracelens" or most is None:
            continue
        clock, work = row["step_ratio"], row["work_ratio"]
        if max(clock["high"], work["high"]) <= most:
            verdict = "met"
        elif max(clock["low"], work["low"]) > most:
            verdict = "missed"
        else:
            verdict = "within the spread"
        yield (
            f"aim, {GENERATING[row['case']]}: a step takes at most {most:.3g} of plain generation's; "
            f"{ratio_text(clock)}, of work {ratio_text(work)}: {verdict}"
        )


def table(report: dict[str, Any]) -> str:
    """The report for the terminal."""
    lines = list(peers(report))
    for measurement in report["measurements"]:
        rows = [list(COLUMNS), *(cells(row) for row in ordered(measurement))]
        widths = [
            max(len(row[column]) for row in rows if not row[2].startswith("absent") or column < 2)
            for column in range(len(COLUMNS))
        ]
        lines += ["", heading(measurement), conditions(measurement), ""]
        lines += [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        lines += ["", *aims(measurement)]
    return "\n".join(lines)


def markdown(report: dict[str, Any], *, page: bool = False) -> str:
    """The report as Markdown; ``page``: with the text that the documentation needs around it."""
    lines = [PAGE.rstrip() if page else "# Generation", "", *(f"* {line}" for line in peers(report))]
    for measurement in report["measurements"]:
        lines += ["", f"## {heading(measurement)}", "", conditions(measurement), ""]
        lines += ["| " + " | ".join(COLUMNS) + " |", "| --- | --- |" + " ---: |" * (len(COLUMNS) - 2)]
        lines += ["| " + " | ".join(cells(row)) + " |" for row in ordered(measurement)]
        if met := list(aims(measurement)):
            lines += ["", *(f"* {line}" for line in met)]
    return "\n".join(lines) + "\n"


def added(report: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The report with the measurements that the folder has of other models and sizes."""
    file = folder / "generation.json"
    if not file.exists():
        return report
    known = json.loads(file.read_text(encoding="utf-8"))

    def size(measurement: dict[str, Any]) -> tuple[Any, ...]:
        return (
            measurement["model"],
            measurement["new"],
            measurement["batch"],
        )

    both = {size(each): each for each in [*known["measurements"], *report["measurements"]]}
    return {"measurements": [both[key] for key in sorted(both)], "peers": known["peers"] | report["peers"]}


def write(report: dict[str, Any], folder: Path | None, page: Path | None) -> None:
    """Adds to ``generation.json`` and ``generation.md`` in ``folder``; writes the documentation's page."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        report = added(report, folder)
        (folder / "generation.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (folder / "generation.md").write_text(markdown(report), encoding="utf-8")
    if page is not None:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(markdown(report, page=True), encoding="utf-8")


if __name__ == "__main__":
    results = Path(sys.argv[1])
    write(json.loads((results / "generation.json").read_text(encoding="utf-8")), results, Path(sys.argv[2]))
