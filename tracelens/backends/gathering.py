"""What a generation saves, step by step: one tensor for each save, made once, that every step writes its part into.

A step's part is copied where it belongs as soon as it is there, so that nothing of a step is held until the next, and
nothing is put together in the end. How long the tensors can become is known before: so is what they hold.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Protocol

import torch

from tracelens.backends.devices import Devices
from tracelens.ir.infer import torch_dtype
from tracelens.ir.layout import Layout, OwnType, Shard
from tracelens.ir.ops import Save
from tracelens.ir.types import DType, TensorType
from tracelens.ir.windows import StepWindow
from tracelens.plan import Plan


@dataclass(frozen=True, slots=True)
class Course:
    """What a save of a generation becomes over its steps.

    ``type``: of what one step saves (of each member, if layers are stacked). ``window``: the steps; ``None`` for what
    is made of constants. ``axis``: the one along which positions are continued, ``None`` where steps get an axis of
    their own, in front.
    """

    save: Save = field()  # no default, also where nnsight has given every object a method of that name
    type: TensorType
    window: StepWindow | None

    @property
    def once(self) -> bool:
        """Is it saved in one step, as it is?"""
        return self.window is None or self.window.single

    @property
    def axis(self) -> int | None:
        axes = () if self.once else self.type.position_axes
        return axes[0] if axes else None

    @property
    def dtype(self) -> DType:
        return self.save.dtype or self.type.dtype

    def sizes(self, sizes: Mapping[str, int]) -> Mapping[str, int]:
        """The sizes of the pass that a save of one step is of."""
        step = 0 if self.window is None else self.window.start
        return sizes if step == 0 else {**sizes, "P": 1, "S": sizes["P"] + step}

    def length(self, sizes: Mapping[str, int], steps: int, *, include_last: bool = False) -> int:
        """How many positions, or steps, there are in a generation of ``steps`` steps."""
        if self.once:
            return 1
        assert self.window is not None
        if self.axis is None:
            return self.window.count(steps)
        found = self.window.count(steps + include_last)
        return found if self.window.start or not found else found - 1 + sizes["P"]

    def place(self, step: int, sizes: Mapping[str, int]) -> tuple[int, int]:
        """Where a step's part begins along the axis, and how long it is."""
        assert self.window is not None
        if self.axis is None or self.window.start:
            return step - self.window.start, 1
        return (0, sizes["P"]) if step == 0 else (sizes["P"] + step - 1, 1)

    def whole(self, type_: TensorType | OwnType, sizes: Mapping[str, int], length: int) -> tuple[int, ...]:
        """The shape of a member over all steps, of which ``type_`` is what one step has."""
        if self.once:
            return type_.sizes(self.sizes(sizes))
        if self.axis is None:
            return (length, *type_.sizes({**sizes, "P": 1}))
        return type_.sizes({**sizes, "P": length})

    def of_step(self, sizes: Mapping[str, int], step: int) -> Mapping[str, int]:
        """The sizes of what one step has."""
        return {**sizes, "P": sizes["P"] if step == 0 else 1, "S": sizes["P"] + step}

    def for_one_step(
        self,
        own: TensorType | OwnType,
        sizes: Mapping[str, int],
        step: int,
        device: torch.device,
        *,
        cached: bool,
    ) -> tuple[Target, torch.Tensor]:
        """A tensor for what one step has of a member, of the type ``own`` here, and where the step puts it."""
        shape = own.sizes(self.of_step(sizes, step))
        tensor = torch.empty(shape, dtype=torch_dtype(self.dtype), device=device)
        if self.axis is not None and step > 0 and not cached:
            return Newest(tensor, self.axis), tensor
        return tensor, tensor

    def lies(self, layout: Layout) -> Layout:
        """How a member over all steps lies on ranks, of which each step's part lies in ``layout``."""
        if isinstance(layout, Shard) and not self.once and self.axis is None:
            return replace(layout, dim=layout.dim + 1)
        return layout

    def nbytes(self, sizes: Mapping[str, int], steps: int, *, include_last: bool = False) -> int:
        """What all members hold together, at most."""
        length = self.length(sizes, steps, include_last=include_last)
        total = self.dtype.itemsize * len(self.save.values)
        for size in self.whole(self.type, sizes, length):
            total *= size
        return total


