"""The maps of a tuned lens, one for each state of the residual stream but the last."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tracelens.errors import LensMismatchError

STATES = {"resid_pre": 0, "resid_post": 1}
"""Sites that are states of the residual stream, with the number of the state in layer 0."""


class Translator(NamedTuple):
    """``h + h @ weight.T + bias``: a map [D, D] and a shift [D] (or none), in float32."""

    weight: Tensor
    bias: Tensor | None


def state_of(component: str, layer: int) -> int:
    """The number of a state of the residual stream: 0 is the embedding, ``n_layers`` what the last norm receives.

    ``resid_post`` of a layer and ``resid_pre`` of the next are one state. Raises :class:`LensMismatchError` for sites
    that are none.
    """
    if component not in STATES:
        raise LensMismatchError(
            f"a tuned lens has maps for states of the residual stream, and {component!r} is none of those that it was "
            "trained for",
            instead="resid_post (or resid_pre), or the logit lens: lens=None",
        )
    return layer + STATES[component]


def empty(count: int, width: int, *, bias: bool, device: torch.device) -> list[Translator]:
    """Maps that change nothing yet."""
    return [
        Translator(
            torch.zeros(width, width, device=device), torch.zeros(width, device=device) if bias else None
        )
        for _ in range(count)
    ]


def named(translators: list[Translator]) -> dict[str, Tensor]:
    """The tensors by the names that they have in files: ``0.weight``, ``0.bias``, ``1.weight``, ..."""
    found: dict[str, Tensor] = {}
    for number, (weight, bias) in enumerate(translators):
        found[f"{number}.weight"] = weight
        if bias is not None:
            found[f"{number}.bias"] = bias
    return found
