"""The only caller of torch's hook registration: a session owns its hooks and removes them, whatever happens."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

PreHook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]
PostHook = Callable[[nn.Module, tuple[Any, ...], Any], Any]


class HookSession:
    """The hooks of one run on one model.

    Removing is idempotent. An interrupt can hit even the removal; what it leaves behind is removed when the next
    session on the model begins.
    """

    def __init__(self, model: nn.Module) -> None:
        self._handles: list[RemovableHandle] = []
        for other in _sessions.pop(model, ()):
            other.remove()
        _sessions[model] = [self]

    def before(self, module: nn.Module, hook: PreHook) -> None:
        """Calls ``hook(module, args, kwargs)`` before the module's forward."""
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def after(self, module: nn.Module, hook: PostHook) -> None:
        """Calls ``hook(module, args, output)`` after the module's forward."""
        self._handles.append(module.register_forward_hook(hook))

    def remove(self) -> None:
        """Takes all hooks of this session off."""
        while self._handles:
            self._handles[-1].remove()
            self._handles.pop()


_sessions: weakref.WeakKeyDictionary[nn.Module, list[HookSession]] = weakref.WeakKeyDictionary()
_locks: weakref.WeakKeyDictionary[nn.Module, threading.Lock] = weakref.WeakKeyDictionary()
_registry = threading.Lock()


def lock_of(model: nn.Module) -> threading.Lock:
    """The lock under which a model runs: one run at a time, however many handles and threads there are."""
    with _registry:
        return _locks.setdefault(model, threading.Lock())
