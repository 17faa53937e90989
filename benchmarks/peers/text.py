"""What is generated: prompts, how many tokens, and what every contestant must do in each step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.peers.laps import Tick
from benchmarks.peers.subject import Results, largest_error

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
class Text:
    """A model of the Llama layout, prompts [B, P] of one length, and a vector [D] that steering adds."""

    folder: str
    model: Any
    ids: torch.Tensor
    vector: torch.Tensor

    @property
    def blocks(self) -> Any:
        return self.model.model.layers

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @property
    def middle(self) -> int:
        return self.n_layers // 2

    def options(self, new: int) -> dict[str, Any]:
        """Those of transformers: so many tokens, each the likeliest; no token ends a text."""
        return {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def separate(self) -> Text:
        """The same with a model of its own, whose weights are the same memory: each contestant has one."""
        held: dict[int, Any] = {id(parameter): parameter for parameter in self.model.parameters()}
        return Text(self.folder, copy.deepcopy(self.model, held), self.ids, self.vector)


def load_text(folder: str, inputs: str | Path) -> Text:
    """The model in ``folder`` with the prompts and the vector in the safetensors file ``inputs``."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tensors = load_file(str(inputs))
    return Text(folder, model, tensors["ids"], tensors["vector"])


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
    """How far an answer is from the right one; infinite where a token is another."""
    if found.keys() != expected.keys():
        raise ValueError(f"results are {sorted(found)}, expected {sorted(expected)}")
    if not torch.equal(found["tokens"], expected["tokens"]):
        return float("inf")
    floats = [{name: each[name] for name in each if name != "tokens"} for each in (found, expected)]
    return largest_error(*floats)
