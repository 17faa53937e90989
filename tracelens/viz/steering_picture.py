"""A steering curve as a figure: the mean with its band and the controls, the rows' slopes, and damage."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

import torch

from tracelens.lens.statistics import Kind, Statistic
from tracelens.view import Shown, html
from tracelens.viz.axes import GREY, Axes, room
from tracelens.viz.drawing import opening, text
from tracelens.viz.heat_map import Panel, heat_map
from tracelens.viz.scales import BLUE, RED, scale_of

if TYPE_CHECKING:
    from tracelens.steering.curve import SteeringCurve
    from tracelens.steering.reading import Reading

_WIDTH = 960
_TOP = 84
_TALL = 290
_AMBER = "#b7791f"
_COLOURS = {"random": GREY, "shuffled": _AMBER}


def picture(curve: SteeringCurve) -> str:
    """The whole figure as SVG."""
    height = _TOP + _TALL + 56 + (170 if curve.damage is not None else 0)
    parts = opening(_WIDTH, height)
    parts.append(text(20, 24, curve._title(), size=13, bold=True))
    parts.append(text(20, 44, _summary(curve), colour="#444"))
    parts += _means(curve)
    parts += _slopes(curve)
    if curve.damage is not None:
        parts += _damage(curve, _TOP + _TALL + 86)
    return "".join([*parts, "</svg>"])


def inside(curve: SteeringCurve) -> str:
    """The figure and the numbers, for a notebook or a page."""
    return f'<div><div style="max-width:{_WIDTH}px">{picture(curve)}</div>{html(curve._view())}</div>'


def page(curve: SteeringCurve, beside: Sequence[Shown | str] = ()) -> str:
    """A page by itself; ``beside``: what else stands on it, below."""
    more = "".join(f"<p>{escape(one)}</p>" if isinstance(one, str) else one._repr_html_() for one in beside)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(curve._title())}</title><style>"
        "body{font:14px system-ui,sans-serif;margin:24px;color:#111;background:white}"
        "svg{max-width:100%;height:auto}table{border-collapse:collapse;margin:16px 0}"
        "td,th{text-align:left;padding:3px 14px 3px 0;border-bottom:1px solid #ddd}"
        f"</style></head><body>{inside(curve)}{more}</body></html>"
    )


def _summary(curve: SteeringCurve) -> str:
    share = curve.anti_steerable_interval
    return (
        f"slope {curve.slope:.4g} {curve.interval}; {curve.anti_steerable:.0%} of rows anti-steerable "
        f"[{share.low:.0%}, {share.high:.0%}]; {curve.accuracy:.0%} chosen without steering"
    )


def _means(curve: SteeringCurve) -> list[str]:
    """On the left: the mean curve, its band, and the mean curves of the controls."""
    grid = curve.multipliers.tolist()
    mean, (low, high) = curve.mean.tolist(), (end.tolist() for end in curve.band)
    controls = {name: curves.tolist() for name, curves in curve.controls.items()}
    every = [
        *mean,
        *low,
        *high,
        *(value for curves in controls.values() for line in curves for value in line),
    ]
    axes = Axes(62, _TOP, 400, _TALL, (grid[0], grid[-1]), room(every))
    found = axes.frame(
        across=[(one, f"{one:g}") for one in grid],
        words="mean propensity: logit of the one answer less the other",
        below="multiplier",
    )
    for name, curves in controls.items():
        colour, dash = _COLOURS.get(name, GREY), "4 3" if name == "shuffled" else ""
        found += [axes.curve(grid, line, colour, dash=dash, opacity=0.55) for line in curves]
    found.append(axes.band(grid, low, high, BLUE))
    found.append(axes.curve(grid, mean, BLUE, width=2.2))
    for one, value, *ends in zip(grid, mean, low, high, strict=True):
        said = f"multiplier {one:g}: {value:.3f} [{ends[0]:.3g}, {ends[1]:.3g}]"
        found.append(axes.point(one, value, BLUE, said, radius=3.5))
    legend = [("the vector, with 95% band", BLUE, "")]
    legend += [
        (f"{len(curves)} {name} vectors", _COLOURS.get(name, GREY), "4 3" if name == "shuffled" else "")
        for name, curves in controls.items()
    ]
    for number, (words, colour, dash) in enumerate(legend):
        x, y = 74, _TOP + 16 + 16 * number
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        found.append(
            f'<line x1="{x}" y1="{y - 4}" x2="{x + 20}" y2="{y - 4}" stroke="{colour}" stroke-width="2"{dashed}/>'
        )
        found.append(text(x + 26, y, words, colour="#444", size=10))
    return found


def _slopes(curve: SteeringCurve) -> list[str]:
    """On the right: the slope of every row, by label too, and those of the controls."""
    groups: list[tuple[str, list[float], list[str]]] = []
    rows = [f"row {row}, {label!r}" for row, label in zip(curve.rows, curve.labels, strict=True)]
    groups.append(("all rows", curve.slopes.tolist(), rows))
    if 1 < len(curve.by_label) < 5:
        for label in curve.by_label:
            chosen = [number for number, own in enumerate(curve.labels) if own == label]
            groups.append((repr(label), curve.slopes[chosen].tolist(), [rows[number] for number in chosen]))
    controls = [(name, curve.control_slopes(name).tolist()) for name in curve.controls]
    count = len(groups) + len(controls)
    every = [value for _, values, _ in groups for value in values] + [
        one for _, values in controls for one in values
    ]
    axes = Axes(530, _TOP, 410, _TALL, (-0.5, count - 0.5), room(every))
    names = [name for name, *_ in groups] + [name for name, _ in controls]
    found = axes.frame(
        across=list(enumerate(names)),
        words="slope of each row",
        below="mean and 95% interval; controls: of the mean",
    )
    for number, (_, values, said) in enumerate(groups):
        found.append(axes.outline(number, values, 0.4, BLUE))
        for at, (value, words) in enumerate(zip(values, said, strict=True)):
            found.append(
                axes.point(
                    number + _beside(at),
                    value,
                    RED if value <= 0 else BLUE,
                    f"{words}: {value:.3f}",
                    opacity=0.45,
                )
            )
        mean = sum(values) / len(values)
        interval = curve.interval if not number else list(curve.by_label.values())[number - 1][2]
        found.append(axes.interval(number, *interval, "#111"))
        found.append(axes.point(number, mean, "#111", f"mean {mean:.3f} {interval}", radius=4))
    for number, (name, values) in enumerate(controls, len(groups)):
        found += [
            axes.point(
                number + _beside(at),
                value,
                _COLOURS.get(name, GREY),
                f"{name} {at}: {value:.3f}",
                opacity=0.7,
            )
            for at, value in enumerate(values)
        ]
    return found


def _damage(curve: SteeringCurve, top: int) -> list[str]:
    """Below: KL and perplexity of neutral texts."""
    hurt = curve.damage
    assert hurt is not None
    grid = curve.multipliers.tolist()
    across = [(one, f"{one:g}") for one in grid]
    found: list[str] = []
    for left, width, values, zero, words in (
        (
            62,
            400,
            hurt.kl.tolist(),
            True,
            f"KL from the unsteered model, nats a token ({hurt.texts} neutral texts)",
        ),
        (
            530,
            410,
            hurt.perplexity.tolist(),
            False,
            f"perplexity of these texts, {hurt.unsteered:.4g} unsteered",
        ),
    ):
        axes = Axes(
            left,
            top,
            width,
            90,
            (grid[0], grid[-1]),
            room(values if zero else [*values, hurt.unsteered], zero=zero),
        )
        found += axes.frame(across=across, words=words, below="multiplier")
        if not zero:
            found.append(axes.curve((grid[0], grid[-1]), [hurt.unsteered] * 2, GREY, dash="4 3"))
        found.append(axes.curve(grid, values, RED, width=2))
        found += [
            axes.point(x, y, RED, f"multiplier {x:g}: {y:.4g}", radius=3)
            for x, y in zip(grid, values, strict=True)
        ]
    return found


def _beside(number: int) -> float:
    """Where a dot stands beside the middle: spread evenly, and always alike."""
    return ((number * 0.618034) % 1 - 0.5) * 0.5


def reading(found: Reading) -> str:
    """How far the activations of a text point along a vector: a map for each site."""
    sites = list(dict.fromkeys(site for site, _ in found.places))
    layers = sorted({layer for _, layer in found.places})
    cosines = torch.from_numpy(found.cosines)
    panels: list[Panel] = []
    for site in sites:
        values = torch.full((len(layers), len(found.tokens)), float("nan"), dtype=torch.float64)
        for row, place in enumerate(found.places):
            if place[0] == site:
                values[layers.index(place[1])] = cosines[row]
        words = [["" if one != one else f"{one:.2f}" for one in line] for line in values.tolist()]
        panels.append(Panel(site, values, words))
    statistic = Statistic("cosine", "cosine with the vector", Kind.SIGNED)
    return heat_map(
        f"{found.model or 'activations'} along a steering vector",
        panels,
        layers=layers,
        positions=range(len(found.tokens)),
        tokens=found.tokens,
        statistic=statistic,
        scale=scale_of(Kind.SIGNED, cosines),
    ).svg
