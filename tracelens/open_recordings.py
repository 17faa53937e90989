"""Which recordings are open, in this thread and task."""

from __future__ import annotations

from contextvars import ContextVar

from tracelens.recorder import Recorder
from tracelens.subject import Anatomy

_open: ContextVar[tuple[Recorder, ...]] = ContextVar("tracelens_open_recordings", default=())


def open_recorder(anatomy: Anatomy) -> Recorder | None:
    """The open recording of this model in the current context."""
    for recorder in _open.get():
        if recorder.anatomy is anatomy and recorder.is_open:
            return recorder
    return None


def open_recorders() -> tuple[Recorder, ...]:
    """All open recordings in the current context, the innermost first."""
    return tuple(recorder for recorder in _open.get() if recorder.is_open)


def enter(recorder: Recorder) -> None:
    _open.set((recorder, *(other for other in _open.get() if other.is_open)))


def leave(recorder: Recorder) -> None:
    _open.set(tuple(other for other in _open.get() if other is not recorder))
