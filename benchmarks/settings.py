"""What a run beside peers is given, and where and with what it was measured."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import transformers

from benchmarks.peers.client import PeerProcess

PEERS = ("nnsight", "transformer_lens")

M = TypeVar("M")


@dataclass(frozen=True)
class Settings(Generic[M]):
    """One run of a benchmark."""

    measurements: tuple[M, ...]
    peer_python: Mapping[str, str] = field(default_factory=dict[str, str])
    threads: int = 1
    seed: int = 0

    def prepare(self) -> None:
        """So many threads, and nothing printed by transformers."""
        torch.set_num_threads(self.threads)
        transformers.logging.disable_progress_bar()
        transformers.logging.set_verbosity_error()

    def processes(self, kind: str = "") -> dict[str, PeerProcess]:
        """A new process for each peer; ``kind``: the end of its name among workers."""
        return {
            name: PeerProcess(name + kind, python, self.threads) for name, python in self.peer_python.items()
        }

    def about(self, load_before: float | None, tolerance: float) -> dict[str, Any]:
        """Where and with what it was measured."""
        import tracelens

        return {
            "date": datetime.date.today().isoformat(),
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": self.threads,
            "seed": self.seed,
            "load_before": load_before,
            "load_after": load(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tracelens": tracelens.__version__,
            "tolerance": tolerance,
        }


def load() -> float | None:
    """The load average of the last minute, where the system knows it."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def processor() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def told(peer: PeerProcess) -> dict[str, Any]:
    """What the report says of a peer: its versions, or why there is none."""
    if peer.absent is not None:
        return {"absent": peer.absent}
    return {"version": peer.version, **peer.versions} | ({"notes": peer.notes} if peer.notes else {})


def add_options(parser: argparse.ArgumentParser, name: str, peers: Sequence[str] = PEERS) -> None:
    """The options of every benchmark beside peers; ``name``: of its report's files."""
    parser.add_argument("--threads", type=int, default=1, help="torch threads in every process (1)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of turns")
    parser.add_argument("--peers", nargs="*", choices=peers, default=list(peers), help="which; none: --peers")
    parser.add_argument(
        "--peer-python",
        action="append",
        default=[],
        metavar="PEER=PYTHON",
        help=f"the Python that has a peer ({', '.join(peers)}) installed; by default this one",
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=f"write {name}.json and {name}.md there")
    parser.add_argument(
        "--page", type=Path, metavar="FILE", help="write the page for the documentation there"
    )


def peer_pythons(
    parser: argparse.ArgumentParser, options: argparse.Namespace, peers: Sequence[str] = PEERS
) -> dict[str, str]:
    """The Python of each peer that takes part."""
    given = dict.fromkeys(peers, sys.executable)
    for each in options.peer_python:
        name, _, python = each.partition("=")
        if name not in given or not python:
            parser.error(f"--peer-python {each}: PEER=PYTHON with PEER one of {', '.join(peers)}")
        given[name] = python
    return {name: given[name] for name in options.peers}


def say(text: str) -> None:
    """How far a run is, on the standard error."""
    print(text, file=sys.stderr, flush=True)
