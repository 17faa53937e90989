"""Experts by number: ``model.layers[8].expert(5).out``, ``.mask()``, ``.force()``.

All of it is written with the language's own functions, over the sites of the experts that each token goes to.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, Protocol, cast

import numpy as np
import torch

from tracelens.errors import ExpertRangeError, UnknownSiteError, WriteTargetError
from tracelens.ir.ops import IndexItem
from tracelens.ir.sites import LAYER_KINDS, near
from tracelens.location import here
from tracelens.mapped import MappedValue, each_layer
from tracelens.operand import Operand
from tracelens.values import Value

_SITES = {"out": "expert_out", "act": "expert_act", "weight": "expert_weights"}
"""What there is of each expert that a token goes to: by what one writes after ``expert(5).``."""
_READ_ONLY = {
    "input": "mlp_in, which all experts of a token receive",
    "chosen": "expert(i).mask() or expert(i).force(), by which other tokens go to it",
}
NAMES = (*_SITES, *_READ_ONLY)
"""What one can write after ``expert(5).``."""


class Mixed(Protocol):
    """What experts need to know of a model."""

    @property
    def widths(self) -> Mapping[str, int]: ...


class ExpertPart(Value):
    """What one expert has of a site: it can be assigned into, and then the site is written where tokens go to it."""

    __slots__ = ("_handle", "_name", "_whole")

    @classmethod
    def of(cls, value: Value, handle: ExpertHandle, name: str, whole: Value) -> ExpertPart:
        part = cls(value._recorder, value._id)
        part._handle, part._name, part._whole = handle, name, whole
        return part

    def _updated(self, result: Any) -> Any:
        site = self._whole._site
        if site is not None and isinstance(result, Value):
            self._recorder.expect_return(result._id, site, None)
        return result

    def _assign(self, index: tuple[IndexItem, ...], new: Any, *, by_token: bool = False) -> None:
        site = self._whole._site
        if site is not None:
            self._whole._require_current(site, "[...]")
        recorder = self._recorder
        value = Value(recorder, recorder.put(self._id, index, new, by_token=by_token))
        setattr(self._handle, self._name, value)
        if isinstance(new, Value) and site is not None:
            recorder.returned(new._id, site)
        self._stale = here()


class ExpertHandle:
    """One expert of one layer, at the tokens that go to it.

    ``out`` [B, P, D] is what it returned of each token, before it is weighted; ``act`` [B, P, N] its neurons;
    ``weight`` [B, P] what its output is multiplied by; ``input`` [B, P, D] what it received; all are 0 where a token
    does not go to it. ``chosen`` [B, P] says which do. Assigning to ``out``, ``act`` and ``weight`` changes these
    tokens alone.
    """

    __slots__ = ("_layer", "_number")

    def __init__(self, anatomy: Mixed, layer: Any, number: Any) -> None:
        object.__setattr__(self, "_layer", layer)
        object.__setattr__(self, "_number", _checked(number, anatomy.widths.get("E")))

    def __getattr__(self, name: str) -> Value:
        if name in _SITES:
            return self._part(name)
        if name.startswith("_"):
            raise AttributeError(name)
        raise _unknown(name, self)

    @property
    def chosen(self) -> Any:
        """Which tokens go to the expert: bool [B, P]."""
        return (self._layer.expert_index == self._number).any(-1)

    @property
    def input(self) -> Any:
        """What the expert received, ``mlp_in`` of the tokens that go to it and 0 elsewhere: [B, P, D]."""
        return torch.where(self.chosen[..., None], self._layer.mlp_in, 0.0)

    def mask(self, where: Any = None) -> None:
        """Has no token go to this expert: its ``router_logits`` are minus infinity, and others are chosen by the rest.

        Weights follow by the router's own rule. ``where`` is a mask [B, P] of the tokens that are meant. A token that
        cannot have as many experts as it needs is refused in the run (:class:`~tracelens.errors.ExpertChoiceError`).
        """
        logits = self._layer.router_logits
        own = torch.arange(logits._type.shape[-1]) == self._number
        meant = own if where is None else _given(where)[..., None] & own
        self._layer.router_logits = torch.where(cast(Any, meant), float("-inf"), logits)

    def force(self, where: Any = None) -> None:
        """Has all tokens go to this expert: where one does not, it takes the place of the one with the lowest logit.

        It takes that one's weight with its place; nothing else changes. ``where`` is a mask [B, P] of the tokens that
        are meant.
        """
        index = self._layer.expert_index
        scores = self._layer.router_logits.gather(-1, index)
        lowest = scores.argmin(-1, keepdim=True)
        place = lowest == torch.arange(index._type.shape[-1])
        meant = place & ~(index == self._number).any(-1, keepdim=True)
        if where is not None:
            meant = meant & _given(where)[..., None]
        self._layer.expert_index = torch.where(meant, self._number, index)

    def __setattr__(self, name: str, new: Any) -> None:
        if name in _READ_ONLY:
            raise WriteTargetError(
                f"{self!r}.{name} is computed, so it can be read but not written",
                at=here(),
                instead=_READ_ONLY[name],
            )
        if name not in _SITES:
            raise _unknown(name, self)
        site = _SITES[name]
        whole = getattr(self._layer, site)
        if isinstance(new, np.ndarray):
            new = torch.as_tensor(new)
        # Beside the axis of a token's experts.
        axis = 2 - whole.ndim
        beside = new.unsqueeze(axis) if isinstance(new, Operand | torch.Tensor) and new.ndim else new
        setattr(self._layer, site, torch.where(self._places(whole), beside, whole))
        if isinstance(new, Value) and whole._site is not None:
            new._recorder.returned(new._id, whole._site)

    def _part(self, name: str) -> ExpertPart:
        whole = getattr(self._layer, _SITES[name])
        # A token goes to an expert once, so that one of the terms at most is not 0.
        found = torch.where(self._places(whole), whole, 0.0).sum(2)
        return ExpertPart.of(found, self, name, whole)

    def _places(self, whole: Value) -> Any:
        """Where among a token's experts this one is, as a mask that broadcasts to a site."""
        found = self._layer.expert_index == self._number
        return found[..., None] if whole.ndim == 4 else found

    def __dir__(self) -> list[str]:
        return sorted([*NAMES, "force", "mask"])

    def __repr__(self) -> str:
        return f"{self._layer!r}.expert({self._number})"


