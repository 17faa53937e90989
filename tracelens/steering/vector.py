"""A steering vector: directions by place, in float32 on the host, with the facts of their making."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from tracelens.errors import (
    Blaming,
    SteeringMismatchError,
    SteeringSelectionError,
    SteeringVectorError,
)
from tracelens.ir.sites import CANONICAL
from tracelens.location import here
from tracelens.steering import applying
from tracelens.steering.directions import (
    from_the_end,
    norm_of,
    number_in,
    order,
    read_direction,
    read_place,
    require_model,
    require_places,
    require_width,
    same_place,
    scaled_to,
    width_of,
)
from tracelens.steering.facts import Facts, Place, written
from tracelens.view import Line, Shown, Stack, Table, View

if TYPE_CHECKING:
    from tracelens.model import Model
    from tracelens.steering.report import VectorReport


class SteeringVector(Shown):
    """Directions in a model's activations, one for each of some places (a site of a layer).

    ``directions``: by place, ``{("resid_post", 12): tensor}``, whatever holds as many numbers as the site is wide; they
    are kept as float32 on the host. ``facts``: what they were made of. Vectors of one model and of the same places can
    be added, subtracted, and multiplied with numbers.

    >>> v = tl.steering.SteeringVector({("resid_post", 12): torch.randn(576)})       # doctest: +SKIP
    >>> with model.trace("The capital of France is"):                                 # doctest: +SKIP
    ...     v.apply(t, 4.0)
    ...     logits = model.logits.save()

    Raises :class:`~tracelens.errors.SteeringVectorError` for what is no direction.
    """

    __slots__ = ("_units", "directions", "facts")

    directions: Mapping[Place, Tensor]
    """By place, the direction [width of the site], float32, on the host. Not to be changed."""
    facts: Facts
    """What the vector was made of."""

    def __init__(self, directions: Mapping[Place, Any], facts: Facts | None = None) -> None:
        with Blaming(here()):
            found: dict[Place, Tensor] = {}
            for place, given in require_places(directions).items():
                name = read_place(place)
                if name in found:
                    raise SteeringVectorError(f"{written(name)} was given two directions")
                found[name] = read_direction(given, name)
            if not found:
                raise SteeringVectorError(
                    "a steering vector has at least one direction",
                    instead='SteeringVector({("resid_post", 12): tensor})',
                )
        self.directions = MappingProxyType(dict(sorted(found.items(), key=lambda item: order(item[0]))))
        self.facts = facts if facts is not None else Facts()
        self._units: dict[Place, Tensor] = {}

    @classmethod
    def from_directions(cls, model: Model, directions: Mapping[Place, Any], **facts: Any) -> SteeringVector:
        """A vector of a model from directions of yours: a probe's weights, a column of an SAE's decoder.

        Layers may be counted from the end. ``facts``: more of them, ``method="SAE feature 1234"``. Raises
        :class:`~tracelens.errors.SteeringMismatchError` for directions that are not as wide as the site.

        >>> column = sae.decoder.weight[:, 1234]                                      # doctest: +SKIP
        >>> v = SteeringVector.from_directions(model, {("resid_post", 6): column})    # doctest: +SKIP
        """
        with Blaming(here()):
            count = require_model(model).n_layers
            vector = cls(
                {
                    (place[0], place[1] + count) if from_the_end(place, count) else place: given
                    for place, given in require_places(directions).items()
                },
                Facts.of(model, **{"method": "directions", **facts}),
            )
            vector._require_places(model)
        return vector

    # --- what it is ----------------------------------------------------------------------------------------------

    @property
    def places(self) -> tuple[Place, ...]:
        """The places that have a direction, ``("resid_post", 12)``, by layer and then by site."""
        return tuple(self.directions)

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that have directions."""
        return tuple(dict.fromkeys(site for site, _ in self.directions))

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have directions."""
        return tuple(sorted({layer for _, layer in self.directions}))

    def __len__(self) -> int:
        return len(self.directions)

    def __iter__(self) -> Iterator[Place]:
        return iter(self.directions)

    def __contains__(self, place: object) -> bool:
        return same_place(place) in self.directions

    def __getitem__(self, place: Place) -> Tensor:
        """The direction of a place, ``v["resid_post", 12]``: float32, on the host.

        Raises :class:`~tracelens.errors.SteeringSelectionError` where there is none.
        """
        found = None if (key := same_place(place)) is None else self.directions.get(key)
        if found is None:
            raise SteeringSelectionError(
                f"the vector has no direction at {place!r}",
                at=here(),
                instead=f"one of its {len(self)} places: {_listed(self.places)}",
            )
        return found

    def at(
        self, *, sites: str | Iterable[str] | None = None, layers: int | Iterable[int] | None = None
    ) -> SteeringVector:
        """The part of the vector at some sites and layers: ``v.at(sites="resid_post", layers=[10, 12])``.

        Raises :class:`~tracelens.errors.SteeringSelectionError` for a site or layer at which it has no direction.
        """
        with Blaming(here()):
            wanted_sites = self.sites if sites is None else _names(sites)
            wanted_layers = self.layers if layers is None else _integers(layers)
            for wanted, known, word in (
                (wanted_sites, self.sites, "site"),
                (wanted_layers, self.layers, "layer"),
            ):
                for one in wanted:
                    if one not in known:
                        raise SteeringSelectionError(
                            f"the vector has no direction at {word} {one!r}",
                            instead=f"{word}s= with some of {_listed(known)}",
                        )
            places = tuple(
                (site, layer)
                for site, layer in self.directions
                if site in wanted_sites and layer in wanted_layers
            )
            if not places:
                raise SteeringSelectionError(
                    f"the vector has no direction at sites {_listed(wanted_sites)} of layers {_listed(wanted_layers)}",
                    instead=f"some of its places: {_listed(self.places)}",
                )
        return SteeringVector({place: self.directions[place] for place in places}, self.facts.at(places))

    @property
    def norms(self) -> Mapping[Place, float]:
        """By place, the length of the direction."""
        return {place: norm_of(direction) for place, direction in self.directions.items()}

    def unit(self, place: Place) -> Tensor:
        """The direction of a place with length 1, float32; :class:`SteeringVectorError` where it is zero."""
        direction, key = self[place], same_place(place) or place
        if key not in self._units:
            self._units[key] = scaled_to(direction, 1.0, key)
        return self._units[key]

    # --- arithmetic ----------------------------------------------------------------------------------------------

    def __add__(self, other: Any) -> SteeringVector:
        return self._with(other, 1.0) if isinstance(other, SteeringVector) else NotImplemented

    def __sub__(self, other: Any) -> SteeringVector:
        return self._with(other, -1.0) if isinstance(other, SteeringVector) else NotImplemented

    def __neg__(self) -> SteeringVector:
        return self._times(-1.0)

    def __mul__(self, number: Any) -> SteeringVector:
        found = number_in(number)
        return NotImplemented if found is None else self._times(found)

    __rmul__ = __mul__

    def __truediv__(self, number: Any) -> SteeringVector:
        found = number_in(number)
        if found is None:
            return NotImplemented
        if found == 0:
            raise SteeringVectorError("a steering vector was divided by zero", at=here())
        return self._times(1 / found)

    def normalized(self) -> SteeringVector:
        """The same directions, each of length 1; :class:`~tracelens.errors.SteeringVectorError` if one is zero."""
        return self.to_norm(1.0)

    def to_norm(self, norm: float | Mapping[Place, float] | SteeringVector) -> SteeringVector:
        """The same directions with other lengths: one number, one for each place, or those of another vector.

        ``v.to_norm(v.facts.scale)`` makes each as long as the activations at its place are on average. Raises
        :class:`~tracelens.errors.SteeringVectorError` for a direction that is zero, and
        :class:`~tracelens.errors.SteeringSelectionError` for a place without a number.
        """
        with Blaming(here()):
            given = norm.norms if isinstance(norm, SteeringVector) else norm
            found: dict[Place, Tensor] = {}
            for place, direction in self.directions.items():
                length = given.get(place) if isinstance(given, Mapping) else number_in(given)
                if length is None or not math.isfinite(length) or length < 0:
                    raise SteeringSelectionError(
                        f"{norm!r} is no length"
                        if not isinstance(given, Mapping)
                        else f"there is no length for {written(place)}, or none that can be one",
                        instead="v.to_norm(8.0), or a length for each place: v.to_norm({place: 8.0 for place in v})",
                    )
                found[place] = scaled_to(direction, length, place)
        return SteeringVector(found, replace(self.facts, method=f"{self.facts.made} to norm"))

    def for_model(self, model: Model) -> SteeringVector:
        """The same directions, taken for those of another model of the same shape, such as a fine-tune.

        Raises :class:`~tracelens.errors.SteeringMismatchError` where a direction does not fit.
        """
        with Blaming(here()):
            require_model(model)
        facts = Facts.of(
            model,
            **{
                name: getattr(self.facts, name)
                for name in ("positions", "rows", "data", "template", "seed", "scale", "diagnostics")
            },
            method=self.facts.method
            if self.facts.model is None
            else f"{self.facts.made} of {self.facts.model}",
        )
        found = SteeringVector(self.directions, facts)
        with Blaming(here()):
            found._require_places(model)
        return found

    def _times(self, number: float) -> SteeringVector:
        return SteeringVector(
            {place: direction * number for place, direction in self.directions.items()},
            self.facts.times(number),
        )

    def _with(self, other: SteeringVector, sign: float) -> SteeringVector:
        with Blaming(here()):
            if not self.facts.agrees(other.facts):
                raise SteeringMismatchError(
                    f"vectors of two models, {self.facts.model} and {other.facts.model}, have no sum",
                    instead="vectors of one model",
                )
            if self.places != other.places:
                raise SteeringMismatchError(
                    f"vectors of other places, {_listed(self.places)} and {_listed(other.places)}, have no sum",
                    instead="v.at(sites=..., layers=...) for the places that both have; or v.apply(t) of each of them",
                )
            for place in self.places:
                require_width(other[place], len(self[place]), place, "the other vector")
        return SteeringVector(
            {place: self[place] + sign * other[place] for place in self.places},
            self.facts.plus(other.facts, sign),
        )

    # --- use -----------------------------------------------------------------------------------------------------

    def apply(
        self,
        t: Any,
        strength: Any = 1.0,
        *,
        positions: Any = "all",
        operator: str = "add",
        steps: int | slice | None = None,
        **settings: Any,
    ) -> None:
        """Changes the model's activations in an open block: ``v.apply(t, 2.0)`` is ``site += 2.0 * direction``.

        ``strength``: a number, or one for each row of the batch; also a value of the block, ``[]``, ``[rows]`` or
        ``[rows, positions]``. ``positions``: ``"all"``; ``"prompt"``; ``"last_prompt_token"``; ``"generated"``;
        ``"newest"`` (the last token that each pass has, which chooses the next one); a part of the block (``t.decode``,
        ``t.prompts[1]``); or whatever ``site.tok[...]`` takes: a number, a slice, a list, a text, a mask
        ``[rows, positions]``, a condition that the run decides (``model.positions >= 5``); or a function of the block
        that gives one of these. ``steps``: of a generation, ``slice(5, 10)`` as ``t.steps[5:10]``.

        What is written are the language's own writes, so it holds on every device and rank, and the order of writes to
        one site is that of the lines. The arithmetic is in float32 at least, rounded once, to the model's dtype.

        Raises :class:`~tracelens.errors.SteeringSelectionError` for a vector of several sites,
        :class:`~tracelens.errors.SteeringMismatchError` for one of another model, and
        :class:`~tracelens.errors.OptionError` for other words.
        """
        with Blaming(here()):
            applying.apply(self, t, strength, positions, operator, steps, settings)

    def check(self, model: Model) -> None:
        """Raises :class:`~tracelens.errors.SteeringMismatchError` unless the vector is one for this model."""
        with Blaming(here()):
            self.facts.check(require_model(model))
            self._require_places(model)

    def _require_places(self, model: Model) -> None:
        for place, direction in self.directions.items():
            if place[1] >= model.n_layers:
                raise SteeringMismatchError(
                    f"the vector has a direction at {written(place)}, and this model has {model.n_layers} layers",
                    instead="a vector of this model; layers are counted from 0",
                )
            require_width(direction, width_of(model, place), place, "this model")

    # --- keeping -------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Writes the directions and the facts to a safetensors file; gives its path. :func:`tl.steering.load` reads it.

        Raises :class:`~tracelens.errors.SteeringFileError` for another ending.
        """
        from tracelens.steering.vector_files import save

        with Blaming(here()):
            save(self, Path(path))
        return Path(path)

    def to_gguf(self, path: str | Path) -> Path:
        """Writes a control vector of llama.cpp and repeng: ``direction.k`` for ``layers[k].resid_post``.

        llama.cpp adds it to what leaves block k, counted from 0, at every position; it has none for block 0. Gives the
        path; needs the extra ``demo``. Raises :class:`~tracelens.errors.SteeringVectorError` for other sites, and 0.
        """
        from tracelens.steering.interchange import write_gguf

        with Blaming(here()):
            write_gguf(self, Path(path))
        return Path(path)

    @classmethod
    def from_gguf(cls, path: str | Path, model: Model | None = None) -> SteeringVector:
        """Reads a control vector of llama.cpp or repeng: :func:`tl.steering.load` of that file."""
        from tracelens.steering.vector_files import load

        return load(path, model)

    def to_caa(self, folder: str | Path) -> Path:
        """Writes one ``vec_layer_L_MODEL.pt`` for each layer, as the code of CAA reads them; gives the folder.

        Raises :class:`~tracelens.errors.SteeringVectorError` for sites other than ``resid_post``.
        """
        from tracelens.steering.interchange import write_folder

        with Blaming(here()):
            write_folder(self, Path(folder))
        return Path(folder)

    # --- looking -------------------------------------------------------------------------------------------------

    def report(self) -> VectorReport:
        """What is known of each direction: its norm, alone and beside the activations there, and its diagnostics.

        The cosines between the directions of each site's layers stand beside: ``report.cosines``.
        """
        from tracelens.steering.report import VectorReport

        return VectorReport(self)

    def _view(self) -> View:
        facts, norms = self.facts, self.norms
        words = f"steering vector of {facts.model or 'an unknown model'}: {len(self)} direction{'s' * (len(self) > 1)}"
        if facts.method:
            words += f", {facts.method}"
        shown = self.places[:_SHOWN]
        rows = tuple((written(place), str(len(self[place])), f"{norms[place]:.4g}") for place in shown)
        table = Table(("place", "width", "norm"), rows)
        more = (Line(f"and {len(self) - len(shown)} more"),) if len(self) > len(shown) else ()
        return Stack((Line(words), table, *more))


_SHOWN = 12


def _names(sites: str | Iterable[str]) -> tuple[str, ...]:
    return tuple(CANONICAL.get(site, site) for site in ((sites,) if isinstance(sites, str) else sites))


def _integers(layers: int | Iterable[int]) -> tuple[int, ...]:
    return (int(layers),) if isinstance(layers, int | np.integer) else tuple(int(layer) for layer in layers)


def _listed(things: Iterable[object]) -> str:
    listed = list(things)
    return ", ".join(map(repr, listed[:6])) + ", ..." * (len(listed) > 6)
