"""What is told of a steering vector before it is tried."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

from tracelens import errors
from tracelens.steering import Facts, SteeringVector

A, B, C = (("resid_post", layer) for layer in (1, 2, 4))
DIRECTIONS = {A: [3.0, 4.0, 0.0], B: [4.0, -3.0, 0.0], C: [0.0, 6.0, 8.0]}
FACTS = Facts(
    model="m",
    method="mean_difference",
    positions="label",
    rows=20,
    data="0123456789abcdef",
    seed=1,
    scale={A: 10.0, B: 2.5},
    diagnostics={A: {"agreement": 0.5, "separation": 2.0}, C: {"agreement": 0.25}},
)


def test_the_numbers_are_norms_shares_and_diagnostics() -> None:
    report = SteeringVector(DIRECTIONS, FACTS).report()
    assert report.columns == ("norm", "of activations", "agreement", "separation")
    assert report.numbers(A) == {"norm": 5.0, "of activations": 0.5, "agreement": 0.5, "separation": 2.0}
    assert report.numbers(B) == {"norm": 5.0, "of activations": 2.0}
    assert report.numbers(C) == {"norm": 10.0, "agreement": 0.25}
    with pytest.raises(errors.SteeringSelectionError):
        report.numbers(("resid_post", 3))
    lines = repr(report).splitlines()
    assert lines[0] == "steering vector of m, mean_difference, at label, 20 rows, data 0123456789ab, seed 1"
    assert lines[2].split() == ["layers[1].resid_post", "5", "0.5", "0.5", "2"]
    assert lines[3].split() == ["layers[2].resid_post", "5", "2"]
    assert lines[5] == (
        "resid_post: cosine between neighbouring layers -0.18 on average, least -0.36 between 2 and 4"
    )
    table = report.to_pandas()
    assert list(table.columns) == ["site", "layer", *report.columns]
    assert table["of activations"].tolist()[:2] == [0.5, 2.0]
    assert math.isnan(table["of activations"][2])


def test_cosines_of_one_sites_layers(tmp_path: Path) -> None:
    both = SteeringVector({**DIRECTIONS, ("post_ln", 1): [1.0, 1.0, 1.0]})
    cosines = both.report().cosines("resid_post")
    wanted = torch.tensor([[1, 0, 0.48], [0, 1, -0.36], [0.48, -0.36, 1]], dtype=torch.float64)
    torch.testing.assert_close(cosines, wanted, rtol=0, atol=1e-7)
    with pytest.raises(errors.SteeringSelectionError, match="one site"):
        both.report().cosines()
    picture = both.report().plot("resid_post")
    drawn = ET.fromstring(picture.svg)
    said = [title.text for title in drawn.iter("{http://www.w3.org/2000/svg}title")]
    assert "layers 2 and 4: -0.360" in said
    assert picture.save(tmp_path / "v.svg").exists()
    page = both.report()._repr_html_()
    assert page.count("<svg") == 1  # of the site that has several layers
    zero = SteeringVector({A: [1.0, 0.0], B: [0.0, 0.0]}).report()
    assert zero.cosines()[0, 1].isnan()
    assert "<svg" in zero._repr_html_()
