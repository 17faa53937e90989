"""Runs a program on a model that lives on one device of this process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from tracelens.backends.anatomy import ModelAnatomy
from tracelens.backends.base import Side, Tap
from tracelens.backends.execute import Action, State, action
from tracelens.backends.hooks import HookSession, lock_of
from tracelens.errors import (
    ModelClosedError,
    NestedTraceError,
    OpFailedError,
    SiteMismatchError,
    TracelensError,
)
from tracelens.ir.graph import Graph
from tracelens.ir.ops import Call, IndexPut, results
from tracelens.ir.sites import Site
from tracelens.location import here
from tracelens.program import Block, Program


class ForwardStopped(Exception):
    """Leaves a forward pass after the last site that is needed; it never reaches the user."""


@dataclass(frozen=True, slots=True)
class BlockCode:
    """A block of a program, as Python functions."""

    site: Site | None
    actions: tuple[Action, ...]
    numbers: tuple[int, ...]
    writes: bool
    stops: bool

    def run(self, state: State) -> None:
        for position, do in enumerate(self.actions):
            try:
                do(state)
            except TracelensError as error:
                raise _Blamed(error, self.numbers[position]) from None
            except Exception as error:
                raise _Blamed(error, self.numbers[position]) from error


class _Blamed(Exception):
    """An error in a step, with the step's number: the recording that is running knows its line."""

    def __init__(self, error: Exception, number: int) -> None:
        super().__init__(str(error))
        self.error = error
        self.number = number


@dataclass(frozen=True, slots=True)
class HookCode:
    """All blocks of one hook point, in order."""

    module: nn.Module
    path: str
    tap: Tap
    blocks: tuple[BlockCode, ...]


@dataclass(frozen=True, slots=True)
class LocalCode:
    """A program ready to run on one device: what happens before the pass, and at each hook point."""

    graph: Graph
    program: Program
    before: BlockCode | None
    hooks: tuple[HookCode, ...]
    count: int


def prepare(program: Program, graph: Graph, anatomy: ModelAnatomy) -> LocalCode:
    """Compiles a program for a model."""
    fresh = frozenset(
        value
        for op in graph.ops
        if isinstance(op, IndexPut) or (isinstance(op, Call) and _computes(op))
        for value, _ in results(op)
    )
    before: BlockCode | None = None
    points: dict[tuple[str, Side], list[tuple[Site, BlockCode]]] = {}
    for block in program.blocks:
        code = _code(block, graph, fresh, stops=block.site is not None and block.site == program.stop)
        if block.site is None:
            before = code
            continue
        _, tap, path = anatomy.tap(block.site)
        points.setdefault((path, tap.side), []).append((block.site, code))
    hooks: list[HookCode] = []
    for (path, side), found in points.items():
        # Sites of one hook point may differ in where the tensor lies in the output; one hook each, in order.
        groups: dict[Tap, list[BlockCode]] = {}
        for site, code in found:
            _, tap, _ = anatomy.tap(site)
            groups.setdefault(Tap(path, side, tap.key), []).append(code)
        hooks += [HookCode(anatomy.module(path), path, tap, tuple(codes)) for tap, codes in groups.items()]
    return LocalCode(graph, program, before, tuple(hooks), graph.next_value)


def _computes(op: Call) -> bool:
    """Does the function make a new tensor, rather than perhaps a view of its operand?"""
    return op.function in {
        "torch.add",
        "torch.sub",
        "torch.mul",
        "torch.div",
        "torch.matmul",
        "torch.where",
        "torch.neg",
    }


def _code(block: Block, graph: Graph, fresh: frozenset[int], *, stops: bool) -> BlockCode:
    return BlockCode(
        block.site,
        tuple(action(step, graph.types, fresh) for step in block.steps),
        tuple(step.number for step in block.steps),
        block.writes,
        stops,
    )


