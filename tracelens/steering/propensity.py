"""What rows of contrast data say at the decision position, with many vectors at many strengths.

Where only the decision position is changed, everything before it is the same however it is changed. Then a pass
computes a batch of prompts once, with many ends of each (``model.prepare(prompt, branches=...)``): a vector at a
strength is one more token of the pass, not one more pass. Where that cannot be had, each is a pass by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from tracelens.errors import PromptError, PromptTooLongError
from tracelens.progress import watched
from tracelens.steering.operators import operator_named

if TYPE_CHECKING:
    from tracelens.model import Model
    from tracelens.steering.labels import LabelledRow
    from tracelens.steering.vector import SteeringVector

Numbers = NDArray[np.float64]

ENDS = 256
"""So many ends a pass has at most: their attention over one another is computed and thrown away."""


@dataclass(frozen=True, eq=False)
class End:
    """One way to end the prompts: a vector of one place at a strength; without a vector, as the model does it.

    ``labels``: whether the probability of the label tokens is wanted too, which takes the whole vocabulary.
    """

    vector: SteeringVector | None
    strength: float = 0.0
    labels: bool = False


@dataclass(frozen=True, eq=False)
class Readings:
    """What was read for each row and end, [rows, ends].

    ``propensity``: the logit of the positive label less that of the negative one. ``mass``: the probability of all
    label tokens together, nan for ends that did not ask. ``first``: whether the positive label is the likeliest of
    them. ``plainly``: why every end was a pass of its own; ``None`` where many were computed in one.
    """

    propensity: Numbers
    mass: Numbers
    first: NDArray[np.bool_]
    plainly: str | None


def readings(
    model: Model,
    rows: Sequence[LabelledRow],
    ends: Sequence[End],
    *,
    positions: Any = "decision",
    operator: str = "add",
    settings: Mapping[str, Any] | None = None,
    batch_size: int = 8,
    quick: bool | None = None,
    progress: bool | None = None,
) -> Readings:
    """Reads the rows with every end. ``quick``: many ends in one pass, or not; by default where the model allows it."""
    given = settings or {}
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row].prompt))  # as little padding as possible
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    plainly = _why_plainly(model, rows[order[0]], positions, quick)
    found = Readings(
        np.full((len(rows), len(ends)), np.nan),
        np.full((len(rows), len(ends)), np.nan),
        np.zeros((len(rows), len(ends)), dtype=bool),
        plainly,
    )
    parts = _parts(len(ends), ENDS) if plainly is None else [range(end, end + 1) for end in range(len(ends))]
    work = [(batch, part) for batch in batches for part in parts]
    sizes = [len(batch) * len(part) for batch, part in work]
    for batch, part in watched(work, sizes, "prompt", progress):
        own, chosen = [rows[row] for row in batch], [ends[end] for end in part]
        if plainly is None:
            read = _together(model, own, chosen, operator, given)
        else:
            read = _alone(model, own, chosen[0], positions, operator, given)
        for name, numbers in read.items():
            getattr(found, name)[np.ix_(batch, part)] = numbers.numpy()
    return found


def _why_plainly(model: Model, longest: LabelledRow, positions: Any, quick: bool | None) -> str | None:
    """Why not many ends in one pass; ``None`` where they can be."""
    if not (isinstance(positions, str) and positions == "decision"):
        reason = "not only the decision position is changed"
    elif quick is False:
        return "it was asked for"
    else:
        try:
            model.prepare([list(longest.prompt)], branches=2)
        except PromptTooLongError:
            raise
        except PromptError as error:
            reason = error.problem
        else:
            return None
    if quick:
        raise PromptError(
            f"quick=True, and many ends cannot be had in one pass: {reason}",
            instead="quick=None, which takes the plain way where it has to",
        )
    return reason


def _parts(count: int, most: int) -> list[range]:
    """Runs of numbers, of about one length."""
    parts = -(-count // most)
    edges = [round(part * count / parts) for part in range(parts + 1)]
    return [range(start, stop) for start, stop in pairwise(edges)]


# --- passes ----------------------------------------------------------------------------------------------------------


def _together(
    model: Model, rows: Sequence[LabelledRow], ends: Sequence[End], operator: str, settings: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """All ends in one pass: each a copy of the last token, written to by itself."""
    count = len(ends)

    def tokens(first: int, length: int) -> slice:
        return slice(first - count, first - count + length or None)

    prompt = model.prepare([list(row.prompt) for row in rows], branches=count)
    with model.trace(prompt):
        for first, vector, strengths in _groups(ends):
            change = operator_named(operator).prepared(vector, settings)
            (place,) = vector.places
            handle = getattr(model.layers[place[1]], place[0])
            chosen = tokens(first, len(strengths))
            factor = torch.tensor(strengths, dtype=torch.float32)[:, None]
            handle.tok[chosen] = change(handle.tok[chosen], place, factor)
        state = model.final_norm.tok[tokens(0, count)]
        difference = _difference(model, state, rows).save()
        wanted = [number for number, end in enumerate(ends) if end.labels]
        runs = _runs(wanted)
        probabilities = [
            _probabilities(model, model.final_norm.tok[tokens(run.start, len(run))], rows) for run in runs
        ]
        saved = [[one.save() for one in found] for found in probabilities]
    mass = torch.full((len(rows), count), float("nan"))
    first = torch.zeros((len(rows), count), dtype=torch.bool)
    for run, found in zip(runs, saved, strict=True):
        columns = slice(run.start, run.stop)
        mass[:, columns], first[:, columns] = _labels([one.value for one in found])
    return {"propensity": difference.value, "mass": mass, "first": first}


def _alone(
    model: Model,
    rows: Sequence[LabelledRow],
    end: End,
    positions: Any,
    operator: str,
    settings: Mapping[str, Any],
) -> dict[str, torch.Tensor]:
    """One end in a pass of its own."""
    where = "last_prompt_token" if isinstance(positions, str) and positions == "decision" else positions
    with model.trace([list(row.prompt) for row in rows]) as t:
        if end.vector is not None:
            end.vector.apply(t, end.strength, positions=where, operator=operator, **settings)
        state = model.final_norm[:, -1:]
        difference = _difference(model, state, rows).save()
        found = [one.save() for one in _probabilities(model, state, rows)] if end.labels else []
    read = {"propensity": difference.value}
    if end.labels:
        read["mass"], read["first"] = _labels([one.value for one in found])
    return read


def _groups(ends: Sequence[End]) -> list[tuple[int, SteeringVector, list[float]]]:
    """Neighbours with one vector: where they begin, the vector, and the strengths."""
    found: list[tuple[int, SteeringVector, list[float]]] = []
    for _, several in groupby(enumerate(ends), key=lambda item: id(item[1].vector)):
        members = list(several)
        vector = members[0][1].vector
        if vector is not None:
            found.append((members[0][0], vector, [end.strength for _, end in members]))
    return found


def _runs(numbers: Sequence[int]) -> list[range]:
    """Neighbouring numbers as runs."""
    found: list[range] = []
    for number in numbers:
        if found and found[-1].stop == number:
            found[-1] = range(found[-1].start, number + 1)
        else:
            found.append(range(number, number + 1))
    return found


# --- what is read ----------------------------------------------------------------------------------------------------


def _difference(model: Model, state: Any, rows: Sequence[LabelledRow]) -> Any:
    """The logit of the positive label less that of the negative one, [B, ends]: two rows of the head are read."""
    lens = model.lens(state)
    one = torch.tensor([[row.positive_token] for row in rows])
    other = torch.tensor([[row.negative_token] for row in rows])
    return lens.log_prob_difference(one, other)


def _probabilities(model: Model, state: Any, rows: Sequence[LabelledRow]) -> list[Any]:
    """The log-probability [B, ends] of the positive label, and of each other one; nan where a row has fewer."""
    lens = model.lens(state)
    others = [[token for token in row.options if token != row.positive_token] for row in rows]
    most = max(map(len, others))
    padded = [[*tokens, *[-1] * (most - len(tokens))] for tokens in others]
    columns = [[row.positive_token for row in rows], *map(list, zip(*padded, strict=True))]
    return [lens.log_prob(torch.tensor(column)[:, None]) for column in columns]


def _labels(log_probs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The probability of all labels together, and whether the first of them is the likeliest."""
    stacked = torch.stack(list(log_probs))
    mass = stacked.double().exp().nansum(0)
    others = stacked[1:].nan_to_num(float("-inf")).amax(0)
    return mass, stacked[0] > others
