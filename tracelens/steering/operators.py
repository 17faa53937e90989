"""What a vector does to an activation: each operator is one formula, written with the language's own operations.

With v the direction, u = v / |v|, h an activation [..., D] and k the strength. Every operator computes in float32 at
least, so a model in bfloat16 rounds once, where the result is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tracelens.errors import OptionError
from tracelens.steering.facts import Place

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


OPERATORS: dict[str, Operator] = {operator.name: operator for operator in (Operator("add", "h + k v", _add),)}
_EXAMPLES: dict[str, str] = {}
