"""Runs a program on a model that lives on one device of this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from threading import get_ident
from typing import Any, cast

import torch
from torch import nn

from tracelens.backends.anatomy import ModelAnatomy
from tracelens.backends.autograd_mode import plain_mode, with_autograd
from tracelens.backends.base import HeadsView, NeuronsView, RowsView, ScaledView, Side, Tap
from tracelens.backends.body import Body, body
from tracelens.backends.devices import Devices
from tracelens.backends.differentiate import gradients_of
from tracelens.backends.enduring import remember
from tracelens.backends.execute import State
from tracelens.backends.expert_hooks import ExpertsHook, join_experts
from tracelens.backends.hooks import Seat, seat_of
from tracelens.backends.inside_hooks import InsideHook, join
from tracelens.backends.module_hooks import ModuleHook
from tracelens.backends.replacing import replacement
from tracelens.backends.side_hooks import (
    Blamed,
    ForwardStopped,
    HookCode,
    SideHook,
    done,
    kind_of_hook,
)
from tracelens.backends.spread import Keeper, Loading, is_hooked
from tracelens.backends.stand_in import StandIn, missed
from tracelens.backends.transfer import Everywhere
from tracelens.backends.users_plan import LocalHookCode, refuse_stand_in
from tracelens.backends.views import Put, Take, TakeSized, rows_apart, scaled, shown, taking_and_putting
from tracelens.errors import (
    NestedTraceError,
    OpFailedError,
    TracelensError,
)
from tracelens.ir.functions import FUNCTIONS, Kind
from tracelens.ir.graph import Graph
from tracelens.ir.layout import OwnType
from tracelens.ir.module_sites import INPUT, ModuleSite
from tracelens.ir.ops import Apply, Call, Index, IndexPut, Keep, Save, Write, results
from tracelens.ir.sites import Scope, Site
from tracelens.ir.types import TensorType
from tracelens.location import here
from tracelens.plan import Plan, replaced_layers
from tracelens.program import Block, Program, Step, alone, merged


@dataclass(frozen=True, slots=True)
class LocalCode:
    """A program ready to run on one device: what happens before the pass, and at each hook point."""

    graph: Graph
    devices: Devices
    before: Body | None
    hooks: tuple[SideHook | ModuleHook | StandIn | InsideHook | ExpertsHook, ...]
    count: int
    seat: Seat
    differentiates: bool
    keepers: tuple[Keeper, ...]
    """What loads offloaded weights during a forward pass."""
    shapes: tuple[TensorType | OwnType, ...]
    """The types of the sites that are read; their sizes in a pass are what the hooks compare with."""
    after: Body | None = None
    """What is done when the pass is over, for sites that are on another place."""
    tail: Body | None = None
    """What is done when it is known which tokens follow."""
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
    gathers = plan.gathers
    departing = _departing(programs, places) if anatomy.mesh is None and not gathers else {}
    lying = plan.placement.layout_of
    views = _views(graph)
    devices = Devices(places, plan.home, views, departing, anatomy.mesh, plan.layouts, lying, gathers)
    fresh = frozenset(
        value
        for op in graph.ops
        if isinstance(op, IndexPut) or (isinstance(op, Call) and op.function in _FRESH)
        for value, _ in results(op)
    )
    gradients = gradients_of(graph)
    before: Body | None = None
    points: dict[tuple[str, Tap] | ModuleSite, list[Block]] = {}
    shapes: dict[TensorType | OwnType, int] = {}
    mesh = anatomy.mesh
    after: tuple[Step, ...] = ()
    tail: tuple[Step, ...] = ()
    if mesh is None:
        own = merged(programs)
    else:
        own, after = alone(programs[mesh.stage], plan.placement)
    for block in own:
        if block.site is not None and block.site.kind.scope is Scope.END:
            tail = (*tail, *block.steps)
        elif block.site is None:
            before = body(block.steps, graph.types, fresh, shapes, gradients, devices)
        elif isinstance(block.site, ModuleSite):
            points[block.site] = [block]
        else:
            # Sites of one hook point may differ in where the tensor lies in the output: one hook each, in order.
            _, tap, path = anatomy.tap(block.site)
            point = (path, Tap("", tap.side, tap.key, tap.view, tap.decides, tap.changes))
            points.setdefault(point, []).append(block)
    seat = seat_of(anatomy.model)
    hooks: list[SideHook | ModuleHook | StandIn | InsideHook | ExpertsHook] = []
    standing: dict[str, StandIn] = {}
    for point, blocks in points.items():
        path, tap = _ends(point) if isinstance(point, ModuleSite) else point
        making: Callable[..., HookCode] = HookCode
        if mesh is not None and mesh.by_user:
            layout = plan.placement.layout_of(cast(Site, blocks[0].site))
            making = partial(LocalHookCode, layout=shown(layout, tap.view) if mesh.ranks > 1 else None)
        code = making(
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
                _view(anatomy, tap, cast(Site, blocks[0].site))
                or _view_of_what_stands_in(anatomy, blocks[0]),
                cuts=isinstance(tap.view, HeadsView | NeuronsView) and len(tap.view.parts) > 1,
                sized=isinstance(tap.view, RowsView),
            ),
            any(block.writes for block in blocks),
            plan.stop is not None and plan.stop in {block.site for block in blocks},
            anatomy.spread.device_of(path) if len(anatomy.spread.devices) > 1 else None,
            is_hooked(anatomy.module(path)),
        )
        if isinstance(point, ModuleSite) and blocks[0].stands_in:
            if mesh is not None and mesh.by_user:
                refuse_stand_in(code.module, path, distributed=path in anatomy.distributed)
            if path not in standing:
                standing[path] = StandIn(code.module, path, seat, anatomy.spread.device_of(path))
                hooks.append(standing[path])
            written = _written(blocks[0]).site
            new = replacement(anatomy, written)
            own = devices.local(new.type, plan.placement.layout_of(written))
            standing[path].calls[point.call or 0] = (code, new, own)
        elif isinstance(point, ModuleSite):
            calls, copies = anatomy.sides.calls_of(point), anatomy.sides.leaf(point).lent
            hooks.append(ModuleHook(code, seat, calls=calls, copies=copies))
        else:
            kind = cast(Site, blocks[0].site).kind
            hooks.append(kind_of_hook(tap, kind, anatomy.widths)(code, seat))
    inside = [hook for hook in hooks if isinstance(hook, InsideHook)]
    if inside:
        join(inside, seat, replaced_layers(graph), anatomy)
    join_experts([hook for hook in hooks if isinstance(hook, ExpertsHook)], seat)
    count, differentiates = graph.next_value, bool(gradients)
    keepers = anatomy.spread.keepers
    last, end = (
        body(steps, graph.types, fresh, shapes, gradients, devices) if steps else None
        for steps in (after, tail)
    )
    return LocalCode(
        graph, devices, before, tuple(hooks), count, seat, differentiates, keepers, tuple(shapes), last, end
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


def _view(anatomy: ModelAnatomy, tap: Tap, site: Site) -> tuple[Take | TakeSized, Put] | None:
    """How a site is found in its module's tensor, where it is not that tensor itself."""
    if isinstance(tap.view, HeadsView | NeuronsView):
        return taking_and_putting(tap.view, anatomy.local_widths(site))
    if isinstance(tap.view, ScaledView):
        return scaled(anatomy.factor(tap))
    return None if tap.view is None else rows_apart(tap.view)


