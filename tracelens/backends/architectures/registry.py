"""All tables that this process knows: tracelens's own, those that were registered, those of installed packages."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from tracelens.backends.architectures import FAMILIES, FAMILIES_OF
from tracelens.backends.base import Family
from tracelens.backends.table_rules import require_complete
from tracelens.errors import FamilyImportError, FamilyKnownError, UnknownArchitectureError

GROUP = "tracelens.families"
"""The entry points by which an installed package brings tables: ``model_type = "module:NAME"``."""
OWN = "tracelens"

_registered: dict[str, tuple[Family, ...]] = {}
_names: dict[int, str] = {}
"""By the identity of a table, which :data:`_registered` keeps alive: the name by which other processes import it."""


def families() -> tuple[Family, ...]:
    """All tables that are loaded, of which the later ones were registered."""
    added = {id(each): each for found in _registered.values() for each in found}
    return (*FAMILIES, *added.values())


def families_of(model_type: str) -> tuple[Family, ...]:
    """The tables for a type of models: what was registered, else tracelens's own, else an installed package's."""
    found = _registered.get(model_type) or FAMILIES_OF.get(model_type, ())
    if found:
        return found
    package = _package(model_type)
    if package is None:
        return ()
    brought = imported(package.value)
    for each in brought:
        require_complete(each)
        if model_type not in each.model_types:
            raise FamilyImportError(
                f"{package.value}, which {_whose(package)} names for models of type {model_type!r}, serves "
                + ", ".join(map(repr, each.model_types))
            )
    _registered[model_type] = brought
    _names.update((id(each), package.value) for each in brought)
    return brought


def sources() -> dict[str, str]:
    """By model type: whose table serves it. Of installed packages nothing is imported for this."""
    found = dict.fromkeys(FAMILIES_OF, OWN)
    for name, points in _packages().items():
        found.setdefault(name, " and ".join(point.value for point in points))
    registered = {
        name: _names.get(id(families[0]), "registered here") for name, families in _registered.items()
    }
    return {**found, **registered}


def add(given: Iterable[Family | str], *, replace: bool) -> None:
    """Registers tables; nothing is registered if one of them cannot be."""
    new: dict[str, list[Family]] = {}
    names: dict[int, str] = {}
    for each in given:
        for family in imported(each) if isinstance(each, str) else (each,):
            require_complete(family)
            if isinstance(each, str):
                names[id(family)] = each
            for model_type in family.model_types:
                new.setdefault(model_type, []).append(family)
    known = {} if replace else sources()
    for model_type in new:
        if model_type in known:
            raise FamilyKnownError(
                f"models of type {model_type!r} have a table already ({known[model_type]})",
                instead="tl.families.register(family, replace=True), where yours is to serve them",
            )
    _registered.update({model_type: tuple(tables) for model_type, tables in new.items()})
    _names.update(names)


def remove(model_type: str) -> bool:
    """Forgets what was registered for a type of models; was there anything?"""
    return _registered.pop(model_type, None) is not None


def imported(name: str) -> tuple[Family, ...]:
    """The tables that a name means: ``"module:NAME"``, of one table or several."""
    module, colon, attribute = name.partition(":")
    if not colon or not all(word.isidentifier() for word in (*module.split("."), attribute)):
        raise FamilyImportError(
            f"{name!r} does not name a table that can be imported",
            instead='"my_families:STARCODER2", for STARCODER2 = tl.families.Family(...) in my_families.py',
        )
    try:
        found: Any = getattr(import_module(module), attribute)
    except Exception as error:  # whatever somebody's module raises
        raise FamilyImportError(
            f"the table {name!r} could not be imported: {error!r}",
            instead="a module beside the script, or one that is installed",
        ) from error
    tables = tuple(found) if isinstance(found, list | tuple) else (found,)
    if not tables or not all(isinstance(each, Family) for each in tables):
        raise FamilyImportError(f"{name!r} is a {type(found).__name__}, and no tl.families.Family")
    return tables


@cache
def _packages() -> Mapping[str, tuple[EntryPoint, ...]]:
    found: dict[str, tuple[EntryPoint, ...]] = {}
    for point in entry_points(group=GROUP):
        found[point.name] = (*found.get(point.name, ()), point)
    return found


def _package(model_type: str) -> EntryPoint | None:
    found = _packages().get(model_type, ())
    if len({point.value for point in found}) > 1:
        raise FamilyKnownError(
            f"models of type {model_type!r} have tables of several packages: "
            + ", ".join(f"{point.value} of {_whose(point)}" for point in found),
            instead=f'tl.families.register("{found[0].value}"), which chooses one',
        )
    return found[0] if found else None


def _whose(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "an installed package"


# --- the same table in another process -----------------------------------------------------------------------------


def told(model_type: str) -> list[list[str]]:
    """The names and fingerprints of tables that another process has to know, for models of a type.

    Raises :class:`UnknownArchitectureError` where a table has no name by which that process could import it.
    """
    if model_type not in _registered:
        return []
    found = _registered[model_type]
    nameless = [each for each in found if id(each) not in _names]
    if nameless:
        raise UnknownArchitectureError(
            f"the table {nameless[0].name!r} was registered as an object of this process, and ranks are others",
            instead='tl.families.register("my_families:TABLE"), a name that every rank can import',
        )
    return [[name, fingerprint(imported(name))] for name in dict.fromkeys(_names[id(each)] for each in found)]


def learn(tables: Iterable[Iterable[str]]) -> None:
    """Registers what another process has told; :class:`UnknownArchitectureError` where it is not the same here."""
    for name, theirs in tables:
        if fingerprint(imported(name)) != theirs:
            raise UnknownArchitectureError(
                f"{name!r} is one table on this rank and another in the process that owns it",
                instead="model.close() and new ranks, once the module has changed",
            )
        add([name], replace=True)


def fingerprint(families: Any) -> str:
    """What two tables have in common that say the same, in this process and in others."""
    return hashlib.sha256(repr(_plain(families)).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """A table without what differs between processes: functions are their names and their code."""
    if isinstance(value, Enum):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return type(value).__name__, [
            (each.name, _plain(getattr(value, each.name))) for each in fields(value)
        ]
    if isinstance(value, Mapping):
        return sorted((str(key), _plain(each)) for key, each in value.items())
    if isinstance(value, tuple | list | frozenset):
        return [_plain(each) for each in value]
    if isinstance(value, Callable):
        code: Any = getattr(value, "__code__", None)
        own = None if code is None else (code.co_code.hex(), repr(code.co_names))
        return getattr(value, "__module__", ""), getattr(value, "__qualname__", type(value).__name__), own
    return value


__all__ = ["add", "families", "families_of", "fingerprint", "imported", "learn", "remove", "sources", "told"]
