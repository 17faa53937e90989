"""Do the parts of a logit sum to what the model computed?  If not, nobody gets to see them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from tracelens.errors import DecompositionError
from tracelens.ir.sites import Site

if TYPE_CHECKING:
    from tracelens.lens.contributions import Part
    from tracelens.model import Model


class Found(Protocol):
    """What one prompt has of what a run saved for its attribution, by name."""

    def __call__(self, name: str) -> Tensor: ...
    def has(self, name: str) -> bool: ...
    def layers(self, name: str) -> tuple[int, ...]: ...


def tolerance(dtype: torch.dtype) -> float:
    """How much rounding may leave, relative to the numbers that are summed: 1e-4, in bfloat16 and float16 4 roundings.

    Streams are summed in the model's dtype, and contributions are not.
    """
    return max(1e-4, 4 * torch.finfo(dtype).eps)


OF_ATTENTION = ("head", "attention", "attn_bias")
"""The kinds of parts that attention adds, by layer."""


def require_sums(model: Model, own: Found, parts: list[Part], weights: Tensor, logit: float) -> None:
    """Raises :class:`DecompositionError` that says which sum of the model is another than that of its parts."""
    allowed, scale = tolerance(model.anatomy.dtype), own("scale")
    for site in ("attn_post_norm", "mlp_post_norm"):
        name = f"{site} misfit"
        for layer, misfit in zip(own.layers(name), own(name) if own.has(name) else (), strict=True):
            _require_fit(str(Site(site, layer)), misfit.item(), allowed)
    _require_fit("final_norm", own("final_norm misfit").item(), allowed)
    before = ["embed", "pos_embed"] if own.has("pos_embed") else ["embed"]
    size = sum(own(f"{name} size") for name in before) + own("attention size").sum() + own("mlp size").sum()
    size = (size * scale).abs() + (weights.abs() * own("raw").abs()).sum()
    allowed = (allowed * size).item()
    in_layer = [[part for part in parts if part.layer == layer] for layer in range(model.n_layers)]
    for layer, there in enumerate(in_layer):
        of_attention = _sum([part for part in there if part.kind in OF_ATTENTION])
        _require_sum(
            f"the heads of layer {layer} and the bias behind them",
            of_attention,
            own("attention")[layer] * scale,
            allowed,
        )
        of_mlp = _sum([part for part in there if part.kind not in OF_ATTENTION])
        _require_sum(
            f"the neurons of layer {layer} and the bias behind them",
            of_mlp,
            own("mlp")[layer] * scale,
            allowed,
        )
    stream = sum(own(name) for name in before) + own("attention").sum() + own("mlp").sum()
    _require_sum("what the layers add to the residual stream", stream * scale, own("end") * scale, allowed)
    after = _sum([part for part in parts if part.kind in ("final_norm_bias", "unembed_bias")])
    _require_sum(
        "the final norm and the unembedding", own("end") * scale + after, torch.tensor(logit), allowed
    )


def _sum(parts: list[Part]) -> Tensor:
    return torch.stack([part.values.sum() for part in parts]).sum() if parts else torch.zeros(()).double()


def _require_fit(site: str, misfit: float, allowed: float) -> None:
    if not misfit <= allowed:
        raise DecompositionError(
            f"the norm that makes {site} does more than scale and weigh what it receives: with its scale frozen it "
            f"misses what it returned by {misfit:.2g} of its length, so what goes in has no share of what comes out",
            instead="tl.grad(logit, site), whose products with the site are a first-order estimate",
        )


def _require_sum(what: str, parts: Tensor, whole: Tensor, allowed: float) -> None:
    error = abs((parts - whole).item())
    if not error <= allowed:
        raise DecompositionError(
            f"{what} should sum to {whole.item():+.4f} logits, and {parts.item():+.4f} was found: something takes part "
            f"that is no embedding, head or MLP (rounding may leave {allowed:.2g})",
            instead="the model without hooks of your own, or with its weights in a floating dtype",
        )
