"""Which table serves a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from tracelens.backends.architectures.others import other, sentence
from tracelens.backends.architectures.registry import families_of
from tracelens.backends.base import Family, text_of
from tracelens.errors import LayoutError, UnknownArchitectureError


def family_of(config: Any) -> Family:
    """The table for a model's configuration; :class:`UnknownArchitectureError` where there is none."""
    kind = getattr(config, "model_type", None)
    known = families_of(kind) if isinstance(kind, str) else ()
    words = text_of(config) if known else config
    family = next((one for one in known if one.serves is None or one.serves(words)), None)
    if family is None:
        raise UnknownArchitectureError(
            sentence(config) if isinstance(kind, str) else f"a {type(config).__name__} says no model_type",
            instead="tl.families.known() lists the types that have one, and tl.families.register(...) adds one",
        )
    reason = family.refused(words)
    if reason is not None:
        raise UnknownArchitectureError(f"this {family.name} model cannot be served: {reason}")
    return family


def require_shareable(family: Family, **ways: bool) -> None:
    """Raises :class:`LayoutError` where transformers has a plan by which it spreads such a model, but a wrong one."""
    for way, used in ways.items():
        if used and way in family.not_on_ranks:
            raise LayoutError(
                f"transformers computes something else of {family.name} models with {way}=: {family.not_on_ranks[way]}",
                instead='tl.load(name, device_map="auto"), which spreads the layers over devices',
            )


def no_table(model: object) -> str | None:
    """Why no table of sites serves a module, if none does: only its modules can be named then."""
    if not isinstance(model, nn.Module):
        return None
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if isinstance(kind, str):
        return None if families_of(kind) else sentence(model.config)
    return "it is no language model of transformers"


def may_derive(config: Any) -> bool:
    """May tables of other families be tried on a model of this configuration?"""
    return other(config).derives


def require_loadable(config: Any, name: str) -> None:
    """Raises :class:`UnknownArchitectureError` for a model that does not go on with a text, before it is loaded."""
    kind = getattr(config, "model_type", None)
    if isinstance(kind, str) and not families_of(kind) and (loads := other(config).loads) is not None:
        raise UnknownArchitectureError(
            sentence(config),
            instead=f"tl.wrap(transformers.{loads}.from_pretrained({name!r})), whose modules are there by path: "
            "model.module(path).output",
        )


def require_table(config: Any, name: str) -> None:
    """Raises :class:`UnknownArchitectureError` for a model that ranks cannot have: each of them needs its table."""
    require_loadable(config, name)
    kind = getattr(config, "model_type", None)
    if isinstance(kind, str) and not families_of(kind):
        raise UnknownArchitectureError(
            sentence(config),
            instead=f"tl.load({name!r}) in this process; or tl.families.register(...) with a table that ranks import",
        )
