"""Draws the pictures of the documentation from real runs of the embedded model."""

from __future__ import annotations

from pathlib import Path

import tracelens as tl
from docs import token_grids, trajectories, tuned_curve
from tracelens.lens.statistics import STATISTICS
from tracelens.token_texts import token_texts
from tracelens.viz.heat_map import Panel, heat_map
from tracelens.viz.scales import Scale

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
    with model.trace(prompt):
        logits = model.hf.model.norm(model.layers[:].resid_post) @ model.unembed.T
        best = logits.softmax(dim=-1).max(dim=-1)
        p, ids = best.values.save(), best.indices.save()
    tokenizer = model.tokenizer
    assert tokenizer is not None
    layers = sorted({*range(0, model.n_layers, every), model.n_layers - 1})
    words = token_texts(ids.value.unique().tolist(), tokenizer)
    tokens = tokenizer.encode(prompt)
    said = [[words[token] for token in ids.value[layer, 0].tolist()] for layer in layers]
    return heat_map(
        "Logit lens: what each layer would say next (SmolLM2-135M-Instruct)",
        [Panel("resid_post", p.value[layers, 0], said)],
        layers=layers,
        positions=range(len(tokens)),
        tokens=[str(tokenizer.decode([token])) for token in tokens],
        statistic=STATISTICS["top_prob"],
        scale=Scale(0.0, 1.0),
    ).svg
