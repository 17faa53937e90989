"""What reads and steering cost while text is generated: beside plain generation, hooks, nnsight and TransformerLens.

    python -m benchmarks.generation --peer-python nnsight=PYTHON --peer-python transformer_lens=PYTHON --out FOLDER

All of one process take turns step by step (see peers/laps.py), plain generation among them, and every answer is
compared with that of the hooks. Measurements are added to those that the folder has already, so that a long run can be
made in pieces (``--models``, ``--batches``, ``--long``, ``--cases``). Where all steps of a text would take hours,
``--sample`` measures some.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the package is one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from safetensors.torch import load_file, save_file
from torch import equal

from benchmarks import ours_text
from benchmarks.generation_report import Part, row, table, write
from benchmarks.models import SmolLM2, Tiny, write_inputs
from benchmarks.peers import hooks_text
from benchmarks.peers.client import PeerFailedError, PeerProcess
from benchmarks.peers.laps import Lap, Laps, in_turns
from benchmarks.peers.text import GENERATING, NEAR, STEERED, WRITTEN, Text, difference, plain
from benchmarks.settings import Settings, add_options, load, peer_pythons, say, told

OWN: dict[str, Callable[[Text], dict[str, WRITTEN]]] = {
    "hooks": hooks_text.build,
    "tracelens": ours_text.build,
}
SHORT = tuple(GENERATING)
LONG = ("nothing", "read-one", "read-all", "steer-all")
AIMED = ("read-all", "steer-all")
WARMUP = 3
"""Tokens that each contestant writes before it is timed."""


@dataclass(frozen=True)
class Sample:
    """Steps that are measured in place of all: so many after each of these lengths of the text."""

    lengths: tuple[int, ...]
    steps: int

    @classmethod
    def of(cls, prompt: int, new: int, count: int, steps: int) -> Sample:
        """``count`` lengths, from the prompt's to that whose steps are the last of the text."""
        if count < 2 or steps < 1 or steps >= new:
            raise ValueError(
                f"a sample is of 2 lengths or more and 1 to {new - 1} steps, not {count} and {steps}"
            )
        whole = new - 1 - steps
        return cls(tuple(prompt + round(whole * number / (count - 1)) for number in range(count)), steps)


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
    peer_cases: tuple[str, ...] | None = None
    """Those of ``cases`` by default."""
    uncached: int = 32
    """How many tokens without a cache."""
    sample: Sample | None = None

    @property
    def asked(self) -> tuple[str, ...]:
        """The cases that peers are asked for."""
        return self.cases if self.peer_cases is None else self.peer_cases

    def parts(self, case: str) -> list[Part]:
        """The generations that are made of a case: from which length of the text, and how many tokens."""
        if self.sample is not None:
            # The first token comes out of the pass over all before it, which is no step.
            return [Part(length, self.sample.steps + 1) for length in self.sample.lengths]
        return [Part(self.model.tokens, self.new if case != "uncached" else self.uncached)]

    def row(self, case: str, name: str, parts: Sequence[Part], laps: Any, base: Any) -> dict[str, Any]:
        """The figures of a contestant; ``parts``: which generation each of its laps is."""
        new = self.new if self.sample or case != "uncached" else self.uncached
        sampled = parts if self.sample else ()
        return row(case, name, self.batch, new, laps, base, sampled=sampled)


def run(
    settings: Settings[Measurement],
    *,
    say: Callable[[str], None] = lambda text: None,
    keep: Callable[[dict[str, Any]], None] = lambda report: None,
) -> dict[str, Any]:
    """Measures everything; the report is plain data, made for JSON. ``keep`` gets it whenever there is more of it."""
    settings.prepare()
    report: dict[str, Any] = {"measurements": [], "peers": {}}
    for measurement in settings.measurements:
        before = load()
        peers = settings.processes("_text")  # begun anew, so that none holds the memory of an earlier model
        report["peers"] |= {name: told(peer) for name, peer in peers.items()}
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
            present = {name: peer for name, peer in peers.items() if peer.absent is None}
            for more in measure(measurement, present, random.Random(settings.seed), say):
                rows += more
                found["about"] = settings.about(before, NEAR)
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

    def say_more(text: str) -> None:
        say(f"{what}: {text}")

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model_folder = measurement.model.write(folder)
        for part in measurement.parts(""):
            write_inputs(model_folder, inputs_of(folder, part), part.length, measurement.batch)
        for uncached in (False, True):
            cases = [case for case in measurement.cases if (case == "uncached") == uncached]
            asked = [case for case in measurement.asked if peers and (case == "uncached") == uncached]
            if cases or asked:
                yield own_rows(measurement, model_folder, folder, cases, asked, shuffle, say_more)
        for name, peer in peers.items():
            say_more(name)
            for found in peers_rows(measurement, name, peer, model_folder, folder):
                yield [found]


