"""What one rank is and has: its number, its device, its process group and the models that it holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, cast

import torch
import torch.distributed as dist

from tracelens.backends.ranks.channel import Message


class Conversation(Protocol):
    """What a handler says before its answer, and hears."""

    def say(self, message: Message) -> None:
        """Tells the owner something, in the midst of a request."""
        ...

    def hears_more(self) -> bool:
        """Waits for the owner, who tells all ranks alike whether to go on."""
        ...


@dataclass
class Served:
    """The state of a rank, which every handler is given.

    ``models`` holds what the handlers keep, by the id that the owner gave it. ``talk``: of the request at hand.
    """

    rank: int
    world: int
    device: torch.device
    group: dist.ProcessGroup
    models: dict[str, Any] = field(default_factory=dict[str, Any])
    talk: Conversation | None = None

    def communication(self) -> dict[str, int | None]:
        """How often each process group of this rank has communicated so far; ``None`` where it cannot be known."""
        return {name: _count(group) for name, group in _groups()}


Handler: TypeAlias = Callable[[Served, Message], Message]
"""What answers a request. It runs in the rank; all ranks are asked at the same time."""
Handlers: TypeAlias = Mapping[str, "str | Handler"]
"""By name: a handler, or where it stands, ``"tracelens.module:function"``."""


def _groups() -> list[tuple[str, dist.ProcessGroup]]:
    # By way of the names, as torch.distributed has no list of the groups.
    names = dist.distributed_c10d._world.pg_names
    return [(name, group) for group, name in names.items()]


def _count(group: dist.ProcessGroup) -> int | None:
    try:
        return int(cast(Any, group)._get_sequence_number_for_group())  # untyped
    except RuntimeError:  # not every kind of group counts
        return None
