"""Watching a generation: steered in some of its steps, printed while it is written, with what each step had.

The vector is added in a window of steps. Each step's line has the token that was chosen, its probability, and how
far the stream points along the vector: high within the window, and back to what it was after it.

    python -m examples.watch_a_generation
"""

from __future__ import annotations

import torch

import tracelens as tl

PROMPT = "I watched the new film last night, and I thought that it was"
LAYER = 14


def steering_vector(model: tl.Model, layer: int) -> torch.Tensor:
    """What differs [D] in the stream at the last token of two sentences."""
    with model.trace(["That was wonderful. I loved it", "That was terrible. I hated it"]):
        ends = model.layers[layer].resid_post[:, -1].save()
    return ends.value[0] - ends.value[1]


def main(
    model: tl.Model | None = None, *, first: int = 4, last: int = 8, new_tokens: int = 14
) -> tuple[list[str], list[float]]:
    """Prints the steps; gives what was written, and how far the stream points along the vector in each step."""
    model = model or tl.load("smollm2-135m")
    v = steering_vector(model, LAYER)
    with model.record(generation=True) as r:
        r.steps[first:last].layers[LAYER].resid_post += v
        newest = model.layers[LAYER].resid_post[:, -1]
        (newest @ (v / v.norm())).save("along")
        model.logits[:, -1].softmax(-1).max(-1).values.save("probability")

    pieces: list[str] = []
    along: list[float] = []
    print(PROMPT)
    for event in model.stream(PROMPT, r, max_new_tokens=new_tokens):
        pieces.append(event.text)
        along.append(float(event["along"]))
        mark = "+ v" if first <= event.step < last else ""
        bar = "#" * max(0, round(along[-1]))
        print(f"{event.step:3} {event.text!r:14} p {float(event['probability']):.2f}  {mark:3}  {bar}")
    return pieces, along


if __name__ == "__main__":
    main()
