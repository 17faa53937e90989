"""The only place where a tensor changes device."""

from __future__ import annotations

import weakref
from typing import Any, cast

import torch
from torch import nn

from tracelens.constants import Captured


class ConstantCache:
    """The constants of programs on each device, moved once; what is the user's own is moved each time."""

    def __init__(self) -> None:
        self._moved: dict[
            tuple[int, torch.device], tuple[weakref.ref[torch.Tensor], int | None, torch.Tensor]
        ] = {}

    def place(
        self, constant: Captured, device: torch.device, journeys: list[tuple[str, str, str, int]]
    ) -> torch.Tensor:
        """The constant's tensor on ``device``; constants are moved, never cast. ``journeys`` gets what is moved now."""
        tensor = constant.tensor
        if tensor.requires_grad:
            tensor = tensor.detach()
        if tensor.device == device:
            return tensor
        key = (id(constant.tensor), device)
        known = self._moved.get(key)
        if known is not None and known[0]() is constant.tensor and known[1] == constant.version:
            return known[2]
        found = moved(tensor, device)
        journeys.append((str(tensor.device), str(device), "constants", found.nbytes))
        if not constant.private:
            return found  # changed through .data or numpy, it would be another one and look the same
        cache = self._moved
        reference = weakref.ref(constant.tensor, lambda _: cache.pop(key, None))
        self._moved[key] = (reference, constant.version, found)
        return found


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on another device. The host goes on at once, but for a copy to its own memory, which it may read."""
    return tensor.to(device, non_blocking=device.type != "cpu")


def land(tensor: torch.Tensor, host: torch.Tensor) -> None:
    """Puts a saved tensor where it arrives on the host, cast on the way; nobody waits for it here."""
    host.copy_(tensor.detach(), non_blocking=True)


def on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """A saved tensor on its way out of the run."""
    return tensor if tensor.device.type == "cpu" else tensor.to("cpu")


class Everywhere:
    """A tensor that may be needed on several devices: on each, it is moved once."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._on = {tensor.device: tensor}
        self._tensor = tensor

    def on(self, device: torch.device) -> torch.Tensor:
        """The tensor on ``device``."""
        found = self._on.get(device)
        if found is None:
            found = self._on[device] = moved(self._tensor, device)
        return found


def loaded(weight: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An offloaded weight, from memory or disk, where and as its module uses it."""
    return moved(weight.detach(), device).to(dtype)


def arguments_on(value: Any, device: torch.device) -> Any:
    """A forward's arguments, with the tensors among them on the model's device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if type(value) is dict:
        return {name: arguments_on(part, device) for name, part in cast("dict[Any, Any]", value).items()}
    if type(value) in (list, tuple):
        parts = [arguments_on(part, device) for part in cast("list[Any]", value)]
        return tuple(parts) if isinstance(value, tuple) else parts
    return value


def inputs_on(inputs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The model's inputs on its device."""
    if device.type == "cpu":
        return inputs
    return {
        name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()
    }


def module_on(module: nn.Module, device: torch.device) -> nn.Module:
    """A module whose parameters and buffers are all on a device, as ``module.to`` moves them."""
    return module.to(device)


def following(ids: torch.Tensor, mask: torch.Tensor, chosen: torch.Tensor | None = None) -> torch.Tensor:
    """The token that follows each, -1 at padding; ``chosen`` [B]: those that come after the last, -1 if not given."""
    last = ids.new_full((ids.shape[0], 1), -1) if chosen is None else chosen[:, None]
    return torch.cat([ids[:, 1:], last], 1).masked_fill(mask == 0, -1)
