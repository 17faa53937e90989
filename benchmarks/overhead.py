"""What a trace costs beside the bare forward pass, hooks written by hand, nnsight and TransformerLens.

    python -m benchmarks.overhead --peer-python nnsight=PYTHON --peer-python transformer_lens=PYTHON --out FOLDER

Everything is timed in one run, in turns: in each round every contestant answers every case once, in an order shuffled
anew, and beside it the bare forward pass of the same process. Before anything is timed, every answer is compared with
that of the hooks. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import random
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the package is one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers

from benchmarks.bout import Bout
from benchmarks.overhead_report import table, write
from benchmarks.peers.client import PeerProcess
from benchmarks.peers.subject import INSIDE, STREAM, TOLERANCE

PEERS = ("nnsight", "transformer_lens")
MEASURED = ("tiny", "smollm2", "inside", "sweep")


@dataclass(frozen=True)
class Tiny:
    """A random Llama, so small that what surrounds the forward pass shows."""

    layers: int = 12
    d_model: int = 192
    neurons: int = 528
    heads: int = 6
    vocabulary: int = 512
    tokens: int = 32
    new: int = 96
    """For how many further tokens there are positions."""

    def write(self, folder: Path) -> str:
        """Writes the model's folder; the same weights each time."""
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.d_model,
            intermediate_size=self.neurons,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=self.tokens + self.new,
            tie_word_embeddings=False,
        )
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder / "model")
        return str(folder / "model")


@dataclass(frozen=True)
class SmolLM2:
    """SmolLM2-135M-Instruct, the model that tracelens can fetch."""

    tokens: int = 32

    def write(self, folder: Path) -> str:
        """Gives the model's folder in the cache."""
        from tracelens.pretrained import embedded_model

        return str(embedded_model("smollm2-135m"))


@dataclass(frozen=True)
class Measurement:
    """How often each model is measured."""

    name: str
    model: Tiny | SmolLM2
    rounds: int
    firsts: int = 3
    warmups: int = 2
    cases: tuple[str, ...] = tuple(STREAM)


@dataclass(frozen=True)
class Settings:
    """One run of the benchmark."""

    measurements: tuple[Measurement, ...]
    peer_python: Mapping[str, str] = field(default_factory=dict[str, str])
    threads: int = 1
    seed: int = 0


def run(settings: Settings, *, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Measures everything; the report is plain data, made for JSON."""
    torch.set_num_threads(settings.threads)
    transformers.logging.disable_progress_bar()
    load = os.getloadavg() if hasattr(os, "getloadavg") else ()
    peers = [PeerProcess(name, python, settings.threads) for name, python in settings.peer_python.items()]
    rows: list[dict[str, Any]] = []
    try:
        for measurement in settings.measurements:
            rows += measure(measurement, [peer for peer in peers if peer.absent is None], settings.seed, say)
    finally:
        for peer in peers:
            peer.close()
    return {
        "about": about(settings, load),
        "models": [describe(measurement) for measurement in settings.measurements],
        "peers": {
            peer.name: {"absent": peer.absent}
            if peer.absent is not None
            else {"version": peer.version, **peer.versions, "notes": peer.notes}
            for peer in peers
        },
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


def about(settings: Settings, load_before: Sequence[float]) -> dict[str, Any]:
    """Where and with what it was measured."""
    import tracelens

    return {
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": settings.threads,
        "seed": settings.seed,
        "load_before": round(load_before[0], 2) if load_before else None,
        "load_after": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tracelens": tracelens.__version__,
        "tolerance": TOLERANCE,
    }


def processor() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="few rounds: to see that it works, not to measure"
    )
    parser.add_argument("--models", nargs="+", choices=MEASURED, default=list(MEASURED))
    parser.add_argument("--rounds", type=int, help="rounds on the tiny model (200), a tenth of it on SmolLM2")
    parser.add_argument("--threads", type=int, default=1, help="torch threads in every process (1)")
    parser.add_argument("--seed", type=int, default=0, help="of the order in each round")
    parser.add_argument(
        "--peer-python",
        action="append",
        default=[],
        metavar="PEER=PYTHON",
        help=f"the Python that has a peer ({', '.join(PEERS)}) installed; by default this one",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="write overhead.json and overhead.md there"
    )
    parser.add_argument(
        "--page", type=Path, metavar="FILE", help="write the page for the documentation there"
    )
    options = parser.parse_args(arguments)

    pythons = dict.fromkeys(PEERS, sys.executable)
    for given in options.peer_python:
        name, _, python = given.partition("=")
        if name not in pythons or not python:
            parser.error(f"--peer-python {given}: PEER=PYTHON with PEER one of {', '.join(PEERS)}")
        pythons[name] = python
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
    report = run(settings, say=lambda text: print(text, file=sys.stderr, flush=True))
    print(table(report))
    write(report, options.out, options.page)


if __name__ == "__main__":
    main()
