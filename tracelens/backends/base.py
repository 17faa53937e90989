"""What the library needs of a family of models: where its sites are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from tracelens.ir.types import DType
from tracelens.plan import Carry
from tracelens.subject import HeadOf


class Side(Enum):
    """Which side of a module a hook point is on.

    The inside is where an attention module computes attention; among experts is where a module of experts has what each
    of them makes, before it adds that up.
    """

    IN = "input"
    OUT = "output"
    INSIDE = "inside"
    EXPERTS = "among experts"


@dataclass(frozen=True, slots=True)
class HeadsView:
    """A site with an axis for heads, in a tensor whose last axis holds the heads side by side.

    ``parts`` are what lies there one after the other, each named by the width that counts its heads (``H`` or ``K``);
    the site is part number ``index``. ``heads_first``: the tensor has an axis for the heads already, before that of the
    positions: [B, H, P, d]. ``width`` names that of a head. ``grouped``: the axis is cut into as many groups as there
    are kv heads first, and each group has its own heads of every part, one part after the other.
    """

    parts: tuple[str, ...]
    index: int = 0
    heads_first: bool = False
    width: str = "d"
    grouped: bool = False


@dataclass(frozen=True, slots=True)
class NeuronsView:
    """A site that is a stretch of a tensor's last axis: part number ``index`` of ``parts``, each named by its width."""

    parts: tuple[str, ...]
    index: int


@dataclass(frozen=True, slots=True)
class RowsView:
    """A site [B, P, ...] in a tensor with the tokens of all rows one after the other: [B * P, ...].

    ``flat``: the number of that tensor's axes, where other layers have it with an axis more, as the site.
    """

    flat: int | None = None


@dataclass(frozen=True, slots=True)
class ScaledView:
    """A site that is the module's tensor times a number, which the model multiplies with outside the module.

    ``by``: the configuration's word for the number. What is read is the product, as the model makes it; what is written
    is divided by the number, so that the model's product is it up to rounding.
    """

    by: str


View = HeadsView | NeuronsView | RowsView | ScaledView


@dataclass(frozen=True, slots=True)
class Tap:
    """Where a site is found: a module (relative to its layer, for sites of a layer), a side, and a key into it.

    ``key`` for an input is the name of a keyword argument that may carry the tensor instead of the first positional
    one; for an output it is a position in a tuple or the name of a field, and ``None`` is the tensor itself (or the
    first element, where a version of transformers returns a tuple). Inside attention it names one of the tensors there:
    ``v``, ``q_rot``, ``k_rot``, ``scores`` or ``pattern``. ``view`` finds the site in a tensor that holds more, or in
    another shape. ``decides``: the module makes the rest of its output of this tensor, and the model goes on with that
    alone. The function makes it once more (of the module and the tensor), where the tensor is written. ``changes``: the
    block goes on to change the tensor in place, so that nobody else may hold it. ``dtype``: where it is another than
    that of the model and of the vocabulary.
    """

    module: str
    side: Side
    key: str | int | None = None
    view: View | None = None
    decides: Callable[[Any, Any], tuple[Any, ...]] | None = None
    changes: bool = False
    dtype: DType | None = None


def expert_taps(experts: str) -> dict[str, Tap]:
    """The sites among the experts of a module that transformers describes (``use_experts_implementation``).

    The rule of its router (``decides``) never chooses an expert whose logit is minus infinity; a run refuses one that
    does. A family says where that module is, what the configuration calls the neurons of an expert (``N`` of its
    ``widths``), and by :class:`InSome` which layers have experts, if not all have. How experts compute is read off the
    module; one that cannot be read, or that makes something else than the sum of its experts, is refused by name.
    """
    return {name: Tap(experts, Side.EXPERTS, name, RowsView()) for name in ("expert_act", "expert_out")}


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


@dataclass(frozen=True, slots=True)
class Word:
    """A part of a module's path: one of ``choices``, whose number ``of`` says, of the configuration and the layer."""

    choices: tuple[str, ...]
    of: Callable[[Any, int], int]


