"""The report of the benchmark of generation, as a table for the terminal and as Markdown.

    python -m benchmarks.generation_report benchmarks/results docs/benchmarks/generation.md [FOLDER ...]

writes both Markdown files anew from ``generation.json``, without measuring; with what other folders have added to it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.peers.laps import Laps
from benchmarks.peers.text import GENERATING
from benchmarks.ratios import RESAMPLES, Ratio, Spread
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
* Without a cache the plain generation beside it has no cache either. In texts of 128 tokens fewer are written without
  one. In texts of 1,500 a step without a cache takes seconds, and all would take hours: since each is a forward pass
  of its own over all that stands before, **steps were measured after sampled lengths of the text**, in turns with the
  same steps of plain generation. So were steps with a cache of that length where all would have taken too long: at the
  beginning, in the middle and at the end of the text. What stands before them are random tokens. Where steps were
  sampled, it says so above the table, with the lengths; their ratios are over the sampled steps, and figures with an ≈
  are of the whole text as it is estimated from them: the time of a step is interpolated between the lengths, in a
  straight line, and summed. What grows with the steps made before (what was read so far, for one) is not in
  sampled steps: all steps of a whole text can cost more than they say.
* Everything is on the CPU, and nothing here says what a GPU would. Where the load average shows other work beside it,
  tokens per second are low for all, and the ratios are what is left to compare. Texts of 1,500 tokens were measured
  beside each other and other work, which exhausted the machine's memory for some minutes: where "of all" is far from
  the ratio of a step, single steps stood still, which is in the sum and not in the median.
"""


def side_by_side(steps: Sequence[float], plain: Sequence[float]) -> Ratio:
    """The median over all steps of a step's time over that of the same step of plain generation, and its interval."""
    ratios = np.asarray(steps) / np.asarray(plain)
    resamples = np.random.default_rng(0).integers(0, ratios.size, (RESAMPLES, ratios.size))
    low, high = np.quantile(np.median(ratios[resamples], axis=1), [0.025, 0.975])
    return Ratio(float(np.median(ratios)), float(low), float(high))


class Part(NamedTuple):
    """One generation: how long the text before it is, and how many tokens it writes."""

    length: int
    new: int


