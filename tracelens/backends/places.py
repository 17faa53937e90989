"""The places of a model's sites and parameters: which device shows each."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from tracelens.ir.sites import INPUT_KINDS, KINDS, TEXT_KINDS, Scope
from tracelens.placement import Place, Placement

if TYPE_CHECKING:
    from tracelens.backends.anatomy import ModelAnatomy
    from tracelens.backends.mesh import Mesh


def placement(anatomy: ModelAnatomy) -> Placement:
    """Where the sites of a model are: a site of a module is where the module computes, whichever side it is on.

    What accelerate moves on its way into a module is moved there by whoever reads or writes it.
    """
    if anatomy.elsewhere is not None:
        return anatomy.elsewhere
    spread = anatomy.spread
    if anatomy.mesh is not None:
        return _of_ranks(anatomy, anatomy.mesh)
    if len(spread.devices) == 1:
        single = Placement.single(str(spread.devices[0]), anatomy.n_layers)
        return replace(single, brought=spread.brought)
    number = {device: index for index, device in enumerate(spread.devices)}
    layers = tuple(
        number[spread.device_of(anatomy.family.layers.format(layer))] for layer in range(anatomy.n_layers)
    )
    ends = dict.fromkeys((kind.name for kind in TEXT_KINDS), number[spread.inputs])
    apart: dict[tuple[str, int], int] = {}
    for kind in KINDS:
        tap = anatomy.family.taps.get(kind.name)
        if tap is None:
            continue
        if kind.scope is not Scope.LAYER:
            ends[kind.name] = number[spread.device_of(tap.module)]
            continue
        for layer in anatomy.layers_with(kind.name):
            place = layers[layer]
            own = number[spread.device_of(anatomy.module_path(tap, layer))]
            if own != place:
                apart[kind.name, layer] = own
    modules = {path: number[device] for path, device in spread.own.items()}
    places = tuple(Place(index, str(device)) for device, index in number.items())
    return Placement(places, layers, ends, modules, apart, spread.brought)


def look_at(anatomy: ModelAnatomy) -> None:
    """Sees in a forward pass how a model lies on the ranks that share its layers, all of which call this together.

    Raises :class:`~tracelens.errors.LayoutError` on every rank where a named site lies otherwise than is thought.
    """
    from tracelens.backends.probing import probe

    if anatomy.mesh is not None and anatomy.mesh.ranks > 1:
        anatomy.probed = probe(anatomy, placement(anatomy))


def _of_ranks(anatomy: ModelAnatomy, mesh: Mesh) -> Placement:
    """One place for each stage of a pipeline, or one for all."""
    device = str(anatomy.spread.inputs)
    layers = (0,) * anatomy.n_layers if mesh.pipeline is None else mesh.pipeline.layers
    last = layers[-1]
    taps = anatomy.family.taps
    ends = {
        kind.name: last if kind.scope is Scope.AFTER else 0
        for kind in KINDS
        if kind.scope is not Scope.LAYER and kind.name in taps
    }
    modules = {taps[name].module: place for name, place in ends.items() if taps[name].module}
    modules |= {anatomy.family.layers.format(layer): place for layer, place in enumerate(layers)}
    found = Placement(
        tuple(Place(index, device, mesh.ranks) for index in range(last + 1)),
        layers,
        {**dict.fromkeys((kind.name for kind in INPUT_KINDS), 0), **ends},
        modules,
        layouts=anatomy.site_layouts,
        parameters=anatomy.parameter_layouts,
        probed=anatomy.probed,
    )
    seen = anatomy.seen
    if seen is None:
        return found
    return replace(found, layouts=seen.layouts, own_layouts=seen.own_layouts, unknown=seen.unknown)
