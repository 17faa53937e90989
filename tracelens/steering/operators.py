"""What a vector does to an activation: each operator is one formula, written with the language's own operations.

With v the direction, u = v / |v|, h an activation [..., D] and k the strength. Every operator computes in float32 at
least, so a model in bfloat16 rounds once, where the result is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tracelens.errors import OptionError, SteeringMismatchError, SteeringSelectionError, SteeringVectorError
from tracelens.language import where
from tracelens.steering.directions import number_in
from tracelens.steering.facts import Place, written

if TYPE_CHECKING:
    from tracelens.steering.vector import SteeringVector

Change = Callable[[Any, Place, Any], Any]
"""What is written in place of an activation, from it, its place and the strength, which has the activation's axes."""


@dataclass(frozen=True)
class Operator:
    """One way to use a direction: its formula, the settings that it takes, and what makes its change."""

    name: str
    formula: str
    make: Callable[..., Change]
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()

    def prepared(self, vector: SteeringVector, settings: Mapping[str, Any]) -> Change:
        """The change that it makes with a vector; raises :class:`OptionError` for settings that it does not take."""
        known = (*self.required, *self.optional)
        for name in settings:
            if name not in known:
                raise OptionError(
                    f"the operator {self.name!r} has no setting {name}=",
                    instead=f"{', '.join(f'{one}=' for one in known)}" if known else "no further settings",
                )
        for name in self.required:
            if name not in settings:
                raise OptionError(
                    f"the operator {self.name!r}, {self.formula}, needs {name}=", instead=_EXAMPLES[self.name]
                )
        return self.make(vector, **settings)


def operator_named(name: object) -> Operator:
    """The operator of that name; :class:`OptionError` where there is none."""
    found = OPERATORS.get(name) if isinstance(name, str) else None
    if found is None:
        raise OptionError(f"there is no operator {name!r}", instead=f"one of {', '.join(OPERATORS)}")
    return found


# --- the formulas ----------------------------------------------------------------------------------------------------


def _add(vector: SteeringVector) -> Change:
    return lambda h, place, k: h + k * vector[place]


def _norm_relative(vector: SteeringVector) -> Change:
    def change(h: Any, place: Place, k: Any) -> Any:
        wide = _wide(h)
        return wide + _norm(wide) * (k * vector.unit(place))

    return change


def _norm_preserving(vector: SteeringVector) -> Change:
    def change(h: Any, place: Place, k: Any) -> Any:
        wide = _wide(h)
        moved = wide + k * vector[place]
        return moved * (_norm(wide) / _norm(moved).clamp_min(_TINY))

    return change


def _scale(vector: SteeringVector) -> Change:
    def change(h: Any, place: Place, k: Any) -> Any:
        wide, u = _wide(h), vector.unit(place)
        return wide + _along(wide, u) * (k * u)

    return change


def _ablate(vector: SteeringVector) -> Change:
    def change(h: Any, place: Place, k: Any) -> Any:
        if not isinstance(k, Tensor) or bool((k != 1).any()):
            raise OptionError(
                "ablation takes the whole component away, so it has no strength",
                instead='operator="scale", strength=-0.5, which takes half of it; positions= for some tokens only',
            )
        wide, u = _wide(h), vector.unit(place)
        return wide - _along(wide, u) * u

    return change


def _ablate_then_add(vector: SteeringVector) -> Change:
    def change(h: Any, place: Place, k: Any) -> Any:
        wide, u = _wide(h), vector.unit(place)
        return wide - _along(wide, u) * u + k * vector[place]

    return change


def _affine(vector: SteeringVector, reference: Any) -> Change:
    _require_beside(vector, reference, "reference", "affine")

    def change(h: Any, place: Place, k: Any) -> Any:
        wide, u = _wide(h), vector.unit(place)
        kept = _number(torch.dot(reference[place].double(), u.double()).item())
        return wide + (kept - _along(wide, u)) * u + k * vector[place]

    return change


def _clamp(vector: SteeringVector, low: Any = None, high: Any = None) -> Change:
    if low is None and high is None:
        raise OptionError("a clamp has low=, high= or both", instead=_EXAMPLES["clamp"])

    def change(h: Any, place: Place, k: Any) -> Any:
        least, most = _limit(low, "low", place), _limit(high, "high", place)
        if least is not None and most is not None and least > most:
            raise OptionError(f"low={least} is above high={most}", instead=_EXAMPLES["clamp"])
        wide, u = _wide(h), vector.unit(place)
        found = _along(wide, u)
        wanted = found
        if least is not None:
            wanted = torch.maximum(wanted, _number(least, like=found))
        if most is not None:
            wanted = torch.minimum(wanted, _number(most, like=found))
        return wide + (wanted - found) * (k * u)

    return change


