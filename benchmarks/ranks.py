"""What a block costs on ranks, beside the bare forward pass of the same ranks.

    python -m benchmarks.ranks --out benchmarks/results --page docs/benchmarks/ranks.md

Everything of one way to spread a model is timed in one run, in turns: in each round the bare forward pass and every
block once, in an order shuffled anew. The bare pass is asked for as a block is, so that the way to the ranks and back
is in both.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import tracelens as tl
from benchmarks.models import SmolLM2, Tiny
from benchmarks.ratios import Ratio
from tracelens.backends.ranks.pool import Ranks

WAYS = {"tiny": ({"tp": 2}, {"pp": 2}), "smollm2": ({"tp": 3}, {"pp": 2})}
MODELS = {"tiny": Tiny(), "smollm2": SmolLM2()}

PAGE = """\
# What a block costs on ranks

Blocks on models that are spread over ranks (`tl.load(name, tp=...)`, `pp=...`), beside the bare forward pass of the
same ranks, which is asked for in the same way. It is made by `python -m benchmarks.ranks`.

* A number is the **ratio** to the bare pass: of medians over {rounds} rounds in which everything is timed once, in an
  order shuffled anew, with the interval that holds 95% of its bootstrap resamples.
* **trace** records, plans and runs; **program** was compiled before.
* The ranks are processes on the CPU that talk by gloo, more of them than the machine has cores to spare: the bare pass
  is slow, and what is exchanged costs what it costs over loopback. On GPUs both are other numbers.
* **bytes**: what crosses between ranks for the block, and beside it the ratio to what the bare pass exchanges itself:
  two sums over ranks in each layer and one for the embedding, and the gathered logits; or the stream between stages.
  What is saved crosses once more, to the process that asked, and is not in it.
* **start**: from `Ranks(n)` until all have met. **load**: of the model on all ranks. **empty**: to the ranks and back,
  with nothing to do.