def row(
    case: str,
    contestant: str,
    batch: int,
    new: int,
    laps: Sequence[Laps],
    base: Sequence[Laps],
    *,
    sampled: Sequence[Part] = (),
) -> dict[str, Any]:
    """The figures of one contestant, beside those of plain generation in the same turns.

    ``sampled``: of a text of which not all steps were measured, where each of ``laps`` is in it; the first begins it.
    """
    steps = [lap for each in laps for lap in each.steps]
    plain = [lap for each in base for lap in each.steps]
    clock, below = [lap.clock for lap in steps], [lap.clock for lap in plain]
    if sampled:
        whole, whole_plain = ([estimated(sampled, each, new)] for each in (laps, base))
    else:
        whole, whole_plain = ([each.whole.clock for each in of] for of in (laps, base))
    low, high = np.quantile(np.asarray(clock), [0.25, 0.75]) * 1e3
    figures = {
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
    if sampled:
        lengths = sorted({part.length for part in sampled})
        figures |= {
            "rounds": len(laps) // len(lengths),
            "sampled": {"lengths": lengths, "steps": sampled[0].new - 1, "step_ms": each_ms(laps)},
            "plain_sampled_ms": each_ms(base),
            "start_ms": laps[0].start.clock * 1e3,
            "end_ms": None,  # what was read is put together at the end of a whole text
        }
    return figures


def each_ms(laps: Sequence[Laps]) -> list[list[float]]:
    """The time of each step, generation by generation."""
    return [[round(lap.clock * 1e3, 3) for lap in each.steps] for each in laps]


def estimated(sampled: Sequence[Part], laps: Sequence[Laps], new: int) -> float:
    """Seconds for the whole text: the pass over the prompt, and steps interpolated between the sampled lengths."""
    steps: dict[float, list[float]] = {}
    for part, each in zip(sampled, laps, strict=True):
        middle = part.length + part.new / 2  # the first of its steps has one token more before it
        steps.setdefault(middle, []).extend(lap.clock for lap in each.steps)
    prompt = sampled[0].length
    lengths = np.arange(prompt + 1, prompt + new)
    times = np.interp(lengths, list(steps), [float(np.median(each)) for each in steps.values()])
    return laps[0].start.clock + float(times.sum())


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
    about = "≈" if "sampled" in row else ""
    return [
        *start,
        "1" if plain else ratio_text(row["step_ratio"]),
        "1" if plain else ratio_text(row["work_ratio"]),
        "" if plain else f"{row['more_us']:+.0f}",
        "1" if plain else f"{about}{row['whole_ratio']['value']:.3f}",
        f"{about}{speed(row['tokens_per_s'])}",
        f"{about}{speed(row['plain_tokens_per_s'])}",
        f"{row['start_ms']:.0f}",
        "" if row["end_ms"] is None else f"{row['end_ms']:.1f}",
    ]


def speed(tokens: float) -> str:
    return f"{tokens:.1f}" if tokens >= 1 else f"{tokens:.2g}"


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
    lines = f"{machine(about)}, {told}; {load(about)}. {versions(about)}."
    for lengths, steps in sorted(
        {
            (tuple(row["sampled"]["lengths"]), row["sampled"]["steps"])
            for row in measurement["rows"]
            if "sampled" in row
        }
    ):
        lines += (
            f" Sampled, not all steps: {steps} after each of these lengths of the text: "
            f"{', '.join(f'{length:,}' for length in lengths)}."
        )
    return lines


def aims(measurement: dict[str, Any]) -> Iterator[str]:
    """What was aimed at on SmolLM2, and whether it was met: by the clock and by the work."""
    if measurement["model"] != "smollm2":
        return
    for row in measurement["rows"]:
        most = AIMS.get(row["case"])
        if row["contestant"] != "tracelens" or most is None:
            continue
        clock, work = row["step_ratio"], row["work_ratio"]
        yield (
            f"aim, {GENERATING[row['case']]}: a {'sampled ' if 'sampled' in row else ''}step takes at most "
            f"{most:.3g} of plain generation's; "
            f"{ratio_text(clock)}, of work {ratio_text(work)}: {verdict(most, clock, work)}"
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
    above = ""
    for measurement in report["measurements"]:
        if heading(measurement) != above:
            above = heading(measurement)
            lines += ["", f"## {above}"]
        lines += ["", conditions(measurement), ""]
        lines += markdown_table(COLUMNS, [cells(row) for row in ordered(measurement)], words=2)
        if met := list(aims(measurement)):
            lines += ["", *(f"* {line}" for line in met)]
    return "\n".join(lines) + "\n"


def size(measurement: dict[str, Any]) -> tuple[Any, ...]:
    return (measurement["model"], measurement["new"], measurement["batch"])


def place(measurement: dict[str, Any]) -> tuple[Any, ...]:
    """Among those of its size: whole texts, then sampled ones; those without a cache at the end."""
    rows = measurement["rows"]
    return (
        *size(measurement),
        any("sampled" in row for row in rows),
        all(row["case"] == "uncached" for row in rows),
    )


def added(report: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The report with what the folder has of other models, sizes, contestants and cases."""
    file = folder / "generation.json"
    if not file.exists():
        return report
    known = json.loads(file.read_text(encoding="utf-8"))
    kept: list[dict[str, Any]] = []
    for measurement in known["measurements"]:
        newer = {
            (row["case"], row["contestant"])
            for other in report["measurements"]
            if size(other) == size(measurement)
            for row in other["rows"]
        }
        rows = [row for row in measurement["rows"] if (row["case"], row["contestant"]) not in newer]
        here = {row["case"] for row in rows if row["contestant"] in ("hooks", "tracelens")}
        # Plain generation alone says nothing: its row goes with the last that was measured beside it.
        rows = [row for row in rows if row["contestant"] != "plain" or here & set(row["case"].split())]
        if rows:
            kept.append(measurement | {"rows": rows})
    found = {name: peer for name, peer in report["peers"].items() if "absent" not in peer}
    return {
        "measurements": sorted([*kept, *report["measurements"]], key=place),
        "peers": report["peers"] | known["peers"] | found,
    }


def write(report: dict[str, Any], folder: Path | None, page: Path | None) -> None:
    """Adds to ``generation.json`` and ``generation.md`` in ``folder``; writes the documentation's page."""
    if folder is not None:
        report = added(report, folder)
        write_files("generation", report, markdown(report), folder)
    if page is not None:
        write_page(page, markdown(report, page=True))


if __name__ == "__main__":
    results, page, *others = map(Path, sys.argv[1:])
    for folder in (results, *others):
        write(json.loads((folder / "generation.json").read_text(encoding="utf-8")), results, page)
