"""TransformerLens' generation, with the hooks that its documentation puts around it; its loop is its own."""

from __future__ import annotations

from importlib.metadata import version as installed
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from benchmarks.peers.laps import Tick
from benchmarks.peers.subject import Results
from benchmarks.peers.text import WRITTEN, Text
from benchmarks.peers.with_transformer_lens import bridge_of

NAME = "transformer_lens"


def version() -> str:
    return installed("transformer-lens")


def build(text: Text) -> dict[str, WRITTEN]:
    """A function for each case, all on one bridge."""
    own = text.separate()
    bridge = bridge_of(own)
    vector = own.vector
    points = [f"blocks.{layer}.hook_resid_post" for layer in range(own.n_layers)]

    def answer(kept: list[str], *, steers: bool = False) -> WRITTEN:
        def write(new: int, tick: Tick) -> Results:
            found: dict[str, list[torch.Tensor]] = {point: [] for point in kept}

            def hook_of(point: str) -> Any:
                parts = found.get(point)

                def hook(value: torch.Tensor, hook: Any) -> torch.Tensor | None:
                    if parts is not None:
                        parts.append(value)
                    return value + vector if steers else None

                return hook

            hooks = [(point, hook_of(point)) for point in (points if steers else kept)]
            with torch.no_grad(), bridge.hooks(fwd_hooks=hooks):
                tokens = bridge.generate(
                    own.ids,
                    max_new_tokens=new,
                    stop_at_eos=False,
                    do_sample=False,
                    return_type="tokens",
                    verbose=False,
                    stopping_criteria=StoppingCriteriaList([clock(tick, own.ids.shape[0])]),
                )
            results = {"tokens": tokens[:, own.ids.shape[1] :]}
            if kept:
                results["stream"] = torch.stack([torch.cat(parts, 1) for parts in found.values()])
            return results

        return write

    return {
        "nothing": answer([]),
        "read-one": answer([points[own.middle]]),
        "read-all": answer(points),
        "steer-all": answer([], steers=True),
        "both": answer(points, steers=True),
    }


def clock(tick: Tick, rows: int) -> StoppingCriteria:
    """Has the bridge call ``tick`` in each step; nothing is stopped."""
    never = torch.zeros(rows, dtype=torch.bool)

    class Clock(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **options: Any) -> Any:
            tick()
            return never

    return Clock()
