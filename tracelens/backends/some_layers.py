"""Sites that some layers of a model have and others lack: mixtures of experts among layers with one MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tracelens.backends.base import Family
from tracelens.errors import AbsentSiteError
from tracelens.ir.sites import Site


class SomeLayers:
    """Which layers of one model have the sites that not all layers have, and why the others lack them."""

    def __init__(self, family: Family, config: Any, n_layers: int) -> None:
        self.layers: dict[str, tuple[int, ...]] = {}
        """By name, for sites that some layers lack."""
        self.reasons: dict[str, Mapping[int | None, str]] = {}
        """By name and layer; ``None``: why no layer has the site."""
        for some in family.in_some:
            having = some.layers(config)
            others: dict[int | None, str] = {
                layer: f"layer {layer} {some.others}" for layer in range(n_layers) if layer not in having
            }
            if not having:
                others[None] = f"each layer {some.others}"
            if others:
                self.layers |= dict.fromkeys(some.names, tuple(sorted(having)))
                self.reasons |= dict.fromkeys(some.names, others)

    def absent(self, family: Family, site: Site, reason: str) -> AbsentSiteError:
        """The error for a site that a layer lacks, or all layers."""
        layers = self.layers.get(site.name)
        if not layers or site.layer in layers:
            return AbsentSiteError(
                f"{family.name} models have no {site.name!r}: {reason}",
                instead="model.sites() lists the sites that this model has",
            )
        return AbsentSiteError(
            f"model.layers[{site.layer}] has no {site.name!r}: {reason}",
            instead=f"model.layers[{layers[0] if len(layers) == 1 else list(layers)}].{site.name}",
        )
