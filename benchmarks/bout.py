"""One model, and everything that is measured on it, in turns."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from benchmarks import ours
from benchmarks.models import write_inputs
from benchmarks.peers import by_hooks
from benchmarks.peers.client import PeerFailedError, PeerProcess
from benchmarks.peers.subject import (
    CHANGING,
    STREAM,
    TOLERANCE,
    Answer,
    Subject,
    Taken,
    largest_error,
    load_subject,
    plain_forward,
    timed,
)
from benchmarks.ratios import Ratio, Spread

OWN: dict[str, Callable[[Subject], dict[str, Answer]]] = {
    "hooks": by_hooks.build,
    "tracelens trace": ours.traces,
    "tracelens trace, mapped": ours.mapped_traces,
    "tracelens program": ours.programs,
}
"""The contestants in this process."""


class Bout:
    """One model, and all that is measured on it."""

    def __init__(
        self,
        name: str,
        model_folder: str,
        *,
        tokens: int,
        scratch: Path,
        peers: Sequence[PeerProcess],
        cases: Sequence[str] = tuple(STREAM),
    ) -> None:
        self.scratch = scratch
        self.cases = tuple(cases)
        inputs = scratch / "inputs.safetensors"
        write_inputs(model_folder, inputs, tokens)
        self.subject = load_subject(name, model_folder, inputs)
        self.plain = plain_forward(self.subject)
        self.own = {name: build(self.subject) for name, build in OWN.items()}
        self.failures: dict[tuple[str, str], str] = {}
        self.peers = {peer.name: peer for peer in peers}
        for peer in peers:
            try:
                peer.ask("open", name=name, folder=model_folder, inputs=str(inputs))
            except PeerFailedError as error:
                self.failures |= {(peer.name, case): str(error) for case in self.cases}
        self.notes = {peer.name: peer.notes for peer in peers}
        self.errors: dict[tuple[str, str], float] = {}
        self.very_first: dict[tuple[str, str], float] = {}
        self.first: dict[tuple[str, str], list[float]] = {}
        self.times: dict[tuple[str, str], list[Taken]] = {}
        # Beside which bare forward passes: those of the same process, in the same moments.
        self.beside: dict[tuple[str, str], list[Taken]] = {}

    def contestants(self) -> list[tuple[str, str]]:
        """Who answers which case."""
        own = [(name, case) for name, answers in self.own.items() for case in self.cases if case in answers]
        return own + [(peer, case) for peer in self.peers for case in self.cases]

    def check(self) -> None:
        """Compares all answers with the hooks', so that nobody is timed for doing nothing."""
        plain = self.plain()["logits"]
        for case in self.cases:
            expected = self.own["hooks"][case]()
            changed = (expected["logits"] - plain).abs().max().item() if "logits" in expected else 0.0
            # An edit that changes nothing would make every wrong answer right, and a read must change nothing.
            if (changed > 1e-3) != (case in CHANGING):
                raise AssertionError(f"{self.subject.name}: {case} changes the logits by {changed}")
            reference = self.scratch / f"{case}.safetensors"
            save_file({name: tensor.contiguous() for name, tensor in expected.items()}, reference)
            for name, answers in self.own.items():
                if case not in answers:
                    continue
                taken, found = timed(answers[case])
                self.very_first[name, case] = taken.clock
                self._judge(name, case, largest_error(found, expected))
            for name, peer in self.peers.items():
                if (name, case) in self.failures:
                    continue
                try:
                    reply = peer.ask("check", case=case, reference=str(reference))
                except PeerFailedError as error:
                    self.failures[name, case] = str(error)
                    continue
                self.very_first[name, case] = reply["seconds"]
                self._judge(name, case, reply["error"])

    def _judge(self, name: str, case: str, error: float) -> None:
        self.errors[name, case] = error
        if error <= TOLERANCE:
            return
        if name in self.own:
            raise AssertionError(f"{self.subject.name}: {name} is wrong by {error} in {case}")
        self.failures[name, case] = f"its answer is wrong by {error:.2g}"

    def firsts(self, repeats: int) -> None:
        """Times first calls on newly wrapped models: recording, planning, compiling, whatever there is."""
        for _ in range(repeats):
            for name, case in self.contestants():
                if (name, case) in self.failures or name == "hooks":
                    continue
                if name in self.peers:
                    spent = self.peers[name].ask("first", case=case)["seconds"]
                else:
                    spent = timed(OWN[name](self.subject)[case])[0].clock
                self.first.setdefault((name, case), []).append(spent)

    def round(self, shuffle: random.Random, *, keep: bool) -> None:
        """Each contestant once in each case, in a new order."""
        cases = list(self.cases)
        shuffle.shuffle(cases)
        for case in cases:
            processes = [None, *(name for name in self.peers if (name, case) not in self.failures)]
            shuffle.shuffle(processes)
            for process in processes:
                taken = (
                    self._own_turn(case, shuffle) if process is None else self._turn(process, case, shuffle)
                )
                if not keep:
                    continue
                plain = taken.pop("plain")
                for name, spent in taken.items():
                    self.times.setdefault((name, case), []).append(spent)
                    self.beside.setdefault((name, case), []).append(plain)

    def _own_turn(self, case: str, shuffle: random.Random) -> dict[str, Taken]:
        answers = {"plain": self.plain}
        answers |= {name: of_case[case] for name, of_case in self.own.items() if case in of_case}
        order = list(answers)
        shuffle.shuffle(order)
        self.plain()  # untimed, as in the peers' processes: brings the weights back into the processor's caches
        return {name: timed(answers[name])[0] for name in order}

    def _turn(self, peer: str, case: str, shuffle: random.Random) -> dict[str, Taken]:
        order = ["plain", "peer"]
        shuffle.shuffle(order)
        reply = self.peers[peer].ask("time", case=case, order=order)
        return {"plain": Taken(*reply["plain"]), peer: Taken(*reply["peer"])}

    def rows(self) -> list[dict[str, Any]]:
        """The measured figures; milliseconds throughout."""
        rows: list[dict[str, Any]] = []
        for case in self.cases:
            # The own processes' contestants of a case share their bare forward passes.
            base = self.beside["hooks", case]
            rows.append(self._row("plain", case, base, base))
            for name, of_case in self.contestants():
                if of_case != case:
                    continue
                if (name, case) in self.failures:
                    rows.append(self._name(name, case) | {"absent": self.failures[name, case]})
                    continue
                rows.append(self._row(name, case, self.times[name, case], self.beside[name, case]))
        return rows

    def _name(self, name: str, case: str) -> dict[str, Any]:
        return {"model": self.subject.name, "case": case, "contestant": name}

    def _row(self, name: str, case: str, taken: list[Taken], beside: list[Taken]) -> dict[str, Any]:
        times, base = [each.clock for each in taken], [each.clock for each in beside]
        spread, plain = Spread.of(times), Spread.of(base)
        row = self._name(name, case) | {
            "rounds": len(taken),
            "median_ms": spread.median,
            "min_ms": spread.low,
            "max_ms": spread.high,
            "plain_median_ms": plain.median,
            "ratio": Ratio.of(times, base).as_dict(),
            "work_ratio": Ratio.of([each.work for each in taken], [each.work for each in beside]).as_dict(),
            "ratio_of_fastest": spread.low / plain.low,
        }
        if name in self.own and name != "hooks":
            hooks = self.times["hooks", case]
            row["to_hooks"] = Ratio.of(times, [each.clock for each in hooks]).as_dict()
            row["work_to_hooks"] = Ratio.of(
                [each.work for each in taken], [each.work for each in hooks]
            ).as_dict()
        if (name, case) in self.first:
            row["first_ms"] = Spread.of(self.first[name, case]).median
        if name not in ("plain", "hooks"):
            row["first_in_process_ms"] = self.very_first[name, case] * 1e3
        if name != "plain":
            row["error"] = self.errors[name, case]
        note = self.notes.get(name, {}).get(case)
        return row | ({"note": note} if note else {})
