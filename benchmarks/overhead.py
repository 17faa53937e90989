"""What a trace costs beside the bare forward pass, hooks written by hand, nnsight and TransformerLens.

    python -m benchmarks.overhead --peer-python nnsight=PYTHON --peer-python transformer_lens=PYTHON --out FOLDER

Everything is timed in one run, in turns: in each round every contestant answers every case once, in an order shuffled
anew, and beside it the bare forward pass of the same process. Before anything is timed, every answer is compared with
that of the hooks. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the package is one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bout import Bout
from benchmarks.models import SmolLM2, Tiny
from benchmarks.overhead_report import table, write
from benchmarks.peers.client import PeerProcess
from benchmarks.peers.subject import INSIDE, STREAM, TOLERANCE
from benchmarks.settings import Settings, add_options, load, peer_pythons, say, told

MEASURED = ("tiny", "smollm2", "inside", "sweep")


@dataclass(frozen=True)
class Measurement:
    """How often each model is measured."""

    name: str
    model: Tiny | SmolLM2
    rounds: int
    firsts: int = 3
    warmups: int = 2
    cases: tuple[str, ...] = tuple(STREAM)


def run(settings: Settings[Measurement], *, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Measures everything; the report is plain data, made for JSON."""
    settings.prepare()
    before = load()
    peers = settings.processes()
    rows: list[dict[str, Any]] = []
    try:
        present = [peer for peer in peers.values() if peer.absent is None]
        for measurement in settings.measurements:
            rows += measure(measurement, present, settings.seed, say)
    finally:
        for peer in peers.values():
            peer.close()
    return {
        "about": settings.about(before, TOLERANCE),
        "models": [describe(measurement) for measurement in settings.measurements],
        "peers": {name: told(peer) for name, peer in peers.items()},
        "rows": rows,
    }


def measure(
    measurement: Measurement, peers: Sequence[PeerProcess], seed: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """The rows of one model."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = measurement.model
        bout = Bout(
            measurement.name,
            model.write(folder),
            tokens=model.tokens,
            scratch=folder,
            peers=peers,
            cases=measurement.cases,
        )
        say(f"{measurement.name}: checking that all answers agree")
        bout.check()
        say(f"{measurement.name}: first calls")
        bout.firsts(measurement.firsts)
        shuffle = random.Random(seed)
        for number in range(-measurement.warmups, measurement.rounds):
            if number >= 0 and number % max(1, measurement.rounds // 10) == 0:
                say(f"{measurement.name}: round {number} of {measurement.rounds}")
            bout.round(shuffle, keep=number >= 0)
        return bout.rows()


def describe(measurement: Measurement) -> dict[str, Any]:
    model = measurement.model
    found: dict[str, Any] = {"name": measurement.name, "rounds": measurement.rounds, "tokens": model.tokens}
    if isinstance(model, Tiny):
        found["shape"] = f"Llama, {model.layers} layers, d_model {model.d_model}, random weights"
    else:
        found["shape"] = "SmolLM2-135M-Instruct, 30 layers, d_model 576"
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="few rounds: to see that it works, not to measure"
    )
    parser.add_argument("--models", nargs="+", choices=MEASURED, default=list(MEASURED))
    parser.add_argument("--rounds", type=int, help="rounds on the tiny model (200), a tenth of it on SmolLM2")
    add_options(parser, "overhead")
    options = parser.parse_args(arguments)

    pythons = peer_pythons(parser, options)
    rounds = options.rounds or (8 if options.quick else 200)
    known = {
        "tiny": Measurement("tiny", Tiny(), rounds),
        "smollm2": Measurement("smollm2", SmolLM2(), max(4, rounds // 10)),
        "inside": Measurement("inside", SmolLM2(), max(4, rounds // 10), cases=tuple(INSIDE)[:4]),
        "sweep": Measurement(
            "sweep", SmolLM2(tokens=8), max(2, rounds // 50), firsts=1, warmups=0, cases=("sweep",)
        ),
    }
    settings = Settings(tuple(known[name] for name in options.models), pythons, options.threads, options.seed)
    report = run(settings, say=say)
    print(table(report))
    write(report, options.out, options.page)


if __name__ == "__main__":
    main()
