"""What a peer's process does for the benchmark of steering."""

from __future__ import annotations

from typing import Any

from benchmarks.live_memory import most_live
from benchmarks.peers.steering import Answers, Steering
from benchmarks.peers.subject import largest_error, timed


class SteeringWorker:
    """Answers the requests for one peer."""

    def __init__(self, peer: Any) -> None:
        self.peer = peer
        self.answers: Answers = {}

    def open(self, folder: str, inputs: str) -> dict[str, Any]:
        """Loads a model and prepares the peer's answers."""
        self.answers = self.peer.build(Steering.load(folder, inputs))
        return {"cases": list(self.answers)}

    def check(self, case: str, reference: str) -> dict[str, Any]:
        """Runs a case for the first time: how far it is from the reference, and the most bytes that it takes."""
        from safetensors.torch import load_file

        most, _, results = most_live(self.answers[case])
        return {"bytes": most, "error": largest_error(results, load_file(reference))}

    def time(self, case: str) -> dict[str, Any]:
        """One call."""
        return {"seconds": timed(self.answers[case])[0]}
