"""What the steering-vectors package was asked when tests/data/steering_vectors.safetensors was made."""

from __future__ import annotations

RECORDED_VOCABULARY = 420
RECORDED_STRENGTH = 1.5
RECORDED_PAIRS = [
    ("The capital of France is", " Paris", " Rome"),
    ("Paris is the capital of", " France", " Italy"),
    ("When Mary and John went to the store,", " Mary", " John"),
    ("The old theory of the", " capital", " thing"),
]
RECORDED_PROMPTS = ["Rome is the capital of", "Is Rome older than", "John gave a drink to the old"]
