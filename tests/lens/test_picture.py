"""Pictures of lenses: what stands in them, and that they are whole SVG."""

from __future__ import annotations

import base64
import re
import struct
import xml.etree.ElementTree as ET
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.lens.results_by_hand import by_hand
from tests.lens.test_page import NASTY, nasty
from tracelens.errors import LensFileError, LensSelectionError
from tracelens.lens.result import LensResult
from tracelens.viz.drawing import PALEST
from tracelens.viz.heat_map import WORDS, Picture
from tracelens.viz.scales import scale_of

LENS = by_hand()
SVG = "{http://www.w3.org/2000/svg}"


def read(picture: Picture) -> tuple[ET.Element, list[str]]:
    """The picture's tree, and what it says cell by cell."""
    tree = ET.fromstring(picture.svg)
    return tree, [found.text or "" for found in tree.iter(f"{SVG}title") if found.text]


def test_a_cell_has_its_token_and_its_shade() -> None:
    lens = LENS["resid_post"]
    tree, said = read(lens.plot("entropy"))
    assert len(said) == 6 * 13
    assert said[0] == (
        f"layer 5, after The: {lens.text_of[int(lens.top_ids[0, 5, 0, 0])]} {float(lens.entropy[0, 5, 0]):.3g}"
    )
    scale = scale_of(lens.described("entropy").kind, lens.entropy)
    groups = [
        group for group in tree.iter(f"{SVG}g") if (group.findtext(f"{SVG}title") or "").startswith("layer")
    ]
    opacities = [float(group[1].attrib["fill-opacity"]) for group in groups]
    expected = [
        max(float(scale.shade(value) or 0), PALEST) for value in lens.entropy[0].flip(0).reshape(-1).tolist()
    ]
    assert opacities == pytest.approx(expected, abs=0.006)
    assert len(set(opacities)) > 10
    assert "shade: entropy (nats)" in [text.text for text in tree.iter(f"{SVG}text")]
    assert len(list(tree.iter(f"{SVG}line"))) == 1, "where the generated text begins"


def test_components_are_drawn_below_one_another() -> None:
    tree, said = read(LENS.plot())
    assert len(said) == 2 * 6 * 13
    texts = [text.text for text in tree.iter(f"{SVG}text")]
    assert {"attn_out", "resid_post"} <= set(texts)
    cells = [rect.attrib for rect in tree.iter(f"{SVG}rect")][1:]  # the first is the page
    assert max(int(rect["y"]) + int(rect["height"]) for rect in cells) <= int(tree.attrib["height"])
    assert max(int(rect["x"]) + int(rect["width"]) for rect in cells) <= int(tree.attrib["width"])


def test_where_there_is_no_number_there_is_no_shade() -> None:
    tree, _ = read(LENS["resid_post"].at(layers=0).plot("rank"))
    groups = [
        group for group in tree.iter(f"{SVG}g") if (group.findtext(f"{SVG}title") or "").startswith("layer")
    ]
    assert [group[1].attrib["fill-opacity"] == "0" for group in groups] == [False] * 12 + [True]


def test_what_falls_is_red_and_what_grows_is_blue() -> None:
    change = torch.linspace(-1, 1, 13).expand(1, 6, 13)
    lens = LENS["resid_post"]
    other = replace(lens, statistics={**lens.statistics, "entropy": lens.entropy + change})
    tree, said = read(lens.compare(other, ("plain", "steered")).plot("entropy"))
    groups = [
        group for group in tree.iter(f"{SVG}g") if (group.findtext(f"{SVG}title") or "").startswith("layer")
    ]
    row = [group[1].attrib["fill"] for group in groups[:13]]
    assert len(set(row[:6])) == 1
    assert len(set(row[7:])) == 1
    assert row[0] != row[-1]
    assert said[0].endswith(" -1")


def test_a_long_text_is_one_picture_of_shades() -> None:
    T = WORDS + 1
    logits = torch.randn(1, 4, T, 9, generator=torch.Generator().manual_seed(0)) * 3
    lens = LensResult.from_logits(logits, [1] * T, top_k=1, n_prompt=30)
    tree, said = read(lens.plot("top_prob"))
    assert not said
    (image,) = tree.iter(f"{SVG}image")
    png = base64.b64decode(image.attrib["href"].partition("base64,")[2])
    assert struct.unpack(">II", png[16:24]) == (T, 4)
    size = struct.unpack(">I", png[33:37])[0]
    data = zlib.decompress(png[41 : 41 + size])
    reds = torch.tensor(list(data)).view(4, 3 * T + 1)[:, 1::3]
    expected = 255 + (0x25 - 255) * lens.statistic("top_prob")[0].flip(0)
    torch.testing.assert_close(reds.float(), expected, rtol=0, atol=0.51)
    assert image.attrib["width"] == str(16 * T)


def test_a_picture_of_fifteen_hundred_positions_is_small() -> None:
    lens = LensResult.from_logits(torch.randn(1, 80, 1500, 4), [1] * 1500, top_k=1)
    assert len(lens.plot("entropy").svg) < 600_000


def test_markup_is_text() -> None:
    _, said = read(nasty().plot())
    assert any("</script>" in text for text in said)
    assert NASTY[0] not in nasty().plot().svg


def test_a_picture_is_written_as_svg(tmp_path: Path) -> None:
    picture = LENS.plot("kl")
    path = picture.save(tmp_path / "kl.svg")
    assert path.read_text() == picture.svg == picture._repr_svg_()
    assert re.fullmatch(r"<picture of KL.*: \.save\(path\) writes it as SVG>", repr(picture))
    with pytest.raises(LensFileError, match="pictures are SVG") as caught:
        picture.save(tmp_path / "kl.png")
    assert caught.value.at is not None
    with pytest.raises(LensSelectionError):
        LENS.plot("entropie")
