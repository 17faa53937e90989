"""Neuron ablation: which groups of neurons does one answer depend on?

The neurons of each layer are switched off group by group, and the loss in the answer's log-probability is measured. All
groups of a layer run as the rows of one batch, through a mask that says which row loses which neurons.

    python -m examples.neuron_ablation
"""

from __future__ import annotations

import torch

import tracelens as tl

PROMPT = "The capital of France is"
ANSWER = " Paris"


def ablation_sweep(model: tl.Model, prompt: str, answer: str, layers: range, groups: int) -> torch.Tensor:
    """The change of the answer's log-probability, [layers, groups]: negative where the neurons are needed."""
    token = model.tokenizer.encode(answer, add_special_tokens=False)[0]
    with model.trace(prompt):
        n_neurons = model.layers[0].mlp_act.shape[-1]
        whole = model.logits[:, -1].log_softmax(-1)[:, token].save()

    kept = torch.ones(groups, 1, n_neurons)  # row g: all neurons but those of group g
    for group, neurons in enumerate(torch.arange(n_neurons).chunk(groups)):
        kept[group, :, neurons] = 0

    changes: list[torch.Tensor] = []
    for layer in layers:
        with model.trace([prompt] * groups):
            model.layers[layer].mlp_act *= kept
            ablated = model.logits[:, -1].log_softmax(-1)[:, token].save()
        changes.append(ablated.value - whole.value)
    return torch.stack(changes)


def main(model: tl.Model | None = None, groups: int = 4) -> torch.Tensor:
    """Prints the worst groups; gives the whole table."""
    model = model or tl.load("smollm2-135m")
    changes = ablation_sweep(model, PROMPT, ANSWER, range(model.n_layers), groups)
    worst = changes.flatten().argsort()[:5].tolist()
    print(
        f"what {ANSWER!r} after {PROMPT!r} needs most: change of its log-probability without a group of neurons"
    )
    for index in worst:
        layer, group = divmod(index, groups)
        print(f"layer {layer:2}, group {group} of {groups}: {changes[layer, group]:6.2f}")
    return changes


if __name__ == "__main__":
    main()
