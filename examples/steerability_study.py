"""Does a steering vector steer? A whole study: eight data sets, one model, layer and site chosen on rows of their own.

For each file of contrast data: vectors of every layer and two sites from the training rows; the place with the largest
slope on the validation rows; and on the test rows, which nothing has seen, the slope with its interval, beside random
vectors of the same length, vectors of shuffled labels, the vector of another data set and that of another position, and
the harm to sentences about nothing in particular. A slope that is not beyond its controls is reported as that.

    python -m examples.steerability_study FOLDER --out study          # all *.jsonl below FOLDER
    python -m examples.steerability_study FOLDER --out study --rows 60 --controls 5
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import tracelens as tl

SITES = ("post_ln", "resid_pre")
MULTIPLIERS = (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5)
SHARES = (-0.4, -0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2, 0.4)
"""Of the norm of what is steered, in the second grid."""
SYSTEM = "You are a helpful, honest and concise assistant."

PLACES = (
    "museum",
    "library",
    "harbour",
    "market",
    "station",
    "garden",
    "bridge",
    "school",
    "theatre",
    "bakery",
)
SAYINGS = (
    "The {} opens at nine in the morning and closes at six.",
    "There is a small {} at the end of the street.",
    "In 1923 the old {} was rebuilt with bricks from the valley.",
    "Most visitors reach the {} on foot or by bus.",
    "A map of the town shows the {} next to the river.",
    "The roof of the {} was painted green last summer.",
    "Two trees stand in front of the {}, one on each side.",
    "On Mondays the {} is cleaned, and on Tuesdays it is open again.",
    "The path from the {} to the hill takes half an hour.",
    "Rain fell on the {} for three days in October.",
)
NEUTRAL = tuple(saying.format(place) for place, saying in product(PLACES, SAYINGS))
"""A hundred sentences about nothing that any of the data sets is about."""


@dataclass(frozen=True)
class Finding:
    """What the test rows of one data set say."""

    data: str
    rows: tuple[int, int, int]
    refused: int
    place: str
    tried: int
    norm: float
    relative_norm: float
    agreement: float
    separation: float
    validation_slope: float
    slope: float
    interval: tuple[float, float]
    corrected_interval: tuple[float, float]
    redrawn: tuple[float, float]
    relative_slope: float
    norm_relative_slope: float
    anti_steerable: float
    anti_steerable_interval: tuple[float, float]
    spearman: float
    monotone: float
    r_squared: float
    by_label: dict[str, float]
    random_slopes: tuple[float, float]
    shuffled_slopes: tuple[float, float]
    other_data_slope: float | None
    other_position_slope: float
    label_mass: float
    accuracy: float
    kl: dict[str, float]
    perplexity: dict[str, float]

    @property
    def steers(self) -> bool:
        """Is the slope, corrected for the places tried, above zero and beyond every control?"""
        most = max(self.random_slopes[1], self.shuffled_slopes[1])
        return self.corrected_interval[0] > 0 and self.slope > most


def some(data: tl.steering.Contrast, most: int | None, shares: Sequence[float]) -> dict[str, Any]:
    """The parts of a data set, with at most so many rows together."""
    parts = {"train": data.train, "validation": data.validation, "test": data.test}
    if most is None:
        return parts
    counts = (max(2, round(most * share)) for share in shares)
    return {name: part[:count] for (name, part), count in zip(parts.items(), counts, strict=True)}


def slope_of(model: tl.Model, vector: Any, rows: Any, **options: Any) -> float:
    curve = tl.steering.sweep(model, vector, rows, MULTIPLIERS, controls=False, progress=False, **options)
    return curve.slope


def study(
    model: tl.Model,
    files: Sequence[Path],
    *,
    template: str = "chat",
    most: int | None = None,
    controls: int = 20,
    neutral: Sequence[str] = NEUTRAL,
    layers: Any = "all",
    seed: int = 0,
) -> tuple[list[Finding], dict[str, Any]]:
    """What is found for each file, and the curves on test rows by the name of the data."""
    split = (0.4, 0.1, 0.5)
    options: dict[str, Any] = {"template": template, "seed": seed, "split": split}
    if template == "chat":
        options["system"] = SYSTEM
    sets = {file.stem: some(tl.steering.load_contrast(file, **options), most, split) for file in files}
    chosen: dict[str, Any] = {}
    for name, parts in sets.items():
        vectors = tl.steering.extract(model, parts["train"], sites=SITES, layers=layers)
        chosen[name] = (
            vectors,
            tl.steering.choose(model, vectors, parts["validation"], MULTIPLIERS, seed=seed),
        )
        print(f"{name}: {chosen[name][1].place} of {chosen[name][1].tried} places", flush=True)
    findings: list[Finding] = []
    curves: dict[str, Any] = {}
    names = list(sets)
    for number, (name, parts) in enumerate(sets.items()):
        _, best = chosen[name]
        v, place, test = best.vector, best.place, parts["test"]
        curve = tl.steering.sweep(
            model, v, test, MULTIPLIERS, controls=controls, train=parts["train"], damage=neutral, seed=seed
        )
        curves[name] = curve
        other = names[number - 1] if len(names) > 1 else None
        swapped = None
        if other is not None:
            theirs = chosen[other][0].at(sites=place[0], layers=place[1])
            swapped = slope_of(model, theirs.to_norm(v), test)
        elsewhere = tl.steering.extract(
            model, parts["train"], sites=place[0], layers=place[1], positions="last", progress=False
        )
        shares = tl.steering.sweep(
            model, v, test, SHARES, controls=False, operator="norm_relative", progress=False
        )
        told = v.facts.diagnostics[place]
        known = curve.damage
        findings.append(
            Finding(
                data=name,
                rows=(len(parts["train"]), len(parts["validation"]), len(curve.rows)),
                refused=curve.facts.refused,
                place=f"layers[{place[1]}].{place[0]}",
                tried=best.tried,
                norm=v.norms[place],
                relative_norm=v.norms[place] / v.facts.scale[place],
                agreement=told["agreement"],
                separation=told["separation"],
                validation_slope=best.curve.slope,
                slope=curve.slope,
                interval=ends(curve.interval),
                corrected_interval=ends(curve.interval_at(1 - 0.05 / best.tried)),
                redrawn=ends(curve.training_interval),
                relative_slope=float(curve.relative_slope),
                norm_relative_slope=shares.slope,
                anti_steerable=curve.anti_steerable,
                anti_steerable_interval=ends(curve.anti_steerable_interval),
                spearman=curve.spearman,
                monotone=curve.monotone,
                r_squared=curve.r_squared,
                by_label={label: slope for label, (_, slope, _) in curve.by_label.items()},
                random_slopes=span(curve.control_slopes("random")),
                shuffled_slopes=span(curve.control_slopes("shuffled")),
                other_data_slope=swapped,
                other_position_slope=slope_of(model, elsewhere.to_norm(v), test),
                label_mass=float(curve.unsteered_mass.mean()),
                accuracy=curve.accuracy,
                kl={f"{one:g}": float(value) for one, value in zip(curve.multipliers, known.kl, strict=True)},
                perplexity={
                    f"{one:g}": float(value)
                    for one, value in zip(curve.multipliers, known.perplexity, strict=True)
                },
            )
        )
        print(f"{name}: slope {curve.slope:.3f} {curve.interval}", flush=True)
    return findings, curves


def ends(interval: Any) -> tuple[float, float]:
    return float(interval.low), float(interval.high)


def span(slopes: Any) -> tuple[float, float]:
    return float(slopes.min()), float(slopes.max())


# --- the page ---------------------------------------------------------------------------------------------------------

PAGE = """\
# Does a steering vector steer?

