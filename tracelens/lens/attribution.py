"""Direct logit attribution: which components write a logit, `model.logit_attribution`.

With the scale of the final norm held at what it was, the logit is linear in the residual stream, and the stream is the
sum of what the embedding, the heads and the MLPs added to it. So each has its part, the parts sum to the logit, and
nothing is estimated (Elhage et al. 2021; "direct logit attribution" after Wang et al. 2022, Lieberum et al. 2023).

Everything that meets a weight is computed where the layer is. The direction of the logit goes to the layers before the
pass, [rows, d_model]; one number for each head and MLP comes back.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from tracelens.errors import Blaming, OptionError
from tracelens.handles import LayersSlice
from tracelens.ir.sites import Site
from tracelens.lens.contributions import Kind, LogitAttribution, LogitAttributions, Part
from tracelens.lens.directions import Directions, directions_of
from tracelens.lens.frozen_norm import FrozenNorm
from tracelens.lens.summing import require_sums
from tracelens.location import here
from tracelens.mapped import MappedValue

if TYPE_CHECKING:
    from tracelens.model import Model


@overload
def logit_attribution(
    self: Model,
    prompt: str,
    token: Any = None,
    *,
    against: Any = None,
    position: int = -1,
    neurons: Any = None,
    batch_size: int | None = None,
    max_extra_memory: int | str | None = None,
) -> LogitAttribution: ...
@overload
def logit_attribution(
    self: Model,
    prompt: list[str],
    token: Any = None,
    *,
    against: Any = None,
    position: int = -1,
    neurons: Any = None,
    batch_size: int | None = None,
    max_extra_memory: int | str | None = None,
) -> LogitAttributions: ...
@overload
def logit_attribution(
    self: Model,
    prompt: Any,
    token: Any = None,
    *,
    against: Any = None,
    position: int = -1,
    neurons: Any = None,
    batch_size: int | None = None,
    max_extra_memory: int | str | None = None,
) -> Any: ...
def logit_attribution(
    self: Model,
    prompt: Any,
    token: Any = None,
    *,
    against: Any = None,
    position: int = -1,
    neurons: Any = None,
    batch_size: int | None = None,
    max_extra_memory: int | str | None = None,
) -> LogitAttribution | LogitAttributions:
    """Who contributes how much to a token's logit: the embedding, each attention head, each MLP.

    ``prompt``: as for :meth:`trace`; a list of prompts gives :class:`~tracelens.LogitAttributions`, a sequence with one
    :class:`~tracelens.LogitAttribution` for each. ``token``: a text that is one token (mind its space: ``" Paris"``) or
    an id, or a list with one for each prompt; without it, the token that the model finds most likely. ``against``: the
    logit of this token is taken away, of several their mean; a list of lists has those of each prompt. ``position``:
    whose next token it is, counted in real tokens as ``.tok`` counts. ``neurons``: layers whose MLP is told neuron by
    neuron, as a number, a list, or ``"all"``. ``batch_size``, ``max_extra_memory``: as for :meth:`trace`.

    The contributions, with biases as rows of their own, sum to the logit, with the scale of the final norm (and of
    norms between a sublayer and the stream) frozen at what it was. They are in logits before a soft-cap, and computed
    in float32, in a float64 model in float64. One forward pass; without ``token`` two.

    >>> found = model.logit_attribution("The capital of France is", " Paris", against=" Rome")   # doctest: +SKIP
    >>> found.top(3)                                                                             # doctest: +SKIP
    >>> found.heads.shape                                                                        # doctest: +SKIP
    torch.Size([30, 9])

    Raises :class:`~tracelens.errors.DecompositionError` where the parts do not sum to what the model computes (a norm
    of another kind, a hook that adds to the stream, packed weights), :class:`~tracelens.errors.TokenMatchError`
    for a text that is not one token, :class:`~tracelens.errors.OptionError` for what is no token,
    :class:`~tracelens.errors.TokenRangeError` and :class:`~tracelens.errors.RaggedSelectionError` for a position that a
    prompt lacks, and :class:`~tracelens.errors.AbsentSiteError` for neurons of a mixture of experts.
    """
    with Blaming(here()):
        prepared = self.prepare(prompt)
        rows = prepared.sizes["B"]
        several = rows != 1 or (
            isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], str | list)
        )
        listed, position = _layers(self, neurons), _position(position)
        options: dict[str, Any] = {"batch_size": batch_size, "max_extra_memory": max_extra_memory}
        if token is None:
            with self.trace(prepared, **options) as likely:
                self.logits.tok[position].argmax(-1).save("likely")
            token = likely["likely"].tolist()
        directions = directions_of(self, token, against, rows)
        work = torch.float64 if self.anatomy.dtype is torch.float64 else torch.float32
        with self.trace(prepared, **options) as t:
            where = _Recording(self, directions, position, work).record(listed)
        found = {name: tensor.double() for name, tensor in t.results.items()}
        lengths, tokens = prepared.lengths, self.tokens(prepared)
        attributions: list[LogitAttribution] = []
        for row in range(rows):
            weights = directions.coefficients[row if len(directions.coefficients) > 1 else 0]
            own = _Row(found, where, row)
            parts = own.parts(self.n_layers, weights)
            logit = (weights * own("raw")).sum().item()
            require_sums(self, own, parts, weights, logit)
            total = sum(part.values.sum().item() for part in parts)
            at = position % lengths[row]
            one, others = directions.of(row)
            attributions.append(
                LogitAttribution(
                    model=self.describe(),
                    position=at,
                    at=tokens[row][at].shown or f"<{tokens[row][at].id}>",
                    token=one,
                    against=others,
                    spelt={id_: directions.spelt[id_] for id_ in (one, *others)},
                    logit=logit,
                    returned=(weights * own("returned")).sum().item(),
                    scale=own("scale").item(),
                    parts=(
                        *parts,
                        Part("rounding", None, torch.tensor([logit - total], dtype=torch.float64)),
                    ),
                )
            )
    return LogitAttributions(tuple(attributions)) if several else attributions[0]


def _layers(model: Model, neurons: Any) -> tuple[int, ...]:
    """The layers whose neurons are asked for, in order."""
    if neurons is None or (isinstance(neurons, list | tuple) and not neurons):
        return ()
    key: Any = slice(None) if isinstance(neurons, str) and neurons == "all" else neurons
    chosen: Any = model.layers[key]
    handles = tuple(chosen) if isinstance(chosen, LayersSlice) else (chosen,)
    return tuple(number for number in range(model.n_layers) if model.layers[number] in handles)


def _position(position: Any) -> int:
    try:
        if isinstance(position, bool):
            raise TypeError
        return operator.index(position)
    except TypeError:
        raise OptionError(
            f"position={position!r} is no number of a token",
            instead="position=-1, the last token, whose next one the logit is of",
        ) from None


# --- what is recorded ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Recording:
    """Writes down, in an open block of the model, every part of the logit and what it takes to check them."""

    model: Model
    directions: Directions
    position: int
    work: torch.dtype

    def record(self, neurons: tuple[int, ...]) -> Mapping[str, tuple[int, ...]]:
        """Returns the layers of what is saved layer by layer, by name."""
        model, ids = self.model, self.directions.ids
        anatomy = model.anatomy
        unembedding = self.wide(model.unembed[ids])
        wanted = self.directions.coefficients.to(self.work) @ unembedding  # [rows or 1, D]
        norm = FrozenNorm.of(model, anatomy.head.norm, self.work)
        direction = norm.pulled_back(wanted)
        self.part("embed", self.here(model.embed), direction)
        if anatomy.has(Site("pos_embed")):
            self.part("pos_embed", self.here(model.pos_embed), direction)
        saved: dict[str, dict[int, Any]] = {}
        for layer in range(model.n_layers):
            for name, value in self.layer(layer, direction, neurons=layer in neurons).items():
                saved.setdefault(name, {})[layer] = value
        for name, values in saved.items():
            MappedValue(tuple(values), tuple(values.values())).save(name)
        end, normed = self.here(model.layers[-1].resid_post), self.here(model.final_norm)
        self.part("end", end, direction)
        scale, misfit = norm.scale(end, normed)
        scale.save("scale")
        misfit.save("final_norm misfit")
        if norm.bias is not None:
            (norm.bias * wanted).sum(-1).save("final_norm_bias")
        if anatomy.head.bias is not None:
            self.wide(model.param(anatomy.head.bias)[ids]).save("unembed_bias")
        model.lm_head.tok[self.position][:, ids].save("raw")
        model.logits.tok[self.position][:, ids].save("returned")
        return {name: tuple(values) for name, values in saved.items()}

    def layer(self, number: int, direction: Any, *, neurons: bool) -> dict[str, Any]:
        """The parts of one layer: of each head [B, H], of both sublayers, and on request of each neuron [B, M]."""
        model, layer = self.model, self.model.layers[number]
        heads, width = model.anatomy.widths["H"], model.anatomy.widths["d"]
        found: dict[str, Any] = {}
        added = self.here(layer.attn_add)
        found["attention"], found["attention size"] = _part(added, direction)
        if model.anatomy.has(Site("z", number)):
            z = self.here(layer.z)
            inner = self.inside(number, ("z", "attn_out", "attn_post_norm", "attn_add"), direction, found)
            parts = (z * inner.towards.reshape(-1, heads, width)).sum(-1)
            found["heads"] = parts if inner.scale is None else parts * inner.scale[:, None]
            if inner.bias is not None:
                found["attn_bias"] = inner.bias
        found["mlp"], found["mlp size"] = _part(self.here(layer.mlp_add), direction)
        if neurons:
            neuron = self.here(layer.mlp_act)  # refuses layers without neurons by name
            inner = self.inside(number, ("mlp_act", "mlp_out", "mlp_post_norm", "mlp_add"), direction, found)
            parts = neuron * inner.towards
            found["neurons"] = parts if inner.scale is None else parts * inner.scale[:, None]
            if inner.bias is not None:
                found["mlp_bias"] = inner.bias
        return found

    def inside(
        self, number: int, sites: tuple[str, str, str, str], direction: Any, found: dict[str, Any]
    ) -> _Inside:
        """The direction as a sublayer's last projection reads it, through the norm or factor after it, if any."""
        model, (read, made, normed, added) = self.model, sites
        factor = model.anatomy.factor(model.anatomy.family.taps[added])
        direction = direction if factor == 1 else direction * factor
        layer, path = model.layers[number], self.path(read, number)
        scale = constant = None
        if model.anatomy.has(Site(normed, number)):
            norm = FrozenNorm.of(model, self.path(normed, number), self.work)
            scale, misfit = norm.scale(self.here(getattr(layer, made)), self.here(getattr(layer, normed)))
            found[f"{normed} misfit"] = misfit
            if norm.bias is not None:
                constant = (norm.bias * direction).sum(-1)
            direction = norm.pulled_back(direction)
        bias = self.bias(path)
        if bias is not None:
            own = (self.wide(bias) * direction).sum(-1)
            own = own if scale is None else own * scale
            constant = own if constant is None else own + constant
        weight = self.wide(model.param(f"{path}.weight"))
        towards = direction @ (weight if model.anatomy.family.out_by_in else weight.T)
        return _Inside(towards, scale, constant)

    def part(self, name: str, value: Any, direction: Any) -> None:
        own, size = _part(value, direction)
        own.save(name)
        size.save(f"{name} size")

    def here(self, site: Any) -> Any:
        """A site at the position, in the dtype that is computed in."""
        return self.wide(site.tok[self.position])

    def wide(self, value: Any) -> Any:
        return value if value.dtype is self.work else value.to(self.work)

    def path(self, site: str, layer: int | None = None) -> str:
        """The path of the module that shows a site."""
        anatomy = self.model.anatomy
        return anatomy.module_path(anatomy.family.taps[site], layer)

    def bias(self, path: str) -> Any:
        """The bias of a module, if it has one."""
        own = getattr(self.model.hf.get_submodule(path), "bias", None)
        return self.model.param(f"{path}.bias") if isinstance(own, Tensor) else None


