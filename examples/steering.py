"""Steering: a vector from contrast pairs, added to the residual stream while the model writes.

The vector is the mean difference between the last tokens of positive and negative prompts. How it moves what the model
says next is measured as well as shown: a sweep over strengths, with the same structure of block each time.

    python -m examples.steering
"""

from __future__ import annotations

import torch

import tracelens as tl

POSITIVE = ["That was wonderful. I loved it", "What a delight. I enjoyed it", "Simply great. I liked it"]
NEGATIVE = ["That was terrible. I hated it", "What a bore. I endured it", "Simply bad. I disliked it"]
PROMPT = "I watched the new film last night, and I thought that it was"
WORDS = (" great", " terrible")
LAYER = 12


def steering_vector(model: tl.Model, layer: int) -> torch.Tensor:
    """The mean difference [D] of the stream at the last token, positive prompts less negative ones."""
    with model.trace(POSITIVE + NEGATIVE):  # of different lengths: -1 is the last token of each
        ends = model.layers[layer].resid_post[:, -1].save()
    return ends.value[: len(POSITIVE)].mean(0) - ends.value[len(POSITIVE) :].mean(0)


def preference(model: tl.Model, v: torch.Tensor, strength: torch.Tensor, layer: int) -> float:
    """The logit of the first word less that of the second, after ``PROMPT`` with ``strength * v`` added."""
    liked, disliked = (model.tokenizer.encode(word, add_special_tokens=False)[0] for word in WORDS)
    with model.trace(PROMPT):
        model.layers[layer].resid_post += strength * v
        last = model.logits[0, -1]
        difference = (last[liked] - last[disliked]).save()
    return float(difference)


def main(model: tl.Model | None = None, layer: int = LAYER, new_tokens: int = 16) -> list[float]:
    """Prints the sweep and three continuations; gives the preferences in the order of the strengths."""
    model = model or tl.load("smollm2-135m")
    v = steering_vector(model, layer)
    strengths = torch.linspace(-2, 2, 5)
    found = [preference(model, v, strength, layer) for strength in strengths]
    print(f"logit of {WORDS[0]!r} less logit of {WORDS[1]!r}, by strength")
    for strength, value in zip(strengths.tolist(), found, strict=True):
        print(f"{strength:6.1f}  {value:7.2f}")
    for strength in (-1.5, 0.0, 1.5):
        with model.generate(PROMPT, max_new_tokens=new_tokens, repetition_penalty=1.1) as t:
            model.layers[layer].resid_post += strength * v
        print(f"{strength:6.1f}  {t.text!r}")
    return found


if __name__ == "__main__":
    main()
