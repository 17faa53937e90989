"""The logit lens: what each layer would say next, if the model ended there.

The final norm and the unembedding are applied to the residual stream after every layer, in one trace. Only the best
tokens and their probabilities leave the run.

    python -m examples.logit_lens "The capital of France is"
"""

from __future__ import annotations

import sys

import torch

import tracelens as tl


def lens(model: tl.Model, prompt: str, top: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and probabilities [layers, top] of what each layer would say after ``prompt``."""
    base = model.hf.base_model
    norm = base.norm if hasattr(base, "norm") else base.ln_f
    with model.trace(prompt):
        last = model.layers[:].resid_post[:, -1]
        best = (norm(last) @ model.unembed.T).float().softmax(-1).topk(top)
        ids, probabilities = best.indices.save(), best.values.save()
    return ids.value[:, 0], probabilities.value[:, 0]


def main(model: tl.Model | None = None, prompt: str = "The capital of France is") -> list[list[str]]:
    """Prints the table; gives the tokens of each layer, best first."""
    model = model or tl.load("smollm2-135m")
    ids, probabilities = lens(model, prompt)
    words = [[model.tokenizer.decode([token]) for token in row] for row in ids.tolist()]
    print(f"what each layer would say after {prompt!r}:")
    for layer, (row, ps) in enumerate(zip(words, probabilities.tolist(), strict=True)):
        print(f"{layer:5}  " + "  ".join(f"{word!r:>12} {p:.2f}" for word, p in zip(row, ps, strict=True)))
    return words


if __name__ == "__main__":
    main(prompt=sys.argv[1] if len(sys.argv) > 1 else "The capital of France is")
