"""Making steering vectors: one pass over contrast data, for all layers and sites at once."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from torch import Tensor

from tracelens.errors import Blaming, ExtractionError, LeftOutWarning, ZeroVectorError, ZeroVectorWarning
from tracelens.location import Location, here
from tracelens.slices import require_rows
from tracelens.steering.contrast import Contrast
from tracelens.steering.directions import require_model, require_site, width_of
from tracelens.steering.estimators import CONTROLS, METHODS, UNPAIRED, Method, vector_of
from tracelens.steering.facts import Facts, Place, written
from tracelens.steering.gathering import Positions, gathered, sides_of
from tracelens.steering.labels import Labelled
from tracelens.steering.unpaired import Unpaired
from tracelens.steering.vector import SteeringVector

if TYPE_CHECKING:
    from tracelens.model import Model

NOTHING = 1e-3
"""A vector shorter than this, beside the activations that it was made of, is none."""


def extract(
    model: Model,
    data: Contrast | Labelled | Unpaired | Sequence[Sequence[str]],
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

    ``data``: contrast data, or ``(prompt, positive, negative)`` for each pair; or texts of two classes that do not come
    in pairs (:class:`Unpaired`). ``sites``, ``layers``: the places, all of which one pass over the data serves; layers
    count from 0, and from the end with a minus.

    ``positions``: where the activations of both answers of a pair are read. At the ``"label"``, the first token in
    which the two differ; at the ``"decision"`` before it, where the model has not seen the answer yet and the two do
    not differ; at the ``"last"`` token of each; or their ``"mean"`` over the tokens from the first that differs to the
    last, for answers of free text. Texts that do not come in pairs have a ``"last"`` token, and a ``"mean"`` over all.

    ``method``, with d a pair's difference a(x+) - a(x-):

    * ``"mean_difference"``: the mean of d (CAA, Panickssery et al. 2023, arXiv:2312.06681). ``"unpaired"``: the
      difference of the classes' means, which for pairs is the same (as for refusal, Arditi et al. 2024,
      arXiv:2406.11717). ``"actadd"``: d of one single pair (Turner et al. 2023, arXiv:2308.10248).
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
    (:class:`~tracelens.errors.ZeroVectorWarning`), as where rows without a label are left out
    (:class:`~tracelens.errors.LeftOutWarning`).

    >>> v = tl.steering.extract(model, data.train, sites=["post_ln"], layers=range(10, 20))   # doctest: +SKIP
    >>> v["post_ln", 12].shape                                                                # doctest: +SKIP
    torch.Size([576])
    """
    at = here()
    with Blaming(at):
        require_model(model)
        if method not in METHODS:
            raise ExtractionError(f"method={method!r} is none", instead=f"one of {', '.join(METHODS)}")
        if positions not in get_args(Positions):
            raise ExtractionError(
                f"positions={positions!r} is none", instead=f"one of {', '.join(get_args(Positions))}"
            )
        each = require_rows(batch_size) or 1
        places = _places(model, sites, layers)
        sides = sides_of(data, model, positions)
        if method == "actadd" and len(sides.positive) != 1:
            raise ExtractionError(
                f"actadd is made of one pair, and these are {len(sides.positive)}",
                instead='data[:1], or method="mean_difference"',
            )
        if not sides.paired and method not in UNPAIRED:
            raise ExtractionError(
                f"{method} is made of pairs, and these texts do not come in pairs",
                instead=f"method= one of {', '.join(UNPAIRED)}",
            )
        found = gathered(model, places, sides, method, each, seed, progress)
        directions: dict[Place, Tensor] = {}
        scale: dict[Place, float] = {}
        diagnostics: dict[Place, dict[str, float]] = {}
        compared: dict[Place, float] = {}
        for site, numbers in places.items():
            moments = found[site]
            for row, layer in enumerate(numbers):
                place = (site, layer)
                if not moments.norms[row].isfinite():
                    raise ExtractionError(
                        f"the activations at {written(place)} are not finite numbers",
                        instead="a dtype with room for them, such as torch.bfloat16 in place of torch.float16",
                    )
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
        if sides.left_out:
            left, kept = sum(sides.left_out.values()), len(sides.positive)
            reasons = "; ".join(f"{reason} ({count})" for reason, count in sides.left_out.items())
            _warn(LeftOutWarning(f"{left} of {left + kept} rows are left out: {reasons}"), at)
        return SteeringVector(
            directions,
            Facts.of(
                model,
                method=method,
                positions=positions,
                rows=len(sides.positive) if sides.paired else len(sides.positive) + len(sides.negative),
                data=sides.digest,
                row_digests=sides.row_digests,
                template=sides.template,
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
        names[require_site(site)] = None
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
    _warn(
        ZeroVectorWarning(
            f"the vectors of {len(short)} of {len(compared)} places have less than {NOTHING} of the mean activation "
            f"there, which is nothing to steer with: {told}"
        ),
        at,
    )


def _warn(warning: Warning, at: Location) -> None:
    warnings.warn_explicit(warning, None, at.filename, at.line)
