"""Runs a program on a model that lives on one device of this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any, cast

import torch
from torch import nn

from tracelens.backends.anatomy import ModelAnatomy
from tracelens.backends.autograd_mode import plain_mode, with_autograd
from tracelens.backends.base import Side, Tap
from tracelens.backends.body import Body, Devices, body
from tracelens.backends.differentiate import gradients_of
from tracelens.backends.execute import State
from tracelens.backends.hooks import Seat, seat_of
from tracelens.backends.inside_hooks import InsideHook, join
from tracelens.backends.module_hooks import ModuleHook
from tracelens.backends.replacing import replacement
from tracelens.backends.spread import Keeper, Loading, is_hooked
from tracelens.backends.stand_in import StandIn, missed
from tracelens.backends.transfer import Everywhere, moved
from tracelens.backends.views import taking_and_putting
from tracelens.errors import (
    NestedTraceError,
    OpFailedError,
    SiteMismatchError,
    TracelensError,
)
from tracelens.ir.functions import FUNCTIONS, Kind
from tracelens.ir.graph import Graph
from tracelens.ir.module_sites import INPUT, ModuleSite
from tracelens.ir.ops import Apply, Call, Index, IndexPut, Keep, Save, Write, results
from tracelens.ir.sites import Site
from tracelens.ir.types import TensorType
from tracelens.location import here
from tracelens.plan import Plan, replaced_layers
from tracelens.program import Block, Program, merged


class ForwardStopped(Exception):
    """Leaves a forward pass after the last site that is needed; it never reaches the user."""


class _Blamed(Exception):
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
        return _Blamed(error, self.body.numbers[0])

    def steps(self, state: State, tensor: Any) -> Any:
        """The tensor after the steps; after the last step of the program the pass is left."""
        found = _after(self.body, state, tensor)
        if self.stops:
            raise ForwardStopped
        return found


def _after(body: Body, state: State, tensor: Any) -> Any:
    """The tensor after a body's steps; an error is given the step's number."""
    try:
        return body.run(state, tensor)
    except TracelensError as error:
        raise _Blamed(error, body.number(error)) from None
    except Exception as error:
        raise _Blamed(error, body.number(error)) from error


@dataclass(frozen=True, slots=True)
class LocalCode:
    """A program ready to run on one device: what happens before the pass, and at each hook point."""

    graph: Graph
    devices: Devices
    before: Body | None
    hooks: tuple[_Hook | ModuleHook | StandIn | InsideHook, ...]
    count: int
    seat: Seat
    differentiates: bool
    keepers: tuple[Keeper, ...]
    """What loads offloaded weights during a forward pass."""
    shapes: tuple[TensorType, ...]
    """The types of the sites that are read; their sizes in a pass are what the hooks compare with."""
    _sizes: dict[tuple[tuple[str, int], ...], tuple[tuple[int, ...], ...]] = field(
        default_factory=dict[tuple[tuple[str, int], ...], tuple[tuple[int, ...], ...]]
    )

    def sizes_of(self, sizes: Mapping[str, int]) -> tuple[tuple[int, ...], ...]:
        """The sizes of :attr:`shapes` for a prompt."""
        key = tuple(sizes.items())
        known = self._sizes.get(key)
        if known is None:
            if len(self._sizes) >= _KEPT_SIZES:
                self._sizes.clear()
            known = self._sizes[key] = tuple(type_.sizes(sizes) for type_ in self.shapes)
        return known


_KEPT_SIZES = 64


def prepare(programs: Sequence[Program], plan: Plan, anatomy: ModelAnatomy) -> LocalCode:
    """Compiles the programs of all places for a model whose devices this process owns."""
    graph = plan.graph
    places = tuple(torch.device(place.device) for place in plan.placement.places)
    devices = Devices(places, plan.home, _views(graph), _departing(programs, places))
    fresh = frozenset(
        value
        for op in graph.ops
        if isinstance(op, IndexPut) or (isinstance(op, Call) and op.function in _FRESH)
        for value, _ in results(op)
    )
    gradients = gradients_of(graph)
    before: Body | None = None
    points: dict[tuple[str, Tap] | ModuleSite, list[Block]] = {}
    shapes: dict[TensorType, int] = {}
    for block in merged(programs):
        if block.site is None:
            before = body(block.steps, graph.types, fresh, shapes, gradients, devices)
        elif isinstance(block.site, ModuleSite):
            points[block.site] = [block]
        else:
            # Sites of one hook point may differ in where the tensor lies in the output: one hook each, in order.
            _, tap, path = anatomy.tap(block.site)
            points.setdefault((path, Tap("", tap.side, tap.key, tap.view)), []).append(block)
    seat = seat_of(anatomy.model)
    hooks: list[_Hook | ModuleHook | StandIn | InsideHook] = []
    standing: dict[str, StandIn] = {}
    for point, blocks in points.items():
        path, tap = _ends(point) if isinstance(point, ModuleSite) else point
        code = HookCode(
            anatomy.module(path),
            path,
            tap,
            cast(Site, blocks[0].site),
            body(
                [step for block in blocks for step in block.steps],
                graph.types,
                fresh,
                shapes,
                gradients,
                devices,
                None if tap.view is None else taking_and_putting(tap.view, anatomy.widths),
                cuts=tap.view is not None and len(tap.view.parts) > 1,
            ),
            any(block.writes for block in blocks),
            plan.stop is not None and plan.stop in {block.site for block in blocks},
            anatomy.spread.device_of(path) if len(anatomy.spread.devices) > 1 else None,
            is_hooked(anatomy.module(path)),
        )
        if isinstance(point, ModuleSite) and blocks[0].stands_in:
            if path not in standing:
                standing[path] = StandIn(code.module, path, seat, anatomy.spread.device_of(path))
                hooks.append(standing[path])
            standing[path].calls[point.call or 0] = (code, replacement(anatomy, _written(blocks[0]).site))
        elif isinstance(point, ModuleSite):
            calls, copies = anatomy.sides.calls_of(point), anatomy.sides.leaf(point).lent
            hooks.append(ModuleHook(code, seat, calls=calls, copies=copies))
        else:
            hooks.append(_HOOKS[tap.side](code, seat))
    inside = [hook for hook in hooks if isinstance(hook, InsideHook)]
    if inside:
        join(inside, seat, replaced_layers(graph), anatomy)
    count, differentiates = graph.next_value, bool(gradients)
    keepers = anatomy.spread.keepers
    return LocalCode(
        graph, devices, before, tuple(hooks), count, seat, differentiates, keepers, tuple(shapes)
    )


def _views(graph: Graph) -> frozenset[int]:
    """The values that may lie in the memory of others."""
    return frozenset(
        value
        for op in graph.ops
        if isinstance(op, Index | Apply)
        or (isinstance(op, Call) and (known := FUNCTIONS.get(op.function)) and known.kind in _VIEWING)
        for value, _ in results(op)
    )


def _departing(
    programs: Sequence[Program], places: Sequence[torch.device]
) -> dict[tuple[int, int], tuple[torch.device, tuple[tuple[Save, int], ...]]]:
    """After which save each device but the host has saved all that goes to the host."""
    found: dict[tuple[int, int], tuple[torch.device, tuple[tuple[Save, int], ...]]] = {}
    for program in programs:
        device = places[program.place.index]
        parts: list[tuple[Save, int]] = []
        last = None
        for step in program.steps():
            if isinstance(step.op, Save) and step.op.keep is Keep.CPU:
                parts += [(step.op, part) for part in step.parts]
                last = step.number, step.parts[-1]
        if last is not None and device.type != "cpu":
            found[last] = (device, tuple(parts))
    return found


_VIEWING = (Kind.SHAPE, Kind.AXIS, Kind.PATTERN, Kind.GENERAL)


def _written(block: Block) -> Write:
    """The write of what a module that is not run would have returned."""
    return next(step.op for step in block.steps if isinstance(step.op, Write))


def _ends(site: ModuleSite) -> tuple[str, Tap]:
    return site.path, Tap(site.path, Side.IN if site.side == INPUT else Side.OUT)


# Functions that make a new tensor, rather than perhaps a view of their operand.
_FRESH = frozenset(f"torch.{name}" for name in ("add", "sub", "mul", "div", "matmul", "where", "neg"))


class _Hook:
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
        raise TypeError("_Hook is abstract")

    def passed(self, run: Run, tensor: Any) -> Any:
        """The tensor after the steps."""
        if self.fired == run.forward_number or not isinstance(tensor, torch.Tensor):
            raise self.unfit(run, tensor)
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


class _Before(_Hook):
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


class _After(_Hook):
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


_HOOKS: dict[Side, Callable[[HookCode, Seat], _Hook | InsideHook]] = {
    Side.IN: _Before,
    Side.OUT: _After,
    Side.INSIDE: InsideHook,
}


class Run:
    """One use of a model: hooks on, forward passes, hooks off."""

    __slots__ = ("code", "forward_number", "mask", "model", "real", "state", "thread")

    def __init__(
        self,
        model: nn.Module,
        code: LocalCode,
        state: State,
        mask: torch.Tensor | None,
        real: torch.Tensor | None = None,
    ) -> None:
        """``mask``: the site ``token_mask``. ``real``: which keys [B, S] are no padding; ``None``: all of them."""
        self.model = model
        self.real = real if real is None else Everywhere(real)
        self.code = code
        self.state = state
        self.mask = mask
        self.thread = get_ident()
        # Among all forward passes of the model's runs; no pass has the number 0.
        self.forward_number = 0

    def begin(self, sizes: Mapping[str, int]) -> None:
        """Starts a forward pass: sizes, and all that is computed before the first site."""
        self.forward_number = self.code.seat.next_forward()
        state, before = self.state, self.code.before
        state.sizes = sizes
        state.shapes = self.code.sizes_of(sizes)
        if before is not None:
            _after(before, state, self.mask)

    def execute(
        self, forward: Callable[[], Any], *, each_forward: Callable[[Any, Any], Mapping[str, int]] | None
    ) -> Any:
        """Calls ``forward`` with the hooks in place, holding the model's lock.

        ``each_forward`` is for functions that run the model several times: it is given the root module's arguments and
        says the sizes of that pass. Without it, :meth:`begin` was called by the caller.
        """
        seat = self.code.seat
        sitting = seat.run
        if sitting is not None and sitting.thread == self.thread:
            raise NestedTraceError(
                "a trace of this model was run from inside a run of it, by an applied function",
                at=here(),
                instead="save the value, and open the second trace after the first block",
            )
        with seat.lock:
            try:
                seat.clear()
                seat.run = self
                if self.code.keepers:
                    seat.hold(Loading(self.code.keepers))
                if each_forward is not None:

                    def starting(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                        if get_ident() == self.thread:
                            self.begin(each_forward(args, kwargs))

                    seat.before(self.model, starting)
                for hook in self.code.hooks:
                    hook.register()
                if not self.code.differentiates:
                    with plain_mode():
                        result = forward()
                else:
                    seat.freeze(self.model)
                    with with_autograd():
                        result = forward()
                self._require_reached()
                return result
            except ForwardStopped:
                self._require_reached()
                return None
            except _Blamed as blamed:
                raise self._explained(blamed) from blamed.__cause__
            finally:
                seat.run = None
                seat.clear()

    def _require_reached(self) -> None:
        """A pass must have come by every site that is named by a module's path before it ended."""
        for hook in self.code.hooks:
            if isinstance(hook, ModuleHook | StandIn) and (what := hook.missed(self)):
                raise missed(what)

    def before_only(self, sizes: Mapping[str, int]) -> None:
        """For programs that need no site at all."""
        with plain_mode():
            try:
                self.begin(sizes)
            except _Blamed as blamed:
                raise self._explained(blamed) from blamed.__cause__

    def _explained(self, blamed: _Blamed) -> TracelensError:
        error = blamed.error
        if not isinstance(error, TracelensError):
            error = OpFailedError(f"{type(error).__name__} while the model ran: {error}")
        return self.code.graph.blame(error, blamed.number)
