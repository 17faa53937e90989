"""What a generation has gathered, as its user gets it: without padding, each row as long as its own text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NoReturn

import torch

from tracelens.backends.devices import Devices
from tracelens.backends.gathering import Course, Gathering
from tracelens.backends.mesh import Mesh
from tracelens.backends.transfer import moved, on_cpu
from tracelens.errors import GenerationStepError
from tracelens.ir.infer import torch_dtype
from tracelens.ir.ops import Keep, Save
from tracelens.ir.windows import StepWindow
from tracelens.leaving import same, whole_on_first, write_files
from tracelens.location import here
from tracelens.prompted import Prompt
from tracelens.report import RunReport

_MISSING: Mapping[torch.dtype, int | bool] = {torch.bool: False, torch.uint8: 255}


@dataclass(frozen=True)
class Ends:
    """How many steps each row of a generation took.

    ``steps``: for each row how many new tokens it has (one, where only the prompt was read).
    """

    steps: tuple[int, ...]

    @property
    def most(self) -> int:
        return max(self.steps)

    def valid(self, first: int = 0, count: int | None = None) -> torch.Tensor:
        """[steps, rows] bool: was the row still being written in that step?"""
        count = self.most - first if count is None else count
        numbers = torch.arange(first, first + count)
        return numbers[:, None] < torch.tensor(self.steps)[None, :]


@dataclass(frozen=True)
class Generated:
    """What a generation gave: the new tokens of each row, and what was saved, by name."""

    tokens: list[list[int]]
    tensors: dict[str, Callable[[], Any]]
    report: RunReport


def ends_of(tokens: Sequence[Sequence[int]]) -> Ends:
    """The ends of rows with these new tokens; a row without new ones has had the step over its prompt."""
    return Ends(tuple(max(1, len(row)) for row in tokens))


def finished(
    gathering: Gathering,
    prompt: Prompt,
    ends: Ends,
    members: Mapping[str, Sequence[torch.Tensor]] | None = None,
) -> dict[str, Callable[[], Any]]:
    """The saved tensors of a generation by name.

    ``members``: those that came from ranks, each over all steps; without it, this process gathered everything itself.
    """
    gathering.flush()
    found: dict[str, Callable[[], Any]] = {}
    files: list[Save] = []
    for name, course in gathering.courses.items():
        length = course.length(gathering.sizes, ends.most, include_last=gathering.include_last)
        if (missing := missed(course, prompt, ends, include_last=gathering.include_last)) is not None:
            found[name] = missing
            files += [course.save] * has_file(course, missing)
            continue
        if members is not None:
            whole = _joined(course, members[name])
        else:
            whole = _own(gathering, course, length)
        value = _by_row(course, whole, prompt, ends, include_last=gathering.include_last)
        if course.save.to is not None:
            files.append(course.save)
        elif isinstance(value, torch.Tensor):
            value = _compact(value)
        found[name] = partial(same, value)
    if files:
        write_files(files, found)
    return found


def from_ranks(
    gathering: Gathering, ends: Ends, devices: Devices, mesh: Mesh
) -> dict[str, list[torch.Tensor]]:
    """The members of every save over all steps, put together on the first rank; all ranks call it."""
    found: dict[str, list[torch.Tensor]] = {}
    for name, course in gathering.courses.items():
        if name not in gathering.reached:
            continue
        length = course.length(gathering.sizes, ends.most, include_last=gathering.include_last)
        members: list[torch.Tensor] = []
        for part in range(len(course.save.values)):
            home, layout = gathering.homes[name, part]
            own = devices.local(course.type, layout)
            shape = course.whole(own, gathering.sizes, length)
            mine = gathering.member(name, part, length)
            if home == mesh.stage and (mine is None or mine.shape != shape):
                raise AssertionError("what was gathered has another shape than what was planned")
            whole_shape = course.whole(course.type, gathering.sizes, length)
            dtype = torch_dtype(course.dtype)
            whole = whole_on_first(mine, home, course.lies(layout), whole_shape, dtype, mesh)
            if whole is not None:
                members.append(whole)
        found[name] = members
    if mesh.pipeline is not None:
        mesh.pipeline.settle()
    return found


def _own(gathering: Gathering, course: Course, length: int) -> torch.Tensor:
    """A save that this process gathered, on one device or several."""
    series = gathering.series(course.save.name)
    behind = not course.once and course.axis is None
    if len(series) == 1:
        whole = series[0].upto(length)
        whole = whole if course.save.keep is Keep.DEVICE else on_cpu(whole)
        return whole if course.save.stacked else whole.select(1 if behind else 0, 0)
    parts = [gathering.member(course.save.name, part, length) for part in range(len(course.save.values))]
    there = [part for part in parts if part is not None]
    return _joined(course, there)


def _joined(course: Course, members: Sequence[torch.Tensor]) -> torch.Tensor:
    """The members of a save as one tensor: layers in front, but behind the steps."""
    if course.save.keep is Keep.DEVICE:
        last = members[-1].device
        there = [moved(part, last) for part in members]
    else:
        there = [on_cpu(part) for part in members]
    if not course.save.stacked:
        return there[0]
    return torch.stack(there, 1 if not course.once and course.axis is None else 0)


def _by_row(course: Course, whole: torch.Tensor, prompt: Prompt, ends: Ends, *, include_last: bool) -> Any:
    """The tensor; or for rows of different lengths one tensor each, without padding and what came after its end."""
    batch_axis = course.type.batch_axis
    if batch_axis is None:
        return whole
    if not course.once and course.axis is None:
        return _marked(whole, course, ends, batch_axis + 1 + course.save.stacked)
    shift = int(course.save.stacked)
    batch_axis += shift
    pads = prompt.batch.pads
    start = 0 if course.window is None else course.window.start
    if course.once:
        if start > 0:
            whole = _marked(whole[None], course, ends, batch_axis + 1)[0]
        axes = [axis + shift for axis in (course.type.padded_axes if start == 0 else _key_axes(course))]
        if not prompt.ragged or not axes:
            return whole
        cuts = [{axis: (pad, whole.shape[axis] - pad) for axis in axes} for pad in pads]
    else:
        assert course.axis is not None
        assert course.window is not None
        axis = course.axis + shift
        if start == 0:
            before = [
                (pad, gathered_prompt - pad) for pad in pads for gathered_prompt in (prompt.sizes["P"],)
            ]
        else:
            before = [(0, 0)] * len(pads)
        lengths = [
            real + course.window.count(steps + include_last) - (1 if start == 0 else 0)
            for (_, real), steps in zip(before, ends.steps, strict=True)
        ]
        if len(set(lengths)) == 1 and all(pad == 0 for pad, _ in before):
            return whole.narrow(axis, 0, lengths[0])
        cuts = [{axis: (pad, length)} for (pad, _), length in zip(before, lengths, strict=True)]
    found: list[torch.Tensor] = []
    for row, cut in enumerate(cuts):
        part = whole.narrow(batch_axis, row, 1)
        for axis, (first, length) in cut.items():
            part = part.narrow(axis, first, length)
        found.append(
            part if course.save.to is not None else part.clone(memory_format=torch.contiguous_format)
        )
    return found


def _key_axes(course: Course) -> list[int]:
    return [axis for axis in course.type.padded_axes if axis not in course.type.position_axes]


def _marked(whole: torch.Tensor, course: Course, ends: Ends, batch_axis: int) -> torch.Tensor:
    """What a row has in steps after its end, which is none of its own, is no number: nan, -1 or False."""
    assert course.window is not None
    first, count = course.window.start, whole.shape[0]
    if all(steps >= first + count for steps in ends.steps):
        return whole
    missing = missing_number(whole.dtype)
    for row, steps in enumerate(ends.steps):
        own = max(0, min(count, steps - first))
        whole.narrow(0, own, count - own).narrow(batch_axis, row, 1).fill_(missing)
    return whole


def missing_number(dtype: torch.dtype) -> float | int | bool:
    """What stands where a row has nothing of its own: nan, -1 or False."""
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return _MISSING.get(dtype, -1)


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole and tensor.is_contiguous() else tensor.clone(memory_format=torch.contiguous_format)


def of_one_step(
    course: Course, members: Sequence[torch.Tensor], prompt: Prompt, step: int
) -> torch.Tensor | list[torch.Tensor]:
    """What one step saved: as it was there, for prompts of different lengths one tensor for each without padding."""
    once = replace(course, window=StepWindow(step, step + 1))
    return _by_row(
        once, _joined(once, members), prompt, Ends((step + 1,) * len(prompt.lengths)), include_last=False
    )


def missed(
    course: Course, prompt: Prompt, ends: Ends, *, include_last: bool = False
) -> Callable[[], Any] | None:
    """What reading a save does of which no step was made: without a row's steps there is nothing, or an error."""
    # The pass over the last token is one more for positions, and no step of its own.
    passes = ends.most + (include_last and course.axis is not None)
    if course.window is None or course.window.start < passes:
        return None
    if course.once:
        return partial(unreached, course, ends)
    shape = list(course.whole(course.type, prompt.sizes, 0))
    if course.save.stacked:
        shape.insert(1 if course.axis is None else 0, len(course.save.values))
    return partial(same, torch.empty(shape, dtype=torch_dtype(course.dtype)))


def has_file(course: Course, missing: Callable[[], Any] | None) -> bool:
    """Is there a file for a save? Of steps that no row made there is nothing in it; for one such step there is none."""
    return course.save.to is not None and (missing is None or not course.once)


def unreached(course: Course, ends: Ends) -> NoReturn:
    """What reading a save does whose step was never made."""
    assert course.window is not None
    count = "1 step" if ends.most == 1 else f"{ends.most} steps"
    raise GenerationStepError(
        f"{course.save.name!r} was to be saved in {course.window.words}, and the generation ended after {count}",
        at=here(),
        instead="a step that the text reaches: t.tokens says how long it is; or t.decode, which saves what there is",
    )
