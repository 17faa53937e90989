"""Decides, where a parameter meets a value of the forward pass that is elsewhere, which is sent to the other.

Whatever takes fewer bytes: a norm's weight is sent to the streams of a lens, once to each place, and the streams to the
unembedding. All that a parameter meets at a place is weighed together, because it is sent there once. What is computed
with one parameter may go on to the next: a stream that is sent to the unembedding anyway, which lies beside the norm,
is sent before the norm and not after it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tracelens.ir.graph import Graph
from tracelens.ir.ops import Apply, Call, Grad, Index, IndexPut, Op, Param, Read, operands, results
from tracelens.ir.sites import Sequence as Moment
from tracelens.placement import Placement

Weigh = Callable[[int], int]
"""The bytes of a value."""


@dataclass(frozen=True, slots=True)
class _Meeting:
    """An operation on parameters and values of the forward pass that nothing is written from."""

    largest: int
    """The largest of its parameters; the values go there, or all parameters come to the values."""
    there: int
    """Where the last of its values appears."""
    parameters: tuple[int, ...]
    values: tuple[int, ...]


def fetching(
    graph: Graph, placement: Placement, moments: Sequence[Moment], written: frozenset[int], weigh: Weigh
) -> frozenset[int]:
    """The numbers of the operations that their parameters are sent to; to those of others the values are.

    ``written``: the values that something written to the model is made of, which no parameter moves.
    """
    if not any(isinstance(op, Param) for op in graph.ops):
        return frozenset()
    return _Fetching(graph, placement, moments, written, weigh).found()


class _Fetching:
    def __init__(
        self,
        graph: Graph,
        placement: Placement,
        moments: Sequence[Moment],
        written: frozenset[int],
        weigh: Weigh,
    ) -> None:
        self.graph = graph
        self.weigh = weigh
        self.parameters: set[int] = set()
        """Values made of parameters and constants alone."""
        self.home: dict[int, int] = {}
        """Where values are if every parameter comes to them."""
        self.there_anyway: set[tuple[int, int]] = set()
        """Parameters, and the places they are sent to for what is written."""
        self.meetings: dict[int, _Meeting] = {}
        for number, op in enumerate(graph.ops):
            made = [value for value, _ in results(op)]
            if isinstance(op, Grad):
                self.home.update((out, self.home[value]) for out, value in zip(op.outs, op.wrt, strict=True))
                continue
            if isinstance(op, Param):
                self.parameters.add(op.out)
                found = placement.of_path(op.path)
            elif isinstance(op, Read):
                found = placement.place_of(op.site).index
            else:
                used = [value for value in operands(op) if value in self.home]
                if not used or not made:
                    continue
                parameters = tuple(value for value in used if value in self.parameters)
                values = tuple(value for value in used if value not in self.parameters)
                if not values:
                    self.parameters.update(made)
                    found = self.home[max(parameters, key=weigh)]
                else:
                    found = self.home[max(values, key=lambda value: moments[graph.producer[value]])]
                    if any(value in written for value in made):
                        self.there_anyway.update((value, found) for value in parameters)
                    elif parameters:
                        largest = max(parameters, key=weigh)
                        self.meetings[number] = _Meeting(largest, found, parameters, values)
            self.home.update(dict.fromkeys(made, found))

    def found(self) -> frozenset[int]:
        """The operations that their parameters are sent to."""
        groups: dict[tuple[int, int], list[int]] = {}
        for number, meeting in self.meetings.items():
            groups.setdefault((meeting.largest, meeting.there), []).append(number)
        later = self._next_meetings()
        fetched: dict[tuple[int, int], bool] = {}
        # Later meetings first: where their values go is known before those that these are made of are weighed.
        for meeting in reversed(self.meetings.values()):
            key = (meeting.largest, meeting.there)
            if key not in fetched:
                fetched[key] = self._fetches(key, groups[key], later, fetched)
        return frozenset(number for key, numbers in groups.items() if fetched[key] for number in numbers)

    def _fetches(
        self,
        key: tuple[int, int],
        numbers: Sequence[int],
        later: Mapping[int, tuple[int, int]],
        fetched: Mapping[tuple[int, int], bool],
    ) -> bool:
        """Does it take no more bytes to send a parameter to a place than to send it all that it meets there?"""
        largest, there = key
        away = self.home[largest]
        if away == there:
            return False
        values: set[int] = set()
        parameters: set[int] = set()
        sent_on: dict[int, int] = {}
        for number in numbers:
            values.update(self.meetings[number].values)
            parameters.update(self.meetings[number].parameters)
            for made, _ in results(self.graph.ops[number]):
                if made in later:
                    value, another = later[made]
                    meeting = self.meetings[another]
                    if fetched.get((meeting.largest, meeting.there)) is False:
                        sent_on[value] = self.home[meeting.largest]
        parameters = {value for value in parameters if (value, there) not in self.there_anyway}

        def bytes_sent(place: int) -> int:
            sent = [value for value in (*values, *parameters) if self.home[value] != place]
            sent += [value for value, goal in sent_on.items() if goal != place]
            return sum(map(self.weigh, sent))

        return bytes_sent(there) <= bytes_sent(away)

    def _next_meetings(self) -> Mapping[int, tuple[int, int]]:
        """For values that go on to one meeting alone: what comes there, perhaps made of the value, and its number."""
        found: dict[int, tuple[int, int]] = {}
        for number in reversed(range(len(self.graph.ops))):
            op = self.graph.ops[number]
            for value in {value for value in operands(op) if self.graph.uses[value] == (number,)}:
                if number in self.meetings:
                    found[value] = (value, number)
                elif self._is_made_of(op, value):
                    following = (found.get(made) for made, _ in results(op))
                    if (first := next(filter(None, following), None)) is not None:
                        found[value] = first
        return found

    def _is_made_of(self, op: Op, value: int) -> bool:
        """Is nothing of the model but one value needed for the operation?"""
        return isinstance(op, Call | Index | IndexPut | Apply) and not any(
            other != value and other in self.home for other in operands(op)
        )
