"""Vectors and steered logits beside those of the steering-vectors package 0.12.2, which were recorded.

The package pins a transformers that excludes ours, so it cannot stand in this environment;
``benchmarks/peers/steering_vectors_check.py`` made the recording, and compares both on a real model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import tracelens as tl
from tests.steering.recorded import (
    RECORDED_PAIRS,
    RECORDED_PROMPTS,
    RECORDED_STRENGTH,
    RECORDED_VOCABULARY,
)
from tests.support.families import FAMILIES, LAYERS
from tests.support.tokenizers import byte_level_bpe

SITES = ("resid_post", "attn_out", "mlp_out", "post_ln")
POSITIONS: dict[str, Any] = {"all": "all", "slice": slice(1, 3), "last": -1}


@pytest.fixture(scope="module")
def model() -> tl.Model:
    return tl.wrap(FAMILIES["llama"].build(vocab_size=RECORDED_VOCABULARY), byte_level_bpe())


@pytest.fixture(scope="module")
def theirs() -> dict[str, Tensor]:
    return load_file(Path(__file__).parents[1] / "data" / "steering_vectors.safetensors")


def logits(model: tl.Model, vector: Any = None, strength: float = 0.0, **how: Any) -> Tensor:
    with model.trace(RECORDED_PROMPTS) as t:
        if vector is not None:
            vector.apply(t, strength, **how)
        found = model.logits[:, -1].save()
    return found.value


def test_the_recording_is_of_this_model(model: tl.Model, theirs: dict[str, Tensor]) -> None:
    torch.testing.assert_close(logits(model), theirs["plain"], atol=1e-5, rtol=1e-5)


def test_mean_differences_are_theirs(model: tl.Model, theirs: dict[str, Tensor]) -> None:
    ours = tl.steering.extract(model, RECORDED_PAIRS, sites=SITES)
    for site in SITES:
        for layer in range(LAYERS):
            torch.testing.assert_close(ours[site, layer], theirs[f"{site}.{layer}"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("operator", ["add", "ablate", "ablate_then_add"])
@pytest.mark.parametrize("site", SITES)
def test_steered_logits_are_theirs(
    site: str, operator: str, model: tl.Model, theirs: dict[str, Tensor]
) -> None:
    places = {(site, layer): theirs[f"{site}.{layer}"] for layer in range(LAYERS)}
    vector = tl.steering.SteeringVector.from_directions(model, places)
    strength = 1.0 if operator == "ablate" else RECORDED_STRENGTH  # ablation has no other
    for name, positions in POSITIONS.items():
        wanted = theirs[f"{site} {operator} {name}"]
        assert (wanted - theirs["plain"]).abs().max() > 1e-3
        found = logits(model, vector, strength, operator=operator, positions=positions)
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-5)
