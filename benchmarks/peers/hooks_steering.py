"""Steering vectors by hand: torch hooks around batched forward passes. The answer that all others must give."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from benchmarks.peers.steering import Answers, Steering, named
from benchmarks.peers.subject import Results

NAME = "hooks"


def version() -> str:
    return torch.__version__


def build(subject: Steering) -> Answers:
    """A function for each case."""
    return {"extract": partial(extract, subject), "sweep": partial(sweep, subject)}


@torch.no_grad()
def extract(subject: Steering) -> Results:
    """Running sums of what is at the last position, of both answers of each pair; the unembedding is left out."""
    shape = (subject.n_layers, subject.model.config.hidden_size)
    sums = {site: torch.zeros(shape, dtype=torch.float64) for site in ("post_ln", "resid_post")}
    half = 0

    def adding(site: str, layer: int) -> Any:
        def hook(module: Any, args: Any, output: torch.Tensor) -> None:
            last = output[:, -1].double()
            sums[site][layer] += last[:half].sum(0) - last[half:].sum(0)

        return hook

    handles: list[Any] = []
    try:
        for layer, block in enumerate(subject.blocks):
            norm = block.post_attention_layernorm
            handles.append(norm.register_forward_hook(adding("post_ln", layer)))
            handles.append(block.register_forward_hook(adding("resid_post", layer)))
        for _, rows in subject.batches(subject.train):
            half = len(rows)
            given = subject.padded([row.positive for row in rows] + [row.negative for row in rows])
            subject.model.model(given.ids, **given.options())
    finally:
        for handle in handles:
            handle.remove()
    return named({site: total / len(subject.train) for site, total in sums.items()})


@torch.no_grad()
def sweep(subject: Steering) -> Results:
    """One forward pass for each batch and multiplier; logits of the last position only."""
    found = torch.zeros(len(subject.test), len(subject.multipliers))
    block = subject.blocks[subject.middle]
    for numbers, rows in subject.batches(subject.test):
        given = subject.padded([row.prompt for row in rows])
        for column, multiplier in enumerate(subject.multipliers):
            added = multiplier * subject.vector

            def add(
                module: Any, args: Any, output: torch.Tensor, added: torch.Tensor = added
            ) -> torch.Tensor:
                output = output.clone()
                output[:, -1] += added
                return output

            handle = block.register_forward_hook(add)
            try:
                logits = subject.model(given.ids, logits_to_keep=1, **given.options()).logits[:, -1]
            finally:
                handle.remove()
            found[numbers, column] = subject.propensity(logits, rows)
    return {"propensity": found}
