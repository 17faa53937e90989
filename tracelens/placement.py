"""Which device owns which part of the forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tracelens.ir.sites import Scope, Site


@dataclass(frozen=True, slots=True)
class Place:
    """A device that owns some of the layers."""

    index: int
    device: str

    def __str__(self) -> str:
        return f"place {self.index} ({self.device})"


@dataclass(frozen=True)
class Placement:
    """The place of every site: one entry per layer, and the places of what comes before and after the layers."""

    places: tuple[Place, ...]
    layers: tuple[int, ...]
    ends: Mapping[str, int] = field(default_factory=dict[str, int])

    @classmethod
    def single(cls, device: str, n_layers: int) -> Placement:
        """One device owns the whole model."""
        return cls((Place(0, device),), (0,) * n_layers)

    def place_of(self, site: Site) -> Place:
        if site.kind.scope is Scope.LAYER and site.layer is not None:
            return self.places[self.layers[site.layer]]
        default = self.layers[-1] if site.kind.scope is Scope.AFTER else self.layers[0]
        return self.places[self.ends.get(site.name, default)]
