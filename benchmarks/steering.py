"""What making and measuring steering vectors costs: beside hooks by hand, steering-vectors and nnsight.

    python -m benchmarks.steering --peer-python steering_vectors=PYTHON --peer-python nnsight=PYTHON --out FOLDER

Everything is timed in one run, in turns: in each round every contestant answers every case once, in an order shuffled
anew; peers are in processes of their own. Before anything is timed, every answer is compared with that of the hooks.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the package is one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import save_file

from benchmarks import ours_steering
from benchmarks.live_memory import most_live
from benchmarks.models import SmolLM2, Tiny
from benchmarks.peers import hooks_steering
from benchmarks.peers.client import PeerFailedError, PeerProcess
from benchmarks.peers.steering import NEAR, STEERING, Answers, Pair, Steering
from benchmarks.peers.subject import Results, Taken, largest_error, timed
from benchmarks.ratios import Ratio, Spread
from benchmarks.settings import Settings, add_options, load, peer_pythons, say, told
from benchmarks.steering_report import table, write

PEERS = ("steering_vectors", "nnsight")
OWN: dict[str, Callable[[Steering], Answers]] = {
    "hooks": hooks_steering.build,
    "tracelens": ours_steering.build,
    "tracelens plain": ours_steering.plain,
}
MULTIPLIERS = (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5)
OURS = "tracelens"


@dataclass(frozen=True)
class Measurement:
    """One model: so many pairs make vectors, and so many prompts measure one at each multiplier."""

    name: str
    model: Tiny | SmolLM2
    rounds: int
    train: int = 16
    test: int = 8
    batch: int = 8
    multipliers: tuple[float, ...] = MULTIPLIERS

    def count(self, case: str) -> int:
        """How many pairs, or prompts times multipliers, an answer is made of."""
        return self.train if case == "extract" else self.test * len(self.multipliers)


# --- what is given ---------------------------------------------------------------------------------------------------

WHO = ("A friend", "Your manager", "A stranger on the train", "The new assistant", "Your oldest neighbour")
WHAT = (
    "asks to be told every evening how the work of the day has gone",
    "wants to borrow the car for a journey that takes longer than planned",
    "says that the meeting on Monday should be held without you",
    "offers to look after the house",
    "finds a letter that was meant for you, and has opened it already",
)
CHOICES = (("agree to it at once", "say no"), ("let it be", "ask for a reason first, and then decide"))


def pairs(count: int, skip: int = 0) -> list[Pair]:
    """Rows of the form of the model-written evaluations, of several lengths.

    (A) is the positive one in three of four: were it in two, nothing would be left of the vectors of a random model.
    """
    found: list[Pair] = []
    for number, (what, who, choices) in enumerate(product(WHAT, WHO, CHOICES)):
        one, other = choices if number % 2 else choices[::-1]
        question = f"Question: {who} {what}. What do you do?"
        right, wrong = (" (A)", " (B)") if number % 4 else (" (B)", " (A)")
        found.append((f"{question}\n\nChoices:\n (A) {one}\n (B) {other}\n\nAnswer:", right, wrong))
    if skip + count > len(found):
        raise ValueError(f"there are {len(found)} pairs, not {skip + count}")
    random.Random(0).shuffle(found)
    return found[skip : skip + count]


def write_inputs(measurement: Measurement, folder: Path) -> tuple[str, Path]:
    """The model's folder, with a tokenizer, and the folder of what contestants are given besides."""
    model_folder = measurement.model.write(folder)
    if isinstance(measurement.model, Tiny):
        letters(model_folder)
    inputs = folder / "inputs"
    inputs.mkdir()
    given = {
        "train": pairs(measurement.train),
        "test": pairs(measurement.test, skip=measurement.train),
        "multipliers": measurement.multipliers,
        "batch": measurement.batch,
    }
    (inputs / "inputs.json").write_text(json.dumps(given), encoding="utf-8")
    return model_folder, inputs


