"""nnsight around generation, as its documentation writes each case. Gradients are off, as in all others.

The trace runs the model's own ``generate``; nnsight's wrapper for transformers would add a pipeline and a streamer.
"""

from __future__ import annotations

from importlib.metadata import version as installed
from typing import Any

import nnsight
import torch
from nnsight import NNsight

from benchmarks.peers.laps import Tick
from benchmarks.peers.subject import Results
from benchmarks.peers.text import WRITTEN, Text, processors

NAME = "nnsight"


def version() -> str:
    return installed("nnsight")


def build(text: Text) -> dict[str, WRITTEN]:
    """A function for each case, all on one wrapped model."""
    own = text.separate()
    model: Any = NNsight(own.model)
    ids, vector, middle, n_layers = own.ids, own.vector, own.middle, own.n_layers
    length = ids.shape[1]

    def given(new: int, tick: Tick) -> dict[str, Any]:
        mask = torch.ones_like(ids)
        generate = own.model.generate
        return {
            "fn": generate,
            "attention_mask": mask,
            "logits_processor": processors(tick),
            **own.options(new),
        }

    def results(tokens: torch.Tensor, steps: list[list[torch.Tensor]]) -> Results:
        streams = [torch.cat(parts, 1) for parts in zip(*steps, strict=True)]
        return {"tokens": tokens[:, length:], "stream": torch.stack(streams)}

    def nothing(new: int, tick: Tick) -> Results:
        with torch.no_grad(), model.trace(ids, **given(new, tick)) as tracer:
            tokens = nnsight.save(tracer.result)
        return {"tokens": tokens[:, length:]}

    def read_one(new: int, tick: Tick) -> Results:
        with torch.no_grad(), model.trace(ids, **given(new, tick)) as tracer:
            steps = nnsight.save(list[list[torch.Tensor]]())
            for _ in tracer.iter[:new]:
                steps.append([model.model.layers[middle].output])
            tokens = nnsight.save(tracer.result)
        return results(tokens, steps)

    def read_all(new: int, tick: Tick) -> Results:
        with torch.no_grad(), model.trace(ids, **given(new, tick)) as tracer:
            steps = nnsight.save(list[list[torch.Tensor]]())
            for _ in tracer.iter[:new]:
                steps.append([model.model.layers[layer].output for layer in range(n_layers)])
            tokens = nnsight.save(tracer.result)
        return results(tokens, steps)

    def steer_all(new: int, tick: Tick) -> Results:
        with torch.no_grad(), model.trace(ids, **given(new, tick)) as tracer:
            for _ in tracer.iter[:new]:
                for layer in range(n_layers):
                    model.model.layers[layer].output = model.model.layers[layer].output + vector
            tokens = nnsight.save(tracer.result)
        return {"tokens": tokens[:, length:]}

    def both(new: int, tick: Tick) -> Results:
        with torch.no_grad(), model.trace(ids, **given(new, tick)) as tracer:
            steps = nnsight.save(list[list[torch.Tensor]]())
            for _ in tracer.iter[:new]:
                kept = []
                for layer in range(n_layers):
                    output = model.model.layers[layer].output
                    kept.append(output)
                    model.model.layers[layer].output = output + vector
                steps.append(kept)
            tokens = nnsight.save(tracer.result)
        return results(tokens, steps)

    return {
        "nothing": nothing,
        "read-one": read_one,
        "read-all": read_all,
        "steer-all": steer_all,
        "both": both,
    }
