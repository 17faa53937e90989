"""Attribution patching: what activation patching would find, from one backward pass.

Putting a clean activation into a corrupt run changes a metric by about its gradient times the difference of the two
activations. The gradients at all layers and all positions come from one backward pass, where activation patching needs
a run for each. The estimate is exact where the metric is linear in the activation, and worst where much of the stream
is replaced at once: so it is used for what the sublayers add, and the best candidates are patched in earnest.

    python -m examples.attribution_patching
"""

from __future__ import annotations

from collections.abc import Callable

import torch

import tracelens as tl
from examples.activation_patching import ANSWERS, CLEAN, CORRUPT, logit_difference, patch_all

Metric = Callable[[tl.Model], tl.Value]
"""Inside a block: one number for each row."""


def attribute(model: tl.Model, clean: str, corrupt: str, metric: Metric, site: str) -> torch.Tensor:
    """By how much each patch would change the metric of the corrupt run, to first order: [layers, positions]."""
    with model.trace(clean):
        donors = getattr(model.layers[:], site).save()  # [layers, 1, P, D]
    with model.trace(corrupt):
        own = getattr(model.layers[:], site)
        gradients = tl.grad(metric(model).sum(), own)
        change = (gradients * (tl.per_layer(donors.value) - own)).sum(-1).save()
    return change.value[:, 0]


def main(model: tl.Model | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Prints the estimate beside what patching finds, for what the MLPs add; gives both [layers, positions]."""
    model = model or tl.load("smollm2-135m")
    right, wrong = (model.tokenizer.encode(answer, add_special_tokens=False)[0] for answer in ANSWERS)

    def metric(model: tl.Model) -> tl.Value:
        return logit_difference(model, right, wrong)

    found = []
    for prompt in (CLEAN, CORRUPT):
        with model.trace(prompt):
            found.append(metric(model).save())
    span = found[0].value - found[1].value
    estimate = attribute(model, CLEAN, CORRUPT, metric, "mlp_out") / span
    patched = patch_all(model, CLEAN, CORRUPT, ANSWERS, site="mlp_out")

    words = [model.tokenizer.decode([token]) for token in model.tokenizer.encode(CORRUPT)]
    print(
        f"share of the answer restored by what an MLP adds, {CLEAN!r} into {CORRUPT!r}: estimated / patched"
    )
    print("layer  " + "".join(f"{word:>16}" for word in words))
    for layer, rows in enumerate(zip(estimate.tolist(), patched.tolist(), strict=True)):
        print(f"{layer:5}  " + "".join(f"{a:8.2f} /{b:6.2f}" for a, b in zip(*rows, strict=True)))
    agreement = torch.corrcoef(torch.stack([estimate.flatten(), patched.flatten()]))[0, 1].item()
    print(f"correlation {agreement:.2f}")
    return estimate, patched


if __name__ == "__main__":
    main()
