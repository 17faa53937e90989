"""The only caller of torch's hook registration: each model has one seat, which owns what the run on it changes."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch import nn

PreHook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]
PostHook = Callable[[nn.Module, tuple[Any, ...], Any], Any]


class Removable(Protocol):
    """Something on a model that comes off; a second time does no harm."""

    def remove(self) -> None: ...


class Seat:
    """Where the runs of one model sit, one at a time, with their hooks and the parameters that they freeze.

    Clearing is idempotent. An interrupt can hit even the clearing; what it leaves behind is removed before the next run
    puts hooks of its own on.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        """Held while the model runs: one run at a time, however many handles and threads there are."""
        self.run: Any = None
        """The run that holds the lock."""
        self._handles: list[Removable] = []
        self._standing: list[tuple[nn.Module, Any]] = []
        self._frozen: list[tuple[dict[str, nn.Parameter | None], str, nn.Parameter]] = []
        self._forwards = 0

    def next_forward(self) -> int:
        """Numbers the forward passes of all runs, so that a hook knows whether it was called in this one before."""
        self._forwards += 1
        return self._forwards

    def before(self, module: nn.Module, hook: PreHook) -> None:
        """Calls ``hook(module, args, kwargs)`` before the module's forward."""
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def after(self, module: nn.Module, hook: PostHook) -> None:
        """Calls ``hook(module, args, output)`` after the module's forward."""
        self._handles.append(module.register_forward_hook(hook))

    def hold(self, handle: Removable) -> None:
        """Takes care of something else that a run puts on the model and that has to come off with the hooks."""
        self._handles.append(handle)

    def stand_in(
        self, module: nn.Module, standing_in: Callable[[Callable[..., Any]], Callable[..., Any]]
    ) -> None:
        """Calls ``standing_in(own)`` in place of the module's own forward, until :meth:`clear`."""
        attributes = vars(module)
        # Others may have given this one module a forward of its own: accelerate does, and so may the user.
        had = attributes.get("forward", _NONE)
        forward = standing_in(module.forward)
        self._standing.append((module, had))
        attributes["forward"] = forward

    def freeze(self, model: nn.Module) -> None:
        """Keeps the parameters out of autograd's graph, until :meth:`clear`."""
        for module in model.modules():
            table = module._parameters
            for name, parameter in table.items():
                if parameter is not None and parameter.requires_grad:
                    self._frozen.append((table, name, parameter))
        for _, _, parameter in self._frozen:
            parameter.requires_grad_(False)

    def clear(self) -> None:
        """Takes all hooks off, and makes forwards and frozen parameters what they were."""
        standing = self._standing
        while standing:
            module, had = standing[-1]
            if had is _NONE:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = had
            standing.pop()
        frozen = self._frozen
        while frozen:
            table, name, parameter = frozen[-1]
            parameter.requires_grad_(True)
            # accelerate puts others in the place of parameters that it loads, as frozen as they were.
            now = table.get(name)
            if now is not None and now is not parameter:
                now.requires_grad_(True)
            frozen.pop()
        handles = self._handles
        while handles:
            handles[-1].remove()
            handles.pop()


def watch(modules: Iterable[nn.Module], before: PreHook, after: PostHook) -> None:
    """Calls ``before`` and ``after`` around every module of a copy that nobody else uses; they stay on it."""
    for module in modules:
        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after)


_NONE = object()
_seats: weakref.WeakKeyDictionary[nn.Module, Seat] = weakref.WeakKeyDictionary()
_registry = threading.Lock()


def seat_of(model: nn.Module) -> Seat:
    """The one seat of a model."""
    with _registry:
        return _seats.setdefault(model, Seat())
