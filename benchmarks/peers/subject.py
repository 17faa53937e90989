"""What is measured: a model with its prompt, and the cases that every contestant must answer."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

Results = dict[str, torch.Tensor]
"""``logits`` and, for layer i that is read, ``h{i}``: the residual stream after it; or ``h``, that of all layers."""

Answer = Callable[[], Results]

CASES: dict[str, str] = {
    "read-one": "1 read",
    "read-all": "a read in every layer",
    "edit-one": "1 edit",
    "edit-all": "an edit in every layer",
    "stop": "read the first layer only",
}
"""Each is over the residual stream after a layer. All but ``stop`` need the logits too, so the whole pass runs."""

TOLERANCE = 1e-5
"""By how much a result may differ, relative to the largest number in the tensor."""


@dataclass(frozen=True)
class Subject:
    """A model of the Llama layout on the CPU, one prompt [1, P], and a vector [D] that edits add."""

    name: str
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

    def layers(self, case: str) -> tuple[int, ...]:
        """The layers that a case reads or edits."""
        if case == "stop":
            return (0,)
        return tuple(range(self.n_layers)) if case.endswith("all") else (self.n_layers // 2,)

    def separate(self) -> Subject:
        """The same with a model of its own, for a library that leaves something behind on the model."""
        return replace(self, model=copy.deepcopy(self.model))


def load_subject(name: str, folder: str | Path, inputs: str | Path) -> Subject:
    """The model in ``folder`` with the prompt and the vector in the safetensors file ``inputs``."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    tensors = load_file(str(inputs))
    return Subject(name, str(folder), model, tensors["ids"], tensors["vector"])


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