class Target(Protocol):
    """Where a step puts a value."""

    def copy_(self, value: torch.Tensor, /) -> object: ...


class Nowhere:
    """Where a pass puts what it was not run for."""

    def copy_(self, value: torch.Tensor, /) -> None:
        pass


class Newest:
    """Takes the newest position of a pass over all of the text."""

    def __init__(self, target: torch.Tensor, axis: int) -> None:
        self._target, self._axis = target, axis

    def copy_(self, value: torch.Tensor, /) -> None:
        self._target.copy_(value.narrow(self._axis, value.shape[self._axis] - 1, 1))


class _Series:
    """The tensor of those members of a save that lie on one device, with its first part not yet on the host.

    A tensor that goes to a file is that file's, mapped into memory. What is made on another device is collected there
    for some steps, and then goes to it in one piece.
    """

    COLLECTED = 64

    def __init__(
        self, course: Course, shape: Sequence[int], parts: int, device: torch.device, file: bool
    ) -> None:
        self.course = course
        self.parts = parts
        # Members of a save that has an axis for steps stand behind it.
        self.behind = not course.once and course.axis is None
        self.along = 0 if self.behind else 1 + (course.axis or 0)
        self.dtype = torch_dtype(course.dtype)
        whole = (shape[0], parts, *shape[1:]) if self.behind else (parts, *shape)
        self.mapped = _Mapped(course.save, whole, self.dtype) if file else None
        self.tensor = (
            torch.empty(whole, dtype=self.dtype, device=device) if self.mapped is None else self.mapped.tensor
        )
        self.device = device
        self.collected: torch.Tensor | None = None
        self.first = 0
        self.filled = 0
        """Positions, or steps, of the tensor that have been written."""

    def open(self, at: int, width: int) -> Sequence[torch.Tensor]:
        """For each member where its next part goes."""
        if self.course.once:
            self.filled = 1
            return self.tensor.unbind(0)
        if self.tensor.device != self.device and width <= self.COLLECTED:
            target, at = self._collecting(at, width)
        else:
            self.flush()
            target = self.tensor
        self.filled = max(self.filled, at + width + (self.first if target is not self.tensor else 0))
        return target.narrow(self.along, at, width).unbind(1 if self.behind else 0)

    def _collecting(self, at: int, width: int) -> tuple[torch.Tensor, int]:
        if self.collected is not None and at + width > self.first + self.COLLECTED:
            self.flush()
        if self.collected is None:
            shape = list(self.tensor.shape)
            shape[self.along] = self.COLLECTED
            self.collected, self.first = torch.empty(shape, dtype=self.dtype, device=self.device), at
        return self.collected, at - self.first

    def flush(self) -> None:
        """Brings what was collected on a device to the host."""
        if self.collected is not None:
            length = self.filled - self.first
            self.tensor.narrow(self.along, self.first, length).copy_(
                self.collected.narrow(self.along, 0, length)
            )
            self.collected = None

    def members(self, length: int) -> list[torch.Tensor]:
        """The members up to a number of positions, or steps."""
        return list(self.upto(length).unbind(1 if self.behind else 0))

    def upto(self, length: int) -> torch.Tensor:
        """All of it up to a number of positions, or steps."""
        return self.tensor if self.course.once else self.tensor.narrow(self.along, 0, length)


class _Mapped:
    """A safetensors file under construction, whose one tensor is mapped into memory."""

    def __init__(self, save: Save, shape: Sequence[int], dtype: torch.dtype) -> None:
        assert save.to is not None
        # Several saves may go to one file.
        self.path = f"{os.path.abspath(save.to)}.{zlib.crc32(save.name.encode()):08x}.part"
        count = 1
        for size in shape:
            count *= size
        self.tensor = torch.from_file(self.path, shared=True, size=count, dtype=dtype).view(*shape)

    def remove(self) -> None:
        """Lets go of the file, which the finished one has replaced."""
        if os.path.exists(self.path):
            os.remove(self.path)


