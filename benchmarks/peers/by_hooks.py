"""Torch hooks as one writes them by hand: the fastest that Python can be, and the answer that all others must give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.peers.subject import HEAD, STREAM, Answer, Results, Subject

NAME = "hooks"


class Stop(Exception):
    """Leaves a forward pass that has given all that is wanted."""


def version() -> str:
    return torch.__version__


def build(subject: Subject) -> dict[str, Answer]:
    """A function for each case; each puts its hooks on, runs the model once and takes them off."""
    answers = {case: edit(subject, subject.layers(case)) for case in STREAM if case.startswith("edit")}
    answers |= {case: read(subject, subject.layers(case)) for case in STREAM if case.startswith("read")}
    answers["stop"] = read_and_stop(subject)
    return answers | {
        "pattern": read_patterns(subject),
        "z": read_z(subject),
        "ablate": ablate(subject),
        "attribution": attribute(subject),
        "sweep": sweep(subject),
    }


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


def with_hooks(model: Any, ids: torch.Tensor, handles: list[Any]) -> torch.Tensor:
    """The logits of one pass, after which the hooks are taken off."""
    try:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()


def read_patterns(subject: Subject) -> Answer:
    """From a model whose attention is written out: the fused one has no pattern to give."""

    def answer() -> Results:
        model, found = subject.eager(), Results()

        def keep_second(name: str) -> Callable[..., None]:
            def hook(module: Any, args: Any, output: Any) -> None:
                found[name] = output[1]

            return hook

        blocks = enumerate(model.model.layers)
        handles = [block.self_attn.register_forward_hook(keep_second(f"h{layer}")) for layer, block in blocks]
        found["logits"] = with_hooks(model, subject.ids, handles)
        return found

    return answer


def read_z(subject: Subject) -> Answer:
    heads = subject.heads

    def answer() -> Results:
        found = Results()

        def keep_input(name: str) -> Callable[..., None]:
            def hook(module: Any, args: Any) -> None:
                found[name] = args[0].unflatten(-1, heads)

            return hook

        handles = [
            block.self_attn.o_proj.register_forward_pre_hook(keep_input(f"h{layer}"))
            for layer, block in enumerate(subject.blocks)
        ]
        found["logits"] = with_hooks(subject.model, subject.ids, handles)
        return found

    return answer


def ablate(subject: Subject) -> Answer:
    _, width = subject.heads
    place = slice(HEAD * width, (HEAD + 1) * width)

    def zero(module: Any, args: Any) -> tuple[torch.Tensor]:
        z = args[0].clone()
        z[..., place] = 0
        return (z,)

    def answer() -> Results:
        handles = [block.self_attn.o_proj.register_forward_pre_hook(zero) for block in subject.blocks]
        return {"logits": with_hooks(subject.model, subject.ids, handles)}

    return answer


def attribute(subject: Subject) -> Answer:
    """The gradient of a difference of logits times the difference of activations: two forwards, one backward."""
    model, blocks = subject.model, subject.blocks
    right, wrong = subject.tokens

    def answer() -> Results:
        other: Results = {}
        handles = [block.register_forward_hook(keep(other, f"{i}")) for i, block in enumerate(blocks)]
        with_hooks(model, subject.other_ids, handles)
        clean: Results = {}
        handles = [block.register_forward_hook(keep(clean, f"{i}")) for i, block in enumerate(blocks)]
        try:
            last = model(input_ids=subject.ids, use_cache=False).logits[0, -1]
        finally:
            for handle in handles:
                handle.remove()
        gradients = torch.autograd.grad(last[right] - last[wrong], list(clean.values()))
        parts = [
            ((there - here) * gradient).sum(-1)
            for there, here, gradient in zip(other.values(), clean.values(), gradients, strict=True)
        ]
        return {"attribution": torch.stack(parts).detach()[:, 0]}

    return answer


def sweep(subject: Subject) -> Answer:
    (middle,) = subject.layers("edit-one")

    def answer() -> Results:
        rows: list[torch.Tensor] = []
        for strength in subject.strengths:

            def add(module: Any, args: Any, output: torch.Tensor, strength: float = strength) -> torch.Tensor:
                return output + strength * subject.vector

            handle = subject.blocks[middle].register_forward_hook(add)
            rows.append(with_hooks(subject.model, subject.ids, [handle])[0, -1])
        return {"last": torch.stack(rows)}

    return answer
