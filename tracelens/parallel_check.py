"""``model.check_parallel(prompt)``: every site of a model on ranks beside that of the same model in one process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from tracelens.errors import LayoutError, OptionError
from tracelens.ir.sites import KINDS, TEXT, Scope, Site
from tracelens.location import here
from tracelens.ranked import RankedCompiler
from tracelens.view import Line, Shown, Stack, Table, View

if TYPE_CHECKING:
    from tracelens.model import Model


@dataclass(frozen=True, slots=True)
class SiteCheck:
    """How far a site of a model on ranks is from the same site in one process.

    ``error``: the largest difference between two numbers, relative to the largest number of the site; of all layers,
    that of ``layer`` is the largest. ``alike``: have all ranks the same bits of it? ``None`` if each has a part of its
    own, or there is one rank for each layer. ``refused``: why the site could not be read, if it could not.
    """

    site: str
    error: float
    layer: int | None
    within: bool
    alike: bool | None = None
    refused: str | None = None


class ParallelReport(Sequence[SiteCheck], Shown):
    """What :meth:`Model.check_parallel` found: one row for each kind of site, and the logits."""

    def __init__(self, rows: tuple[SiteCheck, ...], tolerance: float, title: str) -> None:
        self.rows = rows
        self.tolerance = tolerance
        self.title = title

    @property
    def ok(self) -> bool:
        """Was every site compared, and is within the tolerance, with the same bits on all ranks that have it?"""
        return all(row.within and row.alike is not False for row in self.rows)

    @property
    def worst(self) -> SiteCheck:
        """The row with the largest error."""
        return max((row for row in self.rows if row.refused is None), key=lambda row: row.error)

    def __getitem__(self, key: int | str | slice) -> SiteCheck | tuple[SiteCheck, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]  # by name, too
        if isinstance(key, str):
            for row in self.rows:
                if row.site == key:
                    return row
            raise KeyError(f"the report has no site {key!r}")
        return self.rows[key]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[SiteCheck]:
        return iter(self.rows)

    def _view(self) -> View:
        rows = tuple(
            (row.site, "-", "-", row.refused, "-")
            if row.refused is not None
            else (
                row.site,
                f"{row.error:.1e}",
                "-" if row.layer is None else str(row.layer),
                "yes" if row.within else "NO",
                "-" if row.alike is None else "yes" if row.alike else "NO",
            )
            for row in self.rows
        )
        verdict = (
            "all sites are"
            if all(row.within for row in self.rows if row.refused is None)
            else "NOT all sites are"
        )
        apart = [row.site for row in self.rows if row.alike is False]
        differ = f"; the RANKS DIFFER in {', '.join(apart)}" if apart else ""
        refused = sum(row.refused is not None for row in self.rows)
        differ += f"; {refused} COULD NOT BE COMPARED" if refused else ""
        return Stack(
            (
                Line(f"{self.title}: {verdict} within {self.tolerance:.1e}{differ}"),
                Table(("site", "largest relative error", "in layer", "within", "ranks alike"), rows),
            )
        )


def check_parallel(model: Model, prompt: Any, tolerance: float | None) -> ParallelReport:
    """Reads every site of every layer on the ranks, and in one process, which has the whole model for that time."""
    parts = model._parts
    if parts is None:
        raise OptionError(
            "check_parallel compares a model on ranks that this process owns with the same model in one process",
            at=here(),
            instead="a model of tl.load(name, tp=2)",
        )
    from tracelens.loading import load

    dtype = model.anatomy.dtype
    if tolerance is None:
        tolerance = max(1e-5, 8 * torch.finfo(dtype).eps)
    # One device: the whole model has to fit there.
    device: dict[str, Any] = {"device_map": "cuda:0"} if parts.ranks.device == "cuda" else {}
    one = load(parts.source, dtype=dtype, **device, **parts.options)
    if isinstance(prompt, str | list) and one.tokenizer is None and model.tokenizer is not None:
        object.__setattr__(one, "_tokenizer", model.tokenizer)
    rows: list[SiteCheck] = []
    for kind in KINDS:
        if kind.scope in TEXT or not model.anatomy.has(Site(kind.name)):
            continue
        layers = model.anatomy.layers_with(kind.name) if kind.scope is Scope.LAYER else (None,)
        try:
            with cast(RankedCompiler, model._compiler).comparing() as compared:
                there = _read(model, prompt, kind.name, layers)
            pairs = zip(there, _read(one, prompt, kind.name, layers), strict=True)
        except LayoutError as error:
            # Of what goes wrong otherwise, nothing would be known of the other sites either.
            rows.append(SiteCheck(kind.name, float("nan"), None, False, refused=error.problem))
            continue
        errors = [_error(there, here_) for there, here_ in pairs]
        largest = max(range(len(errors)), key=errors.__getitem__)
        within, alike = errors[largest] <= tolerance, all(compared) if compared else None
        rows.append(SiteCheck(kind.name, errors[largest], layers[largest], within, alike))
    return ParallelReport(tuple(rows), tolerance, f"{model.describe()}, beside one process")


def _read(model: Model, prompt: Any, name: str, layers: Sequence[int | None]) -> list[torch.Tensor]:
    """A site of all layers, in one pass."""
    with model.trace(prompt):
        saved = [
            (getattr(model, name) if layer is None else getattr(model.layers[layer], name)).save()
            for layer in layers
        ]
    return [_flat(one.value) for one in saved]


def _flat(value: Any) -> torch.Tensor:
    """All numbers of a result, which for prompts of several lengths is one tensor for each."""
    if isinstance(value, torch.Tensor):
        return value.flatten().double()
    return torch.cat([part.flatten().double() for part in cast("list[torch.Tensor]", value)])


def _error(there: torch.Tensor, whole: torch.Tensor) -> float:
    """The largest difference, relative to the largest number; masked scores, which are the same, are not a number."""
    different = there != whole
    if not bool(different.any()):
        return 0.0
    if not bool((there[different].isfinite() & whole[different].isfinite()).all()):
        return float("inf")
    numbers = whole[whole.abs() < _MASKED]
    largest = float(numbers.abs().max()) if numbers.numel() else 0.0
    difference = float((there - whole)[different].abs().max())
    return difference / largest if largest else float("inf")


_MASKED = 1e30
"""Scores from here on stand for minus infinity."""
