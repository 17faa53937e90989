"""Remembered answers: keys that keep apart what Python takes for equal, and cost little to look up."""

from __future__ import annotations

import math
from typing import cast

from tracelens.ir.abstract import AbstractArg, AbstractKwargs
from tracelens.ir.types import TensorType

Key = tuple[object, ...]

# How many type objects are known by identity. Indexing and capturing make new ones in every trace, so they must not
# pile up; forgetting them costs one look-up by content each.
_LIMIT = 2048


class _Token:
    """Stands for a type in a key: compared and hashed by identity, which is ten times cheaper than by content."""

    __slots__ = ()


_TRUE, _FALSE, _NUMBER, _NAN = (_Token() for _ in range(4))
_by_type: dict[TensorType, _Token] = {}
# By the identity of the type object; the object is kept alive beside its token, so that no other can take its place.
_by_identity: dict[int, tuple[_Token, TensorType]] = {}


def _token(type_: TensorType) -> _Token:
    known = _by_identity.get(id(type_))
    if known is not None:
        return known[0]
    if len(_by_identity) > _LIMIT:
        _by_identity.clear()
    token = _by_type.setdefault(type_, _Token())
    _by_identity[id(type_)] = (token, type_)
    return token


def _entry(arg: AbstractArg, any_number: bool) -> object:
    kind = type(arg)
    if kind is TensorType:
        return _token(cast("TensorType", arg))
    if kind is bool:
        return _TRUE if arg else _FALSE
    if kind is float:
        if any_number and math.isfinite(cast("float", arg)):
            return _NUMBER
        return _NAN if math.isnan(cast("float", arg)) else (float, arg)
    if kind is complex:
        return (complex, repr(arg))
    if kind is tuple:
        return tuple([_entry(part, any_number) for part in cast("tuple[AbstractArg, ...]", arg)])
    return arg


def key_of(name: str, args: tuple[AbstractArg, ...], kwargs: AbstractKwargs, any_number: bool) -> Key:
    """The key of a call; ``any_number``: the result's type does not depend on what the floats in it are."""
    entries: list[object] = [name]
    for arg in args:
        entries.append(_token(arg) if type(arg) is TensorType else _entry(arg, any_number))
    for keyword, value in kwargs:
        entries.append((keyword, _entry(value, any_number)))
    return tuple(entries)


def forget() -> None:
    _by_identity.clear()
    _by_type.clear()
