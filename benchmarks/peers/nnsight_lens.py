"""nnsight around generation, for the logit lens of every layer in every step; the head reads all layers at once."""

from __future__ import annotations

from importlib.metadata import version as installed
from typing import Any

import nnsight
import torch
from nnsight import NNsight

from benchmarks.peers.laps import Tick
from benchmarks.peers.lens_text import Reading, answer
from benchmarks.peers.subject import Results
from benchmarks.peers.text import WRITTEN, Text, processors

NAME = "nnsight"


def version() -> str:
    return installed("nnsight")


def build(text: Text) -> dict[str, WRITTEN]:
    own = text.separate()
    model: Any = NNsight(own.model)
    reading = Reading(text.separate())  # not nnsight's modules: what they do is not asked for
    ids, n_layers = own.ids, own.n_layers

    def lens(new: int, tick: Tick) -> Results:
        given = {"logits_processor": processors(tick), **own.options(new)}
        generate, mask = own.model.generate, torch.ones_like(ids)
        rows = n_layers * ids.shape[1]
        with torch.no_grad(), model.trace(ids, fn=generate, attention_mask=mask, **given) as tracer:
            found = nnsight.save(list[tuple[torch.Tensor, torch.Tensor]]())
            for _ in tracer.iter[:new]:
                states = torch.stack([model.model.layers[layer].output[0] for layer in range(n_layers)])
                found.append(reading.top(states, rows=rows))
            tokens = nnsight.save(tracer.result)
        values, best = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
        return answer(tokens[:, ids.shape[1] :], values, best)

    return {"lens": lens}