def _view_of_what_stands_in(anatomy: ModelAnatomy, block: Block) -> tuple[Take | TakeSized, Put] | None:
    """A module that is not run would have returned what the model multiplies: the quotient is what stands in for it."""
    if not block.stands_in or isinstance(written := _written(block).site, ModuleSite):
        return None
    return _view(anatomy, anatomy.family.taps[written.name], written)


def _written(block: Block) -> Write:
    """The write of what a module that is not run would have returned."""
    return next(step.op for step in block.steps if isinstance(step.op, Write))


def _ends(site: ModuleSite) -> tuple[str, Tap]:
    return site.path, Tap(site.path, Side.IN if site.side == INPUT else Side.OUT)


# Functions that make a new tensor, rather than perhaps a view of their operand.
_FRESH = frozenset(f"torch.{name}" for name in ("add", "sub", "mul", "div", "matmul", "where", "neg"))


class Run:
    """One use of a model: hooks on, forward passes, hooks off."""

    __slots__ = ("code", "forward_number", "model", "real", "state", "thread", "waiting")

    def __init__(
        self, model: nn.Module, code: LocalCode, state: State, real: torch.Tensor | None = None
    ) -> None:
        """``real``: which keys [B, S] are no padding; ``None``: all of them."""
        self.model = model
        self.real = real if real is None else Everywhere(real)
        self.code = code
        self.state = state
        self.thread = get_ident()
        self.waiting: Set[int] = frozenset()
        """Threads that wait for the run, beside its own: none of them may run the model meanwhile."""
        # Among all forward passes of the model's runs; no pass has the number 0.
        self.forward_number = 0

    def begin(self, sizes: Mapping[str, int]) -> None:
        """Starts a forward pass: sizes, and all that is computed before the first site."""
        self.forward_number = self.code.seat.next_forward()
        state, before = self.state, self.code.before
        state.sizes = sizes
        state.shapes = self.code.sizes_of(sizes)
        if before is not None:
            done(before, state, None)

    def execute(self, forward: Callable[[], Any]) -> Any:
        """Calls ``forward`` with the hooks in place, holding the model's lock."""
        seat = self.code.seat
        sitting = seat.run
        own = (self.thread, *self.waiting)
        if sitting is not None and (self.thread == sitting.thread or not sitting.waiting.isdisjoint(own)):
            raise NestedTraceError(
                "this model was run from inside a run of it, by an applied function or in the loop over a stream",
                at=here(),
                instead="save the value, and open the second trace after the first block; or after the loop, which "
                "stream.close() ends where it was left",
            )
        with seat.lock:
            try:
                seat.clear()
                seat.run = self
                self.put_on()
                if not self.code.differentiates:
                    with plain_mode():
                        result = forward()
                else:
                    seat.freeze(self.model)
                    with with_autograd():
                        result = forward()
                self.require_reached()
                return result
            except ForwardStopped:
                self.require_reached()
                return None
            except Blamed as blamed:
                raise self._explained(blamed) from blamed.__cause__
            finally:
                seat.run = None
                seat.clear()

    def put_on(self) -> None:
        """Puts the hooks of the program on the model."""
        if self.code.keepers:
            self.code.seat.hold(Loading(self.code.keepers))
        for hook in self.code.hooks:
            hook.register()

    def require_reached(self) -> None:
        """A pass must have come by every site that is named by a module's path before it ended."""
        for hook in self.code.hooks:
            if isinstance(hook, ModuleHook | StandIn) and (what := hook.missed(self)):
                if self.code.devices.mesh is None:
                    raise missed(what)
                remember(self.state, missed(what))

    def do_before(self) -> None:
        """Does what needs no site."""
        self._do(self.code.before)

    def finish(self) -> None:
        """Does what is left when the pass is over."""
        self._do(self.code.after)

    def end(self) -> None:
        """Does what is left when it is known which tokens follow."""
        self._do(self.code.tail)

    def _do(self, what: Body | None) -> None:
        if what is None:
            return
        with plain_mode():
            try:
                done(what, self.state, None)
            except Blamed as blamed:
                raise self._explained(blamed) from blamed.__cause__

    def before_only(self, sizes: Mapping[str, int]) -> None:
        """For programs that need no site at all."""
        with plain_mode():
            try:
                self.begin(sizes)
            except Blamed as blamed:
                raise self._explained(blamed) from blamed.__cause__

    def _explained(self, blamed: Blamed) -> TracelensError:
        return self._named(blamed.error, blamed.number)

    def _named(self, error: Exception, number: int | None) -> TracelensError:
        if not isinstance(error, TracelensError):
            error = OpFailedError(f"{type(error).__name__} while the model ran: {error}")
        return error if number is None else self.code.graph.blame(error, number)

    @property
    def error(self) -> TracelensError | None:
        """What went wrong on this rank, which took part to the end nonetheless."""
        failure = self.state.failure
        if failure is None or failure.error is None:
            return None
        error = self._named(failure.error, failure.number)
        if error is not failure.error:
            error.__cause__ = failure.error
        return error