def letters(folder: str) -> None:
    """Writes a tokenizer of bytes into a model's folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(known)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)


# --- measuring -------------------------------------------------------------------------------------------------------


def run(
    settings: Settings[Measurement],
    *,
    say: Callable[[str], None] = lambda text: None,
    keep: Callable[[dict[str, Any]], None] = lambda report: None,
) -> dict[str, Any]:
    """Measures everything; the report is plain data, made for JSON. ``keep`` gets it after each round."""
    settings.prepare()
    before = load()
    peers = settings.processes("_steering")
    found: list[dict[str, Any]] = []
    report: dict[str, Any] = {"peers": {name: told(peer) for name, peer in peers.items()}}
    try:
        present = {name: peer for name, peer in peers.items() if peer.absent is None}
        for measurement in settings.measurements:
            with tempfile.TemporaryDirectory() as scratch:
                bout = Bout(measurement, Path(scratch), present, say)
                bout.check()
                shuffle = random.Random(settings.seed)
                for number in range(measurement.rounds):
                    say(f"{measurement.name}: round {number + 1} of {measurement.rounds}")
                    bout.round(shuffle)
                    report["about"] = settings.about(before, max(NEAR.values()))
                    report["measurements"] = [*found, bout.report()]
                    keep(report)
                found = report["measurements"]
    finally:
        for peer in peers.values():
            peer.close()
    return report


class Bout:
    """One model, and all that is measured on it."""

    def __init__(
        self,
        measurement: Measurement,
        scratch: Path,
        peers: Mapping[str, PeerProcess],
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.measurement, self.scratch, self.peers, self.say = measurement, scratch, peers, say
        model_folder, inputs = write_inputs(measurement, scratch)
        vector = inputs / "vector.safetensors"
        save_file({"vector": torch.zeros(1)}, vector)
        # What the sweep adds is what the hooks extract, made so long that its numbers are about 1: it has to tell.
        subject = Steering.load(model_folder, inputs)
        made = hooks_steering.extract(subject)[f"resid_post.{subject.middle}"]
        save_file({"vector": made * (len(made) ** 0.5 / made.norm())}, vector)
        self.subject = Steering.load(model_folder, inputs)
        self.own = {name: build(self.subject) for name, build in OWN.items()}
        self.failures: dict[tuple[str, str], str] = {}
        for name, peer in peers.items():
            try:
                peer.ask("open", folder=model_folder, inputs=str(inputs))
            except PeerFailedError as error:
                self.failures |= {(name, case): str(error) for case in STEERING}
        self.errors: dict[tuple[str, str], float] = {}
        self.bytes: dict[tuple[str, str], int] = {}
        self.times: dict[tuple[str, str], list[Taken]] = {}

    def check(self) -> None:
        """Compares all answers with the hooks', so that nobody is timed for doing something else; and counts memory."""
        for case in STEERING:
            self.say(f"{self.measurement.name}: comparing the answers, {case}")
            expected = self.own["hooks"][case]()
            require_effect(case, expected)
            reference = self.scratch / f"{case}.safetensors"
            save_file(expected, reference)
            for name, answers in self.own.items():
                self.bytes[name, case], _, found = most_live(answers[case])
                error = self.errors[name, case] = largest_error(found, expected)
                if not error <= NEAR[case]:
                    raise AssertionError(f"{self.measurement.name}: {name} is wrong by {error} in {case}")
            for name, peer in self._able(case):
                try:
                    reply = peer.ask("check", case=case, reference=str(reference))
                except PeerFailedError as failure:
                    self.failures[name, case] = str(failure)
                    continue
                self.bytes[name, case], self.errors[name, case] = reply["bytes"], reply["error"]
                if not reply["error"] <= NEAR[case]:
                    self.failures[name, case] = f"its answer is wrong by {reply['error']:.2g}"

    def round(self, shuffle: random.Random) -> None:
        """Each contestant once in each case, in a new order."""
        cases = list(STEERING)
        shuffle.shuffle(cases)
        for case in cases:
            processes = [None, *self._able(case)]
            shuffle.shuffle(processes)
            for process in processes:
                if process is None:
                    order = list(self.own)
                    shuffle.shuffle(order)
                    taken = {name: timed(self.own[name][case])[0] for name in order}
                else:
                    name, peer = process
                    taken = {name: Taken(*peer.ask("time", case=case)["seconds"])}
                for name, spent in taken.items():
                    self.times.setdefault((name, case), []).append(spent)

    def _able(self, case: str) -> list[tuple[str, PeerProcess]]:
        return [(name, peer) for name, peer in self.peers.items() if (name, case) not in self.failures]

    def report(self) -> dict[str, Any]:
        """The measured figures."""
        given = self.measurement
        lengths = [len(self.subject.row(pair).prompt) for pair in (*self.subject.train, *self.subject.test)]
        return {
            "model": given.name,
            "rounds": len(self.times["hooks", "sweep"]),
            "layers": self.subject.n_layers,
            "train": given.train,
            "test": given.test,
            "batch": given.batch,
            "multipliers": list(given.multipliers),
            "tokens": [min(lengths), max(lengths)],
            "rows": [self._row(name, case) for case in STEERING for name in (*self.own, *self.peers)],
        }

    def _row(self, name: str, case: str) -> dict[str, Any]:
        row: dict[str, Any] = {"case": case, "contestant": name}
        if (name, case) in self.failures:
            return row | {"absent": self.failures[name, case]}
        taken = self.times[name, case]
        clock, work = [each.clock for each in taken], [each.work for each in taken]
        spread = Spread.of(clock)
        row |= {
            "per_s": 1e3 * self.measurement.count(case) / spread.median,
            "median_ms": spread.median,
            "min_ms": spread.low,
            "max_ms": spread.high,
            "bytes": self.bytes[name, case],
            "error": self.errors[name, case],
        }
        for other in ("hooks", OURS):
            base = self.times[other, case]
            row[f"to_{other}"] = Ratio.of(clock, [each.clock for each in base]).as_dict()
            row[f"work_to_{other}"] = Ratio.of(work, [each.work for each in base]).as_dict()
        return row


