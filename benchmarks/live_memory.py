"""How much memory the tensors of a run take at most, counted as they are made and let go."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of all storages that were made while it is on and that some tensor still has.

    ``live``: now; ``most``: at most so far, after any operation. What one operation takes for itself on the way, and
    memory that is not of tensors, is not in it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.most = 0
        self._before: set[int] = set()
        self._tensors: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        known = {self._key(leaf) for leaf in tree_leaves((args, kwargs or {})) if self._counts(leaf)}
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            # An output on the storage of an input that was there before is none of the run's.
            if self._counts(leaf) and (self._key(leaf) in self._tensors or self._key(leaf) not in known):
                self._hold(leaf)
        self.most = max(self.most, self.live)
        return found

    @staticmethod
    def _counts(leaf: Any) -> bool:
        return isinstance(leaf, torch.Tensor) and leaf.untyped_storage().device.type != "meta"

    @staticmethod
    def _key(tensor: torch.Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def _hold(self, tensor: torch.Tensor) -> None:
        key, size = self._key(tensor), tensor.untyped_storage().nbytes()
        if key not in self._tensors:
            self._tensors[key] = 0
            self.live += size
        self._tensors[key] += 1
        weakref.finalize(tensor, self._release, key, size).atexit = False

    def _release(self, key: int, size: int) -> None:
        self._tensors[key] -= 1
        if not self._tensors[key]:
            del self._tensors[key]
            self.live -= size


def most_live(run: Callable[[], Any]) -> tuple[int, int, Any]:
    """The most bytes during a run, those that its result leaves, and the result."""
    with LiveMemory() as memory:
        result = run()
        left = memory.live
    return memory.most, left, result
