"""The steering-vectors package: its training and its patches, as its documentation writes them."""

from __future__ import annotations

from functools import partial
from importlib.metadata import version as installed
from typing import Any

import steering_vectors
import torch
from steering_vectors import SteeringVectorTrainingSample

from benchmarks.peers.steering import Answers, Steering, named
from benchmarks.peers.subject import Results

NAME = "steering_vectors"
LAYERS: dict[str, Any] = {"post_ln": "post_attention_layernorm", "resid_post": "decoder_block"}


def version() -> str:
    return installed("steering-vectors")


def build(subject: Steering) -> Answers:
    """A function for each case, on a model of its own: its hooks write into what the model computes."""
    own = subject.separate()
    return {"extract": partial(extract, own), "sweep": partial(sweep, own)}


def extract(subject: Steering) -> Results:
    """It trains at one site at a time, and runs the two classes one after the other."""
    samples: list[Any] = []
    for pair in subject.train:
        prompt, positive, negative = pair
        label = len(subject.row(pair).positive) - 1
        samples.append(SteeringVectorTrainingSample(prompt + positive, prompt + negative, label, label))
    # Texts of like lengths together, as everybody does.
    samples.sort(key=lambda sample: sample.read_positive_token_index)
    found: dict[str, torch.Tensor] = {}
    for site, kind in LAYERS.items():
        made = steering_vectors.train_steering_vector(
            subject.model, subject.tokenizer, samples, layer_type=kind, batch_size=subject.batch
        )
        found[site] = torch.stack([made.layer_activations[layer] for layer in range(subject.n_layers)])
    return named(found)


@torch.no_grad()
def sweep(subject: Steering) -> Results:
    """A patch for each multiplier; padded on the left, so that the last position is the decision of every prompt."""
    vector = steering_vectors.SteeringVector({subject.middle: subject.vector})
    found = torch.zeros(len(subject.test), len(subject.multipliers))
    for numbers, rows in subject.batches(subject.test):
        given = subject.padded([row.prompt for row in rows])
        for column, multiplier in enumerate(subject.multipliers):
            patch = vector.patch_activations(subject.model, multiplier=multiplier, token_indices=[-1])
            try:
                logits = subject.model(given.ids, logits_to_keep=1, **given.options()).logits[:, -1]
            finally:
                patch.remove()
            found[numbers, column] = subject.propensity(logits, rows)
    return {"propensity": found}