def inputs_of(folder: Path, part: Part) -> Path:
    """Where the prompts of that length are."""
    return folder / f"inputs{part.length}.safetensors"


def answer_of(folder: Path, part: Part, case: str) -> Path:
    """Where the right answer is, for peers to compare theirs with."""
    return folder / f"{case}{part.length}.safetensors"


def own_rows(
    measurement: Measurement,
    model_folder: str,
    folder: Path,
    cases: Sequence[str],
    asked: Sequence[str],
    shuffle: random.Random,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """The rows of this process, for cases that all have a cache or all have none; and the answers for its peers."""
    cached = "uncached" not in (*cases, *asked)
    parts: list[Part] = []
    made: list[dict[tuple[str, str], Laps]] = []
    errors: dict[tuple[str, str], float] = {}
    wanted = measurement.parts((*cases, *asked)[0])
    text = Text.load(model_folder, inputs_of(folder, wanted[0]))
    for part in wanted:
        text = replace(text, **load_file(inputs_of(folder, part)))
        own = {name: build(text) for name, build in OWN.items()}
        bare = plain(text.separate(), cached=cached)
        answers: dict[tuple[str, str], WRITTEN] = {("plain", ""): bare}
        answers |= {(name, case): own[name][case] for name in own for case in cases if case in own[name]}
        if measurement.sample is None:  # a sample's pass over the text warms up more than these would
            for answer in answers.values():
                answer(WARMUP, lambda: None)
        for number in range(measurement.rounds if cases else 0):
            say(
                f"round {number + 1} of {measurement.rounds}, {len(answers)} in turns, {part.length} + {part.new}"
            )
            # Dictionaries of strings for in_turns, and back again.
            found = in_turns(
                {"/".join(who): partial(answer, part.new) for who, answer in answers.items()}, shuffle
            )
            laps = {who: found.pop("/".join(who)) for who in answers}
            if number == 0:
                for who, error in compared(laps, part.new).items():
                    errors[who] = max(error, errors.get(who, 0.0))
                for case in (case for case in cases if case in asked):
                    right = laps["plain", ""] if case == "nothing" else laps["hooks", case]
                    save_answer(right.results, answer_of(folder, part, case))
            parts.append(part)
            made.append({who: Laps(each.laps, None) for who, each in laps.items()})
            del found, laps
        for case in (case for case in asked if case not in cases):
            right = bare if case == "nothing" else own["hooks"][case]
            save_answer(right(part.new, lambda: None), answer_of(folder, part, case))
    if not cases:
        return []
    base = [each["plain", ""] for each in made]
    rows = [measurement.row(" ".join(cases), "plain", parts, base, base)]
    for name, case in errors:
        laps = [each[name, case] for each in made]
        rows.append(measurement.row(case, name, parts, laps, base) | {"error": errors[name, case]})
    return rows


def save_answer(results: Mapping[str, Any], file: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in results.items()}, file)


def compared(made: Mapping[tuple[str, str], Laps], new: int) -> dict[tuple[str, str], float]:
    """How far each own answer is from that of the hooks; raises where it is another, so that nobody is timed for it."""
    bare = made["plain", ""].results
    errors: dict[tuple[str, str], float] = {}
    for (name, case), laps in made.items():
        if name == "plain":
            continue
        same = equal(laps.results["tokens"], bare["tokens"])
        # Steering that changes nothing would make every wrong answer right, and a read must change nothing.
        if same == (case in STEERED) or laps.results["tokens"].shape[1] != new:
            raise AssertionError(f"{name} wrote {'the same' if same else 'another'} text in {case}")
        right = bare if case == "nothing" else made["hooks", case].results
        errors[name, case] = difference(laps.results, right)
        if not errors[name, case] <= NEAR:
            raise AssertionError(f"{name} is wrong by {errors[name, case]} in {case}")
    return errors