class ExpertsOfLayers:
    """The experts of one number in several layers; what they have are values mapped over the layers."""

    __slots__ = ("_handles", "_layers")

    def __init__(self, handles: tuple[ExpertHandle, ...], layers: tuple[int, ...]) -> None:
        object.__setattr__(self, "_handles", handles)
        object.__setattr__(self, "_layers", layers)

    def __getattr__(self, name: str) -> MappedValue:
        if name.startswith("_"):
            raise AttributeError(name)
        return MappedValue(self._layers, tuple(getattr(handle, name) for handle in self._handles))

    def __setattr__(self, name: str, new: Any) -> None:
        for handle, part in zip(self._handles, each_layer(new, self._layers), strict=True):
            setattr(handle, name, part)

    def mask(self, where: Any = None) -> None:
        """Has no token go to these experts; see :meth:`ExpertHandle.mask`."""
        for handle in self._handles:
            handle.mask(where)

    def force(self, where: Any = None) -> None:
        """Has all tokens go to these experts; see :meth:`ExpertHandle.force`."""
        for handle in self._handles:
            handle.force(where)

    def __dir__(self) -> list[str]:
        return dir(self._handles[0])

    def __repr__(self) -> str:
        return f"{self._handles[0]!r} and {len(self._handles) - 1} more layers"


def _given(mask: Any) -> Any:
    return torch.as_tensor(mask) if isinstance(mask, np.ndarray) else mask


def _checked(key: Any, total: int | None) -> int:
    try:
        if isinstance(key, bool):
            raise TypeError
        number = operator.index(key)
    except TypeError:
        raise ExpertRangeError(
            f"an expert is chosen with a number, not with {key!r}",
            at=here(),
            instead="expert(3); for several: for number in (1, 4): layer.expert(number).mask()",
        ) from None
    if not total:
        return number  # a layer without experts says so itself
    if not -total <= number < total:
        raise ExpertRangeError(
            f"there is no expert {number}: a layer has {total} experts, 0 to {total - 1}",
            at=here(),
            instead="expert(-1) is the last expert",
        )
    return number % total


_OF_LAYERS = tuple(kind.name for kind in LAYER_KINDS)


def _unknown(name: str, owner: ExpertHandle) -> UnknownSiteError:
    candidates = near(name, NAMES)
    return UnknownSiteError(
        f"{owner!r} has no {name!r}" + (": it is a site of the whole layer" if name in _OF_LAYERS else ""),
        at=here(),
        instead=f"did you mean {', '.join(candidates)}?" if candidates else "one of " + ", ".join(NAMES),
    )
