"""The groups of ranks that models have in common: made once, not once for each model."""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

_known: dict[Hashable, tuple[Any, Any]] = {}
"""What was made in a process group, with that group, which is held so that no other one is taken for it."""


def once_in_a_world(what: Hashable, make: Callable[[], Any]) -> Any:
    """What ``make`` gives, which is called once for ``what`` in the life of the default process group.

    Groups of ranks are not for one model each: gloo gives every group threads that look for messages as long as the
    process lives, and with a few dozen of them the ranks do little else.
    """
    import torch.distributed as dist

    world = dist.group.WORLD
    known = _known.get((what, id(world)))
    if known is None:
        known = _known[what, id(world)] = (make(), world)
    return known[0]


@cache
def let_collectives_end() -> None:
    """Has the interpreter wait a tenth of a second at its end for gloo's threads to drop what they hold.

    A collective is waited for by what it computes, and ends a moment later: its thread still drops its tensors, for
    which it needs the interpreter. Where that has begun to end, Python 3.11 to 3.13 end the thread inside of a
    destructor instead, which aborts the process ("terminate called without an active exception"), after everything
    was computed and written. Handlers of ``atexit`` run before that point, and one that sleeps leaves the interpreter
    to the threads. ``destroy_process_group()`` does not end them (pytorch/pytorch#179291).
    """
    atexit.register(time.sleep, 0.1)


@contextmanager
def meshes_shared() -> Iterator[None]:
    """Has models that are spread alike share one mesh of ranks, and so its groups."""
    from importlib import import_module

    dist: Any = import_module("torch.distributed")
    before = dist.init_device_mesh

    def shared(
        device_type: str,
        mesh_shape: Sequence[int],
        *,
        mesh_dim_names: Sequence[str] | None = None,
        **more: Any,
    ) -> Any:
        what = (
            "mesh",
            device_type,
            tuple(mesh_shape),
            tuple(mesh_dim_names or ()),
            repr(sorted(more.items())),
        )
        return once_in_a_world(
            what, lambda: before(device_type, mesh_shape, mesh_dim_names=mesh_dim_names, **more)
        )

    dist.init_device_mesh = shared
    try:
        yield
    finally:
        dist.init_device_mesh = before
