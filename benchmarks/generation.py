"""What reads and steering cost while text is generated: beside plain generation, hooks, nnsight and TransformerLens.

    python -m benchmarks.generation --peer-python nnsight=PYTHON --peer-python transformer_lens=PYTHON --out FOLDER

All of one process take turns step by step (see peers/laps.py), plain generation among them, and every answer is
compared with that of the hooks. Measurements are added to those that the folder has already, so that a long run can be
made in pieces (``--models``, ``--batches``, ``--long``).
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the package is one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from safetensors.torch import save_file

from benchmarks import ours_text
from benchmarks.generation_report import row, table, write
from benchmarks.overhead import Settings as Machine
from benchmarks.overhead import SmolLM2, Tiny, about
from benchmarks.peers import hooks_text
from benchmarks.peers.client import PeerFailedError, PeerProcess
from benchmarks.peers.laps import Lap, Laps, in_turns
from benchmarks.peers.text import GENERATING, NEAR, STEERED, WRITTEN, Text, difference, load_text, plain

PEERS = ("nnsight", "transformer_lens")
OWN: dict[str, Callable[[Text], dict[str, WRITTEN]]] = {
    "hooks": hooks_text.build,
    "tracelens": ours_text.build,
}
SHORT = tuple(GENERATING)
LONG = ("read-all", "steer-all")
WARMUP = 3
"""Tokens that each contestant writes before it is timed."""


@dataclass(frozen=True)
class Measurement:
    """One model at one size: ``batch`` prompts of ``model.tokens`` tokens, and ``new`` tokens for each."""

    name: str
    model: Tiny | SmolLM2
    batch: int
    new: int
    rounds: int
    peer_rounds: int = 1
    cases: tuple[str, ...] = SHORT
    peer_cases: tuple[str, ...] = SHORT
    uncached: int = 32
    """How many tokens without a cache."""


@dataclass(frozen=True)
class Settings:
    """One run of the benchmark."""

    measurements: tuple[Measurement, ...]
    peer_python: Mapping[str, str] = field(default_factory=dict[str, str])
    threads: int = 1
    seed: int = 0


def run(
    settings: Settings,
    *,
    say: Callable[[str], None] = lambda text: None,
    keep: Callable[[dict[str, Any]], None] = lambda report: None,
) -> dict[str, Any]:
    """Measures everything; the report is plain data, made for JSON. ``keep`` gets it whenever there is more of it."""
    torch.set_num_threads(settings.threads)
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    report: dict[str, Any] = {"measurements": [], "peers": {}}
    for measurement in settings.measurements:
        load = os.getloadavg()
        # Begun anew, so that no process holds the memory of an earlier model.
        peers = {
            name: PeerProcess(f"{name}_text", python, settings.threads)
            for name, python in settings.peer_python.items()
        }
        for name, peer in peers.items():
            absent = {"absent": peer.absent}
            report["peers"][name] = absent if peer.absent else {"version": peer.version, **peer.versions}
        present = {name: peer for name, peer in peers.items() if peer.absent is None}
        rows: list[dict[str, Any]] = []
        found = {
            "model": measurement.name,
            "batch": measurement.batch,
            "prompt": measurement.model.tokens,
            "new": measurement.new,
            "rows": rows,
        }
        report["measurements"].append(found)
        try:
            for more in measure(measurement, present, random.Random(settings.seed), say):
                rows += more
                machine = about(Machine((), threads=settings.threads, seed=settings.seed), load)
                found["about"] = machine | {"tolerance": NEAR}
                keep(report)
        finally:
            for peer in peers.values():
                peer.close()
    return report


def measure(
    measurement: Measurement,
    peers: Mapping[str, PeerProcess],
    shuffle: random.Random,
    say: Callable[[str], None],
) -> Iterator[list[dict[str, Any]]]:
    """The rows of one measurement, as they are made: a run takes hours, and what was measured is kept."""
    what = f"{measurement.name}, batch {measurement.batch}, {measurement.new} tokens"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model_folder, inputs = measurement.model.write(folder), folder / "inputs.safetensors"
        write_inputs(model_folder, inputs, measurement.batch, measurement.model.tokens)
        text = load_text(model_folder, inputs)
        own = {name: build(text) for name, build in OWN.items()}
        references: dict[str, Path] = {}
        cached = [case for case in measurement.cases if case != "uncached"]
        for cases, new in ((cached, measurement.new), (["uncached"], measurement.uncached)):
            if not cases or not set(cases) <= set(measurement.cases):
                continue
            rows: list[dict[str, Any]] = []
            bare = plain(text.separate(), cached=cases is cached)
            answers: dict[tuple[str, str], WRITTEN] = {("plain", ""): bare}
            answers |= {
                (name, case): answer
                for name, of_case in own.items()
                for case, answer in of_case.items()
                if case in cases
            }
            for answer in answers.values():
                answer(WARMUP, lambda: None)
            rounds: list[dict[tuple[str, str], Laps]] = []
            for number in range(measurement.rounds):
                say(f"{what}: round {number + 1} of {measurement.rounds}, {len(answers)} in turns")
                # Dictionaries of strings for in_turns, and back again.
                found = in_turns(
                    {"/".join(who): partial(answer, new) for who, answer in answers.items()}, shuffle
                )
                made = {who: found.pop("/".join(who)) for who in answers}
                if not rounds:
                    errors = compared(made, new)
                    for case in cases if peers else ():
                        references[case] = folder / f"{case}.safetensors"
                        right = made[
                            "hooks" if case != "nothing" else "plain", "" if case == "nothing" else case
                        ]
                        tensors = {name: each.contiguous() for name, each in right.results.items()}
                        save_file(tensors, references[case])
                rounds.append({who: Laps(laps.laps, None) for who, laps in made.items()})
                del made, found
            base = [each["plain", ""] for each in rounds]
            rows.append(row(" ".join(cases), "plain", measurement.batch, new, base, base))
            for name, case in list(answers)[1:]:
                laps = [each[name, case] for each in rounds]
                rows.append(
                    row(case, name, measurement.batch, new, laps, base) | {"error": errors[name, case]}
                )
            yield rows
        del own, text
        for name, peer in peers.items():
            say(f"{what}: {name}")
            for found in peers_rows(measurement, name, peer, model_folder, inputs, references):
                yield [found]


def compared(made: Mapping[tuple[str, str], Laps], new: int) -> dict[tuple[str, str], float]:
    """How far each own answer is from that of the hooks; raises where it is another, so that nobody is timed for it."""
    bare = made["plain", ""].results
    errors: dict[tuple[str, str], float] = {}
    for (name, case), laps in made.items():
        if name == "plain":
            continue
        same = torch.equal(laps.results["tokens"], bare["tokens"])
        # Steering that changes nothing would make every wrong answer right, and a read must change nothing.
        if same == (case in STEERED) or laps.results["tokens"].shape[1] != new:
            raise AssertionError(f"{name} wrote {'the same' if same else 'another'} text in {case}")
        right = bare if case == "nothing" else made["hooks", case].results
        errors[name, case] = difference(laps.results, right)
        if not errors[name, case] <= NEAR:
            raise AssertionError(f"{name} is wrong by {errors[name, case]} in {case}")
    return errors


def peers_rows(
    measurement: Measurement,
    name: str,
    peer: PeerProcess,
    folder: str,
    inputs: Path,
    references: Mapping[str, Path],
) -> Iterator[dict[str, Any]]:
    """The rows of a peer; a case that it fails is in them with what it said."""
    try:
        known: list[str] = peer.ask("open", folder=folder, inputs=str(inputs))["cases"]
    except PeerFailedError as error:
        for case in references:
            yield {"case": case, "contestant": name, "absent": str(error)}
        return
    for case in (case for case in measurement.cases if case in known and case in measurement.peer_cases):
        laps: list[Laps] = []
        base: list[Laps] = []
        new = measurement.new if case != "uncached" else measurement.uncached
        try:
            peer.ask("time", case=case, new=WARMUP, seed=0)
            error = 0.0
            for number in range(measurement.peer_rounds):
                reply = peer.ask("time", case=case, new=new, seed=number, reference=str(references[case]))
                error = max(error, reply["error"])
                laps.append(Laps(tuple(Lap(*each) for each in reply["peer"]), None))
                base.append(Laps(tuple(Lap(*each) for each in reply["plain"]), None))
        except PeerFailedError as failure:
            yield {"case": case, "contestant": name, "absent": str(failure)}
            continue
        if not error <= NEAR:
            yield {"case": case, "contestant": name, "absent": f"its answer is wrong by {error:.2g}"}
            continue
        yield row(case, name, measurement.batch, new, laps, base) | {"error": error}


def write_inputs(model_folder: str, file: Path, batch: int, tokens: int) -> None:
    """The prompts (random token ids) and the vector that is added, long enough to change the text."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model_folder)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, config.vocab_size, (batch, tokens), generator=generator)
    save_file({"ids": ids, "vector": torch.randn(config.hidden_size, generator=generator)}, file)