* "tiny" is a random Llama of 12 layers (d_model 192) and 32 tokens, "smollm2" SmolLM2-135M with a prompt of 32 tokens.
"""


def blocks(model: Any) -> dict[str, Callable[[Any], None]]:
    """What is done in each case, inside a block; the logits of the last position are asked for, so that all runs."""
    middle = model.n_layers // 2
    v = torch.full((model.anatomy.widths["D"],), 0.01)

    def read(m: Any) -> None:
        m.layers[middle].resid_post.save("h")

    def edit(m: Any) -> None:
        m.layers[middle].resid_post += v

    def head_edit(m: Any) -> None:
        m.layers[middle].head(1).z = 0

    def neurons(m: Any) -> None:
        m.layers[:].mlp_act.mean(-1).save("means")

    def lens(m: Any) -> None:
        streams = m.layers[:].resid_post[:, -1]
        (m.hf.model.norm(streams) @ m.unembed.T).amax(-1).save("best")

    return {
        "the stream after one layer": read,
        "a vector added to the stream": edit,
        "one head ablated": head_edit,
        "the mean neuron of every layer": neurons,
        "a lens on every layer, last position": lens,
    }


def of_the_bare_pass(model: Any, way: dict[str, int], tokens: int) -> int:
    """The bytes that cross between ranks in a pass without a block, as rings sum and gather."""
    widths, ranks = model.anatomy.widths, way.get("tp", 1)
    stream = tokens * widths["D"] * 4
    between_stages = (way.get("pp", 1) - 1) * ranks * stream
    sums = 2 * (ranks - 1) * stream * (2 * model.n_layers + 1)
    return between_stages + sums + (ranks - 1) * tokens * widths["V"] * 4


def measured(name: str, way: dict[str, int], rounds: int) -> dict[str, Any]:
    """Everything of one model, spread in one way."""
    world = way.get("tp", 1) * way.get("pp", 1)
    started = time.perf_counter()
    with (
        Ranks(world, device="cpu", _worker="benchmarks.rank_worker") as ranks,
        tempfile.TemporaryDirectory() as folder,
    ):
        begun = time.perf_counter()
        source = MODELS[name].write(Path(folder))
        before = time.perf_counter()
        model = tl.load(source, ranks=ranks, **way)
        loaded = time.perf_counter()
        ids = torch.arange(MODELS[name].tokens)[None] + 3
        prompt = model.prepare(ids)
        inputs = prompt.batch.model_inputs()
        own = model._parts

        def empty() -> None:
            ranks.ask("ping")

        def bare() -> None:
            ranks.ask("bare", {"model": own.model}, inputs, model=own.model)

        contestants: dict[str, Callable[[], Any]] = {"empty": empty, "bare": bare}
        crossing: dict[str, int] = {}
        for case, body in blocks(model).items():

            def traced(body: Callable[[Any], None] = body) -> None:
                with model.trace(prompt):
                    body(model)
                    model.logits[:, -1].save("end")

            with model.trace(prompt) as once:
                body(model)
                model.logits[:, -1].save("end")
            crossing[case] = sum(moved.bytes for moved in once.report.moved if moved.what != "results")
            with model.record() as recorded:
                body(model)
                model.logits[:, -1].save("end")
            program = model.compile(recorded)
            contestants[f"{case}, trace"] = traced
            contestants[f"{case}, program"] = lambda program=program: program(prompt)
        for contestant in contestants.values():  # once before anything is timed
            contestant()
        times: dict[str, list[float]] = {case: [] for case in contestants}
        order = list(contestants)
        for _ in range(rounds):
            random.shuffle(order)
            for case in order:
                start = time.perf_counter()
                contestants[case]()
                times[case].append(time.perf_counter() - start)
        return {
            "model": name,
            "way": ", ".join(f"{kind}={size}" for kind, size in way.items()),
            "start": begun - started,
            "load": loaded - before,
            "bytes": list(own.bytes),
            "empty": statistics.median(times["empty"]) * 1e3,
            "bare": statistics.median(times["bare"]) * 1e3,
            "cases": {
                case: {
                    kind: str(Ratio.of(times[f"{case}, {kind}"], times["bare"]))
                    for kind in ("trace", "program")
                }
                for case in blocks(model)
            },
            "exchanged": {"bare": of_the_bare_pass(model, way, MODELS[name].tokens), **crossing},
        }


def page(report: dict[str, Any]) -> str:
    """The report for reading."""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    rows = report["rows"]
    lines = [
        PAGE.format(rounds=report["rounds"]),
        f"{report['date']}, {versions}.",
        "",
        "| | " + " | ".join(f"{row['model']}, {row['way']}" for row in rows) + " |",
        "|" + " --- |" * (len(rows) + 1),
        "| start | " + " | ".join(f"{row['start']:.1f} s" for row in rows) + " |",
        "| load | " + " | ".join(f"{row['load']:.1f} s" for row in rows) + " |",
        "| weights on each rank | "
        + " | ".join(", ".join(f"{size / 1e6:.1f}" for size in row["bytes"]) + " MB" for row in rows)
        + " |",
        "| empty | " + " | ".join(f"{row['empty']:.2f} ms" for row in rows) + " |",
        "| bare forward pass | " + " | ".join(f"{row['bare']:.1f} ms" for row in rows) + " |",
        "| bare forward pass: bytes | "
        + " | ".join(f"{row['exchanged']['bare'] / 1e3:.1f} kB" for row in rows)
        + " |",
    ]
    for case in rows[0]["cases"]:
        for kind in ("trace", "program"):
            cells = " | ".join(row["cases"][case][kind] for row in rows)
            lines.append(f"| {case}: {kind} | {cells} |")
        cells = " | ".join(_bytes(row["exchanged"], case) for row in rows)
        lines.append(f"| {case}: bytes | {cells} |")
    return "\n".join(lines) + "\n"


def _bytes(exchanged: dict[str, int], case: str) -> str:
    return f"{exchanged[case] / 1e3:.1f} kB ({exchanged[case] / exchanged['bare']:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--models", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--out", type=Path, help="a folder for the report as JSON")
    parser.add_argument("--page", type=Path, help="the page to write")
    options = parser.parse_args()
    random.seed(0)
    torch.set_num_threads(1)
    report: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {name: version(name) for name in ("torch", "transformers", "tracelens")},
        "rounds": options.rounds,
        "rows": [measured(name, way, options.rounds) for name in options.models for way in WAYS[name]],
    }
    if options.out is not None:
        (options.out / "ranks.json").write_text(json.dumps(report, indent=1) + "\n")
    if options.page is not None:
        options.page.write_text(page(report))
    print(page(report))


if __name__ == "__main__":
    main()
