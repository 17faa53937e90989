"""The groups of ranks that models have in common: made once, not once for each model."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
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
