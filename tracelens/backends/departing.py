"""Saved tensors on their way from a device to the host, while the forward pass goes on elsewhere.

As soon as a device has made the last of what it saves, copies are put on a stream of their own; nobody waits for them
before a result is read. They land in pinned memory where there is such, so that the host is not needed on the way. Each
result has host memory of its own, and members of a stack go straight to their places in it.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch

from tracelens.backends.transfer import land
from tracelens.errors import MutatedActivationError
from tracelens.ir.dims import Sizes
from tracelens.ir.infer import torch_dtype
from tracelens.ir.ops import Save
from tracelens.ir.types import TensorType

Member = tuple[torch.Tensor, int]
"""A saved tensor with its version when it was saved."""

_streams: dict[torch.device, Any] = {}


class Departures:
    """The copies of one run. ``wait`` may be called from any thread, and again."""

    def __init__(self, types: Mapping[int, TensorType], sizes: Sizes) -> None:
        self._types = types
        self._sizes = sizes
        self._hosts: dict[str, torch.Tensor] = {}
        self._arrivals: list[Any] = []
        self._lock = threading.Lock()

    def depart(
        self,
        device: torch.device,
        parts: Sequence[tuple[Save, int]],
        saved: Mapping[str, Sequence[Member]],
    ) -> None:
        """Sends what a device has saved; ``parts`` are saves with the numbers of the members that lie there."""
        module: Any = torch.get_device_module(device)
        stream = _streams.get(device)
        if stream is None:
            stream = _streams[device] = module.Stream(device=device)
        stream.wait_stream(module.current_stream(device))
        with cast(
            "AbstractContextManager[object]", module.stream(stream) if hasattr(module, "stream") else stream
        ):
            for save, part in parts:
                tensor, seen = saved[save.name][part]
                require_unchanged(save, tensor, seen)
                host = self._host(save, tensor.dtype, pinned=device.type == "cuda")
                land(tensor, host[part] if save.stacked else host)
                if device.type == "cuda":
                    tensor.record_stream(stream)  # its memory is not given to others before it has left
        arrival = module.Event()
        arrival.record(stream)
        self._arrivals.append(arrival)

    def _host(self, save: Save, dtype: torch.dtype, *, pinned: bool) -> torch.Tensor:
        host = self._hosts.get(save.name)
        if host is None:
            type_ = self._types[save.values[0]]
            sizes = type_.sizes(self._sizes)
            shape = (len(save.values), *sizes) if save.stacked else sizes
            dtype = torch_dtype(save.dtype) if save.dtype is not None else dtype
            host = self._hosts[save.name] = torch.empty(shape, dtype=dtype, pin_memory=pinned)
        return host

    def host(self, save: Save) -> torch.Tensor | None:
        """Where a save arrives, if it is on its way; to be looked at after :meth:`wait`."""
        return self._hosts.get(save.name)

    def wait(self) -> None:
        """Returns when everything has arrived."""
        with self._lock:
            while self._arrivals:
                self._arrivals[-1].synchronize()
                self._arrivals.pop()


def require_unchanged(save: Save, tensor: torch.Tensor, seen: int) -> None:
    """Refuses a saved tensor that the model has changed in place since."""
    if tensor._version != seen:
        raise MutatedActivationError(
            f"the model changed the tensor saved as {save.name!r} in place after it had been read"
        )


class Peaks:
    """The most bytes that are allocated on devices from now on, beyond what is there."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._before: dict[torch.device, int] = {}
        for device in devices:
            if device.type != "cpu":
                module: Any = torch.get_device_module(device)
                self._before[device] = module.memory_allocated(device)
                module.reset_peak_memory_stats(device)

    def found(self) -> dict[str, int]:
        """By device; waits for each to have done its work."""
        peaks: dict[str, int] = {}
        for device, before in self._before.items():
            module: Any = torch.get_device_module(device)
            module.synchronize(device)
            peaks[str(device)] = module.max_memory_allocated(device) - before
        return peaks
