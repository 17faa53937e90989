"""What it costs to hold a model's sites to their names when it is wrapped: `tl.wrap` with and without its proof.

    python -m benchmarks.probe --out benchmarks/results --page docs/benchmarks/probe.md

Everything of a model is timed in turns, once a round, in an order shuffled anew: loading its file, a bare forward pass
of as many tokens as the proof runs, and `tl.wrap` without a proof, with one that is made, and with one that is known.
What a process does for the first time takes longer, so the first `tl.wrap` of new processes is timed besides.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import tracelens as tl
from benchmarks.models import SmolLM2
from benchmarks.probe_report import table, write
from benchmarks.ratios import Ratio, Spread
from benchmarks.settings import Settings, load, say
from tests.support.more_families import ALL, EAGER_ALONE
from tracelens import proving

SMOLLM2 = "SmolLM2-135M"
IN_NEW_PROCESSES = ("llama", "qwen3_moe", SMOLLM2)
CASES = ("load", "forward", "unproven", "first", "file", "memory")
RATIOS = {
    "first": ("forward", "unproven", "load"),
    "file": ("unproven",),
    "memory": ("unproven",),
}
"""What is divided by what."""


def forget(folder: Path | None = None) -> None:
    """Forgets proofs in memory, and in the cache's files if its folder is given."""
    proving._known.clear()
    if folder is not None:
        for file in (folder / "sites").glob("*.json"):
            file.unlink()


def built(name: str, folder: Path) -> tuple[PreTrainedModel, str]:
    """The model, and the folder that it is loaded from."""
    if name == SMOLLM2:
        from transformers import AutoModelForCausalLM

        source = SmolLM2().write(folder)
        return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval(), source
    model = ALL[name].build(attn="eager" if name in EAGER_ALONE else "sdpa")
    model.save_pretrained(folder / name)
    return model.eval(), str(folder / name)


def measured(name: str, rounds: int, seed: int) -> dict[str, Any]:
    """Everything of one model."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        # Before the cache is another one: SmolLM2 lies in the user's.
        model, source = built(name, folder)
        try:
            with _environment(TRACELENS_CACHE=made, TRACELENS_PROBE="1"):
                return {"model": name, "rounds": rounds, **_timed(model, source, folder, rounds, seed)}
        finally:
            forget()


@contextmanager
def _environment(**wanted: str) -> Iterator[None]:
    """The environment with these variables, and as it was afterwards."""
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _timed(model: PreTrainedModel, source: str, folder: Path, rounds: int, seed: int) -> dict[str, Any]:
    ids = torch.arange(proving.TOKENS)[None] + 3
    kind = type(model)

    @torch.no_grad()
    def forward() -> None:
        model(input_ids=ids, use_cache=False)

    contestants: dict[str, Callable[[], object]] = {
        "load": lambda: kind.from_pretrained(source, dtype=torch.float32),
        "forward": forward,
        "unproven": lambda: tl.wrap(model, probe=False),
        "first": lambda: tl.wrap(model),
        "file": lambda: tl.wrap(model),
        "memory": lambda: tl.wrap(model),
    }
    prepared: dict[str, Callable[[], object]] = {"first": lambda: forget(folder), "file": forget}
    proof = tl.wrap(model).check_sites()
    if proof.skipped is not None or not proof.ok:
        raise RuntimeError(f"{source}: this model is not proven, so there is nothing to time: {proof}")
    forward()
    times: dict[str, list[float]] = {case: [] for case in CASES}
    order = random.Random(seed)
    for _ in range(rounds):
        for case in order.sample(CASES, len(CASES)):
            prepared.get(case, lambda: None)()
            if case == "file":
                # Whatever had its turn before: the file is there, and memory knows nothing of it.
                contestants["first"]()
                forget()
            elif case == "memory":
                contestants["first"]()
            started = time.perf_counter()
            contestants[case]()
            times[case].append(time.perf_counter() - started)
    return {
        "verified": len(proof.verified),
        "layers": len(proving.layers_to_look_at(tl.wrap(model, probe=False).anatomy)),
        "cases": {case: asdict(Spread.of(of)) for case, of in times.items()},
        "ratios": {
            f"{case}/{base}": Ratio.of(times[case], times[base]).as_dict()
            for case, bases in RATIOS.items()
            for base in bases
        },
    }


def alone(name: str) -> float:
    """The seconds that the first `tl.wrap` of this process takes, after a bare forward pass."""
    with tempfile.TemporaryDirectory() as made:
        model, _ = built(name, Path(made))
        with torch.no_grad():
            model(input_ids=torch.arange(proving.TOKENS)[None] + 3, use_cache=False)
        with _environment(TRACELENS_CACHE=made, TRACELENS_PROBE="1"):
            started = time.perf_counter()
            tl.wrap(model)
            return time.perf_counter() - started


def in_new_processes(name: str, processes: int, threads: int) -> dict[str, float]:
    """What :func:`alone` says in so many processes."""
    command = [sys.executable, "-m", "benchmarks.probe", "--alone", name, "--threads", str(threads)]
    seconds: list[float] = []
    for _ in range(processes):
        said = subprocess.run(command, capture_output=True, text=True, check=False)
        if said.returncode:
            raise RuntimeError(f"{' '.join(command)}: {said.stderr}")
        seconds.append(json.loads(said.stdout))
    return asdict(Spread.of(seconds))


def run(settings: Settings[str], rounds: int, rounds_of_large: int, processes: int) -> dict[str, Any]:
    """Measures each model, and says with what."""
    settings.prepare()
    before = load()
    measurements: list[dict[str, Any]] = []
    for name in settings.measurements:
        say(name)
        found = measured(name, rounds_of_large if name == SMOLLM2 else rounds, settings.seed)
        if name in IN_NEW_PROCESSES and processes:
            found["new process"] = in_new_processes(name, processes, settings.threads)
        measurements.append(found)
    medians = [each["cases"]["first"]["median"] for each in measurements if each["model"] != SMOLLM2]
    return {
        "about": settings.about(before, 0.0),
        "tokens": proving.TOKENS,
        "processes": processes,
        "tiny": {"median": statistics.median(medians), "low": min(medians), "high": max(medians)}
        if medians
        else None,
        "measurements": measurements,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """What `python -m benchmarks.probe` does."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=(*ALL, SMOLLM2), default=[*ALL, SMOLLM2])
    parser.add_argument("--rounds", type=int, default=11, help="of a tiny model (11)")
    parser.add_argument("--rounds-of-large", type=int, default=7, help="of SmolLM2 (7)")
    parser.add_argument("--processes", type=int, default=5, help="new ones, for some of the models (5)")
    parser.add_argument("--alone", choices=(*ALL, SMOLLM2), help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1, help="torch threads (1)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of turns")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write probe.json and probe.md there")
    parser.add_argument(
        "--page", type=Path, metavar="FILE", help="write the page for the documentation there"
    )
    options = parser.parse_args(arguments)
    settings = Settings(tuple(options.models), threads=options.threads, seed=options.seed)
    if options.alone is not None:
        settings.prepare()
        print(json.dumps(alone(options.alone)))
        return
    report = run(settings, options.rounds, options.rounds_of_large, options.processes)
    print(table(report))
    write(report, options.out, options.page)


if __name__ == "__main__":
    main()
