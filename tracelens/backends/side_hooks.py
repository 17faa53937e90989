"""The hooks at the sides of modules: they find a site's tensor, run its steps, and hand on what these give."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from threading import get_ident
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from tracelens.backends.base import Side, Tap
from tracelens.backends.body import Body
from tracelens.backends.choices import masked_and_chosen, no_choice
from tracelens.backends.enduring import endured
from tracelens.backends.execute import State
from tracelens.backends.expert_hooks import ExpertsHook
from tracelens.backends.hooks import Seat
from tracelens.backends.inside_hooks import InsideHook
from tracelens.backends.transfer import moved
from tracelens.errors import SiteMismatchError, TracelensError
from tracelens.ir.sites import Kind, Site

if TYPE_CHECKING:
    from tracelens.backends.local import Run


class ForwardStopped(Exception):
    """Leaves a forward pass after the last site that is needed; it never reaches the user."""


class Blamed(Exception):
    """An error in a step, with the step's number: the recording that is running knows its line."""

    def __init__(self, error: Exception, number: int) -> None:
        super().__init__(str(error))
        self.error = error
        self.number = number


@dataclass(frozen=True, slots=True)
class HookCode:
    """All that is done at one hook point."""

    module: nn.Module
    path: str
    tap: Tap
    site: Site
    body: Body
    writes: bool
    stops: bool
    device: torch.device | None
    """Where the module computes, if it is not the only device: what it is given may still be on another."""
    moves: bool
    """Does a hook of accelerate on the module itself move what it is given?"""

    def blamed(self, error: TracelensError) -> Exception:
        """The error with the number of the first step, where it came before any."""
        return Blamed(error, self.body.numbers[0])

    def steps(self, state: State, tensor: Any) -> Any:
        """The tensor after the steps; after the last step of the program the pass is left."""
        found = done(self.body, state, tensor)
        if self.stops:
            raise ForwardStopped
        return found

    def failed(self, state: State, tensor: Any, error: Exception, *, again: bool = False) -> Any:
        """What comes of an error of the hook itself: it is raised, or the rank takes part in what others wait for."""
        if not endured(self.body.run, state, error, again=again):
            raise error
        if self.stops:
            raise ForwardStopped
        return tensor

    def refused(self, state: State, tensor: Any, error: TracelensError) -> Any:
        """What comes of an error in what the steps have given: it is raised, with the last step's number."""
        if not endured(self.body.run, state, error, again=True):
            raise Blamed(error, self.body.numbers[-1])
        return tensor


def done(body: Body, state: State, tensor: Any) -> Any:
    """The tensor after a body's steps; an error is given the step's number."""
    try:
        return body.run(state, tensor)
    except TracelensError as error:
        raise Blamed(error, body.number(error)) from None
    except Exception as error:
        raise Blamed(error, body.number(error)) from error


class SideHook:
    """The base of the two kinds of hooks: finds the tensor, runs the steps, gives the tensor back.

    One object for each hook point of a program. Hooks see every call of their module: the run that sits in the model's
    seat says whether it is its own.
    """

    __slots__ = ("code", "device", "fired", "seat", "writes")

    def __init__(self, code: HookCode, seat: Seat) -> None:
        self.code = code
        self.device = code.device
        self.seat = seat
        self.writes = code.writes
        self.fired = 0

    def register(self) -> None:
        """Puts the hook on its module."""
        raise TypeError("SideHook is abstract")

    def passed(self, run: Run, tensor: Any) -> Any:
        """The tensor after the steps."""
        if self.fired == run.forward_number or not isinstance(tensor, torch.Tensor):
            again, error = self.fired == run.forward_number, self.unfit(run, tensor)
            self.fired = run.forward_number
            return self.code.failed(run.state, tensor, error, again=again)
        self.fired = run.forward_number
        return self.code.steps(run.state, tensor)

    def brought(self, given: Any) -> Any:
        """The tensor where the module computes: accelerate moves what a module is given only after the hooks."""
        if self.device is None or not isinstance(given, torch.Tensor) or given.device == self.device:
            return given
        return moved(given, self.device)

    def unfit(self, run: Run, tensor: Any) -> SiteMismatchError:
        """The error for a module that is not used as the family's table says."""
        code = self.code
        if self.fired == run.forward_number:
            return SiteMismatchError(
                f"module {code.path!r} was called twice in one forward pass, so its sites are not unique"
            )
        return SiteMismatchError(
            f"module {code.path!r} has no tensor at its {code.tap.side.value}, where {code.site} was expected; "
            f"it has a {type(tensor).__name__}"
        )


