"""``tl.steering.read``: how much of a vector's direction a model has at every token of a text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tracelens.errors import Blaming, PromptError
from tracelens.location import here
from tracelens.steering.curve import Numbers
from tracelens.steering.facts import Place, written
from tracelens.view import Line, Shown, Stack, Table, View

if TYPE_CHECKING:
    from tracelens.model import Model
    from tracelens.steering.vector import SteeringVector


@dataclass(frozen=True, eq=False, repr=False)
class Reading(Shown):
    """A text under a vector's directions: two numbers for each place and token, [places, tokens].

    ``projections``: the activation along the direction, a·v / |v|. ``cosines``: the same over the activation's own
    length, from -1 to 1. ``tokens``: what they spell; ``places``: the vector's. In a notebook it shows the text in
    colours, layer by layer; in a terminal as a table.
    """

    tokens: tuple[str, ...]
    places: tuple[Place, ...]
    projections: Numbers
    cosines: Numbers
    model: str | None = None

    def __getitem__(self, place: Place) -> Numbers:
        """The projections at one place, [tokens]."""
        return self.projections[self.places.index(place)]

    def _view(self) -> View:
        heads = ("position", "token", *map(written, self.places))
        rows = tuple(
            (str(at), repr(token), *(f"{one:.3f}" for one in self.cosines[:, at]))
            for at, token in enumerate(self.tokens)
        )
        return Stack((Line("cosine of each activation with the vector"), Table(heads, rows)))

    def to_svg(self) -> str:
        """The cosines as a picture: layers from below upwards, tokens to the right; blue along, red against."""
        from tracelens.viz.steering_picture import reading

        return reading(self)

    def _repr_html_(self) -> str:
        return f"<div>{self.to_svg()}</div>"

    def save(self, path: str | Path) -> Path:
        """Writes the picture as an SVG file."""
        target = Path(path)
        target.write_text(self.to_svg(), encoding="utf-8")
        return target


def read(model: Model, vector: SteeringVector, text: Any) -> Reading:
    """Projects a text's activations on a vector: what the model has of its direction at every token and place.

    ``text``: one prompt, as :meth:`Model.trace` takes it. Only two numbers for each token and place leave the model. A
    direction that reads a concept well is not for that reason one that steers it (Wu et al. 2025, arXiv:2501.17148).

    Raises :class:`~tracelens.errors.PromptError` for several prompts, and
    :class:`~tracelens.errors.SteeringMismatchError` for a vector of another model.

    >>> tl.steering.read(model, v, "The soup was wonderful, the service was not.")    # doctest: +SKIP
    """
    with Blaming(here()):
        vector.check(model)
        prompt = model.prepare(text)
        if prompt.sizes["B"] != 1:
            raise PromptError(f"there are {prompt.sizes['B']} texts to read", instead="one of them")
        saved: list[tuple[Any, Any]] = []
        with model.trace(prompt):
            for place in vector.places:
                h = getattr(model.layers[place[1]], place[0])[0].float()
                saved.append(((h @ vector.unit(place)).save(), torch.linalg.vector_norm(h, dim=-1).save()))
        projections = np.stack([along.value.double().numpy() for along, _ in saved])
        norms = np.stack([norm.value.double().numpy() for _, norm in saved])
        tokens = tuple(token.spelt or str(token.id) for token in model.tokens(prompt)[0])
        cosines = np.divide(projections, norms, out=np.zeros_like(projections), where=norms > 0)
        return Reading(tokens, vector.places, projections, cosines, vector.facts.model)
