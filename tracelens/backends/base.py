"""What the library needs of a family of models: where its sites are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from tracelens.plan import Carry
from tracelens.subject import HeadOf


class Side(Enum):
    """Which side of a module a hook point is on; the inside is where an attention module computes attention."""

    IN = "input"
    OUT = "output"
    INSIDE = "inside"


@dataclass(frozen=True, slots=True)
class HeadsView:
    """A site with an axis for heads, in a tensor whose last axis holds the heads side by side.

    ``parts`` are what lies there one after the other, each named by the width that counts its heads (``H`` or ``K``);
    the site is part number ``index``. ``heads_first``: the tensor has an axis for the heads already, before that of the
    positions: [B, H, P, d].
    """

    parts: tuple[str, ...]
    index: int = 0
    heads_first: bool = False


@dataclass(frozen=True, slots=True)
class RowsView:
    """A site [B, P, ...] in a tensor with the tokens of all rows one after the other: [B * P, ...]."""


@dataclass(frozen=True, slots=True)
class Tap:
    """Where a site is found: a module (relative to its layer, for sites of a layer), a side, and a key into it.

    ``key`` for an input is the name of a keyword argument that may carry the tensor instead of the first positional
    one; for an output it is a position in a tuple or the name of a field, and ``None`` is the tensor itself (or the
    first element, where a version of transformers returns a tuple). Inside attention it names one of the tensors there:
    ``q_rot``, ``k_rot``, ``scores`` or ``pattern``. ``view`` finds the site in a tensor that holds more, or in another
    shape. ``decides``: the module makes the rest of its output of this tensor, and the model goes on with that alone.
    The function makes it once more (of the module and the tensor), where the tensor is written.
    """

    module: str
    side: Side
    key: str | int | None = None
    view: HeadsView | RowsView | None = None
    decides: Callable[[Any, Any], tuple[Any, ...]] | None = None


@dataclass(frozen=True, slots=True)
class InSome:
    """Sites that some layers have and others lack.

    ``layers``: which have them, by the configuration. ``these``: what such a layer is, in words. ``others``: what the
    other ones are, and why they have no such site.
    """

    names: tuple[str, ...]
    layers: Callable[[Any], frozenset[int]]
    these: str
    others: str


@dataclass(frozen=True)
class Family:
    """The table of one family of models.

    ``model_types``: the values of ``config.model_type`` that it serves. ``layers``: the path of the layers with ``{}``
    for the index. ``taps``: site name to hook point. ``absent``: site name to the reason why the family lacks it.
    ``neurons``: the configuration's word for the width of the MLP. ``withheld``: settings of a configuration without
    some of the sites, with the reason. ``out_by_in``: does the output projection keep its matrix as [out, in], as
    ``nn.Linear`` does? ``wide_softmax``: does eager attention take its softmax in float32, or in the model's dtype?
    ``reached``: sites of one level that the family's modules make in another order than the vocabulary has them.
    ``widths``: the configuration's words for further widths of sites. ``in_some``: sites that not all layers have.
    ``softcap``: the configuration's word for what bends the logits.
    """

    name: str
    model_types: tuple[str, ...]
    layers: str
    taps: Mapping[str, Tap]
    absent: Mapping[str, str]
    neurons: str = "intermediate_size"
    carries: tuple[Carry, ...] = (Carry("resid_mid", "mlp_add", "resid_post"),)
    refusals: Mapping[str, Any] = field(default_factory=dict[str, Any])
    withheld: Mapping[str, tuple[tuple[str, ...], str]] = field(
        default_factory=dict[str, tuple[tuple[str, ...], str]]
    )
    out_by_in: bool = True
    wide_softmax: bool = True
    reached: tuple[str, ...] = ()
    widths: Mapping[str, str] = field(default_factory=dict[str, str])
    in_some: tuple[InSome, ...] = ()
    softcap: str | None = None

    def refused(self, config: Any) -> str | None:
        """The reason why a configuration of this family cannot be served, if there is one."""
        for option, reason in self.refusals.items():
            if getattr(config, option, False):
                return reason
        return None


def head_of(family: Family, model: Any, vocabulary: int) -> HeadOf:
    """How a model of the family makes logits of its last residual stream."""
    module = family.taps["lm_head"].module
    head = model.get_submodule(module)
    bias = getattr(head, "bias", None)
    cap = None if family.softcap is None else getattr(model.config, family.softcap, None)
    return HeadOf(
        family.taps["final_norm"].module,
        f"{module}.weight",
        None if bias is None else f"{module}.bias",
        None if cap is None else float(cap),
        vocabulary,
        head.weight.shape[-1],
    )
