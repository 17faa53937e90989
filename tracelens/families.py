"""``tl.families``: tables of families of models, and how to add one for models that have none.

A table says for each site where a family's modules show it, or why they do not. tracelens brings tables for some
families; one of yours is registered by :func:`register`, or by installing a package with an entry point:

    [project.entry-points."tracelens.families"]
    starcoder2 = "my_package.tables:STARCODER2"

which is imported when a model of that type is loaded.

>>> import tracelens as tl
>>> tl.families.known()["llama"]
'tracelens'
>>> tl.families.table("llama").taps["resid_mid"].module
'post_attention_layernorm'
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from tracelens.backends.architectures import registry
from tracelens.backends.architectures.absences import (
    NO_EXPERTS,
    NO_GATE,
    NO_POSITION_EMBEDDING,
    NO_POST_NORMS,
    NO_QK_NORMS,
    NO_ROTATION,
    PARALLEL,
)
from tracelens.backends.base import (
    Family,
    HeadsView,
    InSome,
    NeuronsView,
    RowsView,
    ScaledView,
    Side,
    Tap,
    Word,
)
from tracelens.errors import Blaming, UnknownArchitectureError
from tracelens.location import here
from tracelens.plan import Carry

__all__ = [
    "NO_EXPERTS",
    "NO_GATE",
    "NO_POSITION_EMBEDDING",
    "NO_POST_NORMS",
    "NO_QK_NORMS",
    "NO_ROTATION",
    "PARALLEL",
    "Carry",
    "Family",
    "HeadsView",
    "InSome",
    "NeuronsView",
    "RowsView",
    "ScaledView",
    "Side",
    "Tap",
    "Word",
    "forget",
    "known",
    "register",
    "table",
]


def register(*families: Family | str, replace: bool = False) -> None:
    """Adds tables of families of models, so that ``tl.load`` and ``tl.wrap`` know their sites.

    ``families``: tables, or names of tables in modules, ``"my_families:STARCODER2"``. A name is what ranks need
    (``tl.load(tp=2)``): they are other processes, and import it. Several tables for one type of models are given
    together, each with a ``serves`` of its own. ``replace``: they serve types of models that have a table.

    What a table says is held to each model at load, as for those of tracelens (:meth:`Model.check_sites`).

    Raises :class:`~tracelens.errors.FamilyTableError` for a table that does not say of every site where it is or why
    it is absent, :class:`~tracelens.errors.FamilyKnownError` where a type of models has a table already, and
    :class:`~tracelens.errors.FamilyImportError` for a name that cannot be imported. Then nothing is registered.
    """
    with Blaming(here()):
        registry.add(families, replace=replace)


def forget(model_type: str) -> None:
    """Takes back what :func:`register` did for a type of models; models that are loaded keep their tables.

    Raises :class:`~tracelens.errors.UnknownArchitectureError` where nothing was registered for it.
    """
    if not registry.remove(model_type):
        raise UnknownArchitectureError(
            f"no table was registered for models of type {model_type!r}", at=here()
        )


def known() -> Mapping[str, str]:
    """By type of models (``config.model_type``): whose table serves it.

    That is ``"tracelens"``, the name by which a table is imported from a module or package, or ``"registered here"``.
    """
    return MappingProxyType(dict(sorted(registry.sources().items())))


def table(model_type: str) -> Family:
    """The table for a type of models, to read or to make another one of, with ``dataclasses.replace``.

    Of several it is the first; all of them are asked by a model's configuration. Raises
    :class:`~tracelens.errors.UnknownArchitectureError` where there is none.
    """
    with Blaming(here()):
        found = registry.families_of(model_type)
        if not found:
            raise UnknownArchitectureError(
                f"there is no site table for models of type {model_type!r}",
                instead="one of " + ", ".join(known()),
            )
    return found[0]