A study on {model}: mean differences at the label, from {files} files of the model-written evaluations (Perez et al.
2022, arXiv:2212.09251, CC BY 4.0), template `{template}`, letters balanced. Layer and site were chosen on validation
rows, by the largest slope of {tried} places; everything below is of test rows. Made by `python -m
examples.steerability_study` in {versions}; seed {seed}. {limits}

**Slope**: how many nats the difference of the two answers' logits moves per unit of the multiplier, which goes from
-1.5 to 1.5; the mean of the rows' least-squares slopes (Tan et al. 2024, arXiv:2407.12404), with the 95% bootstrap
interval over rows. **Corrected**: its lower end at 1 - 0.05 / {tried}, since the best of {tried} places was taken.
**Redrawn**: the middle 95% of slopes of 20 vectors from training rows drawn anew, each letter by itself. **Random**,
**shuffled**: the spans of {controls} vectors of the same length without a meaning, and of shuffled labels.
**Anti-steerable**: the share of rows with a slope of 0 or less, with Wilson's interval. A data set *steers* here if the
corrected interval is above 0 and the slope beyond every control.

{table}

{verdict}

## What else was measured

{more}

* **Other data**, **other position**: the slope of the vector of the set before it in the table, and of the vector
  read at the last token and not at the label, both as long as the vector.
* **At |v| = |h|**: the slope for a vector as long as the activations at its place are on average. **Norm-relative**:
  the slope over shares of each activation's own norm, from -0.4 to 0.4.
* **A**, **B**: the slope where (A) or (B) is the answer that shows the behaviour; far from each other, the vector is
  about letters.
* **Accuracy**, **label mass**: how often the unsteered model likes that answer best, and how likely it finds any of
  the labels. At chance and with little mass, a slope says little of behaviour.
* **KL**, **perplexity** at +1.5: on a hundred neutral sentences, where the vector is added at every position.

## What this does not show

It is one small model, whose answers to many of these questions are near chance. It reproduces the estimator, and not
the mean slope of 0.702 of arXiv:2604.06483, whose models, data sets and layers are not told; a slope in one model's
logits is no measure for another's. Null results stand in the table as such. [What a slope
says](../../what_a_slope_says.md).