@dataclass(frozen=True)
class _Inside:
    """What a sublayer's last projection makes of a direction, [.., n]; the scale behind it; what it adds anyway."""

    towards: Any
    scale: Any | None
    bias: Any | None


def _part(value: Any, direction: Any) -> tuple[Any, Any]:
    """The part along a direction, and how large the numbers are that it is the sum of."""
    products = value * direction
    return products.sum(-1), products.abs().sum(-1)


# --- what came back --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """What one prompt of a batch has of what was saved."""

    found: Mapping[str, Tensor]
    where: Mapping[str, tuple[int, ...]]
    row: int

    def __call__(self, name: str) -> Tensor:
        """One number, or as many as tokens; for what is saved layer by layer with them as the first axis."""
        tensor = self.found[name]
        axis = 1 if name in self.where else 0
        # What no prompt has a part in was computed once for all.
        return tensor.select(axis, self.row if tensor.shape[axis] > 1 else 0)

    def layers(self, name: str) -> tuple[int, ...]:
        """The layers that have something, in the order of its first axis."""
        return self.where.get(name, ())

    def has(self, name: str) -> bool:
        return name in self.found

    def parts(self, layers: int, weights: Tensor) -> list[Part]:
        """The contributions in the order of the forward pass, with the scale of the final norm."""
        scale = self("scale")
        found: list[Part] = []

        def add(kind: Kind, layer: int | None, values: Tensor) -> None:
            found.append(Part(kind, layer, values.reshape(-1)))

        def add_of(kind: Kind, layer: int, name: str) -> None:
            if layer in self.layers(name):
                add(kind, layer, self(name)[self.layers(name).index(layer)] * scale)

        add("embed", None, self("embed") * scale)
        if self.has("pos_embed"):
            add("pos_embed", None, self("pos_embed") * scale)
        for layer in range(layers):
            if layer in self.layers("heads"):
                add_of("head", layer, "heads")
            else:
                add_of("attention", layer, "attention")
            add_of("attn_bias", layer, "attn_bias")
            if layer in self.layers("neurons"):
                add_of("neuron", layer, "neurons")
                add_of("mlp_bias", layer, "mlp_bias")
            else:
                add_of("mlp", layer, "mlp")
        if self.has("final_norm_bias"):
            add("final_norm_bias", None, self("final_norm_bias"))
        if self.has("unembed_bias"):
            add("unembed_bias", None, (weights * self.found["unembed_bias"]).sum())
        return found