class _Before(SideHook):
    __slots__ = ()

    def register(self) -> None:
        self.seat.before(self.code.module, self)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run = self.seat.run
        if run is None or get_ident() != run.thread:
            return None
        name = self.code.tap.key
        by_name = name if isinstance(name, str) and name in kwargs else None
        given: Any = kwargs[by_name] if by_name is not None else args[0] if args else None
        here = self.brought(given)
        found = self.passed(run, here)
        if not self.writes:
            if here is given or not self.code.moves:
                return None
            # As the model would have it a moment later; handed on, so that it is not moved there twice.
            found = here
        if by_name is not None:
            return args, {**kwargs, by_name: found}
        return (found, *args[1:]), kwargs


class _After(SideHook):
    __slots__ = ()

    def register(self) -> None:
        self.seat.after(self.code.module, self)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        run = self.seat.run
        if run is None or get_ident() != run.thread:
            return None
        key = self.code.tap.key
        if key is None and isinstance(output, torch.Tensor):
            tensor = self.passed(run, self.brought(output))
            return tensor if self.writes else None
        if isinstance(key, str):
            tensor = self.passed(run, self.brought(getattr(output, key, None)))
            if self.writes:
                cast("dict[str, Any]", output)[key] = tensor
            return None
        if isinstance(output, tuple):
            position = key or 0
            parts = cast("tuple[Any, ...]", output)
            tensor = self.passed(run, self.brought(parts[position]))
            return (*parts[:position], tensor, *parts[position + 1 :]) if self.writes else None
        tensor = self.passed(run, self.brought(output))
        return tensor if self.writes else None


class DecidingHook(_After):
    """At a tensor in a module's output of which the module has made the rest: what is written decides that anew."""

    __slots__ = ()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        run, decides = self.seat.run, self.code.tap.decides
        if not self.writes or run is None or get_ident() != run.thread:
            return super().__call__(module, args, output)
        assert decides is not None
        rest, key = list(map(self.brought, output)), self.code.tap.key or 0
        assert isinstance(key, int)
        first = rest.pop(key)
        if not all(map(torch.equal, decides(module, first), rest)):
            error = SiteMismatchError(
                f"module {self.code.path!r} makes something else of {self.code.site} than its kind does, so that what "
                "follows from another value is not known",
                instead="a write to what the module makes of it, which model.sites() lists",
            )
            self.code.failed(run.state, first, error)
            return None
        made = self.passed(run, first)
        decided = decides(module, made)
        if problem := masked_and_chosen(made, decided):
            self.code.refused(run.state, made, problem)
        return (*decided[:key], made, *decided[key:])


class ChoosingHook(_After):
    """At numbers of things, each of which is there once: what is written is held to that."""

    __slots__ = ("most",)

    def __init__(self, code: HookCode, seat: Seat, most: int) -> None:
        super().__init__(code, seat)
        self.most = most

    def passed(self, run: Run, tensor: Any) -> Any:
        found = super().passed(run, tensor)
        if self.writes and found is not tensor and (problem := no_choice(found, self.most, self.code.site)):
            return self.code.refused(run.state, tensor, problem)
        return found


class CopyingHook(_After):
    """At a tensor that the block goes on to change in place: the steps have a copy, and so has the block of theirs."""

    __slots__ = ()

    def passed(self, run: Run, tensor: Any) -> Any:
        found = super().passed(run, _copy(tensor))
        return _copy(found) if self.writes else found


def _copy(tensor: Any) -> Any:
    return tensor.clone() if isinstance(tensor, torch.Tensor) else tensor


_HOOKS: dict[Side, Callable[[HookCode, Seat], SideHook | InsideHook | ExpertsHook]] = {
    Side.IN: _Before,
    Side.OUT: _After,
    Side.INSIDE: InsideHook,
    Side.EXPERTS: ExpertsHook,
}


def kind_of_hook(
    tap: Tap, kind: Kind, widths: Mapping[str, int]
) -> Callable[[HookCode, Seat], SideHook | InsideHook | ExpertsHook]:
    """What is put at a hook point, where a site of this kind is."""
    if kind.numbers is not None:
        return partial(ChoosingHook, most=widths[kind.numbers])
    if tap.decides is not None:
        return DecidingHook
    return CopyingHook if tap.changes else _HOOKS[tap.side]
