"""What is measured: a model with its prompt, and the cases that every contestant must answer."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors.torch import load_file

Results = dict[str, torch.Tensor]
"""By name. ``h{i}`` is what was read at layer i; ``h`` alone is all layers in one tensor."""

Answer = Callable[[], Results]

STREAM: dict[str, str] = {
    "read-one": "1 read",
    "read-all": "a read in every layer",
    "edit-one": "1 edit",
    "edit-all": "an edit in every layer",
    "stop": "read the first layer only",
}
"""Each is over the residual stream after a layer. All but ``stop`` need the logits too, so the whole pass runs."""

INSIDE: dict[str, str] = {
    "pattern": "the attention pattern of every layer",
    "z": "z of every layer",
    "ablate": "one head ablated in every layer",
    "attribution": "attribution patching, all layers and positions",
    "sweep": "a sweep over 100 strengths",
}
"""The inside of attention, gradients, and many runs of one intervention."""

CASES = STREAM | INSIDE

CHANGING = ("edit-one", "edit-all", "ablate")
"""The cases whose logits are not those of the bare forward pass."""

HEAD = 1
"""The head that is ablated."""

TOLERANCE = 1e-5
"""By how much a result may differ, relative to the largest number in the tensor."""


@dataclass(frozen=True)
class Prompted:
    """A model of the Llama layout on the CPU, prompts [B, P] of one length, and a vector [D] that edits add."""

    folder: str
    model: Any
    ids: torch.Tensor
    vector: torch.Tensor

    @classmethod
    def load(cls, folder: str | Path, inputs: str | Path) -> Self:
        """The model in ``folder`` with the prompts and the vector in the safetensors file ``inputs``."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
        tensors = load_file(str(inputs))
        return cls(str(folder), model, tensors["ids"], tensors["vector"])

    @property
    def blocks(self) -> Any:
        return self.model.model.layers

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @property
    def middle(self) -> int:
        return self.n_layers // 2


@dataclass(frozen=True)
class Subject(Prompted):
    """One forward pass over one prompt [1, P]."""

    name: str = ""
    _eager: Any = None

    def layers(self, case: str) -> tuple[int, ...]:
        """The layers that a case reads or edits."""
        if case == "stop":
            return (0,)
        return (self.middle,) if case.endswith("one") else tuple(range(self.n_layers))

    @property
    def heads(self) -> tuple[int, int]:
        """How many heads there are, and how wide each is."""
        config = self.model.config
        count = config.num_attention_heads
        return count, getattr(config, "head_dim", None) or config.hidden_size // count

    @property
    def other_ids(self) -> torch.Tensor:
        """A second prompt, which differs from the first in one token in the middle."""
        ids = self.ids.clone()
        middle = ids.shape[1] // 2
        ids[0, middle] = (ids[0, middle] + 1) % self.model.config.vocab_size
        return ids

    @property
    def tokens(self) -> tuple[int, int]:
        """The two tokens whose logits are compared at the last position: the loss of the attribution."""
        return 5, 7

    @property
    def strengths(self) -> list[float]:
        return [number / 100 for number in range(100)]

    def eager(self) -> Any:
        """The model with attention written out, which is how its patterns can be had from outside."""
        if self._eager is None:
            model = copy.deepcopy(self.model)
            model.set_attn_implementation("eager")
            object.__setattr__(self, "_eager", model)
        return self._eager

    def separate(self) -> Subject:
        """The same with a model of its own, for a library that leaves something behind on the model."""
        return replace(self, model=copy.deepcopy(self.model))


def load_subject(name: str, folder: str | Path, inputs: str | Path) -> Subject:
    """The model, prompt and vector under the name that the report gives them."""
    return replace(Subject.load(folder, inputs), name=name)


def plain_forward(subject: Subject) -> Answer:
    """The model as transformers has it, without anything around it."""
    model, ids = subject.model, subject.ids

    def plain() -> Results:
        with torch.no_grad():
            return {"logits": model(input_ids=ids, use_cache=False).logits}

    return plain


class Taken(NamedTuple):
    """Seconds by the clock, and seconds of the processor's work in this process."""

    clock: float
    work: float


def timed(answer: Answer) -> tuple[Taken, Results]:
    """How long one call takes, and what it returns; freeing that is not in the time."""
    work = time.process_time()
    clock = time.perf_counter()
    results = answer()
    clock = time.perf_counter() - clock
    work = time.process_time() - work
    return Taken(clock, work), results


def largest_error(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    """The largest difference, relative to the largest number of its tensor; raises where names or shapes differ."""
    if "h" in found:  # all layers in one tensor
        found = dict(found)
        found |= {f"h{layer}": tensor for layer, tensor in enumerate(found.pop("h"))}
    if found.keys() != expected.keys():
        raise ValueError(f"results are {sorted(found)}, expected {sorted(expected)}")
    worst = 0.0
    for name, right in expected.items():
        got = found[name]
        if got.shape != right.shape:
            raise ValueError(f"{name} has shape {tuple(got.shape)}, expected {tuple(right.shape)}")
        error = ((got.detach() - right).abs().max() / right.abs().max()).item()
        if math.isnan(error):
            return math.inf  # a comparison with NaN is false, so it would pass for agreement
        worst = max(worst, error)
    return worst
