"""A model with vectors that are applied whenever it runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tracelens.errors import Blaming, OptionError
from tracelens.location import here
from tracelens.steering.activation_addition import ActivationAddition
from tracelens.steering.directions import require_model
from tracelens.steering.operators import operator_named
from tracelens.steering.vector import SteeringVector
from tracelens.view import Line, Shown, Stack, Table, View

if TYPE_CHECKING:
    from tracelens.generation import Generation
    from tracelens.model import Model
    from tracelens.streaming import Stream
    from tracelens.tracing import Trace


@dataclass(frozen=True)
class _Applied:
    """One vector with how it is applied."""

    vector: SteeringVector | ActivationAddition
    strength: Any
    settings: dict[str, Any] = field(default_factory=dict[str, Any])

    def described(self) -> tuple[str, str, str, str]:
        facts, places = self.vector.facts, list(self.vector.directions)
        site, layer = places[0]
        there = f"layers[{layer}].{site}" + (f" and {len(places) - 1} more" if len(places) > 1 else "")
        how = ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
        return (facts.made, there, str(self.strength), how)


class Steered(Shown):
    """A model together with steering vectors, which are applied in its traces and generations.

    The arguments after the model are those of :meth:`SteeringVector.apply`; several vectors, ``[v, w]`` with the same
    settings or one by one with :meth:`then`, are applied in that order. The model itself is not changed.

    >>> chat = tl.steering.Steered(model, 1.5 * v - 0.5 * w, positions="generated")     # doctest: +SKIP
    >>> chat.generate("How was your day?", max_new_tokens=40).text                       # doctest: +SKIP
    """

    def __init__(
        self,
        model: Model,
        vector: SteeringVector | ActivationAddition | Sequence[SteeringVector | ActivationAddition],
        strength: Any = 1.0,
        **settings: Any,
    ) -> None:
        with Blaming(here()):
            require_model(model)
            given = [vector] if isinstance(vector, SteeringVector | ActivationAddition) else list(vector)
            for one in given:
                if not isinstance(one, SteeringVector | ActivationAddition):  # pyright: ignore[reportUnnecessaryIsInstance]  # users may not be typed
                    raise OptionError(
                        f"a {type(one).__name__} is no steering vector",
                        instead="Steered(model, v), or Steered(model, [v, w])",
                    )
                one.check(model)
            operator_named(settings.get("operator", "add"))
        self.model = model
        self._applied = tuple(_Applied(one, strength, settings) for one in given)

    def then(
        self, vector: SteeringVector | ActivationAddition, strength: Any = 1.0, **settings: Any
    ) -> Steered:
        """The same with one more vector, which is applied after the others with settings of its own.

        >>> tl.steering.Steered(model, v, operator="ablate").then(w, 2.0)                # doctest: +SKIP
        """
        found = Steered(self.model, vector, strength, **settings)
        found._applied = (*self._applied, *found._applied)
        return found

    def apply(self, t: Any) -> None:
        """Applies the vectors, in their order, in an open block of the model."""
        for one in self._applied:
            one.vector.apply(t, one.strength, **one.settings)

    def generate(self, prompt: Any, *, max_new_tokens: int, **options: Any) -> Generation:
        """Generates text: ``.text``, ``.tokens``. Arguments as for :meth:`tracelens.Model.generate`.

        To look at something while it runs, open the block: ``with model.generate(...) as t: steered.apply(t)``.
        """
        with self.model.generate(prompt, max_new_tokens=max_new_tokens, **options) as t:
            self.apply(t)
        return t

    def stream(self, prompt: Any, *, max_new_tokens: int, **options: Any) -> Stream:
        """Tokens while they are made, one event for each step, as :meth:`tracelens.Model.stream` gives them."""
        with self.model.record(prompt, generation=True) as r:
            self.apply(r)
        return self.model.stream(prompt, r, max_new_tokens=max_new_tokens, **options)

    def trace(self, prompt: Any, **options: Any) -> AbstractContextManager[Trace]:
        """Opens a block, :meth:`tracelens.Model.trace`, in which the vectors are applied before all else.

        >>> with steered.trace("How was your day?") as t:                                # doctest: +SKIP
        ...     logits = model.logits[:, -1].save()
        """
        return self._opened(prompt, options)

    @contextmanager
    def _opened(self, prompt: Any, options: dict[str, Any]) -> Iterator[Trace]:
        with self.model.trace(prompt, **options) as t:
            self.apply(t)
            yield t

    def _view(self) -> View:
        rows = tuple(one.described() for one in self._applied)
        table = Table(("vector", "at", "strength", "settings"), rows)
        return Stack((Line(f"steered: {self.model.describe()}"), table))
