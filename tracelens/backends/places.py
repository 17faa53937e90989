"""The places of a model's sites and parameters: which device shows each."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from tracelens.ir.sites import KINDS, Scope
from tracelens.placement import Place, Placement

if TYPE_CHECKING:
    from tracelens.backends.anatomy import ModelAnatomy


def placement(anatomy: ModelAnatomy) -> Placement:
    """Where the sites of a model are: a site of a module is where the module computes, whichever side it is on.

    What accelerate moves on its way into a module is moved there by whoever reads or writes it.
    """
    spread = anatomy.spread
    if len(spread.devices) == 1:
        single = Placement.single(str(spread.devices[0]), anatomy.n_layers)
        return replace(single, brought=spread.brought)
    number = {device: index for index, device in enumerate(spread.devices)}
    layers = tuple(
        number[spread.device_of(anatomy.family.layers.format(layer))] for layer in range(anatomy.n_layers)
    )
    ends = {"token_mask": number[spread.inputs]}
    apart: dict[tuple[str, int], int] = {}
    for kind in KINDS:
        tap = anatomy.family.taps.get(kind.name)
        if tap is None:
            continue
        if kind.scope is not Scope.LAYER:
            ends[kind.name] = number[spread.device_of(tap.module)]
            continue
        for layer, place in enumerate(layers):
            own = number[spread.device_of(anatomy.module_path(tap, layer))]
            if own != place:
                apart[kind.name, layer] = own
    modules = {path: number[device] for path, device in spread.own.items()}
    places = tuple(Place(index, str(device)) for device, index in number.items())
    return Placement(places, layers, ends, modules, apart, spread.brought)
