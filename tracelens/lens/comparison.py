"""Two runs of one text, cell by cell: with a steering vector and without, with one lens and another."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tracelens.errors import LensComparisonError
from tracelens.lens.statistics import OF_TOKENS, Kind, Statistic, written
from tracelens.lens.terminal import ROWS, table, title
from tracelens.location import here
from tracelens.token_texts import visible
from tracelens.view import WIDTH

if TYPE_CHECKING:
    import pandas

    from tracelens.lens.result import LensResult
    from tracelens.viz.heat_map import Picture


@dataclass(frozen=True, eq=False, repr=False)
class LensComparison:
    """What a lens reads in two runs of the same tokens: ``second`` beside ``first``.

    Differences are ``second - first``. Made by ``first.compare(second)``; raises
    :class:`~tracelens.errors.LensComparisonError` where tokens, layers or components differ.
    """

    first: LensResult
    second: LensResult
    names: tuple[str, str] = ("first", "second")

    def __post_init__(self) -> None:
        for what in ("components", "layers", "positions"):
            mine, theirs = getattr(self.first, what), getattr(self.second, what)
            if mine != theirs:
                raise _apart(f"the {what} differ: {_short(mine)} and {_short(theirs)}", _INSTEAD[what])
        apart = (self.first.token_ids != self.second.token_ids).nonzero()[:, 0].tolist()
        if apart:
            position = self.first.positions[apart[0]]
            mine, theirs = self.first.tokens[apart[0]], self.second.tokens[apart[0]]
            more = f", and at {len(apart) - 1} more positions" if len(apart) > 1 else ""
            raise _apart(
                f"position {position} has {mine!r} in one run and {theirs!r} in the other{more}",
                _INSTEAD["tokens"],
            )

    @property
    def same_top(self) -> Tensor:
        """Is the likeliest token the same in both runs? [C, L, T] bool."""
        return self.first.top_ids[..., 0] == self.second.top_ids[..., 0]

    @property
    def overlap(self) -> Tensor:
        """The share of the likeliest tokens that both runs have among theirs, [C, L, T] float32, between 0 and 1."""
        mine, theirs = self.first.top_ids, self.second.top_ids
        most = min(mine.shape[-1], theirs.shape[-1])
        common = mine[..., :most, None] == theirs[..., None, :most]
        return common.any(-1).float().mean(-1)

    def statistic(self, name: str, *tokens: str) -> Tensor:
        """By how much a statistic of the second run is larger, [C, L, T] float32; nan where there is none.

        Names as in :meth:`LensResult.statistic`. A rank that falls (a token that comes closer) is negative. What is
        said of the next token is nan where that is not the same one in both runs.
        """
        mine, theirs = self.first.statistic(name, *tokens), self.second.statistic(name, *tokens)
        change = (theirs - mine).float()
        if name in OF_TOKENS and not tokens:
            apart = (self.first.next_ids != self.second.next_ids) | (self.first.next_ids < 0)
            change[..., apart] = torch.nan
        return change

    def described(self, name: str, *tokens: str) -> Statistic:
        """What :meth:`statistic` gives for the same words."""
        known = self.first.described(name, *tokens)
        return Statistic(name, f"change of the {known.label}", Kind.SIGNED)

    @property
    def names_of_statistics(self) -> tuple[str, ...]:
        """The statistics that both runs have."""
        return tuple(name for name in self.first.names if name in self.second.names)

    def table(self, statistic: str | None = None, *tokens: str, width: int = WIDTH, rows: int = ROWS) -> str:
        """Lines of text: in each cell the likeliest token, where they differ of both runs, and a change if named."""
        values = None if statistic is None else self.statistic(statistic, *tokens)
        mine, theirs = (result.top_ids[..., 0].tolist() for result in (self.first, self.second))

        def cell(*at: int) -> str:
            component, layer, position = at
            first, second = mine[component][layer][position], theirs[component][layer][position]
            text = visible(self.first.text_of[first], _TOKEN)
            if first != second:
                text += f" → {visible(self.second.text_of[second], _TOKEN)}"
            return text if values is None else f"{text} {written(float(values[at]), Kind.SIGNED)}"

        heading = (
            f"{title(self.first)}\n{self.names[0]} → {self.names[1]}, where the likeliest token differs: "
        )
        heading += f"{int((~self.same_top).sum())} of {self.same_top.numel()} cells"
        if statistic is not None:
            heading += f"\nin each cell: the {self.described(statistic, *tokens).label}"
        return table(self.first, width=width, rows=rows, heading=heading, cell=cell)

    def __repr__(self) -> str:
        return self.table(rows=max(ROWS // len(self.first.components), ROWS // 4))

    def plot(self, statistic: str = "top_prob", *tokens: str) -> Picture:
        """A picture of how a statistic changes, as :meth:`LensResult.plot`: blue where it grows, red where it falls."""
        from tracelens.viz.lens_picture import of_comparison

        return of_comparison(self, statistic, *tokens)

    def _repr_html_(self) -> str:
        from tracelens.viz.lens_page import embedded, shown

        return embedded([shown(self)])

    def to_html(self, path: str | Path) -> Path:
        """Writes a page as :meth:`LensResult.to_html` does: both runs in each cell, and what has changed."""
        from tracelens.viz.lens_page import page, shown

        Path(path).write_text(page([shown(self)]), encoding="utf-8")
        return Path(path)

    def to_pandas(self) -> pandas.DataFrame:
        """A table with one row per component, layer and position.

        The columns of each run end in its name, ``entropy: steered``; the differences begin with ``change of``.
        """
        frames: list[Any] = [result.to_pandas() for result in (self.first, self.second)]
        joined = frames[0][_SAME].copy()
        for name, frame in zip(self.names, frames, strict=True):
            for column in frame.columns.drop(_SAME):
                joined[f"{column}: {name}"] = frame[column]
        for name in self.names_of_statistics:
            joined[f"change of {name}"] = self.statistic(name).reshape(-1).numpy()
        joined["same_top"] = self.same_top.reshape(-1).numpy()
        joined["overlap"] = self.overlap.reshape(-1).numpy()
        joined.attrs = {}
        return joined


_SAME = ["component", "layer", "position", "token", "token_id", "generated"]
_TOKEN = 9
_INSTEAD = {
    "components": "the components that both have: lens[name].compare(other[name])",
    "layers": "the layers that both have: lens.at(layers=...) and other.at(layers=...)",
    "positions": "the positions that both have: lens.at(positions=...) and other.at(positions=...)",
    "tokens": "the positions at which the text is the same: lens.at(positions=slice(0, lens.n_prompt)) of both",
}


def _short(values: tuple[object, ...]) -> str:
    return str(values) if len(values) <= 12 else f"{str(values[:12])[:-1]}, ... ({len(values)} of them))"


def _apart(problem: str, instead: str) -> LensComparisonError:
    return LensComparisonError(
        f"these two results are not of the same text: {problem}", at=here(), instead=instead
    )
