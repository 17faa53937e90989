"""Making steering vectors: one pass over contrast data, for all layers and sites at once."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from torch import Tensor

from tracelens.errors import Blaming, ExtractionError, ZeroVectorError, ZeroVectorWarning
from tracelens.location import Location, here
from tracelens.progress import watched
from tracelens.slices import require_rows
from tracelens.steering.contrast import Contrast, name_of
from tracelens.steering.directions import canonical, width_of
from tracelens.steering.estimators import CONTROLS, METHODS, Method, vector_of
from tracelens.steering.facts import Facts, Place, written
from tracelens.steering.labels import Labelled, labelled
from tracelens.steering.moments import SAMPLED, Moments
from tracelens.steering.vector import SteeringVector

if TYPE_CHECKING:
    from tracelens.model import Model

Positions = Literal["label", "decision", "last", "mean"]

NOTHING = 1e-3
"""A vector shorter than this, beside the activations that it was made of, is none."""


@dataclass(frozen=True)
class _Pair:
    """Two texts as ids, and how many of the last tokens of each are read: their activations are averaged."""

    positive: tuple[int, ...]
    negative: tuple[int, ...]
    read: tuple[int, int] = (1, 1)

    @property
    def length(self) -> int:
        return max(len(self.positive), len(self.negative))


def extract(
    model: Model,
    data: Contrast | Labelled | Sequence[Sequence[str]],
    *,
    sites: str | Sequence[str] = ("post_ln", "resid_post"),
    layers: Literal["all"] | int | Iterable[int] = "all",
    method: Method = "mean_difference",
    positions: Positions = "label",
    batch_size: int = 8,
    seed: int = 0,
    progress: bool | None = None,
) -> SteeringVector:
    """A steering vector for each site and layer, made of the activations of a model on pairs of answers.

    ``data``: contrast data, or ``(prompt, positive, negative)`` for each pair. ``sites``, ``layers``: the places, all
    of which one pass over the data serves; layers count from 0, and from the end with a minus.

    ``positions``: where the activations of both answers of a pair are read. At the ``"label"``, the first token in
    which the two differ; at the ``"decision"`` before it, where the model has not seen the answer yet and the two do
    not differ; at the ``"last"`` token of each; or their ``"mean"`` over the tokens from the first that differs to the
    last, for answers of free text.

    ``method``, with d a pair's difference a(x+) - a(x-):

    * ``"mean_difference"``: the mean of d (CAA, Panickssery et al. 2023, arXiv:2312.06681). ``"unpaired"``: the
      difference of the classes' means, which for pairs is the same. ``"actadd"``: d of one single pair (Turner et al.
      2023, arXiv:2308.10248).
    * ``"pca"``: the first principal direction of d about zero; ``"pairwise_pca"``: that of the activations less each
      pair's mean, which is the same.
    * ``"logistic"``: the weights of a logistic regression (l2 penalty 1 on inputs of mean square 1). ``"lda"``:
      Fisher's discriminant, with a shrunk covariance.
    * ``"random"``: drawn with ``seed``, as long as the mean difference; ``"shuffled"``: the mean of d with the labels
      of half the pairs exchanged. Both are controls.

    The sign is that of the mean difference, always (not of controls). Of principal directions and probes the direction
    counts; they are as long as what the mean difference has along them.

    ``batch_size``: how many pairs run together. Sums are float64, on the host, and do not grow with the pairs;
    ``"pca"`` and ``"lda"`` keep matrices [width, width] or the pairs, whichever is less, and ``"logistic"`` keeps the
    pairs. ``v.facts.diagnostics`` has by place the ``agreement`` (mean cosine of d with the mean difference) and the
    ``separation`` (d' of the classes along the vector, of at most 64 pairs), which tell beforehand how well a vector
    will steer (Braun et al. 2025, arXiv:2505.22637); and what the method has to tell.

    Raises :class:`~tracelens.errors.LabelError` if no pair has a label, :class:`~tracelens.errors.ExtractionError` for
    what the method cannot be made of, and :class:`~tracelens.errors.ZeroVectorError` if the answers do not differ where
    they were read: every vector is shorter than 1e-3 of the mean activation. Where some are, it warns
    (:class:`~tracelens.errors.ZeroVectorWarning`).

    >>> v = tl.steering.extract(model, data.train, sites=["post_ln"], layers=range(10, 20))   # doctest: +SKIP
    >>> v["post_ln", 12].shape                                                                # doctest: +SKIP
    torch.Size([576])
    """
    at = here()
    with Blaming(at):
        if method not in METHODS:
            raise ExtractionError(f"method={method!r} is none", instead=f"one of {', '.join(METHODS)}")
        if positions not in get_args(Positions):
            raise ExtractionError(
                f"positions={positions!r} is none", instead=f"one of {', '.join(get_args(Positions))}"
            )
        each = require_rows(batch_size) or 1
        places = _places(model, sites, layers)
        found = _labelled(data, model, positions)
        pairs = [_pair(row, positions) for row in found]
        if method == "actadd" and len(pairs) != 1:
            raise ExtractionError(
                f"actadd is made of one pair, and these are {len(pairs)}",
                instead='data[:1], or method="mean_difference"',
            )
        gathered = _gathered(model, places, pairs, method, each, seed, progress)
        directions: dict[Place, Tensor] = {}
        scale: dict[Place, float] = {}
        diagnostics: dict[Place, dict[str, float]] = {}
        compared: dict[Place, float] = {}
        for site, numbers in places.items():
            moments = gathered[site]
            for row, layer in enumerate(numbers):
                place = (site, layer)
                vector, told = vector_of(moments, row, method, seed, written(place))
                directions[place] = vector
                size = scale[place] = float(moments.scale[row])
                agreement, separation = moments.agreement(row), moments.separation(row, vector)
                if agreement is not None:
                    told["agreement"] = agreement
                if separation is not None:
                    told["separation"] = separation
                diagnostics[place] = told
                # Of controls the contrast counts that they are compared with: a shuffled one may well be short.
                length = moments.mean[row] if method in CONTROLS else vector
                compared[place] = float(length.norm()) / size if size > 0 else 0.0
        _guard(compared, positions, at)
        return SteeringVector(
            directions,
            Facts.of(
                model,
                method=method,
                positions=positions,
                rows=len(pairs),
                data=found.digest,
                template=name_of(found.data.template),
                seed=seed,
                scale=scale,
                diagnostics=diagnostics,
            ),
        )


def _places(model: Model, sites: Any, layers: Any) -> dict[str, tuple[int, ...]]:
    """By site the layers that are wanted, as numbers; the library's own errors for what there is not."""
    names: dict[str, None] = {}
    given = (sites,) if isinstance(sites, str) else tuple(cast("Iterable[Any]", sites))
    for site in given:
        name = canonical(site)
        if name is None:
            raise ExtractionError(
                f"{site!r} is no site of a layer with one axis of numbers at each position",
                instead='sites=["post_ln", "resid_post"]; model.sites() lists them',
            )
        names[name] = None
    count = model.n_layers
    if isinstance(layers, str) and layers != "all":
        raise ExtractionError(f"layers={layers!r} are none", instead='layers="all", or range(10, 20)')
    wanted = range(count) if layers == "all" else (layers,) if isinstance(layers, int) else tuple(layers)
    numbers: dict[int, None] = {}
    for layer in wanted:
        if isinstance(layer, bool) or not isinstance(layer, int) or not -count <= layer < count:
            raise ExtractionError(
                f"there is no layer {layer!r}: the model has {count}", instead=f"layers=range({count})"
            )
        numbers[layer % count] = None
    if not names or not numbers:
        raise ExtractionError("no place was named", instead='sites="resid_post", layers="all"')
    ordered = tuple(sorted(numbers))
    for name in names:
        for layer in ordered:
            width_of(model, (name, layer))
    return dict.fromkeys(names, ordered)


def _labelled(data: Any, model: Model, positions: str) -> Labelled:
    if isinstance(data, Labelled):
        if positions in ("last", "mean"):
            return labelled(data.data, model, free=True)
        return data
    if not isinstance(data, Contrast):
        data = Contrast.pairs(data)
    return labelled(data, model, free=positions in ("last", "mean"))


def _pair(row: Any, positions: str) -> _Pair:
    one, other, label = row.positive, row.negative, row.label
    match positions:
        case "label":
            return _Pair(one[: label + 1], other[: label + 1])
        case "decision":
            if label == 0:
                raise ExtractionError(
                    f"row {row.row} has no token before its label", instead="a prompt of at least one token"
                )
            return _Pair(one[:label], other[:label])
        case "mean":
            return _Pair(one, other, (len(one) - label, len(other) - label))
        case _:
            return _Pair(one, other)


def _gathered(
    model: Model,
    places: dict[str, tuple[int, ...]],
    pairs: Sequence[_Pair],
    method: str,
    each: int,
    seed: int,
    progress: bool | None,
) -> dict[str, Moments]:
    """One pass over the pairs, those of like lengths together."""
    draw = random.Random(seed)
    count = len(pairs)
    sampled = frozenset(draw.sample(range(count), min(count, SAMPLED)))
    signs = None
    if method == "shuffled":
        exchanged = set(draw.sample(range(count), count // 2))
        signs = torch.tensor([-1 if number in exchanged else 1 for number in range(count)])
    gathered = {
        site: Moments(
            len(layers),
            width_of(model, (site, layers[0])),
            count,
            differences=method in ("pca", "pairwise_pca"),
            within=method == "lda",
            rows=method == "logistic",
            signs=signs,
            sampled=sampled,
        )
        for site, layers in places.items()
    }
    order = sorted(range(count), key=lambda number: pairs[number].length)
    batches = [order[start : start + each] for start in range(0, count, each)]
    for numbers in watched(batches, list(map(len, batches)), "pair", progress):
        for site, positive, negative in _activations(model, places, [pairs[number] for number in numbers]):
            gathered[site].add(numbers, positive, negative)
    return gathered


def _activations(
    model: Model, places: dict[str, tuple[int, ...]], pairs: Sequence[_Pair]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """For each site, what the model has at the layers for both texts of each pair: twice [layers, pairs, width]."""
    ids = [list(pair.positive) for pair in pairs] + [list(pair.negative) for pair in pairs]
    reads = [pair.read[0] for pair in pairs] + [pair.read[1] for pair in pairs]
    several = set(reads) != {1}
    longest = max(map(len, ids))
    last = torch.arange(longest) >= longest - torch.tensor(reads)[:, None]
    with model.trace(ids) as t:
        for site, layers in places.items():
            value = getattr(model.layers[list(layers)], site)
            (value.tok[last] if several else value[:, -1]).save(site)
    for site in places:
        found: Tensor = t[site]
        if several:  # [layers, tokens of all rows, width]
            found = torch.stack([part.double().mean(1) for part in found.split(reads, dim=1)], dim=1)
        yield site, found[:, : len(pairs)], found[:, len(pairs) :]


def _guard(compared: dict[Place, float], positions: str, at: Location) -> None:
    """Refuses vectors that are nothing but rounding, and warns of places where they are."""
    short = [place for place, share in compared.items() if not share >= NOTHING]
    if not short:
        return
    told = ", ".join(f"{written(place)} ({compared[place]:.1e})" for place in short[:4])
    told += f" and {len(short) - 4} more" if len(short) > 4 else ""
    if len(short) == len(compared):
        raise ZeroVectorError(
            f"the two answers do not differ where they were read (positions={positions!r}): the vectors have less than "
            f"{NOTHING} of the mean activation, at {told}",
            instead='positions="label", where the answers differ; data.show(model) marks it',
        )
    warnings.warn_explicit(
        ZeroVectorWarning(
            f"the vectors of {len(short)} of {len(compared)} places have less than {NOTHING} of the mean activation "
            f"there, which is nothing to steer with: {told}"
        ),
        None,
        at.filename,
        at.line,
    )