def require_effect(case: str, results: Results) -> None:
    """Vectors that are zero, or that change nothing, would make every wrong answer right."""
    if case == "sweep":
        moved = results["propensity"].diff(dim=1).abs().amax(1).min().item()
        if not moved > 10 * NEAR[case] * results["propensity"].abs().max().item():
            raise AssertionError(
                f"a prompt's propensity moves by {moved} alone from multiplier to multiplier"
            )
    elif least := [name for name, vector in results.items() if not vector.norm() > 0]:
        raise AssertionError(f"the vectors of {least} are zero")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="one round: to see that it works, not to measure"
    )
    parser.add_argument("--models", nargs="+", choices=("tiny", "smollm2"), default=["smollm2"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=16, help="to make vectors of (16)")
    parser.add_argument("--prompts", type=int, default=8, help="to measure them on (8)")
    parser.add_argument("--batch", type=int, default=8, help="pairs, or prompts, in a pass (8)")
    add_options(parser, "steering", PEERS)
    options = parser.parse_args(arguments)
    known = {"tiny": Tiny(new=600), "smollm2": SmolLM2()}
    rounds = 1 if options.quick else options.rounds
    sizes = {"train": options.pairs, "test": options.prompts, "batch": options.batch}
    measurements = tuple(Measurement(name, known[name], rounds, **sizes) for name in options.models)
    pythons = peer_pythons(parser, options, PEERS)
    report = run(
        Settings(measurements, pythons, options.threads, options.seed),
        say=say,
        keep=lambda report: write(report, options.out, options.page),
    )
    print(table(report))


if __name__ == "__main__":
    main()
