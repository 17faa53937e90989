"""The figures of the lens benchmark and their report, for the terminal and as Markdown."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.generation_report import Part, speed
from benchmarks.peers.laps import Lap, Laps
from benchmarks.ratios import RESAMPLES, Ratio
from benchmarks.reporting import (
    load,
    machine,
    markdown_table,
    peers,
    ratio_text,
    verdict,
    versions,
    write_files,
    write_page,
)

TITLES = {
    "plain": "P: plain generate, no lens",
    "product": "the bare product, beside nothing",
    "reference": "B0: the reference loop",
    "last-only": "B1: the loop with one pass, last position only",
    "product-together": "the same for 16 steps together",
    "per-step": "B2: with a cache, lens in each step",
    "afterwards": "B3: with a cache, lens afterwards",
    "nnsight": "nnsight, lens in each step",
    "transformer_lens": "TransformerLens, lens in each step",
    "tracelens": "S: tracelens",
    "tracelens-metrics": "S with its default metrics",
}
COLUMNS = (
    "contestant",
    "of plain",
    "of plain's work",
    "a step, of plain's",
    "tokens/s",
    "seconds",
    "agrees within",
)
AIM = 1.3
TOLD = (64, 128, 256, 512, 1500)

PAGE = """\
# What a logit lens costs while text is generated

For every layer and every position of a text, also while it is generated: the five likeliest tokens with their true
probabilities (soft-max over the whole vocabulary). This page says what that costs beside plain `generate` and beside
other ways to have the same. It is made by `python -m benchmarks.lens` (see `benchmarks/README.md`).

* **P** is plain `generate`. **B0** is the loop that published figures are very probably relative to, made again from
  its description: no cache, for each token two passes over all of the text, in each of which norm and head are applied
  to all positions of four components of every block, and all logits kept. **B1** is B0 with one pass, and of each block
  the last position only (four components). **B2** is what one writes with hooks: a cache, and in each step the states
  of all layers through the head at once. **B3** keeps all states (`output_hidden_states=True`) and applies the head
  when the text is there. **S** is `model.logit_lens(prompt, generate=T, top_k=5, metrics=())`; with its default metrics
  it also computes rank, entropy and divergence from the final layer. nnsight and TransformerLens are written like B2.
* Greedy, no token ends a text, a prompt of 32 tokens, float32, one torch thread. All contestants of a process take
  turns step by step, in an order shuffled anew; peers take turns with plain generation in processes of their own. **Of
  plain**: the whole, from the call to the result, over plain generation of the same round: the ratio of medians, and
  in brackets 95% of 2,000 bootstrap resamples of the rounds (of one round there is no interval). **Of plain's work**:
  the same of the processor time of the thread, which other work on the machine disturbs less. **A step**: the mean
  work of all steps after the first, with what is left to do at the end, over that of plain's same steps, and in
  brackets 95% of the bootstrap resamples of stretches of 32 steps: S leaves the lenses of the prompt and of some steps
  to a later step, and B3 all to the end.
* First, all answers were compared: the text, the likeliest token of every layer and position, and the log-probabilities
  of the five (**agrees within**, in nats; at most 1e-4, or it ends the run).
* **The floor**: a lens that reads every state in its step multiplies [layers, d_model] with [d_model, vocabulary] in
  each. That product alone, timed in the same turns, is what no program can save that does so; the product for 16 steps
  together is what is left to one that waits.
* A length that has no table was not measured; only those with more than one round have intervals over rounds.
* Everything is on the CPU. Where the load average shows other work beside it, tokens per second are low for all, and
  the ratios are what is left to compare.