class Gathering:
    """All that one generation saves."""

    def __init__(
        self,
        courses: Sequence[Course],
        sizes: Mapping[str, int],
        steps: int,
        *,
        include_last: bool,
        cached: bool,
    ) -> None:
        self.courses = {course.save.name: course for course in courses}
        self.sizes = sizes
        self.steps = steps
        self.include_last = include_last
        self.cached = cached
        self._series: dict[str, list[_Series]] = {name: [] for name in self.courses}
        """The tensors of each save, one for each device that has members of it."""
        self._where: dict[tuple[str, int], tuple[_Series, int]] = {}
        """The series of each member of a save, and its number there."""
        self.homes: dict[tuple[str, int], tuple[int, Layout]] = {}
        """The place and the layout of each member of a save."""
        self.reached: set[str] = set()

    def open(self, plan: Plan, devices: Devices, step: int) -> Mapping[str, Sequence[Target]]:
        """Where the pass of a step puts what it saves: by name, for each member of a save."""
        found: dict[str, Sequence[Target]] = {}
        for save in plan.graph.saves:
            course = self.courses[save.name]
            if step >= self.steps and course.axis is None:
                found[save.name] = [Nowhere()] * len(save.values)
                continue
            self._reach(course, save, plan, devices)
            at, width = (0, 1) if course.once else course.place(step, self.sizes)
            axis = course.axis if step > 0 and not self.cached else None
            found[save.name] = self._opened(course, at, width, axis)
        return found

    def open_several(
        self, plan: Plan, devices: Devices, step: int, start: int, width: int
    ) -> Mapping[str, Sequence[Target]]:
        """Where positions go that are done together: so many of them, from the one on that is ``start`` behind the
        first of a step.
        """
        found: dict[str, Sequence[Target]] = {}
        for save in plan.graph.saves:
            course = self.courses[save.name]
            self._reach(course, save, plan, devices)
            at, _ = course.place(step, self.sizes)
            found[save.name] = self._opened(course, at + start, width, None)
        return found

    def _reach(self, course: Course, save: Save, plan: Plan, devices: Devices) -> None:
        if (save.name, 0) not in self.homes:
            self._begin(course, save, plan, devices)
        self.reached.add(save.name)

    def _begin(self, course: Course, save: Save, plan: Plan, devices: Devices) -> None:
        """Makes the tensors of a save, where its members are: those of this process."""
        own: dict[torch.device, list[int]] = {}
        for part, value in enumerate(save.values):
            self.homes[save.name, part] = plan.home[value], plan.layouts[value]
            if devices.mesh is None or plan.home[value] == devices.mesh.stage:
                own.setdefault(devices.places[plan.home[value]], []).append(part)
        length = course.length(self.sizes, self.steps, include_last=self.include_last)
        for device, parts in own.items():
            type_ = devices.local(course.type, plan.layouts[save.values[parts[0]]])
            shape = course.whole(type_, self.sizes, length)
            file = course.save.to is not None and devices.mesh is None and len(own) == 1
            series = _Series(course, shape, len(parts), device, file)
            self._series[save.name].append(series)
            for number, part in enumerate(parts):
                self._where[save.name, part] = series, number

    def _opened(self, course: Course, at: int, width: int, axis: int | None) -> Sequence[Target]:
        """For each member where so many positions go; with an ``axis`` only the newest of those that a pass has."""
        name, members = course.save.name, len(course.save.values)
        opened = {series: series.open(at, width) for series in self._series[name]}
        if axis is None and len(opened) == 1:
            (views,) = opened.values()
            if len(views) == members:  # all of them in one tensor, in their order
                return views
        found: list[Target] = []
        for part in range(members):
            if (there := self._where.get((name, part))) is None:
                found.append(Nowhere())  # a member of another process
                continue
            target = opened[there[0]][there[1]]
            found.append(target if axis is None else Newest(target, axis))
        return found

    def series(self, name: str) -> list[_Series]:
        """The tensors of a save, one for each device that has members of it."""
        return self._series[name]

    def member(self, name: str, part: int, length: int) -> torch.Tensor | None:
        """What this process has of a member of a save."""
        there = self._where.get((name, part))
        return None if there is None else there[0].members(length)[there[1]]

    def flush(self) -> None:
        """Brings everything that goes to files there."""
        for series in chain.from_iterable(self._series.values()):
            series.flush()

    def remove(self) -> None:
        """Lets go of files that were begun."""
        for series in chain.from_iterable(self._series.values()):
            if series.mapped is not None:
                series.mapped.remove()
