"""What is known of a steering vector before it is tried: lengths, diagnostics, and how alike its layers are."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tracelens.errors import SteeringSelectionError
from tracelens.location import here
from tracelens.steering.directions import norm_of, same_place
from tracelens.steering.facts import Place, written
from tracelens.view import Line, Shown, Stack, Table, View

if TYPE_CHECKING:
    from tracelens.steering.vector import SteeringVector
    from tracelens.viz.heat_map import Picture


class VectorReport(Shown):
    """What is known of each direction of a steering vector; a table where it is shown, with a picture in a notebook.

    ``norm``; ``of activations``: the norm over the mean norm of the activations there, so the strength 1 in units of
    what it is added to; and the diagnostics of its making, such as ``agreement`` (mean cosine between the pairs'
    differences and the direction) and ``separation`` (how far the two classes lie apart along it, in standard
    deviations), both of which foretell how well a vector steers (Braun et al. 2025, arXiv:2505.22637).
    """

    def __init__(self, vector: SteeringVector) -> None:
        self._vector = vector

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the numbers that there are."""
        facts = self._vector.facts
        told = dict.fromkeys(name for place in self._vector for name in facts.diagnostics.get(place, {}))
        return ("norm", *(("of activations",) if facts.scale else ()), *told)

    def numbers(self, place: Place) -> dict[str, float]:
        """What is known of one direction; what is not known is left out."""
        facts, norm = self._vector.facts, norm_of(self._vector[place])
        key = same_place(place) or place
        found = {"norm": norm}
        if facts.scale.get(key):
            found["of activations"] = norm / facts.scale[key]
        return {**found, **facts.diagnostics.get(key, {})}

    def cosines(self, site: str | None = None) -> Tensor:
        """The cosines between the directions of a site's layers, [layers, layers], float64; nan for a zero direction.

        ``site``: may be left out where there is one. Raises :class:`~tracelens.errors.SteeringSelectionError` for
        another one.
        """
        part = self._vector.at(sites=self._one(site))
        directions = torch.stack([part[place].double() for place in part])
        return (directions @ directions.T) / torch.outer(directions.norm(dim=-1), directions.norm(dim=-1))

    def _one(self, site: str | None) -> str:
        if site is not None:
            return site
        one, *others = self._vector.sites
        if others:
            raise SteeringSelectionError(
                f"the vector has directions at {', '.join(self._vector.sites)}, and one site is compared with itself",
                at=here(),
                instead=f'"{one}", or another of them',
            )
        return one

    def to_pandas(self) -> Any:
        """The table as a DataFrame, one row for each direction; needs the extra ``pandas``."""
        from tracelens.extras import required

        pandas = required("pandas", extra="pandas", what="a DataFrame")
        rows = [{"site": site, "layer": layer, **self.numbers((site, layer))} for site, layer in self._vector]
        return pandas.DataFrame(rows, columns=["site", "layer", *self.columns])

    def plot(self, site: str | None = None) -> Picture:
        """A picture of the cosines between a site's layers, SVG; ``.save(path)`` writes it."""
        from tracelens.viz.cosines import cosine_map

        site = self._one(site)
        layers = self._vector.at(sites=site).layers
        return cosine_map(f"cosine between layers, {site}", layers, self.cosines(site))

    def _view(self) -> View:
        vector, columns = self._vector, self.columns
        rows: list[tuple[str, ...]] = []
        for place in vector:
            numbers = self.numbers(place)
            rows.append(
                (written(place), *(f"{numbers[name]:.4g}" if name in numbers else "" for name in columns))
            )
        parts: list[View] = [Line(_title(vector)), Table(("place", *columns), tuple(rows))]
        for site in vector.sites:
            part = vector.at(sites=site)
            if len(part) > 1:
                near = self.cosines(site).diagonal(1)
                if not near.isfinite().any():
                    continue  # nothing is along a vector of length 0
                least = int(near.nan_to_num(2.0).argmin())
                parts.append(
                    Line(
                        f"{site}: cosine between neighbouring layers {near.nanmean():.2f} on average, least "
                        f"{near[least]:.2f} between {part.layers[least]} and {part.layers[least + 1]}"
                    )
                )
        return Stack(tuple(parts))

    def _repr_html_(self) -> str:
        pictures = "".join(
            f"<details><summary>{html.escape(site)}: cosine between layers</summary>{self.plot(site).svg}"
            "</details>"
            for site in self._vector.sites
            if len(self._vector.at(sites=site)) > 1
        )
        return super()._repr_html_() + pictures


def _title(vector: SteeringVector) -> str:
    facts = vector.facts
    words = [f"steering vector of {facts.model or 'an unknown model'}"]
    words += [str(told) for told in (facts.method, facts.positions and f"at {facts.positions}") if told]
    if facts.rows is not None:
        words.append(f"{facts.rows} rows")
    if facts.data:
        words.append(f"data {facts.data[:12]}")
    if facts.seed is not None:
        words.append(f"seed {facts.seed}")
    return ", ".join(words)
