"""The one pass over the data: which tokens of which texts are read, and what is gathered of them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from tracelens.errors import ExtractionError, PromptError
from tracelens.progress import watched
from tracelens.prompted import Prompt
from tracelens.steering.contrast import Contrast, name_of
from tracelens.steering.directions import width_of
from tracelens.steering.labels import Labelled, LabelledRow, labelled
from tracelens.steering.moments import SAMPLED, Moments
from tracelens.steering.unpaired import Unpaired

if TYPE_CHECKING:
    from tracelens.model import Model

Positions = Literal["label", "decision", "last", "mean"]


@dataclass(frozen=True)
class Text:
    """A text as ids, and how many of its last tokens are read: of several, the mean."""

    ids: tuple[int, ...]
    read: int = 1


@dataclass(frozen=True)
class Sides:
    """The texts of both classes, and what they are called.

    ``paired``: the two of one number are a pair. ``left_out``: how many rows have no place among them, by reason.
    ``row_digests``: of the rows that they were made of, where these are contrast data.
    """

    positive: tuple[Text, ...]
    negative: tuple[Text, ...]
    paired: bool
    digest: str
    template: str | None
    left_out: Mapping[str, int]
    row_digests: tuple[str, ...] = ()


def sides_of(data: Any, model: Model, positions: Positions) -> Sides:
    """The texts that a user means, as ids, with the positions that are read."""
    if isinstance(data, Unpaired):
        if positions not in ("last", "mean"):
            raise ExtractionError(
                f"texts that do not come in pairs have no {positions}",
                instead='positions="last", or "mean" over all tokens but the first',
            )
        classes = [
            tuple(_text(ids, positions) for prompt in prompts for ids in _ids(model, prompt))
            for prompts in (data.positive, data.negative)
        ]
        return Sides(*classes, paired=False, digest=data.digest, template=None, left_out={})
    free = positions in ("last", "mean")
    if isinstance(data, Labelled):
        found = labelled(data.data, model, free=True) if free else data
    else:
        found = labelled(data if isinstance(data, Contrast) else Contrast.pairs(data), model, free=free)
    pairs = [pair_of(row, positions) for row in found]
    positive, negative = zip(*pairs, strict=True)
    template = name_of(found.data.template)
    if found.joined:
        template += f", with ids put together in {found.joined} of {len(found)} rows"
    return Sides(positive, negative, True, found.digest, template, found.reasons, found.row_digests)


def _ids(model: Model, prompt: Any) -> list[tuple[int, ...]]:
    batch = model.prepare([prompt]).batch
    return [tuple(batch.tokens(0))]


def _text(ids: tuple[int, ...], positions: Positions) -> Text:
    """A text by itself: its last token, or all but the first.

    The first token is what heads look at that look at nothing. In many models it is a hundred times as large as the
    others, and would be all that a mean shows.
    """
    if positions == "mean" and len(ids) < 2:
        raise ExtractionError(
            f"a text of one token, {list(ids)}, has no mean: the first token of a text is left out of it",
            instead='positions="last", or longer texts',
        )
    return Text(ids, len(ids) - 1 if positions == "mean" else 1)


def pair_of(row: LabelledRow, positions: Positions) -> tuple[Text, Text]:
    """Both texts of a row, as far as they are read."""
    one, other, label = row.positive, row.negative, row.label
    match positions:
        case "label":
            return Text(one[: label + 1]), Text(other[: label + 1])
        case "decision":
            return Text(one[:label]), Text(other[:label])
        case "mean":
            return Text(one, len(one) - label), Text(other, len(other) - label)
        case "last":
            return Text(one), Text(other)


def gathered(
    model: Model,
    places: Mapping[str, tuple[int, ...]],
    sides: Sides,
    method: str,
    each: int,
    seed: int,
    progress: bool | None,
) -> dict[str, Moments]:
    """What each site's estimator needs. Texts of like lengths run together, ``each`` pairs (or texts) in a pass."""
    draw = random.Random(seed)
    positive, negative = sides.positive, sides.negative
    most = max(len(positive), len(negative))
    sampled = frozenset(draw.sample(range(most), min(most, SAMPLED)))
    signs = None
    if method == "shuffled":
        exchanged = set(draw.sample(range(most), most // 2))
        signs = torch.tensor([-1 if number in exchanged else 1 for number in range(most)])
    found = {
        site: Moments(
            len(layers),
            width_of(model, (site, layers[0])),
            (len(positive), len(negative)),
            differences=method in ("pca", "pairwise_pca"),
            within=method == "lda",
            rows=method == "logistic",
            signs=signs,
            sampled=sampled,
        )
        for site, layers in places.items()
    }
    if sides.paired:
        lengths = [max(len(one.ids), len(other.ids)) for one, other in zip(positive, negative, strict=True)]
        for numbers in _batches(lengths, each, "pair", progress):
            one, other = [positive[number] for number in numbers], [negative[number] for number in numbers]
            for site, shows, lacks in read_pairs(model, places, one, other):
                found[site].add(numbers, shows, lacks)
    else:
        for which, texts in enumerate((positive, negative)):
            for numbers in _batches([len(text.ids) for text in texts], each, "text", progress):
                for site, read in _activations(model, places, [texts[number] for number in numbers]):
                    found[site].add_class(which, numbers, read)
    return found


def _batches(lengths: Sequence[int], each: int, unit: str, progress: bool | None) -> Iterator[list[int]]:
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    batches = [order[start : start + each] for start in range(0, len(order), each)]
    yield from watched(batches, list(map(len, batches)), unit, progress)


def read_pairs(
    model: Model, places: Mapping[str, tuple[int, ...]], one: Sequence[Text], other: Sequence[Text]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """For each site, what the model has there for both texts of each pair, at the layers: [layers, pairs, width] twice.

    One forward pass over all of them.
    """
    prompt = _in_one(model, one, other)
    if prompt is None:
        for site, read in _activations(model, places, [*one, *other]):
            yield site, read[:, : len(one)], read[:, len(one) :]
    else:
        for site, read in _ends(model, places, prompt):
            yield site, read[:, :, 0], read[:, :, 1]


def _in_one(model: Model, one: Sequence[Text], other: Sequence[Text]) -> Prompt | None:
    """Pairs that differ in their last token alone as rows with two ends, so that the rest is computed once.

    ``None`` where they differ in more, or the model cannot do that: then each text is a row.
    """
    starts = [list(text.ids[:-1]) for text in one]
    if any(
        text.ids[:-1] != pair.ids[:-1] or text.read + pair.read > 2
        for text, pair in zip(one, other, strict=True)
    ):
        return None
    if not all(starts):
        return None
    ends = [[text.ids[-1], pair.ids[-1]] for text, pair in zip(one, other, strict=True)]
    try:
        return model.prepare(starts, branches=ends)
    except PromptError:  # another kind of attention, or a window that is shorter than the prompts
        return None


def _ends(
    model: Model, places: Mapping[str, tuple[int, ...]], prompt: Prompt
) -> Iterator[tuple[str, Tensor]]:
    """For each site, what the model has there at both ends of each row: [layers, rows, 2, width]."""
    with model.trace(prompt) as t:
        for site, layers in places.items():
            getattr(model.layers[list(layers)], site).tok[-2:].save(site)
    for site in places:
        yield site, t[site]


def _activations(
    model: Model, places: Mapping[str, tuple[int, ...]], texts: Sequence[Text]
) -> Iterator[tuple[str, Tensor]]:
    """For each site, what the model has there for each text, at the layers: [layers, texts, width]."""
    ids, reads = [list(text.ids) for text in texts], [text.read for text in texts]
    several = set(reads) != {1}
    longest = max(map(len, ids))
    last = torch.arange(longest) >= longest - torch.tensor(reads)[:, None]
    with model.trace(ids) as t:
        for site, layers in places.items():
            value = getattr(model.layers[list(layers)], site)
            (value.tok[last] if several else value[:, -1]).save(site)
    for site in places:
        found: Tensor = t[site]
        if several:  # [layers, tokens of all texts, width]
            found = torch.stack([part.double().mean(1) for part in found.split(reads, dim=1)], dim=1)
        yield site, found
