"""What the steps of a generation leave for later, to be done for several of them at once.

A step keeps the operands of its lenses in tensors with room for some positions. When these are full, at the end of a
run of like steps, and when the generation is over, one program goes from there to what is saved. How many positions
that are depends on nothing but sizes that all ranks know, so that they all do it after the same step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from tracelens.backends.devices import Devices
from tracelens.backends.gathering import Newest, Target
from tracelens.backends.local import LocalCode
from tracelens.ir.infer import torch_dtype
from tracelens.ir.passes.defer_lenses import Kept
from tracelens.plan import Plan


@dataclass(frozen=True)
class Tail:
    """What is done to positions of several steps at once.

    ``kept``: what each step keeps for it. ``places``: where, by the constant's number. ``together``: for the rows of a
    batch, how many steps are done at once, and how many positions of a prompt.
    """

    plan: Plan
    code: LocalCode
    kept: tuple[Kept, ...]
    places: Mapping[int, tuple[int, ...]]
    together: Callable[[Mapping[str, int]], tuple[int, int]] = field(compare=False)


class Waiting:
    """The positions of one run of steps that wait for each other.

    ``most``: how many steps there are. ``cached``: does a pass have the new position alone?  Else only its newest one
    is kept, after the prompt.
    """

    def __init__(
        self, tail: Tail, sizes: Mapping[str, int], most: int, devices: Devices, *, cached: bool
    ) -> None:
        self.tail = tail
        steps, self._positions = tail.together(sizes)
        self._steps = min(steps, most)
        self.first = 0
        """The step of the first position that waits."""
        self.count = 0
        """How many positions do."""
        self._sizes, self._cached, self._devices = sizes, cached, devices
        self._tensors: dict[tuple[int, int], torch.Tensor] = {}
        self._room = 0

    def open(self, step: int) -> Mapping[tuple[int, int], Sequence[Target]]:
        """Where a pass puts what is kept of it: for each constant and place, its members."""
        width = self._sizes["P"] if step == 0 else 1
        if not self.count:
            self.first = step
        self._make_room(width if step == 0 else self._steps)
        found: dict[tuple[int, int], Sequence[Target]] = {}
        for one in self.tail.kept:
            for place in self._own_places(one):
                whole = self._tensors[one.index, place]
                parts: Sequence[Target] = whole.narrow(1 + one.axis, self.count, width).unbind(0)
                if step > 0 and not self._cached:
                    parts = [Newest(part, one.axis) for part in parts]
                found[one.index, place] = parts
        return found

    def add(self, step: int) -> None:
        """A pass is over: its positions wait."""
        self.count += self._sizes["P"] if step == 0 else 1

    def is_due(self, step: int) -> bool:
        """Is there no room for another step's?"""
        return step == 0 or self.count >= self._steps

    def take(self) -> Iterator[tuple[int, int, Mapping[tuple[int, int], torch.Tensor]]]:
        """What waits, as many positions at a time as are done at once: their begin, their number, the constants."""
        most = self._positions if self.first == 0 else self._steps
        for start in range(0, self.count, most):
            width = min(most, self.count - start)
            yield (
                start,
                width,
                {
                    (one.index, place): self._tensors[one.index, place].narrow(1 + one.axis, start, width)
                    for one in self.tail.kept
                    for place in self._own_places(one)
                },
            )
        self.count = 0

    def _own_places(self, one: Kept) -> tuple[int, ...]:
        mesh = self._devices.mesh
        places = self.tail.places[one.index]
        return places if mesh is None else tuple(place for place in places if place == mesh.stage)

    def _make_room(self, positions: int) -> None:
        if positions == self._room:
            return
        self._room = positions
        self._tensors.clear()
        sizes = {**self._sizes, "P": positions}
        for one in self.tail.kept:
            for place in self._own_places(one):
                shape, dtype = one.whole.sizes(sizes), torch_dtype(one.type.dtype)
                self._tensors[one.index, place] = torch.empty(
                    shape, dtype=dtype, device=self._devices.places[place]
                )
