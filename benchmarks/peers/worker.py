"""A process that holds one peer and times it on request: ``python -m benchmarks.peers.worker nnsight``.

Requests and replies are lines of JSON on standard input and output. Each timing comes with one of the bare forward in
the same process, so that their ratio does not depend on which environment or process it was taken in.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import sys
from collections.abc import Callable
from typing import Any, TextIO

PEERS = {
    "hooks": "benchmarks.peers.by_hooks",
    "nnsight": "benchmarks.peers.with_nnsight",
    "transformer_lens": "benchmarks.peers.with_transformer_lens",
    "hooks_text": "benchmarks.peers.hooks_text",
    "nnsight_text": "benchmarks.peers.nnsight_text",
    "transformer_lens_text": "benchmarks.peers.transformer_lens_text",
    "nnsight_lens": "benchmarks.peers.nnsight_lens",
    "transformer_lens_lens": "benchmarks.peers.transformer_lens_lens",
    "hooks_steering": "benchmarks.peers.hooks_steering",
    "nnsight_steering": "benchmarks.peers.nnsight_steering",
    "steering_vectors_steering": "benchmarks.peers.steering_vectors_steering",
}


class Worker:
    """Answers the requests for one peer."""

    def __init__(self, peer: Any) -> None:
        self.peer = peer
        self.subject: Any = None
        self.plain: Callable[[], Any] | None = None
        self.answers: dict[str, Callable[[], Any]] = {}

    def open(self, name: str, folder: str, inputs: str) -> dict[str, Any]:
        """Loads a model and prepares the peer's answers."""
        from benchmarks.peers.subject import load_subject, plain_forward

        self.answers = {}
        self.subject = load_subject(name, folder, inputs)
        self.plain = plain_forward(self.subject)
        self.answers = self.peer.build(self.subject)
        return {"cases": list(self.answers)}

    def check(self, case: str, reference: str) -> dict[str, Any]:
        """Runs a case for the first time; says how long that took and how far it is from the reference."""
        from safetensors.torch import load_file

        from benchmarks.peers.subject import largest_error, timed

        taken, results = timed(self.answers[case])
        return {"seconds": taken.clock, "error": largest_error(results, load_file(reference))}

    def first(self, case: str) -> dict[str, Any]:
        """How long a case takes the first time on a newly wrapped model."""
        from benchmarks.peers.subject import timed

        return {"seconds": timed(self.peer.build(self.subject)[case])[0].clock}

    def time(self, case: str, order: list[str]) -> dict[str, Any]:
        """One call each of the bare forward and the peer, in the given order."""
        from benchmarks.peers.subject import timed

        assert self.plain is not None
        answers = {"plain": self.plain, "peer": self.answers[case]}
        # The processor's caches hold another process's data now; the first call would pay for that.
        self.plain()
        return {each: timed(answers[each])[0] for each in order}


def serve(requests: TextIO, replies: TextIO, peer_name: str, threads: int) -> None:
    """Answers one line of ``requests`` after another until there are none."""

    def reply(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    try:
        import torch
        import transformers

        torch.set_num_threads(threads)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        peer = importlib.import_module(PEERS[peer_name])
    except ImportError as error:
        reply({"absent": f"{type(error).__name__}: {error}"})
        return
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    reply({"version": peer.version(), "versions": versions, "notes": getattr(peer, "NOTES", {})})
    worker: Any = Worker(peer)
    if peer_name.endswith(("_text", "_lens")) and peer_name != "transformer_lens":
        from benchmarks.peers.text_worker import TextWorker

        worker = TextWorker(peer)
    elif peer_name.endswith("_steering"):
        from benchmarks.peers.steering_worker import SteeringWorker

        worker = SteeringWorker(peer)
    for line in requests:
        request = json.loads(line)
        try:
            reply(getattr(worker, request.pop("do"))(**request))
        except (
            Exception
        ) as error:  # whatever goes wrong in a peer is its result for this case, not the end of the run
            reply({"failure": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"})


def main() -> None:
    # What a library prints must not land between the replies: they get the real standard output for themselves.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.stdin, replies, sys.argv[1], int(sys.argv[2]))


if __name__ == "__main__":
    main()
