"""Pictures of what lenses read: of one run, and of what changes from one to another."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tracelens.lens.terminal import title
from tracelens.viz.heat_map import Panel, Picture, heat_map
from tracelens.viz.scales import scale_of

if TYPE_CHECKING:
    from tracelens.lens.comparison import LensComparison
    from tracelens.lens.result import LensResult


def of_result(result: LensResult, *words: str) -> Picture:
    """A statistic of each component, layer and position, with the likeliest tokens."""
    values, described = result.statistic(*words), result.described(*words)
    best = result.top_ids[..., 0].tolist()
    panels = [
        Panel(name, values[at].double(), [[result.text_of[token] for token in row] for row in best[at]])
        for at, name in enumerate(result.components)
    ]
    return heat_map(
        title(result),
        panels,
        layers=result.layers,
        positions=result.positions,
        tokens=result.tokens,
        statistic=described,
        scale=scale_of(described.kind, values),
        prompt=result.n_prompt,
    )


def of_comparison(both: LensComparison, *words: str) -> Picture:
    """The change of a statistic, with the second run's likeliest tokens, marked ``→`` where the first has another."""
    values, described = both.statistic(*words), both.described(*words)
    same = both.same_top.tolist()
    best = both.second.top_ids[..., 0].tolist()
    panels = [
        Panel(
            name,
            values[at].double(),
            [
                [
                    both.second.text_of[token] if kept else f"→{both.second.text_of[token]}"
                    for token, kept in zip(*row, strict=True)
                ]
                for row in zip(best[at], same[at], strict=True)
            ],
        )
        for at, name in enumerate(both.first.components)
    ]
    return heat_map(
        f"{title(both.first)}; {both.names[0]} → {both.names[1]}",
        panels,
        layers=both.first.layers,
        positions=both.first.positions,
        tokens=both.first.tokens,
        statistic=described,
        scale=scale_of(described.kind, values),
        prompt=both.first.n_prompt,
    )
