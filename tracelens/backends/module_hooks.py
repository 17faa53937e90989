"""The hooks at sites by module path: they find one tensor of one call, wherever it lies among arguments or results."""

from __future__ import annotations

import copy
from threading import get_ident
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from tracelens.backends.hooks import Seat
from tracelens.backends.transfer import moved
from tracelens.errors import SiteMismatchError
from tracelens.ir.module_sites import INPUT, Key, ModuleSite

if TYPE_CHECKING:
    from tracelens.backends.local import Run
    from tracelens.backends.side_hooks import HookCode


class Counted:
    """Counts the calls of a module in each forward pass of the run that sits in a model's seat."""

    __slots__ = ("count", "forward_number", "seat")

    def __init__(self, seat: Seat) -> None:
        self.seat = seat
        self.forward_number = self.count = 0

    def called(self) -> tuple[Run | None, int]:
        """The run whose call this is, if it is one's, and the call's number in the pass."""
        run: Run | None = self.seat.run
        if run is None or get_ident() != run.thread:
            return None, 0
        if self.forward_number != run.forward_number:
            self.forward_number, self.count = run.forward_number, 0
        number = self.count
        self.count += 1
        return run, number


class ModuleHook:
    """One hook of a program at a module site: finds the tensor, runs the steps, gives the tensor back.

    ``calls``: how often a forward pass calls the module. ``copies``: the tensor is not the pass's own, or will
    change in place, so the steps are given a copy, and the model one of what they make.
    """

    __slots__ = ("call", "calls", "code", "copies", "counted", "fired", "key", "seat", "site")

    def __init__(self, code: HookCode, seat: Seat, *, calls: int, copies: bool) -> None:
        site = cast(ModuleSite, code.site)
        self.code = code
        self.seat = seat
        self.site = site
        self.key: Key = site.key
        self.call = site.call or 0
        self.calls = calls
        self.copies = copies
        self.counted = Counted(seat)
        self.fired = 0

    def register(self) -> None:
        """Puts the hook on its module."""
        if self.site.side == INPUT:
            self.seat.before(self.code.module, self.before)
        else:
            self.seat.after(self.code.module, self.after)

    def missed(self, run: Run) -> str | None:
        """What a pass that has ended should have come by, and did not."""
        return None if self.fired == run.forward_number else str(self.site)

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run = self._due()
        if run is None:
            return None
        first = self.key[0]
        given: Any = kwargs if isinstance(first, str) else args
        found = self._passed(run, given)
        if found is None:
            return None
        return (args, found) if given is kwargs else (found, kwargs)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        run = self._due()
        return None if run is None else self._passed(run, output)

    def _due(self) -> Run | None:
        """The run, if this is its thread and this the call that is meant."""
        run, number = self.counted.called()
        if run is None:
            return None
        if number == self.calls:
            error = SiteMismatchError(
                f"module {self.site.path!r} was called more often than the {self.calls} time(s) that were learned for "
                f"it, so {self.site} is not unique"
            )
            self.code.failed(run.state, None, error, again=True)
        return run if number == self.call else None

    def _passed(self, run: Run, given: Any) -> Any:
        """What was given, with the tensor after the steps in it; ``None`` if nothing is written."""
        tensor = given
        try:
            for part in self.key:
                tensor = tensor[part]
        except (KeyError, IndexError, TypeError):
            tensor = None
        if not isinstance(tensor, torch.Tensor):
            error = SiteMismatchError(
                f"there is no tensor at {self.site} in this run, but a {type(tensor).__name__}",
                instead="a tensor that the module is given in every run",
            )
            return self.code.failed(run.state, None, error)
        self.fired = run.forward_number
        device = self.code.device
        here = tensor if device is None else moved(tensor, device)
        found = self.code.steps(run.state, here.clone() if self.copies else here)
        if self.code.writes:
            return replaced(given, self.key, found.clone() if self.copies else found)
        # What was brought to the module's device goes on, so that it is not moved there twice.
        handed_on = self.site.side == INPUT and self.code.moves and here is not tensor
        return replaced(given, self.key, here) if handed_on else None


def replaced(container: Any, key: Key, new: Any) -> Any:
    """A copy of nested containers in which one tensor is another; what is not on the way is shared."""
    if not key:
        return new
    part = replaced(container[key[0]], key[1:], new)
    if isinstance(container, tuple):
        items = cast("tuple[Any, ...]", container)
        number = cast(int, key[0])
        parts = (*items[:number], part, *items[number + 1 :])
        kind: Any = type(cast(object, container))
        return kind(*parts) if hasattr(kind, "_fields") else kind(parts)
    changed = copy.copy(container)
    changed[key[0]] = part
    return changed