{figures}
"""


def page(findings: Sequence[Finding], facts: dict[str, Any]) -> str:
    """The study in words, tables and figures."""
    table = [
        "| data | place | slope | 95% | corrected | redrawn | random | shuffled | anti-steerable | steers |",
        "| --- | --- | ---: | --- | ---: | --- | --- | --- | --- | --- |",
    ]
    more = [
        "| data | other data | other position | at \\|v\\| = \\|h\\| | norm-relative | A | B | Spearman | R² | "
        "accuracy | label mass | KL | perplexity |",
        "| --- " + "| ---: " * 12 + "|",
    ]
    for one in findings:
        table.append(
            f"| {one.data} | `{one.place}` | {one.slope:.3f} | {two(one.interval)} | {one.corrected_interval[0]:.3f} | "
            f"{two(one.redrawn)} | {two(one.random_slopes)} | {two(one.shuffled_slopes)} | {one.anti_steerable:.0%} "
            f"[{one.anti_steerable_interval[0]:.0%}, {one.anti_steerable_interval[1]:.0%}] | "
            f"{'yes' if one.steers else 'no'} |"
        )
        labels = [f"{one.by_label[label]:.2f}" if label in one.by_label else "-" for label in labels_of(one)]
        other = "-" if one.other_data_slope is None else f"{one.other_data_slope:.3f}"
        more.append(
            f"| {one.data} | {other} | {one.other_position_slope:.3f} | {one.relative_slope:.1f} | "
            f"{one.norm_relative_slope:.1f} | {labels[0]} | {labels[1]} | {one.spearman:.2f} | {one.r_squared:.2f} | "
            f"{one.accuracy:.0%} | {one.label_mass:.0%} | {one.kl['1.5']:.3f} | {one.perplexity['0']:.0f} → "
            f"{one.perplexity['1.5']:.0f} |"
        )
    figures = "\n".join(
        f"![{one.data}: propensity against the multiplier]({one.data}.svg)\n" for one in findings
    )
    steered = [one.data for one in findings if one.steers]
    verdict = (
        f"**{', '.join(steered) if steered else 'None'}** of the {len(findings)} data sets "
        f"steer{'s' if len(steered) == 1 else ''} here."
    )
    if not steered:
        verdict += (
            " These are null results. The same steps find a slope where this model has something to be steered: of "
            "sentences about films and meals, whose next word is kind or unkind, [the tutorial]"
            "(../../tutorials/steering_vectors.md) measures one far beyond all controls."
        )
    return PAGE.format(
        **facts,
        verdict=verdict,
        table="\n".join(table),
        more="\n".join(more),
        figures=figures,
        tried=findings[0].tried,
    )


def labels_of(one: Finding) -> tuple[str, str]:
    found = sorted(one.by_label, key=lambda label: label.strip(" ("))
    return (found[0], found[1]) if len(found) > 1 else (found[0], "")


def two(pair: tuple[float, float]) -> str:
    return f"[{pair[0]:.3f}, {pair[1]:.3f}]"


def main(arguments: Sequence[str] | None = None, model: tl.Model | None = None) -> list[Finding]:
    """Runs the study, and writes page, figures and numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a folder with *.jsonl files, at any depth")
    parser.add_argument("--out", type=Path, required=True, help="where page, figures and numbers go")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--template", choices=("chat", "plain"), default="chat")
    parser.add_argument("--rows", type=int, help="at most so many rows of each file")
    parser.add_argument("--controls", type=int, default=20)
    parser.add_argument("--neutral", type=int, default=len(NEUTRAL), help="so many neutral sentences")
    parser.add_argument("--layers", type=int, nargs="*", help="these layers alone")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    files = sorted(given.folder.rglob("*.jsonl"))
    if not files:
        parser.error(f"there are no *.jsonl files in {given.folder}")
    if model is None:
        model = tl.load(given.model, tp=given.tp, pp=given.pp)
    findings, curves = study(
        model,
        files,
        template=given.template,
        most=given.rows,
        controls=given.controls,
        neutral=NEUTRAL[: given.neutral],
        # What enters layer 0 is the label's embedding, and letters that are balanced cancel there.
        layers=given.layers or range(1, model.n_layers),
        seed=given.seed,
    )
    given.out.mkdir(parents=True, exist_ok=True)
    for name, curve in curves.items():
        (given.out / f"{name}.svg").write_text(curve.to_svg(), encoding="utf-8")
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    facts = {
        "model": given.model,
        "files": len(files),
        "template": given.template,
        "seed": given.seed,
        "controls": given.controls,
        "versions": versions,
        "limits": "All rows."
        if given.rows is None
        else f"At most {given.rows} rows of each file, 4 : 1 : 5.",
    }
    (given.out / "README.md").write_text(page(findings, facts), encoding="utf-8")
    results = {"facts": facts, "findings": [asdict(one) for one in findings]}
    (given.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return findings


if __name__ == "__main__":
    main()
