"""What a program did on the pretend devices: copies between devices, host reads and memory."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from tests.support.pretend import memory

_SILENT = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(__file__) + os.sep)


@dataclass(frozen=True)
class Copy:
    """One copy from one device to another one (``"cpu"`` or ``"pretend:1"``)."""

    source: str
    target: str
    bytes: int
    """What travels: in the target's dtype when the CPU sends, else in the source's (CUDA converts on that side too)."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    """The source's."""
    non_blocking: bool
    lines: tuple[str, ...] = field(repr=False)
    """``file:line`` of the program, torch's own left out, the innermost last."""

    @property
    def line(self) -> str:
        """Where the copy was asked for."""
        return self.lines[-1] if self.lines else ""

    @property
    def waits(self) -> bool:
        """Whether the host waits for it, in either direction: copies between accelerators never make it wait."""
        return not self.non_blocking and "cpu" in (self.source, self.target)


@dataclass(frozen=True)
class HostRead:
    """One moment at which a real accelerator would have made the host wait for values."""

    kind: str
    """The operation: ``"item"``, ``"copy"`` (a blocking copy to the CPU), ``"nonzero"``, ``"equal"``..."""
    device: str
    lines: tuple[str, ...] = field(repr=False)

    @property
    def line(self) -> str:
        """Where the value was asked for."""
        return self.lines[-1] if self.lines else ""

    def within(self, part: str) -> bool:
        """Whether a file whose path contains ``part`` was on the way to it."""
        return any(part in line for line in self.lines)


class Seen:
    """What has happened inside one ``with watched():`` block, in any thread."""

    def __init__(self) -> None:
        self.copies: list[Copy] = []
        self.reads: list[HostRead] = []
        self._meter = memory.start_meter()

    def between(self, source: str, target: str) -> list[Copy]:
        """The copies from one device to another one, in order."""
        return [copy for copy in self.copies if (copy.source, copy.target) == (source, target)]

    def moved(self) -> dict[tuple[str, str], int]:
        """Bytes moved for each pair (source, target)."""
        total: dict[tuple[str, str], int] = {}
        for copy in self.copies:
            pair = (copy.source, copy.target)
            total[pair] = total.get(pair, 0) + copy.bytes
        return total

    def before(self, device: str) -> int:
        """Bytes alive on ``device`` when the block began."""
        return self._meter.before.get(index_of(device), 0)

    def alive(self, device: str) -> int:
        """Bytes alive on ``device`` now, or when the block ended; views share the bytes of their storage."""
        return self._meter.alive.get(index_of(device), 0)

    def peak(self, device: str) -> int:
        """The most bytes that were alive on ``device`` at one moment of the block."""
        return self._meter.peak.get(index_of(device), 0)

    def extra(self, device: str) -> int:
        """The most bytes alive at one moment beyond what was alive when the block began."""
        return self.peak(device) - self.before(device)

    def reset_peak(self) -> None:
        """Count ``before``, ``peak`` and ``extra`` from now."""
        self._meter.before, self._meter.peak = dict(self._meter.alive), dict(self._meter.alive)


def index_of(device: str | torch.device) -> int:
    """The number of a pretend device, ``"pretend:1"`` being 1."""
    device = torch.device(device)
    assert device.type == "pretend", f"the pretend devices count no memory of {device}"
    return device.index or 0


_watching: list[Seen] = []


@contextmanager
def watched() -> Iterator[Seen]:
    """Counts what the block does. Blocks may be nested; each counts for itself."""
    seen = Seen()
    _watching.append(seen)
    try:
        yield seen
    finally:
        _watching.remove(seen)
        memory.stop_meter(seen._meter)


def saw_copy(source: torch.Tensor, target: torch.Tensor, non_blocking: bool) -> None:
    """A copy from ``source`` to ``target``, which are on two devices."""
    if not _watching:
        return
    lines = _lines()
    travels = target.dtype if source.device.type == "cpu" else source.dtype
    copy = Copy(
        str(source.device),
        str(target.device),
        source.numel() * travels.itemsize,
        tuple(source.shape),
        source.dtype,
        non_blocking,
        lines,
    )
    read = HostRead("copy", copy.source, lines) if copy.target == "cpu" and not non_blocking else None
    for seen in _watching:
        seen.copies.append(copy)
        if read is not None:
            seen.reads.append(read)


def saw_read(kind: str, device: torch.device) -> None:
    """The host needs a value of ``device``."""
    if _watching:
        read = HostRead(kind, str(device), _lines())
        for seen in _watching:
            seen.reads.append(read)


def _lines() -> tuple[str, ...]:
    lines: list[str] = []
    frame = sys._getframe(1)
    while frame is not None:
        if not frame.f_code.co_filename.startswith(_SILENT):
            lines.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        frame = frame.f_back
    return tuple(reversed(lines))
