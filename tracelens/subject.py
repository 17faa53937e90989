"""What a recording needs to know of its subject: the model and the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from tracelens.ir.dims import Sizes
from tracelens.ir.module_sites import ModuleSite
from tracelens.ir.ops import Selector
from tracelens.ir.sites import Site
from tracelens.ir.types import TensorType

PADS = "lengths"
"""The pseudo size that pins a graph to the very row lengths of the prompt that it was recorded with."""


INPUTS = "inputs"
"""The pseudo size that pins a graph to the shapes, dtypes and settings of the inputs that it was recorded on."""


@dataclass(frozen=True)
class HeadOf:
    """How a model makes logits of its last residual stream: paths of its norm, matrix and bias, and what follows.

    ``scale``: what is multiplied with first, and ``softcap``: what then bends the logits.
    """

    norm: str
    weight: str
    bias: str | None
    scale: float | None
    softcap: float | None
    vocabulary: int
    width: int


class Proof(Protocol):
    """What is known of the sites of a model beyond its family's table."""

    @property
    def skipped(self) -> str | None: ...

    def status(self, site: str) -> str: ...


class Anatomy(Protocol):
    """What the recorder needs to know of a model."""

    @property
    def n_layers(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the residual stream."""
        ...

    @property
    def vocabulary(self) -> int:
        """The number of token ids."""
        ...

    @property
    def head(self) -> HeadOf:
        """How logits are made of the last residual stream."""
        ...

    def type_of(self, site: Site) -> TensorType:
        """The site's type; raises :class:`AbsentSiteError` where the family lacks it."""
        ...

    def in_all_layers(self, name: str) -> bool:
        """Is what holds for a site in one layer so in all?"""
        ...

    def needed_in_generation(self, path: str) -> str | None:
        """Why a module cannot be left out in generation, if it cannot."""
        ...

    def names_at(self, site: ModuleSite) -> Sequence[Site]:
        """The named sites that a module's side shows, or that the module makes of what it receives there."""
        ...

    def parameter_type(self, path: str) -> TensorType: ...

    def parameter_path(self, tensor: torch.Tensor) -> str | None:
        """The path of a parameter or buffer of the model, ``None`` for any other tensor."""
        ...


class Prompted(Protocol):
    """What the recorder needs to know of a prompt."""

    @property
    def sizes(self) -> Sizes: ...

    @property
    def ragged(self) -> bool: ...

    def width(self, selector: Selector) -> int | None: ...

    def repeats(self, selector: Selector) -> bool:
        """Does the selector name a token of some row twice?"""
        ...

    def mask_indices(self, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...

    @property
    def lengths(self) -> tuple[int, ...]:
        """The number of real tokens in every row."""
        ...

    @property
    def lengths_digest(self) -> int: ...


def spelling(site: Site) -> str:
    """The site as one writes it in a block: ``model.layers[3].resid_post``."""
    if isinstance(site, ModuleSite):
        return f"model.{site}"
    return f"model.{site.name}" if site.layer is None else f"model.layers[{site.layer}].{site.name}"