def peers_rows(
    measurement: Measurement, name: str, peer: PeerProcess, model_folder: str, folder: Path
) -> Iterator[dict[str, Any]]:
    """The rows of a peer; a case that it fails is in them with what it said."""
    opened: Part | None = None
    able: list[str] | None = None
    for case in measurement.asked:
        parts: list[Part] = []
        laps: list[Laps] = []
        base: list[Laps] = []
        error = 0.0
        try:
            for part in measurement.parts(case):
                # Texts of another length are another request; it prepares its answers for them anew.
                if opened is None or opened.length != part.length:
                    request = {"folder": model_folder, "inputs": str(inputs_of(folder, part))}
                    able, opened = peer.ask("open", **request)["cases"], part
                if able is not None and case not in able:
                    break
                if measurement.sample is None:
                    peer.ask("time", case=case, new=WARMUP, seed=0)
                for number in range(measurement.peer_rounds):
                    reference = str(answer_of(folder, part, case))
                    reply = peer.ask("time", case=case, new=part.new, seed=number, reference=reference)
                    error = max(error, reply["error"])
                    parts.append(part)
                    laps.append(Laps(tuple(Lap(*each) for each in reply["peer"]), None))
                    base.append(Laps(tuple(Lap(*each) for each in reply["plain"]), None))
        except PeerFailedError as failure:
            yield {"case": case, "contestant": name, "absent": str(failure)}
            continue
        if not error <= NEAR:
            yield {"case": case, "contestant": name, "absent": f"its answer is wrong by {error:.2g}"}
        elif laps:
            yield measurement.row(case, name, parts, laps, base) | {"error": error}


def known(rounds: int, *, quick: bool) -> dict[tuple[str, str], tuple[Measurement, ...]]:
    """What is measured, by model and size."""
    found: dict[tuple[str, str], tuple[Measurement, ...]] = {}
    # A generation of SmolLM2 takes seconds, and peers take two for each case: what aims are about is enough.
    for name, model, of_peers in (("tiny", Tiny(new=2000), SHORT), ("smollm2", SmolLM2(), AIMED)):
        found[name, "short"] = tuple(
            Measurement(name, model, batch, 16 if quick else 128, rounds, rounds, SHORT, of_peers)
            for batch in (1, 8)
        )
        found[name, "long"] = tuple(
            Measurement(name, model, batch, 48 if quick else 1500, 1, 1, LONG, AIMED) for batch in (1, 8)
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
    parser.add_argument("--cases", nargs="*", choices=SHORT, help="these only; none: --cases")
    parser.add_argument("--peer-cases", nargs="+", choices=SHORT, help="these only, of peers")
    parser.add_argument(
        "--sample",
        nargs=2,
        type=int,
        metavar=("LENGTHS", "STEPS"),
        help="in place of all steps, so many after each of so many lengths of the text",
    )
    add_options(parser, "generation")
    options = parser.parse_args(arguments)

    pythons = peer_pythons(parser, options)
    sizes = known(options.rounds, quick=options.quick)
    chosen = [
        measurement
        for name in options.models
        for measurement in sizes[name, "long" if options.long else "short"]
        if measurement.batch in options.batches
    ]
    if options.cases is not None:
        cases = tuple(options.cases)
        chosen = [
            replace(each, cases=cases, peer_cases=tuple(case for case in each.asked if case in cases))
            for each in chosen
        ]
    if options.peer_cases:
        chosen = [replace(each, peer_cases=tuple(options.peer_cases)) for each in chosen]
    if options.sample:
        chosen = [
            replace(each, sample=Sample.of(each.model.tokens, each.new, *options.sample)) for each in chosen
        ]
    report = run(
        Settings(tuple(chosen), pythons, options.threads, options.seed),
        say=say,
        keep=lambda report: write(report, options.out, options.page),
    )
    print(table(report))


if __name__ == "__main__":
    main()
