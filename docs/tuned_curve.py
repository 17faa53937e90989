"""Draws how far a tuned lens is from the model's last word, layer by layer, from what ``examples/tuned_lens.py`` found.

The run takes minutes to hours, so its results are stored: the page names the command.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from tracelens.viz.drawing import opening, text
from tracelens.viz.scales import BLUE, RED

MEASURED = Path(__file__).parent / "tuned_lens.json"
_LEFT, _TOP, _WIDTH, _HEIGHT = 56, 44, 620, 260
_LOW, _HIGH = 0.5, 128.0


def stored() -> dict[str, Any]:
    """What was found."""
    return json.loads(MEASURED.read_text(encoding="utf-8"))


def curve() -> str:
    """KL(final || lens) of every state but the last, on a logarithmic axis, as SVG: tuned lens and logit lens."""
    found = stored()
    states = len(found["kl"]) - 1
    parts = [
        *opening(_LEFT + _WIDTH + 24, _TOP + _HEIGHT + 56),
        text(
            12, 20, "KL(final || lens) in nats per token, on text that was not trained on", size=13, bold=True
        ),
    ]
    for power in range(round(math.log2(_LOW)), round(math.log2(_HIGH)) + 1):
        y = _y(2.0**power)
        parts.append(f'<line x1="{_LEFT}" y1="{y}" x2="{_LEFT + _WIDTH}" y2="{y}" stroke="#ddd"/>')
        parts.append(text(_LEFT - 8, round(y) + 4, f"{2.0**power:g}", anchor="end", colour="#555"))
    for state in range(0, states, 5):
        parts.append(
            text(round(_x(state, states)), _TOP + _HEIGHT + 18, str(state), anchor="middle", colour="#555")
        )
    words = (
        "state of the stream: 0 is the embedding, l is layers[l - 1].resid_post; bars: two standard errors"
    )
    parts.append(text(12, _TOP + _HEIGHT + 40, words, colour="#555"))
    for name, key, colour in (("logit lens", "identity_kl", RED), ("tuned lens", "kl", BLUE)):
        values, errors = found[key][:-1], found[f"{key}_error"][:-1]
        points = " ".join(f"{_x(state, states):.1f},{_y(value):.1f}" for state, value in enumerate(values))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        for state, (value, error) in enumerate(zip(values, errors, strict=True)):
            x, ends = _x(state, states), [_y(max(value + sign * 2 * error, _LOW)) for sign in (1, -1)]
            parts.append(
                f"<g><title>{name}, state {state}: {value:.3f}</title>"
                f'<line x1="{x:.1f}" y1="{ends[0]:.1f}" x2="{x:.1f}" y2="{ends[1]:.1f}" stroke="{colour}"/>'
                f'<circle cx="{x:.1f}" cy="{_y(value):.1f}" r="2.5" fill="{colour}"/></g>'
            )
        at = round(0.55 * states)
        above = -14 if key == "identity_kl" else 22
        parts.append(
            text(round(_x(at, states)), round(_y(values[at])) + above, name, colour=colour, bold=True)
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _x(state: int, states: int) -> float:
    return _LEFT + 10 + (_WIDTH - 20) * state / (states - 1)


def _y(value: float) -> float:
    share = (math.log2(value) - math.log2(_LOW)) / (math.log2(_HIGH) - math.log2(_LOW))
    return round(_TOP + _HEIGHT * (1 - share), 1)


def table() -> str:
    """The same for some states, with bits per byte."""
    found = stored()
    states = len(found["kl"]) - 1
    lines = ["| state | logit lens | tuned lens | tuned lens, bits per byte |", "|---|---|---|---|"]
    for state in [*range(0, states - 1, 5), states - 1]:
        name = "layers[0].resid_pre" if state == 0 else f"layers[{state - 1}].resid_post"
        numbers = [
            f"{found[key][state]:.2f} ± {found[key + '_error'][state]:.2f}" for key in ("identity_kl", "kl")
        ]
        lines.append(
            f"| `{name}` | {' | '.join(numbers)} | {found['kl'][state] * found['bits_per_byte']:.2f} |"
        )
    return "\n".join(lines)


def run() -> str:
    """What was run to find it."""
    found = stored()
    plan = found["plan"]
    seen = plan["steps"] * plan["tokens_per_step"]
    better = sum(a < b for a, b in zip(found["kl"][:-1], found["identity_kl"][:-1], strict=True))
    return (
        f"Trained on {seen:,} tokens ({plan['steps']} steps of {plan['tokens_per_step']}, windows of "
        f"{plan['context']}, {plan['optimizer']}, learning rate {plan['learning_rate']:g}, clip {plan['clip']:g}, seed "
        f"{plan['seed']}), compared on {found['tokens']:,} others, on {found['model']}. The tuned lens is nearer in "
        f"{better} of the {len(found['kl']) - 1} states."
    )
