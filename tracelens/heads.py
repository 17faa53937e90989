"""Heads by number: ``model.layers[8].head(3).z``, ``model.layers[2:5].head([1, 4]).pattern``."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, Protocol, cast

import torch

from tracelens.errors import HeadRangeError, SharedHeadError, UnknownSiteError, WriteTargetError
from tracelens.ir.ops import WHOLE, IndexItem, Ref, Slice
from tracelens.ir.sites import CANONICAL, KIND, LAYER_KINDS, near
from tracelens.location import here
from tracelens.mapped import MappedValue, each_layer
from tracelens.values import Value

_PER_QUERY_HEAD = {kind.name: kind.shape.index("H") for kind in LAYER_KINDS if "H" in kind.shape}
_PER_KV_HEAD = {kind.name: kind.shape.index("K") for kind in LAYER_KINDS if "K" in kind.shape}
NAMES = (*_PER_QUERY_HEAD, *_PER_KV_HEAD, "head_out")
"""What one can write after ``head(3).``."""


class Headed(Protocol):
    """What heads need to know of a model."""

    @property
    def widths(self) -> Mapping[str, int]: ...

    def output_projection(self, layer: int) -> tuple[str, bool]: ...


class Chosen:
    """Some of the heads of a layer, checked: one number, or several."""

    __slots__ = ("heads", "single", "total")

    def __init__(self, key: Any, total: int) -> None:
        self.total = total
        self.single = not isinstance(key, list | tuple | range)
        keys = cast("Sequence[Any]", key) if not self.single else (key,)
        self.heads = tuple(self._checked(one) for one in keys)
        if not self.heads or len(set(self.heads)) != len(self.heads):
            raise HeadRangeError(
                f"head({key!r}) chooses no head" if not self.heads else f"head({key!r}) names a head twice",
                at=here(),
                instead=f"each head once, from 0 to {total - 1}",
            )

    def _checked(self, key: Any) -> int:
        try:
            if isinstance(key, bool):
                raise TypeError
            number = operator.index(key)
        except TypeError:
            raise HeadRangeError(
                f"a head is chosen with a number, not with {key!r}",
                at=here(),
                instead="head(3), or head([1, 4]) for several",
            ) from None
        if not -self.total <= number < self.total:
            raise HeadRangeError(
                f"there is no head {number}: a layer has {self.total} heads, 0 to {self.total - 1}",
                at=here(),
                instead="head(-1) is the last head",
            )
        return number % self.total

    @property
    def written(self) -> str:
        return f"head({self.heads[0]})" if self.single else f"head({list(self.heads)})"

    def index(self, value: Value, axis: int, numbers: tuple[int, ...]) -> tuple[IndexItem, ...]:
        """The index of ``numbers`` on ``axis`` of ``value``: a number, a slice where that is the same, or a tensor."""
        return (*([WHOLE] * axis), self._item(value, numbers))

    def _item(self, value: Value, numbers: tuple[int, ...]) -> IndexItem:
        if self.single:
            return numbers[0]
        first, last = numbers[0], numbers[-1]
        step = max(1, (last - first) // max(1, len(numbers) - 1))
        if list(numbers) == list(range(first, last + 1, step)):
            return Slice(first, last + 1, None if step == 1 else step)
        return Ref(value._recorder.constant(torch.tensor(numbers)))


class SharedHead(Value):
    """A key or value head as one of its query heads sees it: it can be read, and is refused as a target by name."""

    __slots__ = ("_refusal",)

    @classmethod
    def view(cls, value: Value, refusal: SharedHeadError) -> SharedHead:
        shared = cls(value._recorder, value._id)
        shared._parent, shared._index, shared._refusal = value._parent, value._index, refusal
        return shared

    def _indexed(self, index: tuple[IndexItem, ...], *, by_token: bool = False) -> Value:
        return SharedHead.view(super()._indexed(index, by_token=by_token), self._refusal)

    def _assign(self, index: tuple[IndexItem, ...], new: Any, *, by_token: bool = False) -> None:
        refuse_shared(self._refusal)


def refuse_shared(refusal: SharedHeadError) -> NoReturn:
    refusal.at = here()
    raise refusal


class HeadHandle:
    """Some heads of one layer; its attributes are the sites that have an axis for heads.

    For one head the axis is gone (``z`` is [B, P, d], ``pattern`` [B, P, S]); for a list of them it has their number.
    Keys and values are those that serve the head.
    """

    __slots__ = ("_anatomy", "_chosen", "_layer", "_number")

    def __init__(self, anatomy: Headed, layer: Any, number: int, key: Any) -> None:
        object.__setattr__(self, "_anatomy", anatomy)
        object.__setattr__(self, "_layer", layer)
        object.__setattr__(self, "_number", number)
        object.__setattr__(self, "_chosen", Chosen(key, anatomy.widths["H"]))

    def __getattr__(self, name: str) -> Value:
        if name.startswith("_"):
            raise AttributeError(name)
        if name == "head_out":
            return head_out(self._anatomy, self.z, self._number, self._chosen)
        axis, numbers, refusal = self._place(name)
        whole: Value = getattr(self._layer, name)
        index = self._chosen.index(whole, axis, numbers)
        part = whole._indexed(index)
        # Heads are named once each, so that also a list of them is a part of the site that can be assigned into.
        part._parent, part._index = whole, index
        return part if refusal is None else SharedHead.view(part, refusal)

    def __setattr__(self, name: str, new: Any) -> None:
        if name == "head_out":
            raise read_only(f"{self!r}.head_out")
        axis, numbers, refusal = self._place(name)
        if refusal is not None:
            refuse_shared(refusal)
        whole: Value = getattr(self._layer, name)
        whole._assign(self._chosen.index(whole, axis, numbers), new)

    def _place(self, name: str) -> tuple[int, tuple[int, ...], SharedHeadError | None]:
        """The axis of the heads in a site, their numbers there, and why they cannot be written if they cannot."""
        chosen, widths = self._chosen, self._anatomy.widths
        if name in _PER_QUERY_HEAD:
            return _PER_QUERY_HEAD[name], chosen.heads, None
        if name not in _PER_KV_HEAD:
            raise self._unknown(name)
        axis, shared = _PER_KV_HEAD[name], widths["H"] // widths["K"]
        if shared == 1:
            return axis, chosen.heads, None
        numbers = tuple(head // shared for head in chosen.heads)
        groups = sorted(set(numbers))
        heads = [group * shared + member for group in groups for member in range(shared)]
        served = ", ".join(map(str, heads))
        others = ", ".join(str(head) for head in heads if head not in chosen.heads)
        path = f"{self._layer!r}.{name}"
        which = (
            f"head {groups[0]} serves" if len(groups) == 1 else f"heads {', '.join(map(str, groups))} serve"
        )
        place = str(groups[0]) if len(groups) == 1 else str(groups)
        return (
            axis,
            numbers,
            SharedHeadError(
                f"{path} has one head for every {shared} query heads, so "
                + (
                    f"a write to {chosen.written} alone would change heads {others} too"
                    if others
                    else f"there is no tensor of {chosen.written} with a part for each of them"
                )
                + f": key and value {which} heads {served}",
                instead=f"{path}[:, :, {place}] = value, which changes heads {served}",
            ),
        )

    def _unknown(self, name: str) -> UnknownSiteError:
        candidates = near(name, NAMES)
        return UnknownSiteError(
            f"{self!r} has no site {name!r}"
            + (": it is a site of the whole layer" if KIND.get(CANONICAL.get(name, "")) else ""),
            at=here(),
            instead=f"did you mean {', '.join(candidates)}?" if candidates else "one of " + ", ".join(NAMES),
        )

    def __dir__(self) -> list[str]:
        return sorted(name for name in NAMES if name == "head_out" or name in dir(self._layer))

    def __repr__(self) -> str:
        return f"{self._layer!r}.{self._chosen.written}"


class HeadsOfLayers:
    """The same heads in several layers; its sites are values mapped over the layers."""

    __slots__ = ("_handles", "_layers")

    def __init__(self, handles: tuple[HeadHandle, ...], layers: tuple[int, ...]) -> None:
        object.__setattr__(self, "_handles", handles)
        object.__setattr__(self, "_layers", layers)

    def __getattr__(self, name: str) -> MappedValue:
        if name.startswith("_"):
            raise AttributeError(name)
        return MappedValue(self._layers, tuple(getattr(handle, name) for handle in self._handles))

    def __setattr__(self, name: str, new: Any) -> None:
        for handle, part in zip(self._handles, each_layer(new, self._layers), strict=True):
            setattr(handle, name, part)

    def __dir__(self) -> list[str]:
        return dir(self._handles[0])

    def __repr__(self) -> str:
        return f"{self._handles[0]!r} and {len(self._handles) - 1} more layers"


def head_out(anatomy: Headed, z: Value, layer: int, chosen: Chosen | None = None) -> Value:
    """What each head adds to ``attn_out``: [B, P, H, D], or [B, P, D] for one head. The bias belongs to no head.

    ``z`` is that of the ``chosen`` heads.
    """
    path, out_by_in = anatomy.output_projection(layer)
    heads, width, model = (anatomy.widths[name] for name in ("H", "d", "D"))
    weight: Any = Value(z._recorder, z._recorder.parameter(path))
    if chosen is not None and chosen.single:
        span = slice(chosen.heads[0] * width, (chosen.heads[0] + 1) * width)
        return z @ (weight[:, span].T if out_by_in else weight[span])
    # [H, d, D] without a copy of the matrix.
    split = (
        weight.reshape(model, heads, width).permute(1, 2, 0)
        if out_by_in
        else weight.reshape(heads, width, model)
    )
    if chosen is not None:
        split = split._indexed(chosen.index(split, 0, chosen.heads))
    return (z.transpose(1, 2) @ split).transpose(1, 2)


def read_only(what: str) -> WriteTargetError:
    """The error for assigning to a head's contribution, which is computed from ``z``."""
    return WriteTargetError(
        f"{what} is computed from z, so it can be read but not written",
        at=here(),
        instead="model.layers[i].head(h).z = value changes what the head adds",
    )
