"""Ours beside the steering-vectors package: vectors from the same pairs, and logits steered with them.

The package wants an older transformers than ours and still runs with it:

    python -m pip install --no-deps steering-vectors scikit-learn scipy joblib threadpoolctl narwhals
    python -m benchmarks.peers.steering_vectors_check
    python -m benchmarks.peers.steering_vectors_check --record tests/data/steering_vectors.safetensors

The second keeps what the package finds in a tiny model of the tests, which hold ours to it without the package.
It has no positions in padded batches that hold for both sides of the padding, so prompts go to it one by one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version
from itertools import product
from typing import Any

import steering_vectors
import torch
from safetensors.torch import save_file
from torch import Tensor

import tracelens as tl
from tests.steering.recorded import (
    RECORDED_PAIRS,
    RECORDED_PROMPTS,
    RECORDED_STRENGTH,
    RECORDED_VOCABULARY,
)
from tests.support.families import FAMILIES
from tests.support.tokenizers import byte_level_bpe
from tracelens.view import Table, text

PAIRS = [
    (f"{thing} was", " wonderful", " terrible")
    for thing in (
        "The film",
        "The meal",
        "Our stay",
        "The new album",
        "The weather",
        "My first day",
        "The show",
    )
]
PROMPTS = [
    "I saw the film, and it was",
    "The food in this restaurant is",
    "My new neighbours are",
    "The hotel was",
]
STRENGTHS = (-2.0, 0.0, 3.0)
LAYERS = {
    "resid_post": "decoder_block",
    "attn_out": "self_attn",
    "mlp_out": "mlp",
    "post_ln": "post_attention_layernorm",
}
OPERATORS: dict[str, Any] = {
    "add": None,
    "ablate": steering_vectors.ablation_operator,
    "ablate_then_add": steering_vectors.ablation_then_addition_operator,
}
POSITIONS: dict[str, Any] = {"all": None, "slice": slice(1, 3), "last": [-1]}
OURS: dict[str, Any] = {"all": "all", "slice": slice(1, 3), "last": -1}
TOLERANCE = 1e-4


def theirs_steered(
    model: tl.Model,
    vector: Any,
    strength: float,
    operator: Any,
    positions: Any,
    prompts: Sequence[str] = PROMPTS,
) -> Tensor:
    """The logits [prompts, V] after the last token."""
    found: list[Tensor] = []
    for prompt in prompts:
        ids = torch.tensor([[token.id for token in model.tokens(prompt)[0]]])
        how = None if operator is None else operator()
        where = {} if positions is None else {"token_indices": positions}
        # Its apply() has a default that excludes token_indices.
        handle = vector.patch_activations(model.hf, multiplier=strength, operator=how, **where)
        try:
            with torch.no_grad():
                found.append(model.hf(ids).logits[0, -1])
        finally:
            handle.remove()
    return torch.stack(found)


def ours_steered(model: tl.Model, vector: Any, strength: float, operator: str, positions: Any) -> Tensor:
    """The same by this library, all prompts in one batch."""
    with model.trace(PROMPTS) as t:
        vector.apply(t, strength, operator=operator, positions=positions)
        logits = model.logits[:, -1].save()
    return logits.value


def record(path: str) -> None:
    """Writes the package's vectors and steered logits of a tiny model, by the names that the test reads."""
    model = tl.wrap(FAMILIES["llama"].build(vocab_size=RECORDED_VOCABULARY), byte_level_bpe())
    samples = [(prompt + yes, prompt + no) for prompt, yes, no in RECORDED_PAIRS]
    found: dict[str, Tensor] = {}
    for site, kind in LAYERS.items():
        theirs = steering_vectors.train_steering_vector(model.hf, model.tokenizer, samples, layer_type=kind)
        for layer, direction in theirs.layer_activations.items():
            found[f"{site}.{layer}"] = direction
        for (name, operator), (where, positions) in product(OPERATORS.items(), POSITIONS.items()):
            logits = theirs_steered(model, theirs, RECORDED_STRENGTH, operator, positions, RECORDED_PROMPTS)
            found[f"{site} {name} {where}"] = logits
    found["plain"] = theirs_steered(
        model, steering_vectors.SteeringVector({}), 0.0, None, None, RECORDED_PROMPTS
    )
    save_file(found, path, {"steering-vectors": version("steering-vectors"), "torch": torch.__version__})


def off(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, over the largest number."""
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 12, 20])
    parser.add_argument("--record", metavar="FILE")
    given = parser.parse_args()
    if given.record is not None:
        record(given.record)
        return 0
    model = tl.load(given.model)
    rows: list[tuple[str, ...]] = []
    worst = 0.0
    for site, kind in LAYERS.items():
        samples = [(prompt + yes, prompt + no) for prompt, yes, no in PAIRS]
        theirs = steering_vectors.train_steering_vector(
            model.hf, model.tokenizer, samples, layers=given.layers, layer_type=kind
        )
        ours = tl.steering.extract(model, PAIRS, sites=site, layers=given.layers)
        same = max(off(ours[site, layer], theirs.layer_activations[layer]) for layer in given.layers)
        rows.append((site, "vectors", "", f"{same:.1e}"))
        worst = max(worst, same)
        back = tl.steering.from_steering_vectors(theirs, model)
        for name, operator in OPERATORS.items():
            for where, positions in POSITIONS.items():
                error = 0.0
                for strength in STRENGTHS:
                    if name != "add" and strength == 0:
                        continue  # the package divides by the length of k v
                    wanted = theirs_steered(model, theirs, strength, operator, positions)
                    k = 1.0 if name == "ablate" else strength
                    error = max(error, off(ours_steered(model, back, k, name, OURS[where]), wanted))
                rows.append((site, name, where, f"{error:.1e}"))
                worst = max(worst, error)
    print(f"steering-vectors {version('steering-vectors')}, largest difference over the largest number")
    print(text(Table(("site", "what", "positions", "difference"), tuple(rows))))
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
