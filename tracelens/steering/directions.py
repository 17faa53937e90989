"""Places and directions as users give them: read once, at the edge."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from tracelens.errors import (
    ExtractionError,
    NotALanguageModelError,
    OptionError,
    SteeringMismatchError,
    SteeringVectorError,
)
from tracelens.ir.sites import CANONICAL, KIND, LAYER_KINDS, Scope, Site, near
from tracelens.model import Model
from tracelens.operand import Operand
from tracelens.other_names import SCHEMES
from tracelens.plain_model import PlainModel
from tracelens.steering.facts import Place, written

_SITES = [kind.name for kind in LAYER_KINDS]


def require_width(direction: Tensor, width: int, place: Place, whose: str) -> None:
    """Raises :class:`~tracelens.errors.SteeringMismatchError` unless a direction has as many numbers as the site."""
    if len(direction) != width:
        raise SteeringMismatchError(
            f"the direction at {written(place)} has {len(direction)} numbers, and there {whose} has {width}",
            instead="directions of one model",
        )


def require_model(model: Any) -> Model:
    """The model that a vector belongs to; raises for one of transformers, which has no sites, and for other things."""
    if isinstance(model, Model):
        return model
    if isinstance(model, PlainModel):
        raise NotALanguageModelError(
            "a steering vector belongs to a site of a layer, and this model has modules alone",
            instead="model.module(path).output += 2.0 * direction",
        )
    raise OptionError(
        f"a {type(model).__name__} is no model with named sites",
        instead="tl.wrap(model, tokenizer), which gives a model of transformers its sites; or tl.load(name)",
    )


def require_places(directions: Any) -> Mapping[Any, Any]:
    """Directions by place; raises for a direction that does not say which place it belongs to."""
    if isinstance(directions, Mapping):
        return cast("Mapping[Any, Any]", directions)
    raise SteeringVectorError(
        f"a {type(directions).__name__} does not say at which site and layer its direction is to be added",
        instead='SteeringVector({("resid_post", 12): tensor})',
    )


def order(place: Place) -> tuple[int, int]:
    """Where a place stands among others: by layer, and there in the order of the forward pass."""
    site, layer = place
    return layer, _SITES.index(site)


def same_place(place: object) -> Place | None:
    """A place under the one name of its site; ``None`` for what is none."""
    match place:
        case (str() as site, int() | np.integer() as layer):
            return CANONICAL.get(site, site), int(layer)
        case _:
            return None


def read_place(place: object) -> Place:
    """A place as it was given, under the one name of its site; raises for what is none."""
    match place:
        case (site, int() | np.integer() as layer) if not isinstance(layer, bool) and layer >= 0:
            if (name := canonical(site)) is not None:
                return name, int(layer)
        case _:
            pass
    raise SteeringVectorError(
        f"{place!r} is no place for a direction: a site of a layer with one axis of numbers, and the layer from 0",
        instead='("resid_post", 12)',
    )


def from_the_end(place: Any, count: int) -> bool:
    """Is its layer counted from the end of so many?"""
    return (
        isinstance(place, tuple) and len(place) == 2 and isinstance(place[1], int) and -count <= place[1] < 0
    )


def read_direction(given: Any, place: Place) -> Tensor:
    """A copy of what was given, so that nobody changes it under our hands."""
    if isinstance(given, Operand):
        given = given.value if not given._is_recording() else None
    try:
        tensor = given if isinstance(given, Tensor) else torch.as_tensor(np.asarray(given))
    except (TypeError, ValueError):
        tensor = None
    if tensor is None or tensor.dtype.is_complex or tensor.dtype is torch.bool or tensor.is_meta:
        raise SteeringVectorError(
            f"what was given for {written(place)} is no tensor of numbers",
            instead="a tensor, an array or a list of as many numbers as the site is wide",
        )
    if tensor.ndim != 1 or not len(tensor):
        raise SteeringVectorError(
            f"the direction at {written(place)} has the shape {tuple(tensor.shape)}, and a direction has one axis",
            instead="tensor[0], or tensor.mean(0), which is [width]",
        )
    kept = tensor.detach().cpu().to(torch.float32, copy=True)
    if not torch.isfinite(kept).all():
        raise SteeringVectorError(f"the direction at {written(place)} has numbers that are not finite")
    return kept


def norm_of(direction: Tensor) -> float:
    """The length of a direction."""
    return direction.double().norm().item()


def scaled_to(direction: Tensor, length: float, place: Place) -> Tensor:
    """A direction with another length; raises where it is zero."""
    norm = norm_of(direction)
    if norm == 0:
        raise SteeringVectorError(
            f"the direction at {written(place)} is zero, so it points nowhere",
            instead="v.at(layers=...) without that place",
        )
    return (direction.double() * (length / norm)).float()


def number_in(given: Any) -> float | None:
    """A number, out of whatever holds one; ``None`` for anything else."""
    if isinstance(given, bool) or not isinstance(
        given, int | float | np.integer | np.floating | Tensor | np.ndarray
    ):
        return None
    if isinstance(given, Tensor | np.ndarray):
        if given.ndim:
            return None
        given = given.item()
    return float(given)


def canonical(site: object) -> str | None:
    """The one name of a site whose numbers lie along one axis at each position, ``None`` for anything else."""
    name = CANONICAL.get(site) if isinstance(site, str) else None
    if name is None or KIND[name].scope is not Scope.LAYER:
        return None
    return name if len(KIND[name].shape) == 3 and KIND[name].dtype is None else None


def require_site(site: object) -> str:
    """The one name of a site that can have directions; raises with what was meant, where that can be guessed."""
    if (name := canonical(site)) is not None:
        return name
    raise ExtractionError(
        f"{site!r} is no site of a layer with one axis of numbers at each position",
        instead=_meant(site) or 'sites=["post_ln", "resid_post"]; model.sites() lists them',
    )


def _meant(site: object) -> str | None:
    """What to write in place of a name that no site has: that of a misspelling, or of another library's name."""
    if not isinstance(site, str) or site in CANONICAL:
        return None
    theirs = dict.fromkeys(
        meaning
        for scheme in SCHEMES.values()
        for name, meaning in scheme.of_layers.items()
        if name == re.sub(r"^(blocks|layers)\.\d+\.|\[\d+\]$|\.\d+$", "", site)
        and canonical(meaning) is not None
    )
    if theirs:
        return f"sites={' or '.join(map(repr, theirs))}, as that is called here; tl.sites.parse(name) reads such names"
    close = near(site, tuple(name for name in CANONICAL if canonical(name) is not None))
    return f"did you mean {' or '.join(map(repr, close))}?" if close else None


def width_of(model: Model, place: Place) -> int:
    """How many numbers a direction there has; the library's own errors for a site or layer that there is not."""
    site, layer = place
    return int(model.anatomy.type_of(Site(site, layer)).shape[-1])  # pyright: ignore[reportArgumentType]  # a number
