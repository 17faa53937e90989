"""What a steering vector was made of: the model, the data, the method; it travels with the vector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracelens.errors import SteeringMismatchError
from tracelens.steering.fingerprint import sample_digests

if TYPE_CHECKING:
    from tracelens.model import Model

Place = tuple[str, int]
"""A site of a layer: ``("resid_post", 12)``."""


def written(place: Place) -> str:
    """A place as one writes it: ``layers[12].resid_post``."""
    site, layer = place
    return f"layers[{layer}].{site}"


@dataclass(frozen=True)
class Facts:
    """What a steering vector was made of. All of it may be unknown (``None``, or empty), as for files of others.

    ``model``, ``revision``: the name and revision on the hub, or a folder; ``family``, ``architecture`` (transformers'
    ``model_type``), ``n_layers``, ``d_model``.
    ``weights``: digests of a sample of the model's unembedding, by which another model is told. ``method``: how it was
    made, with what was done to it since: ``"mean_difference"``, ``"2 * pca"``. ``positions``: where activations were
    read, ``"label"``. ``rows``: of how many pairs. ``data``, ``template``: the digest of the data and its template.
    ``seed``: of what was drawn. ``row_digests``: of each row that it was made of. ``scale``: by place the mean norm of
    the activations. ``diagnostics``: by place numbers by name, such as ``agreement`` (mean cosine of the pairs'
    differences with the vector) and ``separation`` (d').
    ``tracelens``: the version that made it.
    """

    model: str | None = None
    revision: str | None = None
    family: str | None = None
    architecture: str | None = None
    n_layers: int | None = None
    d_model: int | None = None
    weights: Mapping[str, str] = field(default_factory=dict[str, str])
    method: str | None = None
    positions: str | None = None
    rows: int | None = None
    data: str | None = None
    template: str | None = None
    seed: int | None = None
    row_digests: tuple[str, ...] = field(default=(), repr=False)
    scale: Mapping[Place, float] = field(default_factory=dict[Place, float])
    diagnostics: Mapping[Place, Mapping[str, float]] = field(default_factory=dict[Place, Mapping[str, float]])
    tracelens: str | None = None

    @classmethod
    def of(cls, model: Model, **more: Any) -> Facts:
        """The facts of a model, and ``more`` of them: ``Facts.of(model, method="mean_difference", rows=200)``.

        Reads a few rows of the model's unembedding, once.
        """
        config = model.config
        return cls(
            model=_name(model),
            revision=getattr(config, "_commit_hash", None),
            family=model.anatomy.family.name,
            architecture=config.model_type,
            n_layers=model.n_layers,
            d_model=model.anatomy.widths["D"],
            weights=sample_digests(model),
            tracelens=_version(),
            **more,
        )

    def check(self, model: Model) -> None:
        """Raises :class:`~tracelens.errors.SteeringMismatchError` if this is about another model than that.

        What is not known is not compared. Weights are compared where both sizes agree: models that differ in a few rows
        of their unembedding are told apart, a fine-tune that left these as they were is not.
        """
        named = self.model or "another model"
        for mine, theirs, words in (
            (self.d_model, model.anatomy.widths["D"], "d_model"),
            (self.n_layers, model.n_layers, "layers"),
        ):
            if mine is not None and mine != theirs:
                raise SteeringMismatchError(
                    f"the vector was made for {named}, with {mine} {words}, and this model has {theirs}",
                    instead="a vector of this model",
                )
        if self.weights:
            found = sample_digests(model)
            if not any(found.get(name) == digest for name, digest in self.weights.items()):
                raise SteeringMismatchError(
                    f"the vector was made for {named}, whose unembedding is another one than this model's",
                    instead="a vector of this model; or v.for_model(model), if the two are nearly alike (a fine-tune)",
                )

    def agrees(self, other: Facts) -> bool:
        """Are both of one model, as far as both know theirs?"""
        sizes = ((self.d_model, other.d_model), (self.n_layers, other.n_layers))
        if any(mine is not None and theirs is not None and mine != theirs for mine, theirs in sizes):
            return False
        if self.weights and other.weights:
            return any(other.weights.get(name) == digest for name, digest in self.weights.items())
        return self.model is None or other.model is None or self.model == other.model

    def at(self, places: tuple[Place, ...]) -> Facts:
        """The same facts of some of the places."""
        return replace(
            self,
            scale={place: self.scale[place] for place in places if place in self.scale},
            diagnostics={place: self.diagnostics[place] for place in places if place in self.diagnostics},
        )

    @property
    def made(self) -> str:
        """How it was made, in a word for a formula."""
        return self.method or "vector"

    def times(self, number: float) -> Facts:
        """The facts of a multiple: only a positive one is as good a direction as it was."""
        inner = f"({self.made})" if " " in self.made else self.made
        method = f"-{inner}" if number == -1 else f"{number:g} * {inner}"
        return replace(self, method=method, diagnostics=self.diagnostics if number > 0 else {})

    def plus(self, other: Facts, sign: float) -> Facts:
        """The facts of a sum: what both have in common, and the mean of what both say of the model's activations."""
        made = other.made
        if " + " in made or " - " in made or made.startswith("-"):
            made = f"({made})"
        same = {
            name: getattr(self, name) if getattr(self, name) == getattr(other, name) else None
            for name in ("positions", "rows", "data", "template", "seed")
        }
        same["row_digests"] = tuple(dict.fromkeys((*self.row_digests, *other.row_digests)))
        scales = [facts.scale for facts in (self, other) if facts.scale]
        scale = {
            place: sum(known[place] for known in scales) / len(scales)
            for place in (scales[0] if scales else {})
            if all(place in known for known in scales)
        }
        return replace(
            self if self.weights or self.model else other,
            **same,
            method=f"{self.made} {'+' if sign > 0 else '-'} {made}",
            scale=scale,
            diagnostics={},
        )

    def to_dict(self) -> dict[str, Any]:
        """The facts as JSON has them; places are written ``resid_post.12``."""
        found = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        found["weights"] = dict(self.weights)
        found["scale"] = {key_of(place): number for place, number in self.scale.items()}
        found["diagnostics"] = {key_of(place): dict(numbers) for place, numbers in self.diagnostics.items()}
        return {name: value for name, value in found.items() if value not in (None, {}, ())}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Facts:
        """The facts that :meth:`to_dict` gave; what a newer version says beyond ours is left out."""
        known = {entry.name for entry in fields(cls)}
        given = {name: value for name, value in found.items() if name in known}
        if "row_digests" in given:
            given["row_digests"] = tuple(given["row_digests"])
        for name in ("scale", "diagnostics"):
            if name in given:
                given[name] = {place_of(key): value for key, value in given[name].items()}
        return cls(**given)


def place_of(key: str) -> Place:
    """The place that is written ``resid_post.12``."""
    site, _, layer = key.rpartition(".")
    return site, int(layer)


def key_of(place: Place) -> str:
    """A place as a file has it: ``resid_post.12``."""
    return f"{place[0]}.{place[1]}"


def _name(model: Model) -> str:
    """The name on the hub; of a local folder its own name, since where it lies is nobody's business."""
    name: str = getattr(model.config, "_name_or_path", None) or type(model.hf).__name__
    return Path(name).name if Path(name).is_dir() else name


def _version() -> str | None:
    try:
        return version("tracelens")
    except PackageNotFoundError:  # a source tree that was never installed
        return None
