"""Runs graphs through nnsight: on models that people already hold there, and as an independent oracle for the tests.

Only the public surface of nnsight's envoys is used, so nnsight itself is not imported here. What the graph means is
decided by :mod:`tracelens.reference`, which knows neither plans nor hooks; nnsight gives and takes the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from tracelens.backends.anatomy import ModelAnatomy
from tracelens.backends.base import RowsView, ScaledView, Side, Tap
from tracelens.backends.module_hooks import replaced
from tracelens.backends.views import scaled, taking_and_putting
from tracelens.errors import BridgeError
from tracelens.ir.graph import Graph
from tracelens.ir.module_sites import INPUT, ModuleSite
from tracelens.ir.ops import Grad, Read, Write
from tracelens.ir.sites import TEXT, Site

Intercept = Callable[[Site, torch.Tensor], torch.Tensor]


def module_of(envoy: Any) -> torch.nn.Module:
    """The PyTorch model inside an nnsight model."""
    module = getattr(envoy, "_module", None)
    if not isinstance(module, torch.nn.Module) or not hasattr(envoy, "trace"):
        raise BridgeError(
            f"a {type(envoy).__name__} is not a model of nnsight",
            instead="nnsight.NNsight(model) or nnsight.TransformersModel(name)",
        )
    return module


def forward_through(
    envoy: Any, anatomy: ModelAnatomy, graph: Graph, inputs: Mapping[str, torch.Tensor], mask: torch.Tensor
) -> Callable[[Intercept], None]:
    """One forward pass inside nnsight that stops at every site of the graph, as the reference evaluator asks for it."""
    if any(isinstance(op, Grad) for op in graph.ops):
        raise BridgeError(
            "the graph takes gradients, which the bridge does not carry",
            instead="model.compile(graph)(prompt), on a model of tracelens",
        )
    replaced_modules = [op.instead for op in graph.writes if op.instead is not None]
    if replaced_modules:
        raise BridgeError(
            f"the graph does not run {replaced_modules[0].path!r}, and the bridge runs every module",
            instead="model.compile(graph)(prompt), on a model of tracelens",
        )
    named = {op.site for op in graph.ops if isinstance(op, Read | Write)}
    written = {op.site for op in graph.writes}
    stream = {site for site in written if site.name == "resid_mid"}
    # A block adds its MLP to the stream as it was before the write: its own sum is replaced by that with the new one.
    named |= {Site(name, mid.layer) for mid in stream for name in ("mlp_add", "resid_post")}
    sites = sorted(named, key=lambda site: site.sequence)
    places = {
        site: _ModulePlace(envoy, anatomy, site)
        if isinstance(site, ModuleSite)
        else _Place(envoy, anatomy, site)
        for site in sites
        if site.kind.scope not in TEXT
    }

    def visit(intercept: Intercept) -> None:
        sums: dict[int | None, torch.Tensor] = {}
        for site in sites:
            place = places.get(site)
            if place is None:
                intercept(site, mask)
                continue
            tensor = place.get()
            if Site("resid_mid", site.layer) in stream:
                if site.name == "resid_post":
                    tensor = sums[site.layer]
                new = intercept(site, tensor)
                if site.name in ("resid_mid", "mlp_add"):
                    sums[site.layer] = new if site.name == "resid_mid" else sums[site.layer] + new
                changed = site in written or site.name == "resid_post"
            else:
                new, changed = intercept(site, tensor), site in written
            if changed:
                place.put(new)

    def forward(intercept: Intercept) -> None:
        def plain(site: Site, tensor: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():  # nnsight runs this in a thread of its own
                return intercept(site, tensor)

        with torch.no_grad(), envoy.trace(**inputs, use_cache=False):
            visit(plain)

    return forward


class _Place:
    """A site in nnsight: an envoy, its side, and where the tensor lies in it."""

    def __init__(self, root: Any, anatomy: ModelAnatomy, site: Site) -> None:
        _, tap, path = anatomy.tap(site)
        if tap.side is Side.INSIDE:
            raise BridgeError(
                f"{site} lies inside the attention function, where the bridge does not reach",
                instead="q, k, v and z, or model.compile(graph)(prompt) on a model of tracelens",
            )
        if isinstance(tap.view, RowsView):
            raise BridgeError(
                f"{site} lies in a tensor with the tokens of all rows one after the other, which the bridge does not "
                "take apart",
                instead="sites around it, or model.compile(graph)(prompt) on a model of tracelens",
            )
        self.tap: Tap = tap
        self.view = None
        if isinstance(tap.view, ScaledView):
            self.view = scaled(anatomy.factor(tap))
        elif tap.view is not None:
            self.view = taking_and_putting(tap.view, anatomy.widths)
        self.envoy = _envoy_at(root, path)

    def get(self) -> torch.Tensor:
        # nnsight gives the model's own, which may change in place later.
        whole = self._whole().clone() if self.tap.changes else self._whole()
        return whole if self.view is None else self.view[0](whole)

    def put(self, new: torch.Tensor) -> None:
        new = new.clone() if self.tap.changes else new
        self._replace(new if self.view is None else self.view[1](self._whole(), new))

    def _whole(self) -> torch.Tensor:
        if self.tap.side is Side.IN:
            return self.envoy.input
        output = self.envoy.output
        if isinstance(self.tap.key, str):
            return getattr(output, self.tap.key)
        return output[self.tap.key or 0] if isinstance(output, tuple) else output

    def _replace(self, new: torch.Tensor) -> None:
        if self.tap.side is Side.IN:
            self.envoy.input = new
            return
        output = self.envoy.output
        if isinstance(self.tap.key, str):
            output[self.tap.key] = new
            self.envoy.output = output
        elif isinstance(output, tuple):
            position = self.tap.key or 0
            self.envoy.output = (*output[:position], new, *output[position + 1 :])
        else:
            self.envoy.output = new


class _ModulePlace:
    """A site by module path in nnsight."""

    def __init__(self, root: Any, anatomy: ModelAnatomy, site: ModuleSite) -> None:
        if site.call is not None:
            raise BridgeError(
                f"{site} is one of several calls of its module, which the bridge does not tell apart",
                instead="model.compile(graph)(prompt), on a model of tracelens",
            )
        self.site = site
        self.copies = anatomy.sides.leaf(site).lent
        self.envoy = _envoy_at(root, site.path)

    def _given(self) -> Any:
        if self.site.side != INPUT:
            return self.envoy.output
        args, kwargs = self.envoy.inputs
        return kwargs if isinstance(self.site.key[0], str) else args

    def get(self) -> torch.Tensor:
        found = self._given()
        for part in self.site.key:
            found = found[part]
        return found.clone() if self.copies else found

    def put(self, new: torch.Tensor) -> None:
        given = replaced(self._given(), self.site.key, new.clone() if self.copies else new)
        if self.site.side != INPUT:
            self.envoy.output = given
            return
        args, kwargs = self.envoy.inputs
        self.envoy.inputs = (args, given) if isinstance(self.site.key[0], str) else (given, kwargs)


def _envoy_at(root: Any, path: str) -> Any:
    for part in path.split(".") if path else ():
        root = root[int(part)] if part.isdigit() else getattr(root, part)
    return root
