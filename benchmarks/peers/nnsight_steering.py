"""Steering vectors with nnsight: traces around the same batches as those of the hooks."""

from __future__ import annotations

from functools import partial
from importlib.metadata import version as installed
from typing import Any

import nnsight
import torch
from nnsight import NNsight

from benchmarks.peers.steering import Answers, Steering, named
from benchmarks.peers.subject import Results

NAME = "nnsight"


def version() -> str:
    return installed("nnsight")


def build(subject: Steering) -> Answers:
    """A function for each case, both on one wrapped model."""
    own = subject.separate()
    model: Any = NNsight(own.model)
    return {"extract": partial(extract, own, model), "sweep": partial(sweep, own, model)}


@torch.no_grad()
def extract(subject: Steering, model: Any) -> Results:
    shape = (subject.n_layers, subject.model.config.hidden_size)
    sums = {site: torch.zeros(shape, dtype=torch.float64) for site in ("post_ln", "resid_post")}
    n_layers = subject.n_layers
    for _, rows in subject.batches(subject.train):
        half = len(rows)
        given = subject.padded([row.positive for row in rows] + [row.negative for row in rows])
        with model.trace(given.ids, logits_to_keep=1, **given.options()):
            norms, streams = nnsight.save(list[Any]()), nnsight.save(list[Any]())
            for layer in range(n_layers):
                block = model.model.layers[layer]
                norms.append(block.post_attention_layernorm.output[:, -1].double())
                streams.append(block.output[:, -1].double())
        for site, read in (("post_ln", norms), ("resid_post", streams)):
            last = torch.stack(read)
            sums[site] += last[:, :half].sum(1) - last[:, half:].sum(1)
    return named({site: total / len(subject.train) for site, total in sums.items()})


@torch.no_grad()
def sweep(subject: Steering, model: Any) -> Results:
    found = torch.zeros(len(subject.test), len(subject.multipliers))
    middle = subject.middle
    for numbers, rows in subject.batches(subject.test):
        given = subject.padded([row.prompt for row in rows])
        for column, multiplier in enumerate(subject.multipliers):
            added = multiplier * subject.vector
            with model.trace(given.ids, logits_to_keep=1, **given.options()):
                model.model.layers[middle].output[:, -1] += added
                logits = nnsight.save(model.output.logits[:, -1])
            found[numbers, column] = subject.propensity(logits, rows)
    return {"propensity": found}