def _rotate(vector: SteeringVector, towards: Any, degrees: Any, adaptive: bool = False) -> Change:
    _require_beside(vector, towards, "towards", "rotate")
    if isinstance(degrees, bool) or not isinstance(degrees, int | float) or not math.isfinite(degrees):
        raise OptionError(f"degrees={degrees!r} is no angle", instead=_EXAMPLES["rotate"])
    if not isinstance(adaptive, bool):
        raise OptionError(f"adaptive={adaptive!r} is neither True nor False")
    wanted = _number(math.radians(degrees))

    def change(h: Any, place: Place, k: Any) -> Any:
        wide = _wide(h)
        first, second = vector.unit(place), _upright(vector.unit(place), towards.unit(place), place)
        x, y = _along(wide, first), _along(wide, second)
        # The shorter way round: between half a turn back and half a turn on.
        missing = torch.remainder(wanted - torch.atan2(y, x) + math.pi, 2 * math.pi) - math.pi
        turn = missing * k
        cos, sin = torch.cos(turn), torch.sin(turn)
        turned = wide + (x * cos - y * sin - x) * first + (x * sin + y * cos - y) * second
        return where(x > 0, turned, wide) if adaptive else turned

    return change


_TINY = 1e-30
"""Where an activation is zero, so is what its length is multiplied with."""


def _wide(h: Any) -> Any:
    """The activation in float32 at least: what is measured in it is not to be rounded as it is."""
    return h if h.dtype in (torch.float32, torch.float64) else h.to(torch.float32)


def _along(h: Any, u: Tensor) -> Any:
    """How far the activation goes along a direction: [..., 1]."""
    return (h * u).sum(-1, keepdim=True)


def _norm(h: Any) -> Any:
    return h.norm(dim=-1, keepdim=True)


def _number(number: float, like: Any = None) -> Tensor:
    """A number as a tensor, so that another one makes no other program."""
    return torch.tensor(number, dtype=torch.float32 if like is None else like.dtype)


def _limit(given: Any, name: str, place: Place) -> float | None:
    if given is None:
        return None
    if isinstance(given, Mapping):
        given = given.get(place)
    found = number_in(given)
    if found is None or math.isnan(found):
        raise OptionError(
            f"{name}= has no number for {written(place)}", instead=f"{name}=2.0, or a number for each place"
        )
    return found


def _upright(first: Tensor, other: Tensor, place: Place) -> Tensor:
    """The direction in the plane of two that stands upright on the first, of length 1."""
    wide, base = other.double(), first.double()
    rest = wide - (wide @ base) * base
    if rest.norm() < 1e-4:
        raise SteeringVectorError(
            f"the two directions at {written(place)} lie along one line, so there is no plane to turn in",
            instead="towards= a vector that points elsewhere",
        )
    return (rest / rest.norm()).float()


def _require_beside(vector: SteeringVector, other: Any, name: str, operator: str) -> None:
    """Refuses what is no second vector of the same model with a direction at each place."""
    if not isinstance(other, type(vector)):
        raise OptionError(f"{name}={other!r} is no vector", instead=_EXAMPLES[operator])
    for place in vector:
        if place not in other:
            raise SteeringSelectionError(
                f"{name}= has no direction at {written(place)}",
                instead=f"{name}= a vector of the same places",
            )
        if len(other[place]) != len(vector[place]):
            raise SteeringMismatchError(
                f"{name}= has {len(other[place])} numbers at {written(place)}, and the vector {len(vector[place])}",
                instead="vectors of one model",
            )
    if not vector.facts.agrees(other.facts):
        raise SteeringMismatchError(
            f"the vector is of {vector.facts.model}, and {name}= of {other.facts.model}",
            instead="vectors of one model",
        )


OPERATORS: dict[str, Operator] = {
    operator.name: operator
    for operator in (
        Operator("add", "h + k v", _add),
        Operator("norm_relative", "h + k |h| u", _norm_relative),
        Operator("norm_preserving", "(h + k v) |h| / |h + k v|", _norm_preserving),
        Operator("scale", "h + k (h.u) u", _scale),
        Operator("ablate", "h - (h.u) u", _ablate),
        Operator("ablate_then_add", "h - (h.u) u + k v", _ablate_then_add),
        Operator("affine", "h - (h.u) u + (r.u) u + k v", _affine, ("reference",)),
        Operator("clamp", "h + k (clamp(h.u, low, high) - h.u) u", _clamp, (), ("low", "high")),
        Operator(
            "rotate", "h turned in the plane of v and w", _rotate, ("towards", "degrees"), ("adaptive",)
        ),
    )
}
_EXAMPLES: dict[str, str] = {
    "affine": 'v.apply(t, 1.0, operator="affine", reference=r), where r has the mean activations without the behaviour',
    "clamp": 'v.apply(t, operator="clamp", low=4.0), high=8.0 or both, in units of the activations',
    "rotate": 'v.apply(t, operator="rotate", towards=w, degrees=90.0), where w is a second vector',
}
