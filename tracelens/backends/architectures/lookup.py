"""Which table serves a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from tracelens.backends.architectures.registry import families_of
from tracelens.backends.base import Family, text_of
from tracelens.errors import UnknownArchitectureError


def family_of(config: Any) -> Family:
    """The table for a model's configuration; :class:`UnknownArchitectureError` where there is none."""
    kind = getattr(config, "model_type", None)
    known = families_of(kind) if isinstance(kind, str) else ()
    words = text_of(config) if known else config
    family = next((one for one in known if one.serves is None or one.serves(words)), None)
    if family is None:
        raise UnknownArchitectureError(
            f"there is no site table for models of type {kind!r}",
            instead="tl.families.known() lists the types that have one, and tl.families.register(...) adds one",
        )
    reason = family.refused(words)
    if reason is not None:
        raise UnknownArchitectureError(f"this {family.name} model cannot be served: {reason}")
    return family


def no_table(model: object) -> str | None:
    """Why no table of sites serves a module, if none does: only its modules can be named then."""
    if not isinstance(model, nn.Module):
        return None
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if isinstance(kind, str):
        return None if families_of(kind) else f"there is no site table for models of type {kind!r}"
    return "it is no language model of transformers"
