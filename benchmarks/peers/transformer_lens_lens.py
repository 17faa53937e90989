"""TransformerLens' generation with hooks, for the logit lens of every layer; the head reads all layers at once."""

from __future__ import annotations

from importlib.metadata import version as installed
from typing import Any

import torch
from transformers import StoppingCriteriaList

from benchmarks.peers.laps import Tick
from benchmarks.peers.lens_text import Reading, answer
from benchmarks.peers.subject import Results
from benchmarks.peers.text import WRITTEN, Text
from benchmarks.peers.transformer_lens_text import clock
from benchmarks.peers.with_transformer_lens import bridge_of

NAME = "transformer_lens"


def version() -> str:
    return installed("transformer-lens")


def build(text: Text) -> dict[str, WRITTEN]:
    own = text.separate()
    reading = Reading(text.separate())
    bridge = bridge_of(own)
    n_layers = own.n_layers
    points = [f"blocks.{layer}.hook_resid_post" for layer in range(n_layers)]

    def lens(new: int, tick: Tick) -> Results:
        found: list[tuple[torch.Tensor, torch.Tensor]] = []
        states: list[torch.Tensor] = []

        def hook(value: torch.Tensor, hook: Any) -> None:
            states.append(value[0])
            if len(states) == n_layers:
                found.append(reading.top(torch.stack(states), rows=n_layers * own.ids.shape[1]))
                states.clear()

        with torch.no_grad(), bridge.hooks(fwd_hooks=[(point, hook) for point in points]):
            tokens = bridge.generate(
                own.ids,
                max_new_tokens=new,
                stop_at_eos=False,
                do_sample=False,
                return_type="tokens",
                verbose=False,
                stopping_criteria=StoppingCriteriaList([clock(tick, own.ids.shape[0])]),
            )
        values, best = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
        return answer(tokens[:, own.ids.shape[1] :], values, best)

    return {"lens": lens}
