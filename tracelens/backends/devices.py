"""Where the values of a program are: the device of each place, and how they lie on its ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from tracelens.backends.mesh import Mesh
from tracelens.ir.layout import WHOLE_EVERYWHERE, Layout, OwnType, local_type
from tracelens.ir.ops import Index, IndexPut, Save
from tracelens.ir.sites import Site
from tracelens.ir.types import TensorType
from tracelens.own_part import OwnPart
from tracelens.sharding import own_part


@dataclass(frozen=True, slots=True)
class Devices:
    """Where values are: the device of each place, and the place of each value."""

    places: tuple[torch.device, ...]
    home: Mapping[int, int]
    views: frozenset[int] = frozenset()
    """The values that may be parts of others, in the same memory."""
    departing: Mapping[tuple[int, int], tuple[torch.device, tuple[tuple[Save, int], ...]]] = field(
        default_factory=dict[tuple[int, int], tuple[torch.device, tuple[tuple[Save, int], ...]]]
    )
    """After which member of which save (their numbers) a device has saved all, and what that is."""
    mesh: Mesh | None = None
    """The ranks that have the place of this process together."""
    layouts: Mapping[int, Layout] = field(default_factory=dict[int, Layout])
    """How values lie on them."""
    layout_of: Callable[[Site], Layout] = lambda site: WHOLE_EVERYWHERE
    """How sites do."""

    gathers: bool = False
    """Is what is saved in every pass put where the whole of it is gathered?"""

    def local(self, type_: TensorType, layout: Layout) -> TensorType | OwnType:
        """The type of what this rank has of a value."""
        return type_ if self.mesh is None else local_type(type_, layout, self.mesh.ranks, self.mesh.rank)

    def own_part(self, op: Index | IndexPut, types: Mapping[int, TensorType]) -> OwnPart | None:
        """What this rank does by itself of an index into an axis that is in parts."""
        if self.mesh is None:
            return None
        return own_part(op, self.layouts, types, self.mesh.ranks, self.mesh.rank)
