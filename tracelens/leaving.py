"""How saved tensors leave a run: detached, compact, each in memory of its own, where they were asked to be."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any, NoReturn

import torch

from tracelens.backends.departing import Departures, require_unchanged
from tracelens.backends.devices import Devices
from tracelens.backends.enduring import remember
from tracelens.backends.execute import State
from tracelens.backends.mesh import Mesh
from tracelens.backends.probing import digest_of
from tracelens.backends.transfer import land, on_cpu
from tracelens.errors import ElsewhereError, SavedFileError, SiteMismatchError, TracelensError
from tracelens.ir.graph import Graph
from tracelens.ir.infer import torch_dtype
from tracelens.ir.layout import WHOLE_EVERYWHERE, Layout, Replicate
from tracelens.ir.ops import Keep, Save
from tracelens.ir.types import TensorType
from tracelens.location import here
from tracelens.plan import Plan
from tracelens.prompted import Prompt
from tracelens.selection import unpadded
from tracelens.tensor_file import write_tensors

Members = Sequence[tuple[torch.Tensor, int]]
"""The tensors of one save (several, if it stacks layers), each with its version when it was saved."""


def leave(
    saves: Sequence[Save],
    graph: Graph,
    saved: Mapping[str, Members],
    prompt: Prompt,
    foreign: Set[int] = frozenset(),
    departures: Departures | None = None,
    stacks: Mapping[str, tuple[torch.Tensor, Set[int]]] = MappingProxyType({}),
) -> dict[str, Callable[[], Any]]:
    """The saved tensors, detached, compact and where they were asked to be; every one has its own memory.

    ``graph``: the one that ``saves`` are of. ``foreign``: where memory of the user's or the model's begins, which no
    saved tensor may share. ``departures``: the tensors that are on their way already; reading them waits for their
    arrival. ``stacks``: those that stay on their device, each with the members that it lacks.
    """
    taken = set(foreign)
    found: dict[str, Callable[[], Any]] = {}
    files = False
    for save in saves:
        try:
            members = _members(save, saved, stacks)
        except TracelensError as error:
            raise graph.blame(error, graph.ops.index(save)) from None
        files = files or save.to is not None
        split = (
            partial(_per_prompt, type_=graph.types[save.values[0]], prompt=prompt, stacked=save.stacked)
            if prompt.ragged and graph.types[save.values[0]].padded_axes
            else None
        )
        if departures is not None and (host := departures.host(save)) is not None:
            rest = [part for part, (member, _) in enumerate(members) if member.device.type == "cpu"]
            for part in rest:  # of a stack whose other members come from devices
                land(members[part][0], host[part])
            found[save.name] = _Arriving(departures, host, split)
            continue
        tensor = stacks[save.name][0] if save.name in stacks else _together(save, members)
        value: Any = _own(tensor, taken) if split is None else split(tensor)
        found[save.name] = partial(same, value)
    if files:
        write_files(saves, found)
    return found


def collect(
    saves: Sequence[Save], plan: Plan, state: State, devices: Devices, mesh: Mesh
) -> dict[str, Members]:
    """What the ranks of all places saved, put together on the first of them; every rank calls it after its pass.

    A rank that has failed gives zeros, so that nobody waits for it.
    """
    found: dict[str, Members] = {}
    for save in saves:
        members: list[tuple[torch.Tensor, int]] = []
        for part, value in enumerate(save.values):
            home, layout, type_ = plan.home[value], plan.layouts[value], plan.graph.types[value]
            own = devices.local(type_ if save.dtype is None else replace(type_, dtype=save.dtype), layout)
            mine: torch.Tensor | None = None
            if home == mesh.stage:
                mine = _member(save, part, plan, state)
                if mine is None:
                    mine = mesh.zeros(own, state.sizes)
            dtype = torch_dtype(save.dtype or type_.dtype)
            whole = whole_on_first(mine, home, layout, type_.sizes(state.sizes), dtype, mesh)
            if whole is not None:
                members.append((whole, whole._version))
        found[save.name] = members
    if mesh.pipeline is not None:
        mesh.pipeline.settle()
    return found


def whole_on_first(
    mine: torch.Tensor | None,
    home: int,
    layout: Layout,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    mesh: Mesh,
) -> torch.Tensor | None:
    """A tensor of a place, of which the ranks of that place have ``mine``, whole on the first rank of all."""
    whole = mine
    if whole is not None and not isinstance(layout, Replicate):
        whole = mesh.collected(whole.detach(), shape, layout)
    pipeline = mesh.pipeline
    if home != 0 and pipeline is not None and mesh.leads:
        if whole is not None:
            pipeline.send(whole, 0)
        elif mesh.has_results:
            whole = pipeline.receive(shape, dtype, home, mesh.device)
    return whole


Copies = dict[str, list[str]]
"""By the name of a save, a digest of each of its members that every rank of a place has whole."""


def copies_of(saves: Sequence[Save], plan: Plan, state: State, mesh: Mesh) -> Copies:
    """What this rank saved that the other ranks of its place have to have too, bit for bit."""
    found: Copies = {}
    for save in saves:
        for part, value in enumerate(save.values):
            if plan.home[value] == mesh.stage and plan.layouts[value] == WHOLE_EVERYWHERE:
                member = _member(save, part, plan, state)
                found.setdefault(save.name, []).append("" if member is None else digest_of(member))
    return found


def _member(save: Save, part: int, plan: Plan, state: State) -> torch.Tensor | None:
    """What this rank saved, as it was then; ``None`` if something has gone wrong, now or before."""
    if state.failure is not None:
        return None
    member = next(iter(state.saved.get(save.name, ())[part : part + 1]), None)
    try:
        if member is None:
            raise _unreached(save)
        require_unchanged(save, *member)
    except TracelensError as error:
        remember(state, error, plan.graph.ops.index(save))
        return None
    return member[0]


def elsewhere(name: str) -> NoReturn:
    """What reading a result does on the ranks that do not have it."""
    raise ElsewhereError(
        f"the result {name!r} is on rank 0; this is another rank",
        at=here(),
        instead="if torch.distributed.get_rank() == 0: ... around what uses results",
    )


def _members(
    save: Save, saved: Mapping[str, Members], stacks: Mapping[str, tuple[torch.Tensor, Set[int]]]
) -> Members:
    """The members of a save, all there and as they were when they were read; none of a stack that is put together."""
    stack = stacks.get(save.name)
    missing = stack is None and save.name not in saved
    members = () if stack is not None or missing else saved[save.name]
    if missing or (stack is not None and stack[1]) or None in members:
        raise _unreached(save)
    for member, seen in members:
        require_unchanged(save, member, seen)
    return members


def _unreached(save: Save) -> SiteMismatchError:
    return SiteMismatchError(
        f"the forward pass ended and had not come to all that is saved as {save.name!r}",
        instead="a site of a module that the model calls in every forward pass",
    )


def _together(save: Save, members: Members) -> torch.Tensor:
    """One tensor of the members of a save."""
    parts = [member.detach() if member.requires_grad else member for member, _ in members]
    if save.dtype is not None:
        parts = [part.to(torch_dtype(save.dtype)) for part in parts]
    if save.stacked and len({part.device for part in parts}) == 1:
        parts = [torch.stack(parts)]
    if save.keep is Keep.CPU:
        parts = [on_cpu(part) for part in parts]
    # The members of several devices meet only here.
    return torch.stack(parts) if save.stacked and len(parts) > 1 else parts[0]


def same(value: Any) -> Any:
    """What a saved tensor is that has arrived already."""
    return value


class _Arriving:
    """A saved tensor that is on its way to the host: the first who reads it waits."""

    def __init__(
        self,
        departures: Departures,
        host: torch.Tensor,
        split: Callable[[torch.Tensor], list[torch.Tensor]] | None,
    ) -> None:
        self._departures: Departures | None = departures
        self._value: Any = host
        self._split = split

    def __call__(self) -> Any:
        departures = self._departures
        if departures is not None:
            departures.wait()
            split, self._split = self._split, None
            if split is not None:
                self._value = split(self._value)
            self._departures = None
        return self._value


def _own(tensor: torch.Tensor, taken: set[int]) -> torch.Tensor:
    """``tensor`` itself if it fills memory of its own, else a compact copy."""
    storage = tensor.untyped_storage()
    whole = storage.nbytes() == tensor.numel() * tensor.element_size() and tensor.is_contiguous()
    if not whole or storage.data_ptr() in taken:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        storage = tensor.untyped_storage()
    taken.add(storage.data_ptr())
    return tensor


def _per_prompt(
    tensor: torch.Tensor, type_: TensorType, prompt: Prompt, *, stacked: bool
) -> list[torch.Tensor]:
    shift = 1 if stacked else 0
    batch_axis = type_.batch_axis
    assert batch_axis is not None  # the recorder refuses positions without rows where rows differ
    axes = tuple(axis + shift for axis in type_.padded_axes)
    # Each prompt keeps its row axis, so that code for one prompt runs unchanged on each of them.
    parts = unpadded(tensor, prompt.batch, batch_axis + shift, axes)
    return [part.unsqueeze(batch_axis + shift) for part in parts]


def write_files(saves: Sequence[Save], found: dict[str, Callable[[], Any]]) -> None:
    """Moves the saves that name a file there; their handles read them back on demand."""
    files: dict[str, dict[str, Any]] = {}
    for save in saves:
        if save.to is not None:
            files.setdefault(save.to, {})[save.name] = found[save.name]()
    for written, tensors in files.items():
        # Handles find it again after the user has gone to another folder.
        path = os.path.abspath(written)
        flat: dict[str, torch.Tensor] = {}
        for name, value in tensors.items():
            flat |= (
                {name: value}
                if isinstance(value, torch.Tensor)
                else {f"{name}.{i}": v for i, v in enumerate(value)}
            )
        # Under the name of the file only when it is whole; and as a file of its own, which _Stored can tell apart.
        write_tensors(flat, f"{path}.new")
        os.replace(f"{path}.new", path)
        state = _state(path)
        for name, value in tensors.items():
            keys = [name] if isinstance(value, torch.Tensor) else [f"{name}.{i}" for i in range(len(value))]
            found[name] = _Stored(path, state, keys, isinstance(value, torch.Tensor))


def _state(path: str) -> tuple[int, int, int]:
    """What tells one file of this name from another one."""
    found = os.stat(path)
    return found.st_ino, found.st_mtime_ns, found.st_size


@dataclass(frozen=True)
class _Stored:
    """Reads a saved tensor back from its file, if that is still the file that the run wrote."""

    path: str
    state: tuple[int, int, int]
    keys: list[str]
    whole: bool

    def __call__(self) -> Any:
        from safetensors import safe_open

        if not os.path.exists(self.path) or _state(self.path) != self.state:
            raise SavedFileError(
                f"the file that held this result has been written again or removed: {self.path}",
                at=here(),
                instead='a file name of its own for each run: value.save(to=f"acts_{i}.safetensors")',
            )
        with safe_open(self.path, framework="pt") as file:  # pyright: ignore[reportUnknownVariableType]  # untyped
            stored: list[Any] = [file.get_tensor(key) for key in self.keys]  # pyright: ignore[reportUnknownMemberType]  # untyped
        return stored[0] if self.whole else stored
