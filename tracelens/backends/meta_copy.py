"""A copy of a model whose tensors have no data: what can be run to learn shapes, with nothing of the model touched."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn


def meta_copy(model: nn.Module) -> nn.Module:
    """The same modules with tensors on the meta device, and without anybody's hooks.

    The model's own code may change what it holds while it runs (caches, counters), and users' hooks may do anything: so
    the shapes are learned on a copy. Weights are not copied, they are replaced on the way.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for name, held in vars(module).items():
            if name == "_hf_hook":
                memo[id(held)] = _NO_HOOK  # accelerate's, which may hold the weights of the whole model
            elif name.endswith("_hooks") and isinstance(held, dict):
                memo[id(held)] = type(cast("dict[Any, Any]", held))()
            else:
                _replace_tensors(held, memo)
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        forward = vars(module).get("forward")
        if forward is not None and getattr(forward, "__self__", None) is not module:
            # A function knows the module that it was made for, not this one, and runs that one's weights: accelerate's
            # moves them between devices, of which there is only one here. What the class says has the same shapes; a
            # run in which it had not would fail at the first tensor of another.
            del vars(module)["forward"]
        vars(module).pop("_hf_hook", None)
    return copied


_NO_HOOK = object()
_DEPTH = 4  # of containers, in which a module may keep tensors that are no parameters


def _replace_tensors(held: object, memo: dict[int, Any], depth: int = 0) -> None:
    """Makes ``copy.deepcopy`` put a tensor without data wherever it meets one of these."""
    if isinstance(held, torch.Tensor):
        if id(held) not in memo:  # weights that are tied stay so
            memo[id(held)] = _without_data(held)
    elif depth < _DEPTH and isinstance(held, dict):
        for part in cast("dict[Any, object]", held).values():
            _replace_tensors(part, memo, depth + 1)
    elif depth < _DEPTH and type(held) in (list, tuple):
        for part in cast("list[object]", held):
            _replace_tensors(part, memo, depth + 1)


def _without_data(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def on_meta(value: Any) -> Any:
    """Arguments with their tensors replaced by ones without data, containers rebuilt around them."""
    if isinstance(value, torch.Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    if isinstance(value, Mapping):
        found = copy.copy(cast("dict[Any, Any]", value))
        for name, part in cast("Mapping[Any, Any]", value).items():
            found[name] = on_meta(part)
        return found
    if isinstance(value, list | tuple):
        parts = [on_meta(part) for part in cast("list[Any]", value)]
        kind: Any = type(cast(object, value))
        return kind(*parts) if hasattr(kind, "_fields") else kind(parts)
    return value


@contextmanager
def aside() -> Iterator[None]:
    """Without gradients, and leaving the random generators where they are."""
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=[]):
        yield
