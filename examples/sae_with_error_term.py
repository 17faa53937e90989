"""A sparse autoencoder in the residual stream: read its features, switch one off, keep what it cannot express.

The reconstruction of an SAE is not the stream. Writing it back as it is would change the model even without an
intervention, so tl.splice adds the difference (the error term) again; then only what one does to the features has an
effect. By hand it is ``resid_post = sae.decode(features) + (resid_post - sae.decode(sae.encode(resid_post)))``.

    python -m examples.sae_with_error_term
"""

from __future__ import annotations

import torch
from torch import nn

import tracelens as tl

PROMPT = "The capital of France is"


class SparseAutoencoder(nn.Module):
    """A small SAE with random weights, in place of a trained one."""

    def __init__(self, d_model: int, n_features: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.directions = nn.Parameter(torch.randn(n_features, d_model, generator=generator) / d_model**0.5)
        self.bias = nn.Parameter(torch.zeros(n_features))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Features [..., n_features] of activations [..., d_model]."""
        return torch.relu(x @ self.directions.T + self.bias)

    def decode(self, features: torch.Tensor) -> torch.Tensor:
        """Activations [..., d_model] from features [..., n_features]."""
        return features @ self.directions


def run_with_feature_off(
    model: tl.Model, sae: SparseAutoencoder, prompt: str, layer: int, off: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [P, n_features] and last logits [V] of a run in which the features marked in ``off`` are zero."""
    with model.trace(prompt):
        with tl.splice(model.layers[layer].resid_post, sae) as s:
            z = s.features.save()
            s.features = tl.where(off, 0.0, s.features)
        logits = model.logits[:, -1].save()
    return z.value[0], logits.value[0]


def main(model: tl.Model | None = None, layer: int = 12) -> tuple[float, float]:
    """Prints and gives how far the logits move with no feature off, and with the strongest feature off."""
    model = model or tl.load("smollm2-135m")
    sae = SparseAutoencoder(model.config.hidden_size, 1024)
    with model.trace(PROMPT):
        plain = model.logits[:, -1].save()

    none = torch.zeros(1024, dtype=torch.bool)
    features, same = run_with_feature_off(model, sae, PROMPT, layer, none)
    strongest = int(features[-1].argmax())
    one = none.clone()
    one[strongest] = True
    _, without = run_with_feature_off(model, sae, PROMPT, layer, one)

    moved = [float((logits - plain.value[0]).abs().max()) for logits in (same, without)]
    print(f"{int((features[-1] > 0).sum())} of 1024 features are active at the last token")
    print(f"largest change of a logit, no feature off:         {moved[0]:.5f}")
    print(f"largest change of a logit, feature {strongest:4} off:       {moved[1]:.5f}")
    return moved[0], moved[1]


if __name__ == "__main__":
    main()
