"""Runs a program on a model that lives on one device of this process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
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
class Code:
    """Steps of a program as Python functions, with their numbers in the planned graph."""

    actions: tuple[Action, ...]
    numbers: tuple[int, ...]

    def run(self, state: State) -> None:
        position = 0
        try:
            for position, do in enumerate(self.actions):  # noqa: B007  # the handlers say which one failed
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
    """All that is done at one hook point."""

    module: nn.Module
    path: str
    tap: Tap
    site: Site
    code: Code
    writes: bool
    stops: bool


@dataclass(frozen=True, slots=True)
class LocalCode:
    """A program ready to run on one device: what happens before the pass, and at each hook point."""

    graph: Graph
    program: Program
    before: Code | None
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
    before: Code | None = None
    points: dict[tuple[str, Tap], list[Block]] = {}
    for block in program.blocks:
        if block.site is None:
            before = _code([block], graph, fresh)
        else:
            # Sites of one hook point may differ in where the tensor lies in the output: one hook each, in order.
            _, tap, path = anatomy.tap(block.site)
            points.setdefault((path, Tap("", tap.side, tap.key)), []).append(block)
    hooks = tuple(
        HookCode(
            anatomy.module(path),
            path,
            tap,
            cast(Site, blocks[0].site),
            _code(blocks, graph, fresh),
            any(block.writes for block in blocks),
            program.stop is not None and program.stop in {block.site for block in blocks},
        )
        for (path, tap), blocks in points.items()
    )
    return LocalCode(graph, program, before, hooks, graph.next_value)


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


def _code(blocks: list[Block], graph: Graph, fresh: frozenset[int]) -> Code:
    steps = [step for block in blocks for step in block.steps]
    return Code(
        tuple(action(step, graph.types, fresh) for step in steps), tuple(step.number for step in steps)
    )


class _Hook:
    """The base of the two kinds of hooks: takes the tensor, runs the steps, gives the tensor back."""

    __slots__ = ("code", "fired", "run", "state", "thread")

    def __init__(self, code: HookCode, state: State, run: Run, thread: int) -> None:
        self.code = code
        self.state = state
        self.run = run
        self.thread = thread
        self.fired = 0

    def passed(self, tensor: Any) -> Any:
        """The tensor after the steps."""
        code, state = self.code, self.state
        if self.fired == self.run.forwards:
            raise SiteMismatchError(
                f"module {code.path!r} was called twice in one forward pass, so its sites are not unique"
            )
        self.fired = self.run.forwards
        if not isinstance(tensor, torch.Tensor):
            raise SiteMismatchError(
                f"module {code.path!r} has no tensor at its {code.tap.side.value}, where {code.site} was expected; "
                f"it has a {type(tensor).__name__}"
            )
        state.current = tensor
        code.code.run(state)
        if code.stops:
            raise ForwardStopped
        found, state.current = state.current, None
        return found


class _Before(_Hook):
    __slots__ = ()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:
            return None
        name = self.code.tap.key
        if isinstance(name, str) and name in kwargs:
            tensor = self.passed(kwargs[name])
            return (args, {**kwargs, name: tensor}) if self.code.writes else None
        tensor = self.passed(args[0] if args else None)
        return ((tensor, *args[1:]), kwargs) if self.code.writes else None


class _After(_Hook):
    __slots__ = ()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if threading.get_ident() != self.thread:
            return None
        key = self.code.tap.key
        if isinstance(key, str):
            tensor = self.passed(getattr(output, key, None))
            if self.code.writes:
                output[key] = tensor
            return None
        if isinstance(output, tuple):
            position = key or 0
            parts = cast("tuple[Any, ...]", output)
            tensor = self.passed(parts[position])
            return (*parts[:position], tensor, *parts[position + 1 :]) if self.code.writes else None
        tensor = self.passed(output)
        return tensor if self.code.writes else None


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
            thread = threading.get_ident()
            try:
                if each_forward is not None:

                    def starting(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                        if threading.get_ident() == thread:
                            self.begin(each_forward(args, kwargs))

                    session.before(self.model, starting)
                for hook in self.code.hooks:
                    if hook.tap.side is Side.IN:
                        session.before(hook.module, _Before(hook, self.state, self, thread))
                    else:
                        session.after(hook.module, _After(hook, self.state, self, thread))
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


def plain_mode() -> AbstractContextManager[object]:
    """Without autograd, and without inference mode even inside the user's: saved tensors are fit for training on."""
    return _outside_inference() if torch.is_inference_mode_enabled() else torch.no_grad()


@contextmanager
def _outside_inference() -> Iterator[None]:
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
