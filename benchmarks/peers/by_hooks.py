"""Torch hooks as one writes them by hand: the fastest that Python can be, and the answer that all others must give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.peers.subject import CASES, Answer, Results, Subject

NAME = "hooks"


class Stop(Exception):
    """Leaves a forward pass that has given all that is wanted."""


def version() -> str:
    return torch.__version__


def build(subject: Subject) -> dict[str, Answer]:
    """A function for each case; each puts its hooks on, runs the model once and takes them off."""
    answers = {case: edit(subject, subject.layers(case)) for case in CASES if case.startswith("edit")}
    answers |= {case: read(subject, subject.layers(case)) for case in CASES if case.startswith("read")}
    answers["stop"] = read_and_stop(subject)
    return answers


def read(subject: Subject, layers: tuple[int, ...]) -> Answer:
    model, ids, blocks = subject.model, subject.ids, subject.blocks

    def answer() -> Results:
        found: Results = {}
        handles = [blocks[layer].register_forward_hook(keep(found, f"h{layer}")) for layer in layers]
        try:
            with torch.no_grad():
                found["logits"] = model(input_ids=ids, use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()
        return found

    return answer


def keep(found: Results, name: str) -> Callable[..., None]:
    def hook(module: Any, args: Any, output: torch.Tensor) -> None:
        found[name] = output

    return hook


def edit(subject: Subject, layers: tuple[int, ...]) -> Answer:
    model, ids, blocks, vector = subject.model, subject.ids, subject.blocks, subject.vector

    def add(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output + vector

    def answer() -> Results:
        handles = [blocks[layer].register_forward_hook(add) for layer in layers]
        try:
            with torch.no_grad():
                return {"logits": model(input_ids=ids, use_cache=False).logits}
        finally:
            for handle in handles:
                handle.remove()

    return answer


def read_and_stop(subject: Subject) -> Answer:
    model, ids, blocks = subject.model, subject.ids, subject.blocks

    def answer() -> Results:
        found: Results = {}

        def hook(module: Any, args: Any, output: torch.Tensor) -> None:
            found["h0"] = output
            raise Stop

        handle = blocks[0].register_forward_hook(hook)
        try:
            with torch.no_grad():
                model(input_ids=ids, use_cache=False)
        except Stop:
            pass
        finally:
            handle.remove()
        return found

    return answer
