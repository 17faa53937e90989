"""A rank on which a step goes wrong goes on taking part, so that no other waits for it.

From there on it hands the model's tensors on as they are, and of the program's steps it does only what others wait for:
it gives zeros where they need its part of a value, takes what they send, and says in their votes that it failed. Only
an error within such a step cannot be endured: nobody knows how far it came.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tracelens.errors import TracelensError

if TYPE_CHECKING:
    from tracelens.backends.body import Body
    from tracelens.backends.execute import State


@dataclass(frozen=True, slots=True)
class Failure:
    """The first error of a run on this rank.

    ``error``: ``None`` if this rank has only heard that another one failed. ``number``: of the operation in the planned
    graph, if it was in one. ``when``: by the clock that all processes of a machine share.
    """

    error: Exception | None
    number: int | None
    when: float


@dataclass(frozen=True, slots=True)
class Part:
    """A step of a body that others wait for: its source line, and how a rank that has failed takes part in it."""

    line: int
    take: Callable[[State], object]


class FailedElsewhereError(Exception):
    """Another rank has failed, and this one is to go on as if it had, too; it never reaches the user."""


class Enduring:
    """A body's function on one of several ranks: after an error it does its parts alone."""

    __slots__ = ("body", "parts")

    def __init__(self, body: Body, parts: Sequence[Part]) -> None:
        self.body = body
        self.parts = tuple(parts)

    def __call__(self, state: State, tensor: Any) -> Any:
        done = 0
        if state.failure is None:
            try:
                return self.body.run(state, tensor)
            except Exception as error:
                done = self.body.line(error)
                if isinstance(error, FailedElsewhereError):
                    remember(state, None)
                # In the middle of a communication, unless it is known how that ended.
                elif not isinstance(error, TracelensError) and any(part.line == done for part in self.parts):
                    raise
                else:
                    remember(state, error, self.body.numbers[done - 1])
        self.take_part(state, done)
        return tensor

    def take_part(self, state: State, done: int = 0) -> None:
        """Does the parts that stand behind a line."""
        for part in self.parts:
            if part.line > done:
                part.take(state)


def remember(state: State, error: Exception | None, number: int | None = None) -> None:
    """Notes the first failure of a run, and lets go of what the run holds: the others may need the memory."""
    if state.failure is not None:
        return
    cause = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__
    state.failure = Failure(error, number, time.monotonic())
    state.values = [None] * len(state.values)
    state.saved.clear()
    state.stacks.clear()


def endured(run: Callable[[State, Any], Any], state: State, error: Exception, *, again: bool = False) -> bool:
    """Remembers an error of a hook itself, if its rank is not alone; the body's parts are done, unless they were.

    ``again``: the hook has already acted in this pass.
    """
    if not isinstance(run, Enduring):
        return False
    remember(state, error)
    if not again:
        run.take_part(state)
    return True
