"""Activation patching: which layer, at which token, carries the difference between two prompts?

For every layer and every position, the residual stream of the clean prompt is put into a run of the corrupt prompt, and
we look how far that moves the answer back. All positions of a layer are patched in one forward pass: row i of the batch
is the corrupt prompt with position i patched.

    python -m examples.activation_patching
"""

from __future__ import annotations

import torch

import tracelens as tl

CLEAN = "The capital of France is"
CORRUPT = "The capital of Italy is"
ANSWERS = (" Paris", " Rome")


def logit_difference(model: tl.Model, right: int, wrong: int) -> tl.Value:
    """Inside a block: by how much the model prefers the right answer, for each row."""
    last = model.logits[:, -1]
    return last[:, right] - last[:, wrong]


def patch_all(
    model: tl.Model, clean: str, corrupt: str, answers: tuple[str, str], site: str = "resid_post"
) -> torch.Tensor:
    """How much of the difference each patch restores, [layers, positions]: 0 is the corrupt run, 1 the clean one."""
    right, wrong = (model.tokenizer.encode(answer, add_special_tokens=False)[0] for answer in answers)

    with model.trace(clean):
        donors = getattr(model.layers[:], site).save()  # [layers, 1, P, D]
        best = logit_difference(model, right, wrong).save()
    with model.trace(corrupt):
        worst = logit_difference(model, right, wrong).save()

    n_positions = donors.shape[2]
    here = torch.eye(n_positions, dtype=torch.bool)[:, :, None]  # row i: True at position i
    restored: list[torch.Tensor] = []
    for layer in range(model.n_layers):
        with model.trace([corrupt] * n_positions):
            stream = getattr(model.layers[layer], site)
            setattr(model.layers[layer], site, tl.where(here, donors[layer], stream))
            patched = logit_difference(model, right, wrong).save()
        restored.append((patched.value - worst.value) / (best.value - worst.value))
    return torch.stack(restored)


def main(model: tl.Model | None = None) -> torch.Tensor:
    """Prints the grid of layers and tokens; gives it as a tensor."""
    model = model or tl.load("smollm2-135m")
    grid = patch_all(model, CLEAN, CORRUPT, ANSWERS)
    words = [model.tokenizer.decode([token]) for token in model.tokenizer.encode(CORRUPT)]
    print(f"share of the answer restored by patching {CLEAN!r} into {CORRUPT!r}")
    print("layer  " + "".join(f"{word:>10}" for word in words))
    for layer, row in enumerate(grid.tolist()):
        print(f"{layer:5}  " + "".join(f"{share:10.2f}" for share in row))
    return grid


if __name__ == "__main__":
    main()
