"""A lens in a terminal: a table that fits, aligned also under wide letters, and says what it leaves out."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from tests.lens.results_by_hand import by_hand
from tracelens.token_texts import columns, visible

LENS = by_hand(("resid_post",), layers=20)


@pytest.mark.parametrize("width", [30, 40, 60, 80, 100, 160, 400])
@pytest.mark.parametrize("statistic", [None, "entropy"])
def test_a_table_is_no_wider_than_the_terminal(width: int, statistic: str | None) -> None:
    lines = LENS.table(statistic, width=width).splitlines()
    first = next(at for at, line in enumerate(lines) if line.startswith("position"))
    body = [line for line in lines[first:] if not line.startswith("left out")]
    assert len(body) == 18
    assert max(map(columns, body)) <= width
    shown = re.findall(r"\d+", body[0])
    assert shown == [str(at) for at in range(13 - len(shown), 13)]
    if len(shown) == 13:
        assert width > 130
        assert "position" not in lines[-1].partition(";")[0]
    else:
        assert max(map(columns, body)) > width - 20, "another one would have fitted"
        assert f"positions 0 to {12 - len(shown)}" in lines[-1]


def test_a_table_shows_the_likeliest_tokens() -> None:
    lines = LENS.at(positions=[5, 6]).table().splitlines()
    assert lines[0] == "Logit lens of tiny: resid_post; 20 layers x 2 positions"
    assert lines[2].split() == ["token", "·Paris", "."]
    assert lines[3].split() == [
        "layer",
        "19",
        *(visible(LENS.text_of[int(id)]) for id in LENS.top_ids[0, 19, 5:7, 0]),
    ]
    assert lines[-2].startswith("layer 0 ")
    assert lines[-1].startswith("left out: 4 of 20 layers; ")


def test_a_statistic_stands_beside_the_token() -> None:
    lines = LENS.at(layers=-1, positions=[4]).table("log_prob_difference", " Paris", " Rome").splitlines()
    assert "log-probability of ' Paris' minus that of ' Rome'" in lines[1]
    assert lines[-1].endswith(f" {float(LENS.log_prob_difference(' Paris', ' Rome')[0, -1, 4]):.3g}")
    assert LENS.at(layers=-1, positions=[12]).table("rank").endswith(" -")


def test_generated_text_begins_behind_a_bar() -> None:
    lines = LENS.table().splitlines()
    assert lines[1].index("| 8") == lines[2].index("| ·capital")
    assert "|" not in LENS.at(positions=slice(0, 8)).table()
    assert LENS.at(positions=slice(8, None)).table().splitlines()[1].startswith("position  | 8")


def test_wide_letters_keep_the_columns_apart() -> None:
    wide = replace(LENS, text_of={token: "東京" if token % 2 else " é́" for token in LENS.text_of})
    lines = wide.table().splitlines()[1:-1]
    places = [columns(line[: line.index("| ")]) for line in lines]
    assert len(set(places)) == 1


def test_a_component_has_a_table_of_its_own() -> None:
    text = repr(by_hand(layers=20))
    assert "\nattn_out:\n" in text
    assert "\nresid_post:\n" in text
    assert len(text.splitlines()) < 30
