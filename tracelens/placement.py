"""Which device owns which part of the forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tracelens.errors import LayoutError
from tracelens.ir.layout import WHOLE_EVERYWHERE, Layout, Partial, Shard
from tracelens.ir.module_sites import OUTPUT, ModuleSite
from tracelens.ir.sites import Scope, Site


@dataclass(frozen=True, slots=True)
class Place:
    """A device, or a mesh of ranks with one each, that owns some of the layers."""

    index: int
    device: str
    ranks: int = 1

    def __str__(self) -> str:
        over = f" on {self.ranks} ranks" if self.ranks > 1 else ""
        return f"place {self.index} ({self.device}{over})"


@dataclass(frozen=True, slots=True)
class InParts:
    """A tensor of ``ndim`` axes, of which ``dim`` is in parts."""

    dim: int
    ndim: int


@dataclass(frozen=True, slots=True)
class Probed:
    """What a forward pass has shown of the tensors at modules, by the names of their sites; all others are whole.

    ``unclear``: those that nobody knows how to put together, with the reason. ``sums``: those of which every rank has
    a part that the others' are added to.
    """

    parts: Mapping[str, InParts]
    unclear: Mapping[str, str]
    sums: frozenset[str] = frozenset()

    def layout_of(self, name: str) -> Layout:
        """How the tensor of a module's site lies."""
        found = self.parts.get(name)
        if found is not None:
            return Shard(found.dim)
        return Partial() if name in self.sums else WHOLE_EVERYWHERE


@dataclass(frozen=True, slots=True)
class Seen:
    """How named sites lie where only a forward pass tells: what a :class:`Placement` has under the same names."""

    layouts: Mapping[str, Layout]
    own_layouts: Mapping[tuple[str, int], Layout]
    unknown: Mapping[tuple[str, int | None], str]


@dataclass(frozen=True)
class Placement:
    """The place of every site and parameter.

    ``layers``: one entry per layer. ``ends``: the places of sites before and after the layers, by name. ``modules``:
    the places of modules by their paths; a module that is not named there is where the one around it is.
    """

    places: tuple[Place, ...]
    layers: tuple[int, ...]
    ends: Mapping[str, int] = field(default_factory=dict[str, int])
    modules: Mapping[str, int] = field(default_factory=dict[str, int])
    apart: Mapping[tuple[str, int], int] = field(default_factory=dict[tuple[str, int], int])
    """The places of sites that are elsewhere than their layer, by name and layer: a norm may be."""
    brought: frozenset[str] = frozenset()
    """The parameters that are kept elsewhere, by path: used as values, they are loaded into memory of their own."""
    layouts: Mapping[str, Layout] = field(default_factory=dict[str, Layout])
    """How named sites lie on the ranks of their place, by name; those that are not named are whole on each."""
    parameters: Mapping[str, Layout] = field(default_factory=dict[str, Layout])
    """The same for parameters and buffers, by path."""
    probed: Probed | None = None
    """How tensors at modules lie, where that has been looked at."""
    own_layouts: Mapping[tuple[str, int], Layout] = field(default_factory=dict[tuple[str, int], Layout])
    """How named sites of single layers lie that do not as ``layouts`` says, by name and layer."""
    unknown: Mapping[tuple[str, int | None], str] = field(default_factory=dict[tuple[str, int | None], str])
    """The named sites that nobody knows how to put together, by name and layer, with the reason."""

    @classmethod
    def single(cls, device: str, n_layers: int) -> Placement:
        """One device owns the whole model."""
        return cls((Place(0, device),), (0,) * n_layers)

    def __str__(self) -> str:
        ranks, stages = self.places[0].ranks, len(self.places)
        each = f"{ranks} rank{'s' if ranks > 1 else ''} ({self.places[0].device})"
        return each if stages == 1 else f"{stages} stages of {each}"

    def place_of(self, site: Site) -> Place:
        if isinstance(site, ModuleSite):
            # What all layers make of the input together is there in the last stage alone.
            whole = site.side == OUTPUT and self.is_common(site.path) and self._holds_layers(site.path)
            return self.places[-1 if whole else self.of_path(site.path)]
        if site.kind.scope is Scope.LAYER and site.layer is not None:
            return self.places[self.apart.get((site.name, site.layer), self.layers[site.layer])]
        if not self.layers:
            return self.places[self.ends.get(site.name, 0)]
        default = self.layers[-1] if site.kind.scope in (Scope.AFTER, Scope.END) else self.layers[0]
        return self.places[self.ends.get(site.name, default)]

    def layout_of(self, site: Site) -> Layout:
        """How a site lies on the ranks of its place."""
        if not isinstance(site, ModuleSite):
            own = None if site.layer is None else self.own_layouts.get((site.name, site.layer))
            return own or self.layouts.get(site.name, WHOLE_EVERYWHERE)
        return WHOLE_EVERYWHERE if self.probed is None else self.probed.layout_of(site.name)

    def ndim_of(self, site: Site) -> int:
        """How many axes a site has that is in parts."""
        if not isinstance(site, ModuleSite):
            return len(site.kind.shape)
        assert self.probed is not None
        return self.probed.parts[site.name].ndim

    def require_known(self, site: Site) -> None:
        """Raises :class:`~tracelens.errors.LayoutError` for a tensor of which nobody knows how it lies."""
        if all(place.ranks == 1 for place in self.places):
            return
        if not isinstance(site, ModuleSite):
            reason = self.unknown.get((site.name, site.layer))
            if reason is not None:
                raise LayoutError(
                    f"{site} {reason}, so that it cannot be read or written as a whole",
                    instead="sites around it; or a plan by which the tensor is a DTensor that says how it lies "
                    "(use_local_output=False), or is whole (output_layouts=Replicate())",
                )
            return
        problem = (
            "has not been looked at on all ranks"
            if self.probed is None
            else self.probed.unclear.get(site.name)
        )
        if problem is not None:
            raise LayoutError(
                f"{site.name} {problem}, so that it cannot be read or written as a whole",
                instead="model.sites() lists the named sites, which are known on ranks"
                if self.probed is not None
                else "tl.load(name, tp=...), which looks when it loads the model",
            )

    def is_common(self, path: str) -> bool:
        """Does every stage of a pipeline run this module, each for itself?"""
        own = any(not known or f"{path}.".startswith(f"{known}.") for known in self.modules)
        return len(self.places) > 1 and not own

    def _holds_layers(self, path: str) -> bool:
        return any(not path or known.startswith(f"{path}.") for known in self.modules)

    def has_copies(self, site: Site) -> bool:
        """Does every stage of a pipeline have a tensor of its own at this site?"""
        if not isinstance(site, ModuleSite) or not self.is_common(site.path):
            return False
        return site.side != OUTPUT or not self._holds_layers(site.path)

    def of_path(self, path: str) -> int:
        """The place of a module, a parameter or a buffer, by its path."""
        while path and path not in self.modules:
            path = path.rpartition(".")[0]
        return self.modules.get(path, 0)
