"""The figure of a curve shows its numbers: every row a dot, what falls in red, and nothing of a text as markup."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from tests.steering.test_curve import curve
from tracelens.viz.axes import Axes, room, ticks
from tracelens.viz.scales import RED

SVG = "{http://www.w3.org/2000/svg}"


def test_every_row_is_a_dot_with_its_slope() -> None:
    found = curve()
    root = ElementTree.fromstring(found.to_svg())
    dots = {
        title.text: circle for circle in root.iter(f"{SVG}circle") for title in circle.iter(f"{SVG}title")
    }
    assert (
        len(dots) == len(list(root.iter(f"{SVG}circle"))) - 6
    )  # all rows stand twice: with the others of their label
    for row, label, slope in zip(found.rows, found.labels, found.slopes, strict=True):
        circle = dots[f"row {row}, {label!r}: {slope:.3f}"]
        assert (circle.attrib["fill"] == RED) == (slope <= 0)
    heights = {
        multiplier: float(dots[f"multiplier {multiplier:g}: {mean:.3f} {_ends(found, at)}"].attrib["cy"])
        for at, (multiplier, mean) in enumerate(zip(found.multipliers, found.mean, strict=True))
    }
    order = sorted(heights, key=lambda one: heights[one])  # the page counts downwards
    assert order == sorted(heights, key=lambda one: -found.mean[found.multipliers.tolist().index(one)])
    words = [element.text for element in root.iter(f"{SVG}text")]
    assert "2 random vectors" in words
    assert any("perplexity" in str(word) for word in words)
    assert not any("perplexity" in str(word) for word in _words(curve(damage=None).to_svg()))


def _ends(found: object, at: int) -> str:
    low, high = found.band
    return f"[{low[at]:.3g}, {high[at]:.3g}]"


def _words(svg: str) -> list[str | None]:
    return [element.text for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_names_are_text(tmp_path: Path) -> None:
    found = curve()
    found = dataclasses.replace(
        found, facts=dataclasses.replace(found.facts, data="<b>&", model="<script>"), labels=("<i>",) * 6
    )
    page = found.to_html(tmp_path / "curve.html").read_text(encoding="utf-8")
    for markup in ("<b>", "<script>", "<i>"):
        assert markup not in page
    assert page.count("<svg") == 1
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")  # nothing is fetched
    assert found._repr_html_().count("<table>") == 2
    ElementTree.fromstring(found.to_svg())


@pytest.mark.parametrize("changes", [{"controls": {}}, {"labels": ("A",) * 6}, {"damage": None}])
def test_what_was_not_measured_is_not_drawn(changes: dict[str, object]) -> None:
    ElementTree.fromstring(curve(**changes).to_svg())


def test_flat_curves_have_a_figure_too() -> None:
    found = curve(propensity=np.zeros((6, 4)), unsteered=np.zeros(6), controls={}, damage=None)
    assert "nan" not in found.to_svg()


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0.0, 0.225) == [0.0, 0.05, 0.1, 0.15, 0.2]
    assert ticks(-7.0, 31.0) == [0.0, 10.0, 20.0, 30.0]
    assert room([1.0, 2.0]) == (-0.12, 2.12)
    assert room([9.0, 10.0], zero=False) == (8.94, 10.06)
    assert room([]) == (-1.0, 1.0)
    axes = Axes(10, 20, 100, 50, (-1.0, 1.0), (0.0, 2.0))
    assert (axes.across(-1.0), axes.across(0.5), axes.up(0.0), axes.up(2.0)) == (10, 85, 70, 20)
