"""What the library needs of a family of models: where its sites are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from tracelens.plan import Carry


class Side(Enum):
    """Which side of a module a hook point is on."""

    IN = "input"
    OUT = "output"


@dataclass(frozen=True, slots=True)
class Tap:
    """Where a site is found: a module (relative to its layer, for sites of a layer), a side, and a key into it.

    ``key`` for an input is the name of a keyword argument that may carry the tensor instead of the first positional
    one; for an output it is a position in a tuple or the name of a field, and ``None`` is the tensor itself (or the
    first element, where a version of transformers returns a tuple).
    """

    module: str
    side: Side
    key: str | int | None = None


@dataclass(frozen=True)
class Family:
    """The table of one family of models.

    ``model_types``: the values of ``config.model_type`` that it serves. ``layers``: the path of the layers with ``{}``
    for the index. ``taps``: site name to hook point. ``absent``: site name to the reason why the family lacks it.
    ``neurons``: the configuration's word for the width of the MLP.
    """

    name: str
    model_types: tuple[str, ...]
    layers: str
    taps: Mapping[str, Tap]
    absent: Mapping[str, str]
    neurons: str = "intermediate_size"
    carries: tuple[Carry, ...] = (Carry("resid_mid", "mlp_add", "resid_post"),)
    refusals: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def refused(self, config: Any) -> str | None:
        """The reason why a configuration of this family cannot be served, if there is one."""
        for option, reason in self.refusals.items():
            if getattr(config, option, False):
                return reason
        return None
