"""What a peer's process does for the benchmark of generation."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

from benchmarks.peers.laps import in_turns
from benchmarks.peers.text import WRITTEN, Text, difference, plain


class TextWorker:
    """Answers the requests for one peer: in each timing, plain generation of this process takes turns with it."""

    def __init__(self, peer: Any) -> None:
        self.peer = peer
        self.text: Text | None = None
        self.bare: dict[bool, WRITTEN] = {}
        self.answers: dict[str, WRITTEN] = {}

    def open(self, folder: str, inputs: str) -> dict[str, Any]:
        """Loads a model and prepares the peer's answers."""
        self.answers = {}
        self.text = Text.load(folder, inputs)
        self.bare = {cached: plain(self.text.separate(), cached=cached) for cached in (True, False)}
        self.answers = self.peer.build(self.text)
        return {"cases": list(self.answers)}

    def time(self, case: str, new: int, seed: int, reference: str | None = None) -> dict[str, Any]:
        """A generation of plain transformers and one of the peer; how far the peer is from the reference."""
        both = {"plain": self.bare[case != "uncached"], "peer": self.answers[case]}
        found = in_turns({name: partial(each, new) for name, each in both.items()}, random.Random(seed))
        reply: dict[str, Any] = {name: laps.laps for name, laps in found.items()}
        if reference is not None:
            from safetensors.torch import load_file

            reply["error"] = difference(found["peer"].results, load_file(reference))
        return reply
