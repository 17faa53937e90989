"""What is generated: prompts, how many tokens, and what every contestant must do in each step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.peers.laps import Tick
from benchmarks.peers.subject import Prompted, Results, largest_error

GENERATING: dict[str, str] = {
    "nothing": "nothing is asked for",
    "read-one": "one layer, all positions",
    "read-all": "every layer, all positions",
    "steer-all": "a vector added after every layer",
    "both": "every layer read, and a vector added to it",
    "uncached": "every layer, all positions; no cache",
}
"""Each is over the residual stream after a layer, in every step."""

STEERED = ("steer-all", "both")
"""The cases whose tokens are not those of plain generation."""

NEAR = 1e-4
"""By how much a tensor may differ, relative to its largest number. Tokens are the same."""

WRITTEN = Callable[[int, Tick], Results]
"""Writes that many tokens, and calls what it is given after each; ``tokens`` [B, N] are new, ``stream`` was read."""


@dataclass(frozen=True)
class Text(Prompted):
    """A generation from prompts [B, P], to which steering adds the vector."""

    def options(self, new: int) -> dict[str, Any]:
        """Those of transformers: so many tokens, each the likeliest; no token ends a text."""
        return {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def separate(self) -> Text:
        """The same with a model of its own, whose weights are the same memory: each contestant has one."""
        held: dict[int, Any] = {id(parameter): parameter for parameter in self.model.parameters()}
        return replace(self, model=copy.deepcopy(self.model, held))


def processors(tick: Tick) -> Any:
    """Has transformers call ``tick`` in each step, when it has the logits."""
    from transformers import LogitsProcessor, LogitsProcessorList

    class Clock(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            tick()
            return scores

    return LogitsProcessorList([Clock()])


def plain(text: Text, *, cached: bool = True) -> WRITTEN:
    """transformers' own generation, with nothing around it."""

    def write(new: int, tick: Tick) -> Results:
        with torch.no_grad():
            found = text.model.generate(
                text.ids,
                attention_mask=torch.ones_like(text.ids),
                logits_processor=processors(tick),
                use_cache=cached,
                **text.options(new),
            )
        return {"tokens": found[:, text.ids.shape[1] :]}

    return write


def difference(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    """How far an answer is from the right one; infinite where a token, or any other whole number, is another."""
    if found.keys() != expected.keys():
        raise ValueError(f"results are {sorted(found)}, expected {sorted(expected)}")
    whole = [name for name in expected if not expected[name].is_floating_point()]
    if not all(torch.equal(found[name], expected[name]) for name in whole):
        return float("inf")
    floats = [{name: each[name] for name in each if name not in whole} for each in (found, expected)]
    return largest_error(*floats)
