"""tracelens' own generation, case by case, as users write it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import tracelens as tl
from benchmarks.peers.laps import Tick
from benchmarks.peers.subject import Results
from benchmarks.peers.text import WRITTEN, Text, processors


def build(text: Text) -> dict[str, WRITTEN]:
    """A function for each case, each on a model of its own, so that they can take turns."""
    vector, middle = text.vector, text.middle

    def nothing(model: Any) -> None:
        pass

    def read_one(model: Any) -> None:
        model.layers[middle : middle + 1].resid_post.save("stream")

    def read_all(model: Any) -> None:
        model.layers[:].resid_post.save("stream")

    def steer_all(model: Any) -> None:
        model.layers[:].resid_post += vector

    def both(model: Any) -> None:
        model.layers[:].resid_post.save("stream")
        model.layers[:].resid_post += vector

    return {
        "nothing": written(text, nothing),
        "read-one": written(text, read_one),
        "read-all": written(text, read_all),
        "steer-all": written(text, steer_all),
        "both": written(text, both),
        "uncached": written(text, read_all, cached=False),
    }


def written(text: Text, block: Callable[[Any], None], *, cached: bool = True) -> WRITTEN:
    model: Any = tl.wrap(text.separate().model)

    def write(new: int, tick: Tick) -> Results:
        with model.generate(
            text.ids, logits_processor=processors(tick), use_cache=cached, **text.options(new)
        ) as t:
            block(model)
        return {"tokens": torch.tensor(t.tokens).view(len(text.ids), new), **t.results}

    return write
