"""``tracelens demo``: look inside a real model, steer it, and see the plan, on two CPU cores in under two minutes.

It is written with the public API only; every number and every word of text that it prints comes out of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tracelens.loading import load
from tracelens.model import Model

PROMPT = "The capital of France is"
STORY = "I went to the new restaurant last night. The food was"
CONTRAST = ("I feel so happy and joyful today", "I feel so sad and miserable today")
LAYER = 12
STRENGTH = {"post_ln": 2.0, "resid_post": 2.0}
NEW_TOKENS = 20
PENALTY = 1.1


@dataclass(frozen=True)
class LensRow:
    """What one layer would predict next: its top tokens with their probabilities."""

    layer: int
    tokens: tuple[str, ...]
    probabilities: tuple[float, ...]


def logit_lens(model: Model, prompt: str, top: int = 3) -> list[LensRow]:
    """The top tokens of every layer at the last position: final norm and unembedding applied to each layer's stream."""
    norm = model.hf.model.norm
    with model.trace(prompt):
        last = model.layers[:].resid_post[:, -1]
        logits = norm(last) @ model.unembed.T
        best = logits.float().softmax(dim=-1).topk(top)
        probabilities, ids = best.values.save(), best.indices.save()
    assert model.tokenizer is not None
    return [
        LensRow(
            layer,
            tuple(str(model.tokenizer.decode([token])) for token in ids[layer, 0].tolist()),
            tuple(probabilities[layer, 0].tolist()),
        )
        for layer in range(model.n_layers)
    ]


def contrast_vector(model: Model, site: str, layer: int) -> Any:
    """The difference that a contrast pair makes at a site: the positive prompt's last token less the negative's."""
    ends: list[Any] = []
    for text in CONTRAST:
        with model.trace(text):
            ends.append(getattr(model.layers[layer], site)[:, -1].save())
    positive, negative = ends
    return (positive - negative)[0]


def steered(model: Model, site: str, layer: int, strength: float) -> str:
    """The story's continuation with the contrast vector added at ``site`` in every forward pass."""
    v = contrast_vector(model, site, layer)
    with model.generate(STORY, max_new_tokens=NEW_TOKENS, repetition_penalty=PENALTY) as t:
        if site == "post_ln":
            model.layers[layer].post_ln += strength * v
        else:
            model.layers[layer].resid_post += strength * v
    return str(t.text)


def explained(model: Model) -> str:
    """``explain()`` of a small steering trace."""
    v = contrast_vector(model, "resid_post", LAYER)
    with model.trace(STORY) as t:
        model.layers[LAYER].resid_post += STRENGTH["resid_post"] * v
        model.layers[LAYER + 8].resid_post[:, -1].save("h")
    return t.explain()


def run(model: Model | None = None, say: Callable[[str], None] = print) -> None:
    """The whole demo."""
    model = model or load("smollm2-135m")
    say(f"{model!r}\n")
    say(f'1. Logit lens. What each layer would say after "{PROMPT}":\n')
    say(lens_table(logit_lens(model, PROMPT)))
    say("\n2. Steering, with the difference that one contrast pair makes:")
    for sign, text in zip("+-", CONTRAST, strict=True):
        say(f"     {sign} {text!r}")
    with model.generate(STORY, max_new_tokens=NEW_TOKENS, repetition_penalty=PENALTY) as plain:
        pass
    say(f"\n   {STORY!r} goes on, unsteered:\n     {_quoted(plain.text)}")
    for site, strength in STRENGTH.items():
        say(f"\n   model.layers[{LAYER}].{site} += {strength} * v")
        for sign in (1.0, -1.0):
            text = steered(model, site, LAYER, sign * strength)
            say(f"     {'+' if sign > 0 else '-'}v  {_quoted(text)}")
    say(
        "\n   post_ln is what the MLP of that one layer reads: an edit there reaches the text through that branch only."
        "\n   resid_post is the residual stream: every later layer sees an edit there."
    )
    say("\n3. What ran: explain() of a steering trace\n")
    say("\n".join("   " + line for line in explained(model).splitlines()))


def lens_table(rows: list[LensRow]) -> str:
    """The lens as a table, with a bar for the probability of the best token."""
    lines = [f"   {'layer':>5}  {'top token':<16} {'p':>6}  {'':20}  next best"]
    for row in rows:
        bar = "#" * round(20 * row.probabilities[0])
        rest = ", ".join(
            f"{token!r} {p:.2f}" for token, p in zip(row.tokens[1:], row.probabilities[1:], strict=True)
        )
        lines.append(
            f"   {row.layer:>5}  {row.tokens[0]!r:<16} {row.probabilities[0]:>6.3f}  {bar:<20}  {rest}"
        )
    return "\n".join(lines)


def _quoted(text: Any) -> str:
    return repr(" ".join(str(text).split()))
