"""A model without a table of sites, under inputs of one shape: modules and parameters are all that there is to name."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from tracelens.backends.anatomy import ModelAnatomy
from tracelens.backends.base import Family
from tracelens.backends.meta_copy import on_meta
from tracelens.backends.module_sides import ModuleSides
from tracelens.backends.some_layers import SomeLayers
from tracelens.backends.spread import state_of
from tracelens.errors import NotALanguageModelError
from tracelens.ir.sites import Site
from tracelens.ir.types import TensorType


class PlainAnatomy(ModelAnatomy):
    """A module with what its submodules receive and return when it is given such inputs."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], reason: str) -> None:
        self.model = model
        self.config: Any = getattr(model, "config", None)
        self.family = Family(type(model).__name__, (), "", {}, {}, carries=())
        self.reason = reason
        self.n_layers = 0
        self.widths = {}
        self.max_positions = None
        self._modules = {}
        self._types = {}
        self._paths = {}
        self._points = {}
        self._withheld = {}
        self.some = SomeLayers(self.family, self.config, 0)
        self._rows = 0
        # Only what decides about shapes is kept of the inputs, not their numbers.
        given, named = on_meta(args), on_meta(kwargs)
        self.sides = ModuleSides(
            model, lambda: [[partial(_call, given, named)]], dict, self._state, named=False
        )
        self._spread = None
        assert self.spread  # refuses what cannot be run

    def absence(self, site: Site) -> str | None:
        return self.reason

    def type_of(self, site: Site) -> TensorType:
        if self._named(site):
            raise NotALanguageModelError(
                f"{type(self.model).__name__} has no {site}: {self.reason}",
                instead="model.module(path).output; model.modules() lists the paths",
            )
        return super().type_of(site)

    @staticmethod
    def _named(site: Site) -> bool:
        return type(site) is Site

    def needed_in_generation(self, path: str) -> str | None:
        return None

    @property
    def vocabulary(self) -> int:
        return 0

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating parameter."""
        tensors = (*self.model.parameters(), *self.model.buffers())
        return next((t.dtype for t in tensors if t.dtype.is_floating_point), torch.get_default_dtype())

    def _spread_state(self) -> tuple[object, ...]:
        first = next(self.model.parameters(), None)
        first = next(self.model.buffers(), None) if first is None else first
        return state_of(self.model, None, first)

    @property
    def _head(self) -> None:
        return None


def _call(args: Any, kwargs: Any, model: nn.Module) -> object:
    return model(*on_meta(args), **on_meta(kwargs))
