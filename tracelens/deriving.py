"""Models at load: refuted sites are withheld; a type without a table gets the one that fits, as far as it is shown."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from tracelens.backends.architectures.registry import families
from tracelens.backends.base import Family
from tracelens.errors import RefutedSitesWarning, TracelensError
from tracelens.model import Model
from tracelens.proving import SiteProof, proof_of, prove

_NEEDED = ("resid_pre", "resid_post", "final_norm", "lm_head", "logits")
"""Without these a table says nothing of a model; and a lens needs to know what becomes of the last stream."""


def held_to(model: Model) -> None:
    """Withholds the sites of a model that are not what they are called, and warns of them."""
    proof = proof_of(model)
    model.anatomy.proof = proof
    if proof.refuted:
        model.anatomy.withhold(proof.refuted)
        told = "; ".join(f"{site}: {why}" for site, why in proof.refuted.items())
        warnings.warn(
            RefutedSitesWarning(f"these sites of {model.describe()} are refused, and no others: {told}"),
            stacklevel=3,
        )


def derived(model: nn.Module, tokenizer: Any) -> Model | None:
    """A language model of a type without a table, with the sites of a known table that are verified in it."""
    best: tuple[Model, SiteProof] | None = None
    for family in _fitting(model):
        try:
            found = Model(model, tokenizer, _family=family)
            proof = prove(found)
        except (TracelensError, RuntimeError, AttributeError, TypeError, KeyError):
            continue  # this is not its table, or it cannot be run like a language model
        if all(site in proof.verified for site in _NEEDED) and (
            best is None or len(proof.verified) > len(best[1].verified)
        ):
            best = found, proof
    if best is None:
        return None
    found, proof = best
    reasons = dict(proof.refuted)
    for site in proof.derived:
        reasons[site] = (
            f"{family_name(model)} models have no table of their own, and nothing shows that this is it"
        )
    found.anatomy.proof = proof
    found.anatomy.withhold(reasons)
    return found


def family_name(model: nn.Module) -> str:
    """What a type without a table is called."""
    return str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))


def _fitting(model: nn.Module) -> Iterator[Family]:
    """The tables whose modules the model has, under its own name; of equal ones the first."""
    if not hasattr(model, "get_output_embeddings") or getattr(model, "config", None) is None:
        return
    seen: list[Family] = []
    for family in families():
        if any(other.layers == family.layers and other.taps == family.taps for other in seen):
            continue
        seen.append(family)
        paths = {
            tap.module for name, tap in family.taps.items() if name in ("embed", "final_norm", "lm_head")
        }
        known = {path for path, _ in model.named_modules()}
        if paths <= known and family.layers.format(0) in known:
            yield replace(
                family, name=family_name(model), model_types=(family_name(model),), refusals={}, withheld={}
            )
