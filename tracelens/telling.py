"""A generation that tells of each step when it has been made: its tokens, and what it has saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tracelens.backends.devices import Devices
from tracelens.backends.gathering import Course, Gathering, Nowhere, Target
from tracelens.backends.generation_options import Watched
from tracelens.gathered import of_one_step
from tracelens.ir.infer import torch_dtype
from tracelens.leaving import whole_on_first
from tracelens.plan import Plan
from tracelens.prompted import Prompt


@dataclass(frozen=True)
class StepMade:
    """What one step of a generation has given.

    ``tokens``: for each row the id that it chose, ``None`` for rows that have ended. ``saves``: by name; on ranks those
    of the first one alone.
    """

    step: int
    tokens: tuple[int | None, ...]
    saves: Mapping[str, Any]


@dataclass(frozen=True)
class StepTold:
    """Who hears of each step.

    ``tell`` is given it, and says whether to end there. ``waiting``: the threads that wait for it; it may lose some on
    the way.
    """

    tell: Callable[[StepMade], bool]
    waiting: set[int]


class OneStep(Gathering):
    """Has the tensors of one step, and lets go of them with the next."""

    def __init__(self, courses: Sequence[Course], sizes: Mapping[str, int], *, cached: bool) -> None:
        super().__init__(courses, sizes, 1, include_last=False, cached=cached)
        self._now: dict[str, list[torch.Tensor | None]] = {}
        self._plan: Plan | None = None
        self._devices: Devices | None = None

    def open(self, plan: Plan, devices: Devices, step: int) -> Mapping[str, Sequence[Target]]:
        self._now, self._plan, self._devices = {}, plan, devices
        found: dict[str, Sequence[Target]] = {}
        for save in plan.graph.saves:
            course = self.courses[save.name]
            targets: list[Target] = []
            members = self._now[save.name] = list[torch.Tensor | None]()
            for value in save.values:
                if devices.mesh is not None and plan.home[value] != devices.mesh.stage:
                    members.append(None)  # a member of another process
                    targets.append(Nowhere())
                    continue
                own = devices.local(course.type, plan.layouts[value])
                place = devices.places[plan.home[value]]
                target, tensor = course.for_one_step(own, self.sizes, step, place, cached=self.cached)
                members.append(tensor)
                targets.append(target)
            found[save.name] = targets
        return found

    def given(self, prompt: Prompt, step: int) -> dict[str, Any]:
        """What a step has saved, by name. On ranks all of them call it, and the first one has what there is."""
        mesh = None if self._devices is None else self._devices.mesh
        found: dict[str, Any] = {}
        for name, members in self._now.items():
            course = self.courses[name]
            if mesh is None:
                whole = [member for member in members if member is not None]
            else:
                whole = self._whole(course, members, step)
            if mesh is None or mesh.has_results:
                found[name] = of_one_step(course, whole, prompt, step)
        if mesh is not None and mesh.pipeline is not None:
            mesh.pipeline.settle()
        return found

    def _whole(self, course: Course, members: Sequence[torch.Tensor | None], step: int) -> list[torch.Tensor]:
        """The members of a save, on the first rank."""
        plan, devices = self._plan, self._devices
        assert plan is not None
        assert devices is not None
        assert devices.mesh is not None
        shape = course.type.sizes(course.of_step(self.sizes, step))
        found: list[torch.Tensor] = []
        (save,) = (save for save in plan.graph.saves if save.name == course.save.name)
        for member, value in zip(members, save.values, strict=True):
            home, layout = plan.home[value], plan.layouts[value]
            whole = whole_on_first(member, home, layout, shape, torch_dtype(course.dtype), devices.mesh)
            if whole is not None:
                found.append(whole)
        return found


class Telling:
    """Among the stopping criteria, the last: tells of a step when its tokens have been chosen.

    ``vote``: raises where a rank has failed since the pass.
    """

    def __init__(
        self,
        told: StepTold,
        gathering: OneStep,
        prompt: Prompt,
        ends: frozenset[int],
        watched: Sequence[Watched],
        vote: Callable[[], None] | None,
    ) -> None:
        self._told, self._gathering, self._prompt = told, gathering, prompt
        self._ends, self._watched, self._vote = ends, watched, vote
        self._over: list[bool] = []
        self._step = 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if self._vote is not None:
            self._vote()
        newest: list[int] = input_ids[:, -1].tolist()
        self._over = self._over or [False] * len(newest)
        tokens = [None if over else token for over, token in zip(self._over, newest, strict=True)]
        ended = [watched.newest() for watched in self._watched]
        self._over = [
            over or token in self._ends or any(rows[row] for rows in ended)
            for row, (over, token) in enumerate(zip(self._over, newest, strict=True))
        ]
        made = StepMade(self._step, tuple(tokens), self._gathering.given(self._prompt, self._step))
        over = self._told.tell(made)
        self._step += 1
        return torch.full((len(newest),), over, device=input_ids.device)