@dataclass(frozen=True)
class Family:
    """The table of one family of models.

    ``model_types``: the values of ``config.model_type`` that it serves; ``serves``: which configurations of these, if
    not all, which ``these`` says in words. ``layers``: the path of the layers with ``{}`` for the index. ``taps``: site
    name to hook point. ``absent``: site name to the reason why the family lacks it. ``neurons``: the configuration's
    word for the width of the MLP. ``refusals``: what cannot be served, with the reason: by the configuration's word for
    it, or by any words, of which ``refused_if`` says whether a configuration is so. ``withheld``: settings of a
    configuration without some of the sites, with the reason. ``out_by_in``: does the output projection keep its matrix
    as [out, in], as ``nn.Linear`` does? ``wide_softmax``: does eager attention take its softmax in float32, or in the
    model's dtype? ``sinks``: may heads look at nothing, so that the rows of a pattern are less than 1? ``reached``:
    sites of one level that the family's modules make in another order than the vocabulary has them. ``widths``: the
    configuration's words for further widths of sites, or what makes them of it. ``embedding``: the module with a row
    for each token, where it is another than the one that shows ``embed``. ``attends_itself``: does the attention module
    compute attention in its own code, and not by a function that it looks up in transformers' table? ``in_some``:
    sites that not all layers have. ``logits_times``, ``logits_over``: the configuration's words for what the
    unembedding's logits are multiplied with, or divided by. ``softcap``: its word for what then bends them. ``words``:
    what stands in braces in the paths of taps, and is another in some layers than in others. ``gated``: is what heads
    mix of values multiplied by gates between 0 and 1 before ``z``? ``shared``: is there an expert that all tokens go
    to, beside those that are chosen? ``not_on_ranks``: why transformers cannot share such a model out, where its own
    plan says that it can: by ``"tp"`` or ``"pp"``. ``sigmoid``: does each expert count what a
    sigmoid makes of its own logit? ``resized``: are queries and keys made longer or shorter when they are rotated, or
    instead? ``counts_padding``: from how many positions on does padding change what a row is, if it ever does?
    """

    name: str
    model_types: tuple[str, ...]
    layers: str
    taps: Mapping[str, Tap]
    absent: Mapping[str, str]
    neurons: str = "intermediate_size"
    carries: tuple[Carry, ...] = (Carry("resid_mid", "mlp_add", "resid_post"),)
    refusals: Mapping[str, str] = field(default_factory=dict[str, str])
    refused_if: Mapping[str, Callable[[Any], bool]] = field(
        default_factory=dict[str, "Callable[[Any], bool]"]
    )
    withheld: Mapping[str, tuple[tuple[str, ...], str]] = field(
        default_factory=dict[str, tuple[tuple[str, ...], str]]
    )
    out_by_in: bool = True
    wide_softmax: bool = True
    attends_itself: bool = False
    sinks: bool = False
    gated: bool = False
    shared: bool = False
    sigmoid: bool = False
    resized: bool = False
    counts_padding: Callable[[Any], int | None] | None = None
    reached: tuple[str, ...] = ()
    widths: Mapping[str, str | Callable[[Any], int]] = field(
        default_factory=dict[str, "str | Callable[[Any], int]"]
    )
    in_some: tuple[InSome, ...] = ()
    words: Mapping[str, Word] = field(default_factory=dict[str, "Word"])
    logits_times: str | None = None
    logits_over: str | None = None
    softcap: str | None = None
    not_on_ranks: Mapping[str, str] = field(default_factory=dict[str, str])
    serves: Callable[[Any], bool] | None = None
    these: str = ""
    embedding: str | None = None

    @property
    def rows(self) -> str:
        """The path of the module with a row for each token."""
        return self.embedding or self.taps["embed"].module

    def path(self, tap: Tap, config: Any, layer: int | None) -> str:
        """The path of a tap's module."""
        if layer is None:
            return tap.module
        prefix, module = self.layers.format(layer), tap.module
        if "{" in module:
            module = module.format_map(
                {name: word.choices[word.of(config, layer)] for name, word in self.words.items()}
            )
        return f"{prefix}.{module}" if module else prefix

    @property
    def factors(self) -> tuple[str, ...]:
        """The configuration's words for the numbers that its sites and logits are multiplied with."""
        found = {tap.view.by: None for tap in self.taps.values() if isinstance(tap.view, ScaledView)}
        return (*found, *(word for word in (self.logits_times, self.logits_over) if word is not None))

    def refused(self, config: Any) -> str | None:
        """The reason why a configuration of this family cannot be served, if there is one."""
        for word in self.factors:
            if getattr(config, word, None) == 0:
                return f"its {word} is 0, so that nothing is left of what it multiplies"
        for option, reason in self.refusals.items():
            judge = self.refused_if.get(option)
            if getattr(config, option, False) if judge is None else judge(config):
                return reason
        return None


def inside(family: Family, name: str) -> bool:
    """Is a site inside attention, where its function is called?"""
    tap = family.taps.get(name)
    return tap is not None and tap.side is Side.INSIDE


def text_of(config: Any) -> Any:
    """The part of a configuration that is about text: all of it, but for models that see images too."""
    of_text = getattr(config, "get_text_config", None)
    return config if of_text is None else of_text()


def head_of(family: Family, model: Any, vocabulary: int) -> HeadOf:
    """How a model of the family makes logits of its last residual stream."""
    module = family.taps["lm_head"].module
    head = model.get_submodule(module)
    bias = getattr(head, "bias", None)
    config = text_of(model.config)
    cap = None if family.softcap is None else getattr(config, family.softcap, None)
    scale = 1.0 if family.logits_times is None else float(getattr(config, family.logits_times))
    scale /= 1.0 if family.logits_over is None else float(getattr(config, family.logits_over))
    return HeadOf(
        family.taps["final_norm"].module,
        f"{module}.weight",
        None if bias is None else f"{module}.bias",
        None if scale == 1 else scale,
        None if cap is None else float(cap),
        vocabulary,
        # One that keeps its matrix packed says how wide it is.
        getattr(head, "in_features", None) or head.weight.shape[-1],
    )
