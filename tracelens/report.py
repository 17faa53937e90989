"""What a run has cost: what travelled between devices, what was held on each, how long it took."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from tracelens.ir.types import bytes_text
from tracelens.memory import ExtraMemory
from tracelens.view import Line, Shown, Stack, Table, View


@dataclass(frozen=True, slots=True)
class Moved:
    """Copies from one device to another one, of one kind: transfers, their gradients, results, constants or weights."""

    source: str
    target: str
    what: str
    copies: int
    bytes: int


class RunReport(Shown):
    """What a run has cost, measured; ``t.report`` after a block.

    ``seconds``: until the host was free again; a device may still have been at work. ``peaks``: the most bytes that
    were allocated on each device during the run beyond those before it, the model's own included; measured with
    ``measure=True`` alone, because it resets the peak that torch keeps.
    """

    def __init__(
        self,
        seconds: float,
        journeys: Sequence[tuple[str, str, str, int]],
        planned: Callable[[], Sequence[ExtraMemory]],
        peaks: Mapping[str, int],
    ) -> None:
        self.seconds = seconds
        self.peaks = peaks
        self._journeys = journeys
        self._planned = planned

    @cached_property
    def moved(self) -> tuple[Moved, ...]:
        """What the block itself sent between devices; the model's own traffic is not counted.

        *weights* are offloaded parameters that the block uses as values. What accelerate loads is the model's own, also
        when :func:`tracelens.apply` calls a module of the model.
        """
        return counted(self._journeys)

    @cached_property
    def held(self) -> tuple[ExtraMemory, ...]:
        """The most that was planned to be held on each device beside the model."""
        return tuple(self._planned())

    def bytes_between(self, source: str, target: str) -> int:
        """What the block sent from one device to another one."""
        return sum(one.bytes for one in self.moved if (one.source, one.target) == (source, target))

    def _view(self) -> View:
        rows = tuple(
            (one.source, one.target, one.what, str(one.copies), bytes_text(one.bytes)) for one in self.moved
        )
        parts: list[View] = [
            Line(f"{self.seconds * 1000:.1f} ms"),
            Table(("from", "to", "what", "copies", "bytes"), rows, empty="nothing travelled between devices"),
        ]
        devices = [one for one in self.held if one.bytes or one.place.device in self.peaks]
        if devices:
            parts.append(
                Table(
                    ("device", "held beside the model, planned", "peak, with the model"),
                    tuple(
                        (
                            one.place.device,
                            bytes_text(one.bytes),
                            bytes_text(peak)
                            if (peak := self.peaks.get(one.place.device)) is not None
                            else "",
                        )
                        for one in devices
                    ),
                )
            )
        return Stack(tuple(parts))


def added_up(reports: Sequence[RunReport]) -> RunReport:
    """The cost of several runs, one after the other: what they took, and the most that any of them held."""

    def planned() -> tuple[ExtraMemory, ...]:
        most: dict[int, ExtraMemory] = {}
        for report in reports:
            for extra in report.held:
                known = most.setdefault(extra.place.index, extra)
                most[extra.place.index] = extra if extra.bytes > known.bytes else known
        return tuple(most.values())

    peaks: dict[str, int] = {}
    for report in reports:
        for device, peak in report.peaks.items():
            peaks[device] = max(peaks.get(device, 0), peak)
    journeys = [journey for report in reports for journey in report._journeys]
    return RunReport(sum(report.seconds for report in reports), journeys, planned, peaks)


def counted(journeys: Sequence[tuple[str, str, str, int]]) -> tuple[Moved, ...]:
    """Source, target, kind and bytes of every copy, in order, as one line for each kind and pair."""
    found: dict[tuple[str, str, str], tuple[int, int]] = {}
    for source, target, what, size in journeys:
        copies, total = found.get((source, target, what), (0, 0))
        found[source, target, what] = copies + 1, total + size
    return tuple(Moved(*pair, copies, size) for pair, (copies, size) in found.items())