def known(rounds: int, *, quick: bool) -> dict[tuple[str, str], tuple[Measurement, ...]]:
    """What is measured, by model and size."""
    found: dict[tuple[str, str], tuple[Measurement, ...]] = {}
    # A generation of SmolLM2 takes seconds, and peers take two for each case: what aims are about is enough.
    for name, model, of_peers in (("tiny", Tiny(new=2000), SHORT), ("smollm2", SmolLM2(), LONG)):
        found[name, "short"] = tuple(
            Measurement(name, model, batch, 16 if quick else 128, rounds, rounds, SHORT, of_peers)
            for batch in (1, 8)
        )
        found[name, "long"] = tuple(
            Measurement(name, model, batch, 48 if quick else 1500, 1, 1, LONG, LONG) for batch in (1, 8)
        )
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="few tokens: to see that it works, not to measure"
    )
    parser.add_argument("--models", nargs="+", choices=("tiny", "smollm2"), default=["tiny", "smollm2"])
    parser.add_argument("--long", action="store_true", help="32 + 1,500 tokens, in place of 32 + 128")
    parser.add_argument("--batches", nargs="+", type=int, choices=(1, 8), default=[1, 8])
    parser.add_argument(
        "--rounds", type=int, default=1, help="of 128 tokens (1: each step is compared with its like)"
    )
    parser.add_argument("--cases", nargs="+", choices=SHORT, help="these only")
    parser.add_argument("--threads", type=int, default=1, help="torch threads in every process (1)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of turns")
    parser.add_argument("--no-peers", action="store_true", help="this process only")
    parser.add_argument(
        "--peer-python",
        action="append",
        default=[],
        metavar="PEER=PYTHON",
        help=f"the Python that has a peer ({', '.join(PEERS)}) installed; by default this one",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="generation.json and generation.md there; measurements are added",
    )
    parser.add_argument("--page", type=Path, metavar="FILE", help="the page for the documentation")
    options = parser.parse_args(arguments)

    pythons = dict.fromkeys(() if options.no_peers else PEERS, sys.executable)
    for given in options.peer_python:
        name, _, python = given.partition("=")
        if name not in pythons or not python:
            parser.error(f"--peer-python {given}: PEER=PYTHON with PEER one of {', '.join(PEERS)}")
        pythons[name] = python
    sizes = known(options.rounds, quick=options.quick)
    chosen = [
        measurement
        for name in options.models
        for measurement in sizes[name, "long" if options.long else "short"]
        if measurement.batch in options.batches
    ]
    if options.cases:
        chosen = [Measurement(**{**vars(each), "cases": tuple(options.cases)}) for each in chosen]
    report = run(
        Settings(tuple(chosen), pythons, options.threads, options.seed),
        say=lambda text: print(text, file=sys.stderr, flush=True),
        keep=lambda report: write(report, options.out, options.page),
    )
    print(table(report))


if __name__ == "__main__":
    main()
