"""Cuts a graph for generation into what is done in each run of steps: graphs of one forward pass, which name no steps.

Windows begin and end at few steps. Between two such ends every pass does the same, so that there is one graph, and in
the end one program, for all the steps between them. A value of one step that later steps use is held where it is made,
and is a constant from then on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

from tracelens.ir.graph import Graph
from tracelens.ir.ops import Const, Hold, Op, Read, Save, Write, operands, results
from tracelens.ir.passes.rebuild import rebuild
from tracelens.ir.sites import Site
from tracelens.ir.step_flow import made_in
from tracelens.ir.windows import EVERY_STEP, StepWindow


@dataclass(frozen=True)
class Stepped:
    """A graph for generation with what is known of its steps.

    ``windows``: for every operation, the steps in which it is done (``None`` for what is made of constants).
    ``segments``: runs of steps in which the same is done, together all steps of a generation. ``held``: for every value
    that is held from its step on, the number of the constant that it is then.
    """

    graph: Graph
    windows: tuple[StepWindow | None, ...]
    segments: tuple[StepWindow, ...]
    held: Mapping[int, int]

    def window_of(self, save: Save) -> StepWindow | None:
        """The steps in which what is saved is made."""
        return self.windows[self.graph.producer[save.values[0]]]

    def at(self, segment: StepWindow, places: Mapping[int, Collection[int]]) -> Graph:
        """The graph of one forward pass in a segment.

        ``places``: where later segments need the values that are held, by the number of the constant.
        """
        graph, types = self.graph, self.graph.types
        written: dict[Site, list[int]] = {}
        used: dict[int, None] = {}
        kept: list[tuple[int, Op]] = []
        for number, op in enumerate(graph.ops):
            window = self._saved_in(op) if isinstance(op, Save) else self.windows[number]
            if window is not None and not segment.within(window):
                continue
            if isinstance(op, Read):
                before = [version for version in written.get(op.site.always, ()) if version <= op.version]
                op = replace(op, site=op.site.always, version=len(before))
            elif isinstance(op, Write):
                versions = written.setdefault(op.site.always, [])
                versions.append(op.version)
                op = replace(op, site=op.site.always, version=len(versions))
            used.update(dict.fromkeys(value for value in operands(op) if self._is_earlier(value, segment)))
            kept.append((number, op))
            kept += [
                (number, Hold(value, self.held[value], place))
                for value, _ in results(op)
                if value in self.held and window == segment
                for place in sorted(places.get(self.held[value], ()))
            ]
        constants = [(graph.producer[value], Const(value, types[value], self.held[value])) for value in used]
        return rebuild(graph, [*constants, *kept])

    def _saved_in(self, save: Save) -> StepWindow:
        # What is made of constants alone is the same in all steps, and saved in the first.
        return self.window_of(save) or self.segments[0]

    def _is_earlier(self, value: int, segment: StepWindow) -> bool:
        window = self.windows[self.graph.producer[value]]
        return window is not None and window.single and window.start < segment.start


def in_steps(graph: Graph) -> Stepped:
    """A graph for generation, which has been verified as one, cut into its segments."""
    made: dict[int, StepWindow | None] = {}
    windows: list[StepWindow | None] = []
    held: dict[int, None] = {}
    for op in graph.ops:
        window = made_in(op, made.__getitem__, graph.types)
        windows.append(window)
        held.update(dict.fromkeys(value for value in operands(op) if _outlasts(made[value], window)))
        made.update(dict.fromkeys((value for value, _ in results(op)), window))
    constants = {op.index for op in graph.ops if isinstance(op, Const)}
    first = max((len(graph.constants) - 1, *constants)) + 1
    numbered = {value: first + number for number, value in enumerate(held)}
    return Stepped(graph, tuple(windows), _segments(windows), numbered)


def _outlasts(made: StepWindow | None, window: StepWindow | None) -> bool:
    """Is a value of one step used in a later one?"""
    return made is not None and made.single and window is not None and made != window


def _segments(windows: Iterable[StepWindow | None]) -> tuple[StepWindow, ...]:
    ends = {0}
    for window in windows:
        if window is not None and window != EVERY_STEP:
            ends.add(window.start)
            if window.stop is not None:
                ends.add(window.stop)
    ordered = sorted(ends)
    return (*(StepWindow(*pair) for pair in pairwise(ordered)), StepWindow(ordered[-1]))
