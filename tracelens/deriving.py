"""Models at load: refuted sites are withheld; a type without a table gets the one that fits, as far as it is shown."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from tracelens.backends.architectures.lookup import may_derive
from tracelens.backends.architectures.registry import families, families_of
from tracelens.backends.base import Family, Side, text_of
from tracelens.errors import AttentionImplementationError, RefutedSitesWarning, TracelensError
from tracelens.ir.sites import KIND, Scope
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
    if not may_derive(getattr(model, "config", None)):
        return None
    best: tuple[Model, SiteProof, dict[str, str]] | None = None
    for family in _fitting(model):
        try:
            found = Model(model, tokenizer, _family=family)
            proof, closed = _proven(found)
            if not looks_back_only(found):
                return None  # whatever its modules are called
        except (TracelensError, RuntimeError, AttributeError, TypeError, KeyError):
            continue  # this is not its table, or it cannot be run like a language model
        if all(site in proof.verified for site in _NEEDED) and (
            best is None or len(proof.verified) > len(best[1].verified)
        ):
            best = found, proof, closed
    if best is None:
        return None
    found, proof, closed = best
    reasons = {**proof.refuted, **closed}
    # The language model in a larger one may have a table of its own, which says where the others are.
    for site in () if _of_its_text(model) is not None else proof.derived:
        reasons[site] = (
            f"{family_name(model)} models have no table of their own, and nothing shows that this is it"
        )
    found.anatomy.proof = proof
    found.anatomy.withhold(reasons)
    return found


def _proven(model: Model) -> tuple[SiteProof, dict[str, str]]:
    """What its table is worth, and why some sites were left out: those inside attention that nobody may look into."""
    try:
        return prove(model), {}
    except AttentionImplementationError as problem:
        taps = model.anatomy.family.taps
        closed = {site: problem.problem for site, tap in taps.items() if tap.side is Side.INSIDE}
        model.anatomy.withhold(closed)
        return prove(model), closed


def looks_back_only(model: Model) -> bool:
    """Are the logits of a text those that it has as the beginning of a longer one?"""
    vocabulary = model.anatomy.vocabulary
    tokens = [(7 * number + 11) % vocabulary for number in range(6)]
    found: list[Any] = []
    for prompt in (tokens, tokens[:3]):
        with model.trace([prompt]):
            logits = model.logits.save()
        found.append(logits.value[:, :3].double())
    return bool((found[0] - found[1]).abs().max() <= 1e-3 * found[1].abs().max())


def family_name(model: nn.Module) -> str:
    """What a type without a table is called."""
    return str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))


def _of_its_text(model: nn.Module) -> Family | None:
    """The table for the language model in a larger one, if its type has one."""
    config: Any = getattr(model, "config", None)
    text = text_of(config)
    kind = getattr(text, "model_type", None)
    if text is config or not isinstance(kind, str):
        return None
    return next((one for one in families_of(kind) if one.serves is None or one.serves(text)), None)


def _fitting(model: nn.Module) -> Iterator[Family]:
    """The tables whose modules the model has, under its own name; of equal ones the first."""
    config: Any = getattr(model, "config", None)
    if not hasattr(model, "get_output_embeddings") or config is None:
        return
    own = _of_its_text(model)
    if own is not None and own.refused(text_of(config)) is not None:
        return  # as it would be by itself
    known = {path for path, _ in model.named_modules()}
    seen: list[Family] = []
    for family in families() if own is None else (own,):
        if any(other.layers == family.layers and other.taps == family.taps for other in seen):
            continue
        seen.append(family)
        for outer, inner in _PLACES:
            moved = _moved(family, outer, inner)
            paths = {
                moved.taps[name].module for name in ("embed", "final_norm", "lm_head") if name in moved.taps
            }
            if paths <= known and moved.layers.format(0) in known:
                name = family_name(model)
                yield replace(
                    moved,
                    name=name,
                    model_types=(name,),
                    refusals={},
                    withheld={} if own is None else own.withheld,
                )


_PLACES = (
    ("", ""),
    ("model.", "model.language_model."),
    ("model.", "model.text_model."),
    ("", "language_model."),
)
"""Where models of text and images have the language model: in their ``model``, beside the head; whole, as Llama-4."""


def _moved(family: Family, outer: str, inner: str) -> Family:
    """A table whose modules are those of the language model in a larger one."""

    def path(own: str) -> str:
        # "" is the whole model, whose output the logits are.
        return inner + own.removeprefix(outer) if own and own.startswith(outer) else own

    taps = {
        name: tap if KIND[name].scope is Scope.LAYER else replace(tap, module=path(tap.module))
        for name, tap in family.taps.items()
    }
    embedding = None if family.embedding is None else path(family.embedding)
    return replace(family, layers=path(family.layers), taps=taps, embedding=embedding)