"""


# --- figures ---------------------------------------------------------------------------------------------------------


def row(name: str, made: Sequence[Mapping[str, Laps]], text: Any, new: int) -> dict[str, Any]:
    """The figures of one contestant over all rounds, beside those of the others in the same rounds."""
    mine = [each[name] for each in made]
    whole = [each.whole for each in mine]
    found: dict[str, Any] = {
        "contestant": name,
        "rounds": len(mine),
        "whole_s": [each.clock for each in whole],
        "work_s": [each.work for each in whole],
        "tokens_per_s": new / float(np.median([each.clock for each in whole])),
        "start_ms": [each.start.clock * 1e3 for each in mine],
        "end_ms": [each.end.clock * 1e3 for each in mine],
    }
    if "plain" in made[0]:
        found |= beside(whole, [each["plain"].whole for each in made], "")
        found |= steps_beside(mine, [each["plain"] for each in made])
    if name.startswith("tracelens"):
        for other in ("per-step", "afterwards", "last-only"):
            if other in made[0]:
                found |= beside(whole, [each[other].whole for each in made], f"to_{other}_")
    return found


def beside(whole: Sequence[Lap], base: Sequence[Lap], prefix: str) -> dict[str, Any]:
    return {
        f"{prefix}ratio": Ratio.of([each.clock for each in whole], [each.clock for each in base]).as_dict(),
        f"{prefix}work_ratio": Ratio.of(
            [each.work for each in whole], [each.work for each in base]
        ).as_dict(),
    }


STRETCH = 32
"""So many steps are taken together: some contestants leave what there is to do of several steps to one of them."""


def steps_beside(mine: Sequence[Laps], base: Sequence[Laps]) -> dict[str, Any]:
    return {
        "step_ratio": of_steps(mine, base, 0),
        "step_work_ratio": of_steps(mine, base, 1),
        "step_ms": mean_step(mine, 0) * 1e3,
        "step_work_ms": mean_step(mine, 1) * 1e3,
    }


def mean_step(made: Sequence[Laps], kind: int) -> float:
    """The mean over all steps after the first, with what is left to do in the end; ``kind``: of the clock, or work."""
    return sum(sum(stretches(each, kind)) for each in made) / sum(len(each.steps) for each in made)


def stretches(laps: Laps, kind: int) -> list[float]:
    """The time of each stretch of steps, the last one with what is left in the end."""
    steps = [lap[kind] for lap in laps.steps]
    found = [sum(steps[start : start + STRETCH]) for start in range(0, len(steps), STRETCH)] or [0.0]
    found[-1] += laps.end[kind]
    return found


def of_steps(mine: Sequence[Laps], base: Sequence[Laps], kind: int) -> dict[str, float]:
    """All steps of the one over those of the other, with 95% of its bootstrap resamples over stretches."""
    above, below = (np.array([time for each in of for time in stretches(each, kind)]) for of in (mine, base))
    drawn = np.random.default_rng(0).integers(0, len(above), (RESAMPLES, len(above)))
    low, high = np.quantile(above[drawn].sum(1) / below[drawn].sum(1), [0.025, 0.975])
    return Ratio(float(above.sum() / below.sum()), float(low), float(high)).as_dict()


def sampled_row(name: str, made: Mapping[int, Mapping[str, Laps]], new: int) -> dict[str, Any]:
    """The figures of sampled steps; the whole is estimated from them."""
    mine, base = ([each[who] for each in made.values()] for who in (name, "plain"))
    parts = [Part(length, len(each[name].steps) + 1) for length, each in made.items()]
    whole, plain = (estimated(parts, each, new) for each in (mine, base))
    return {
        "contestant": name,
        "rounds": 1,
        "whole_s": [whole],
        "tokens_per_s": new / whole,
        "ratio": Ratio.of([whole], [plain]).as_dict(),
        **steps_beside(mine, base),
    }


def estimated(sampled: Sequence[Part], laps: Sequence[Laps], new: int) -> float:
    """Seconds for the whole text: the pass over the prompt, and mean steps interpolated between the sampled lengths."""
    middles = [part.length + part.new / 2 for part in sampled]  # the first step has one token more before it
    means = [mean_step([each], 0) for each in laps]
    prompt = sampled[0].length
    return laps[0].start.clock + float(np.interp(np.arange(prompt + 1, prompt + new), middles, means).sum())


def peer_row(name: str, replies: Sequence[dict[str, Any]], largest: float, near: float) -> dict[str, Any]:
    """The figures of a peer; ``largest``: the log-probability that its errors are relative to."""
    error = max(reply["error"] for reply in replies) * largest
    if not error <= near:
        return {"contestant": name, "absent": f"its answer is another, by {error:.2g}"}
    mine, base = (
        [Laps(tuple(Lap(*lap) for lap in reply[who]), None) for reply in replies] for who in ("peer", "plain")
    )
    found = row(
        name,
        [{name: one, "plain": other} for one, other in zip(mine, base, strict=True)],
        None,
        len(mine[0].steps) + 1,
    )
    return found | {"error": error}


def reference_fit(times: Mapping[int, Sequence[float]], prompt: int) -> dict[str, Any]:
    """A token takes ``c + d t`` after ``t`` tokens, and so all of them a T^2 + b T."""
    lengths = [length for length, each in times.items() for _ in each]
    slope, constant = np.polyfit(lengths, [time for each in times.values() for time in each], 1)
    a, b = float(slope / 2), float(constant + slope * prompt - slope / 2)
    measured = {str(length): list(each) for length, each in times.items()}
    return {"work_s": measured, "a": a, "b": b, "whole_s": {str(new): a * new**2 + b * new for new in TOLD}}


def floor(text: Any) -> dict[str, float]:
    """Operations of a lens of every layer on one state each, over those of the forward pass."""
    config = text.model.config
    weights = sum(parameter.numel() for parameter in text.model.parameters())
    if not config.tie_word_embeddings:
        weights -= config.vocab_size * config.hidden_size
    lens = 2 * config.num_hidden_layers * config.hidden_size * config.vocab_size
    return {"lens": lens, "forward": 2 * weights, "ratio": lens / (2 * weights)}


# --- tables ----------------------------------------------------------------------------------------------------------


def cells(row: Mapping[str, Any], sampled: bool) -> list[str]:
    name, about = TITLES[row["contestant"]], "≈" if sampled else ""
    if "absent" in row:
        return [name, f"absent: {row['absent']}", *[""] * (len(COLUMNS) - 2)]
    alone = row["contestant"] in ("plain", "product", "product-together")

    def ratio(key: str) -> str:
        if row["contestant"] == "plain":
            return "1"
        found = row.get(key)
        if found is None:
            return ""
        return f"{about if key == 'ratio' else ''}" + (
            f"{found['value']:.2f}" if row["rounds"] < 2 and "step" not in key else ratio_text(found)
        )

    error = row.get("error")
    return [
        name,
        ratio("ratio"),
        ratio("work_ratio"),
        ratio("step_work_ratio"),
        "" if row["contestant"].startswith("product") else about + speed(row["tokens_per_s"]),
        f"{about}{float(np.median(row['whole_s'])):.1f}",
        "" if alone or error is None else f"{error:.1g}",
    ]


def heading(measurement: Mapping[str, Any]) -> str:
    name = {"smollm2": "SmolLM2-135M-Instruct", "tiny": "a random Llama of 12 layers"}
    tokens = f"{measurement['prompt']} + {measurement['new']:,} tokens"
    found = f"{name.get(measurement['model'], measurement['model'])}: {tokens}"
    return found + (", sampled" if "sample" in measurement else "")


def conditions(measurement: Mapping[str, Any]) -> str:
    about, rounds = measurement["about"], max(row.get("rounds", 0) for row in measurement["rows"])
    lines = f"{machine(about)}, {rounds} round{'s' * (rounds > 1)}; {load(about)}. {versions(about)}."
    if sample := measurement.get("sample"):
        lengths = ", ".join(f"{length:,}" for length in sample["lengths"])
        lines += (
            f" Not all steps: {sample['steps']} after each of these lengths of the text: {lengths}, where random "
            "tokens stand before them; the whole (≈) is estimated from them, and of S without "
            "what it reads of the prompt."
        )
    return lines


def found(measurement: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    return next(
        (row for row in measurement["rows"] if row["contestant"] == name and "absent" not in row), None
    )


def aims(measurement: Mapping[str, Any]) -> Iterator[str]:
    """What was aimed at, what the floor is, and who is faster."""
    mine, product = found(measurement, "tracelens"), found(measurement, "product")
    if mine is None or "ratio" not in mine:
        return
    if measurement["model"] == "smollm2":
        clock = mine["step_work_ratio"]
        told = f"of a step's work {ratio_text(clock)}: {verdict(AIM, clock)}"
        yield f"aim: S takes at most {AIM} of plain generation; {told}"
    if product is not None:
        alone = product["step_work_ratio"]["value"]
        least = 1 + alone
        yield (
            f"the floor: a lens has {measurement['floor']['ratio']:.1f} times the operations of the forward pass of "
            f"one token, and the bare product of a step alone takes {alone:.2f} of plain's "
            f"step: nothing that reads all layers in their step is below {least:.2f} of plain"
        )
    together = found(measurement, "product-together")
    if together is not None:
        least = 1 + together["step_work_ratio"]["value"]
        yield (
            "for 16 steps together a processor does more operations in a second: "
            f"the floor is then {least:.2f} of plain"
            + (f", so that {AIM} cannot be met on this model" if least > AIM else "")
        )
    for other in ("per-step", "afterwards", "last-only"):
        if f"to_{other}_work_ratio" in mine:
            ratios = [mine[f"to_{other}_{kind}"] for kind in ("ratio", "work_ratio")]
            told = [f"{each['value']:.2f}" if mine["rounds"] < 2 else ratio_text(each) for each in ratios]
            yield f"S beside {TITLES[other]}: {told[0]} of its time, {told[1]} of its work"


def of_reference(report: Mapping[str, Any]) -> Iterator[str]:
    """How long the reference loop takes, and S beside it."""
    fit = report.get("reference")
    if fit is None:
        return
    yield ""
    yield "## Beside the reference loop (B0)"
    yield ""
    measured = "; ".join(
        f"after {length} tokens {', '.join(f'{time:.1f}' for time in times)} s"
        for length, times in fit["work_s"].items()
    )
    yield (
        f"One token of B0 was timed ({measured}, of processor time). A token's time grows with the text in a straight "
        f"line, and so T tokens take a T² + b T with a = {fit['a']:.4f} s and b = {fit['b']:.2f} s. **All figures "
        "of B0 in this table are extrapolated by that curve**; S is the processor time that was measured, or what is "
        "estimated from sampled steps (≈; by the clock, beside other work, which only makes the factor smaller)."
    )
    yield ""
    rows: list[list[str]] = []
    for measurement in report["measurements"]:
        mine = found(measurement, "tracelens")
        if mine is None:
            continue
        new, sampled = measurement["new"], "sample" in measurement
        seconds = float(np.median(mine.get("work_s", mine["whole_s"])))
        loop = fit["whole_s"].get(str(new), fit["a"] * new**2 + fit["b"] * new)
        rows.append(
            [
                f"{new:,}",
                f"{loop:,.0f}",
                f"{'≈' * sampled}{seconds:.1f}",
                f"{'≈' * sampled}{loop / seconds:,.0f}",
            ]
        )
    yield from markdown_table(("T", "B0, s", "S, s", "B0 / S"), rows, words=0)
    yield ""
    yield "The factor grows with T without bound: a single one without T means nothing."
    long = next((row for row in rows if row[0] == "1,500"), None)
    if long is not None:
        factor = float(long[-1].strip("≈").replace(",", ""))
        yield ""
        yield (
            f"* aim: far more than 41 times B0 at 1,500 tokens: {long[-1]} times, "
            f"{'met' if factor > 2 * 41 else 'missed'}; both sides are estimates, B0 of four components and S of one"
        )


def of_memory(report: Mapping[str, Any]) -> Iterator[str]:
    """What tensors take, measured, and by the closed form at other lengths."""
    told = report.get("memory")
    if told is None:
        return
    mebi = 2**20
    yield ""
    yield "## Activation memory"
    yield ""
    yield (
        "The most bytes of all tensors that were made in a run and were still there, after any operation, less those "
        f"of the cache of keys and values (computed); {told['prompt']} + {told['new']} tokens, and of B0 one token. "
        "**Left**: what the result holds. The closed form: B3 keeps (layers + 1) × d_model × 4 bytes of each position, "
        f"and has {told['rows_in_hand']} rows of logits in hand; S keeps 5 × 12 bytes of each layer and position, and "
        "has its workspace in hand."
    )
    yield ""
    rows = [
        [
            TITLES.get(
                row["contestant"], row["contestant"].replace("afterwards", "B3").replace("tracelens", "S")
            ),
            f"{row['bytes'] / mebi:.1f}",
            f"{row['result_bytes'] / mebi:.2f}",
        ]
        for row in told["rows"]
    ]
    yield from markdown_table(("contestant", "at most, MiB", "left, MiB"), rows, words=1)
    yield ""
    layers, width, vocabulary = told["layers"], told["d_model"], told["vocabulary"]
    kept: list[list[str]] = []
    for new in TOLD:
        positions = told["prompt"] + new - 1
        states, ours = (layers + 1) * width * 4 * positions, layers * positions * 5 * 12
        loop = 4 * layers * positions * vocabulary * 4
        kept.append(
            [
                f"{new:,}",
                *(f"{size / mebi:,.1f}" for size in (loop, states, ours)),
                f"{states / ours:.0f}",
                f"{loop / ours:,.0f}",
            ]
        )
    yield "What is kept until the end, by the closed form, in MiB:"
    yield ""
    yield from markdown_table(("T", "B0", "B3", "S", "B3 / S", "B0 / S"), kept, words=0)
    yield ""
    sizes = {row["contestant"]: row["bytes"] for row in told["rows"]}
    least = min(size for name, size in sizes.items() if name.startswith("tracelens"))
    ratio = (layers + 1) * width / (layers * 5 * 3)
    yield (
        f"* aim: far more than 7 times less than B3: of what is kept {ratio:.0f} times less, "
        f"{'met' if ratio > 7 else 'missed'}; of all that is in hand at most, at {told['new']} tokens, S takes "
        f"{sizes['tracelens'] / sizes['afterwards']:.2f} of B3 with its default workspace and "
        f"{least / sizes['afterwards']:.2f} with the smallest above, "
        f"{'met' if least * 7 < sizes['afterwards'] else 'missed'}: logits in hand are most of it for both"
    )


def of_gpu(report: Mapping[str, Any]) -> Iterator[str]:
    gpu = report.get("gpu")
    if gpu is None:
        return
    yield ""
    yield "## On a GPU"
    yield ""
    if "absent" in gpu:
        yield f"A Llama of the shape of 8B with random weights in bfloat16: {gpu['absent']}."
        return
    rows = [
        [TITLES[name], f"{np.median(row['whole_s']):.2f}", f"{np.median(row['bytes']) / 2**20:.0f}"]
        for name, row in gpu["rows"].items()
    ]
    yield f"{gpu['device']}, {gpu['prompt']} + {gpu['new']} tokens, a Llama of the shape of 8B with random weights:"
    yield ""
    yield from markdown_table(("contestant", "seconds", "activation memory, MiB"), rows, words=1)


def markdown(report: Mapping[str, Any], *, page: bool = False) -> str:
    """The report as Markdown; ``page``: with the text that the documentation needs around it."""
    lines = [PAGE.rstrip() if page else "# Logit lens", "", *(f"* {line}" for line in peers(report))]
    for measurement in report["measurements"]:
        lines += ["", f"## {heading(measurement)}", "", conditions(measurement), ""]
        lines += markdown_table(
            COLUMNS, [cells(row, "sample" in measurement) for row in measurement["rows"]], words=1
        )
        if told := list(aims(measurement)):
            lines += ["", *(f"* {line}" for line in told)]
    lines += [*of_reference(report), *of_memory(report), *of_gpu(report)]
    return "\n".join(lines) + "\n"


table = markdown
"""For the terminal it is the same."""


def added(report: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The report with what the folder has of other lengths, and parts that were not measured now."""
    file = folder / "lens.json"
    if not file.exists():
        return report
    known = json.loads(file.read_text(encoding="utf-8"))
    newer = {(each["model"], each["new"]) for each in report["measurements"]}
    kept = [each for each in known["measurements"] if (each["model"], each["new"]) not in newer]
    measurements = sorted([*kept, *report["measurements"]], key=lambda each: (each["model"], each["new"]))
    return {**known, **report, "measurements": measurements, "peers": known["peers"] | report["peers"]}


def write(report: dict[str, Any], folder: Path | None, page: Path | None) -> None:
    """Adds to ``lens.json`` and ``lens.md`` in ``folder``; writes the documentation's page."""
    if folder is not None:
        report = added(report, folder)
        write_files("lens", report, markdown(report), folder)
    if page is not None:
        write_page(page, markdown(report, page=True))


if __name__ == "__main__":
    results, page, *others = map(Path, sys.argv[1:])
    for folder in (*others, results):
        write(json.loads((folder / "lens.json").read_text(encoding="utf-8")), results, page)