class _Hook:
    """The base of the two kinds of hooks: finds the tensor, runs the blocks, puts the tensor back."""

    __slots__ = ("code", "fired", "run", "state", "thread")

    def __init__(self, code: HookCode, state: State, run: Run) -> None:
        self.code = code
        self.state = state
        self.run = run
        self.thread = threading.get_ident()
        self.fired = -1

    def blocks(self, tensor: Any) -> tuple[Any, bool]:
        """The tensor after the blocks, and whether one of them wrote it."""
        if self.fired == self.run.forwards:
            raise SiteMismatchError(
                f"module {self.code.path!r} was called twice in one forward pass, so its sites are not unique"
            )
        self.fired = self.run.forwards
        if not isinstance(tensor, torch.Tensor):
            raise SiteMismatchError(
                f"module {self.code.path!r} has no tensor at its {self.code.tap.side.value}, "
                f"where {self.code.blocks[0].site} was expected; it has a {type(tensor).__name__}"
            )
        state = self.state
        state.current = tensor
        written = False
        for block in self.code.blocks:
            block.run(state)
            written = written or block.writes
            if block.stops:
                raise ForwardStopped
        found, state.current = state.current, None
        return found, written


class _Before(_Hook):
    __slots__ = ()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:
            return None
        name = self.code.tap.key
        by_keyword = isinstance(name, str) and name in kwargs
        tensor, written = self.blocks(kwargs[name] if by_keyword else args[0] if args else None)  # pyright: ignore[reportArgumentType]  # by_keyword says that it is a str
        if not written:
            return None
        if by_keyword:
            return args, {**kwargs, cast(str, name): tensor}
        return (tensor, *args[1:]), kwargs


class _After(_Hook):
    __slots__ = ()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if threading.get_ident() != self.thread:
            return None
        key = self.code.tap.key
        if isinstance(key, str):
            tensor, written = self.blocks(getattr(output, key, None))
            if written:
                output[key] = tensor
            return output if written else None
        position = key or 0
        if isinstance(output, tuple):
            parts = cast("tuple[Any, ...]", output)
            tensor, written = self.blocks(parts[position])
            return (*parts[:position], tensor, *parts[position + 1 :]) if written else None
        tensor, written = self.blocks(output)
        return tensor if written else None


class Run:
    """One use of a model: hooks on, forward passes, hooks off."""

    def __init__(self, model: nn.Module, code: LocalCode, state: State) -> None:
        self.model = model
        self.code = code
        self.state = state
        self.forwards = 0

    def begin(self, sizes: Mapping[str, int]) -> None:
        """Starts a forward pass: sizes, and all that is computed before the first site."""
        self.forwards += 1
        self.state.begin(sizes)
        if self.code.before is not None:
            self.code.before.run(self.state)

    def execute(
        self, forward: Callable[[], Any], *, each_forward: Callable[[Any, Any], Mapping[str, int]] | None
    ) -> Any:
        """Calls ``forward`` with the hooks in place, holding the model's lock.

        ``each_forward`` is for functions that run the model several times: it is given the root module's arguments and
        says the sizes of that pass. Without it, :meth:`begin` was called by the caller.
        """
        if _running.model is self.model:
            raise NestedTraceError(
                "a trace of this model was run from inside a run of it, by an applied function",
                at=here(),
                instead="save the value, and open the second trace after the first block",
            )
        lock = lock_of(self.model)
        with lock:
            _running.model = self.model
            session = HookSession(self.model)
            try:
                if each_forward is not None:
                    thread = threading.get_ident()

                    def starting(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                        if threading.get_ident() == thread:
                            self.begin(each_forward(args, kwargs))

                    session.before(self.model, starting)
                for hook in self.code.hooks:
                    if hook.tap.side is Side.IN:
                        session.before(hook.module, _Before(hook, self.state, self))
                    else:
                        session.after(hook.module, _After(hook, self.state, self))
                with plain_mode():
                    return forward()
            except ForwardStopped:
                return None
            except _Blamed as blamed:
                raise self._explained(blamed) from blamed.__cause__
            finally:
                session.remove()
                _running.model = None
                self.state.current = None

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


@contextmanager
def plain_mode() -> Iterator[None]:
    """Without autograd, and without inference mode even inside the user's: saved tensors are fit for training on."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class _Running(threading.local):
    """The model that this thread is running right now."""

    model: nn.Module | None = None


_running = _Running()


def require_weights(anatomy: ModelAnatomy) -> None:
    """Refuses to run a model that was loaded without weights."""
    if anatomy.device.type == "meta":
        raise ModelClosedError(
            "this model was loaded without weights: its sites can be listed and graphs recorded, but it cannot run",
            instead="tl.load(...) without weights=False",
        )
