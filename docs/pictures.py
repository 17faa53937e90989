"""Draws the pictures of the documentation from real runs of the embedded model."""

from __future__ import annotations

from pathlib import Path

import tracelens as tl
from docs import token_grids, trajectories, tuned_curve

PICTURES = Path(__file__).resolve().parent / "images"
LENS_PROMPT = "Paris is the capital of France. Rome is the capital of"


def make() -> list[tuple[Path, str]]:
    """Every picture, with the file that it belongs in."""
    model = tl.load("smollm2-135m")
    return [
        (PICTURES / "logit_lens.svg", logit_lens(model, LENS_PROMPT)),
        (PICTURES / "steered_generation.svg", trajectories.steered(model)),
        (PICTURES / "tokens_in_a_trace.svg", token_grids.grids(model, generating=False)),
        (PICTURES / "tokens_in_a_generation.svg", token_grids.grids(model, generating=True)),
        (PICTURES / "tuned_lens.svg", tuned_curve.curve()),
    ]


def logit_lens(model: tl.Model, prompt: str, every: int = 3) -> str:
    """What each layer would say after each token of a prompt, as SVG: best token, and its probability as a shade."""
    layers = {*range(0, model.n_layers, every), model.n_layers - 1}
    lens = model.logit_lens(prompt, layers=layers, metrics=())
    assert isinstance(lens, tl.LensResult)
    return lens.plot("top_prob").svg
