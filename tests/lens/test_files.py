"""Lens results in files and tables: each format gives back what was saved, number for number."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.lens.results_by_hand import by_hand, equal, same
from tracelens.errors import LensFileError, MissingExtraError
from tracelens.lens.files import _digits
from tracelens.lens.result import LensResult
from tracelens.lens.results import LensResults

LENS = by_hand()
ENDINGS = ("safetensors", "json", "csv", "parquet")
AWKWARD = {
    0: "<0xE2>",
    1: '"quoted", with a comma',
    2: "two\nlines\r\n",
    3: "</script>",
    4: " naïve ▁Ġ 東京",
    5: "None",
    6: "nan",
    7: "\x00",
}


@pytest.fixture(params=ENDINGS)
def ending(request: pytest.FixtureRequest) -> str:
    return request.param


def test_a_file_gives_the_result_back(ending: str, tmp_path: Path) -> None:
    path = LENS.save(tmp_path / f"lens.{ending}")
    assert path == tmp_path / f"lens.{ending}"
    back = LensResult.load(str(path))
    same(back, LENS)
    assert dict(back.text_of) == dict(LENS.text_of)


def test_numbers_that_are_none_and_texts_that_are_awkward_come_back(ending: str, tmp_path: Path) -> None:
    """Infinite and missing numbers, quotes, line ends, and texts that look like a missing number."""
    log_prob = LENS.log_prob.clone()
    log_prob[0, 0, :4] = torch.tensor([-torch.inf, torch.nan, -1e-42, -0.1])
    logsumexp = LENS.logsumexp.clone()
    logsumexp[0, 0, 0] = torch.inf
    ids = torch.arange(8).repeat(LENS.top_ids.numel() // 8).view(LENS.top_ids.shape)
    text_of = {**LENS.text_of, **AWKWARD}
    awkward = replace(
        LENS,
        statistics={"log_prob": log_prob, "rank": LENS.rank, "logsumexp": logsumexp},
        top_ids=ids,
        text_of=text_of,
        model="",
        lens='a "tuned" lens, of\nours',
        tracked={'a, "b"': 5, " x_id": 6},
        layers=(0, 3, 4, 7, 8, 79),
        positions=tuple(range(1000, 1013)),
        n_prompt=1005,
    )
    back = LensResult.load(awkward.save(tmp_path / f"lens.{ending}"))
    same(back, awkward)
    occurring = set(ids.reshape(-1).tolist()) | set(LENS.token_ids.tolist())
    assert all(back.text_of[token] == text_of[token] for token in occurring)


def test_a_result_without_tracked_tokens_and_of_one_of_everything_comes_back(
    ending: str, tmp_path: Path
) -> None:
    lean = replace(
        LENS["resid_post"].at(layers=-1, positions=0),
        tracked={},
        tracked_log_probs=None,
        tracked_ranks=None,
        statistics={},
    )
    same(LensResult.load(lean.save(tmp_path / f"lens.{ending}")), lean)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_the_digits_of_a_number_give_it_back(number: float) -> None:
    written = _digits(np.float32(number))
    assert np.float32(float(written)) == np.float32(number)
    assert len(written) <= 24


def test_a_table_has_one_row_per_cell() -> None:
    table = LENS.to_pandas()
    assert len(table) == 2 * 6 * 13
    row = table[(table.component == "resid_post") & (table.layer == 4) & (table.position == 3)].iloc[0]
    assert (row.token, row.next_token) == (" France", " is")
    assert row.next_token_id == LENS.next_ids[3]
    assert not row.generated
    assert row.entropy == LENS.entropy[1, 4, 3]
    assert row["rank"] == LENS.rank[1, 4, 3]
    assert row.top_2_id == LENS.top_ids[1, 4, 3, 1]
    assert row.top_2 == LENS.text_of[row.top_2_id]
    assert row.top_2_log_prob == LENS.top_log_probs[1, 4, 3, 1]
    assert row["log_prob:  Rome"] == LENS.statistic("log_prob", " Rome")[1, 4, 3]
    assert row["rank:  Rome"] == LENS.statistic("rank", " Rome")[1, 4, 3]
    assert table.groupby("position").generated.all().tolist() == [False] * 8 + [True] * 5


def test_what_is_missing_is_missing_in_the_table() -> None:
    """A mean over a column must not count a rank of -1."""
    table = LENS.to_pandas()
    last = table[table.position == 12]
    for name in ("next_token", "next_token_id", "rank", "log_prob"):
        assert last[name].isna().all(), name
        assert not table[table.position < 12][name].isna().any(), name
    assert table["rank"].mean() == pytest.approx(float(LENS.rank[..., :-1].double().mean()))


def test_a_table_of_several_prompts_counts_them() -> None:
    table = LensResults((LENS, LENS.at(positions=slice(0, 3)))).to_pandas()
    assert table.groupby("prompt").size().tolist() == [2 * 6 * 13, 2 * 6 * 3]


def test_other_programs_read_the_files(tmp_path: Path) -> None:
    with open(LENS.save(tmp_path / "lens.csv"), newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows[12]["token"] == " Rome"
    assert rows[12]["next_token"] == rows[12]["rank"] == rows[12]["log_prob"] == ""
    assert float(rows[0]["entropy"]) == pytest.approx(float(LENS.entropy[0, 0, 0]))
    document = json.loads(LENS.save(tmp_path / "lens.json").read_text(), parse_constant=pytest.fail)
    assert document["tensors"]["statistics.log_prob"][0][0][12] is None
    assert document["components"] == ["attn_out", "resid_post"]


def test_pandas_reads_a_parquet_file(tmp_path: Path) -> None:
    table = pandas.read_parquet(LENS.save(tmp_path / "lens.parquet"))
    assert table["rank"].isna().sum() == 12
    equal(torch.tensor(table.entropy.to_numpy()).view(2, 6, 13), LENS.entropy)


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lens", "lens.txt", "lens.html", "lens.svg"])
def test_an_ending_that_names_no_format_is_refused(name: str, tmp_path: Path) -> None:
    for use in (LENS.save, LensResult.load):
        with pytest.raises(LensFileError) as caught:
            use(tmp_path / name)
        assert ".safetensors, .parquet, .csv, .json" in str(caught.value.instead)
        assert caught.value.at is not None
        assert caught.value.at.filename == __file__
    assert not (tmp_path / name).exists()


def test_a_file_that_is_not_whole_is_refused(ending: str, tmp_path: Path) -> None:
    path = LENS.save(tmp_path / f"lens.{ending}")
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"something else\n1\n", b"{}"):
        path.write_bytes(broken)
        with pytest.raises(LensFileError, match="is not a lens result, or not a whole one") as caught:
            LensResult.load(path)
        assert caught.value.at is not None


def test_a_table_with_a_row_too_few_is_refused(tmp_path: Path) -> None:
    path = LENS.save(tmp_path / "lens.csv")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    with pytest.raises(LensFileError, match="each component, layer and position once"):
        LensResult.load(path)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"h": torch.zeros(1)}, tmp_path / "h.safetensors")
    with pytest.raises(LensFileError, match="another kind of file"):
        LensResult.load(tmp_path / "h.safetensors")
    (tmp_path / "x.json").write_text('{"format": "another", "version": 1, "tensors": {}}')
    with pytest.raises(LensFileError, match="something else"):
        LensResult.load(tmp_path / "x.json")


def test_a_file_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    path = LENS.save(tmp_path / "lens.json")
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(LensFileError, match="version 2") as caught:
        LensResult.load(path)
    assert caught.value.instead == "a newer tracelens"


def test_a_file_that_is_not_there_is_no_broken_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        LensResult.load(tmp_path / "lens.json")


@pytest.mark.parametrize("package", ["pyarrow", "pandas"])
def test_a_package_that_is_missing_is_named(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError) as caught:
        LENS.save(tmp_path / "lens.parquet") if package == "pyarrow" else LENS.to_pandas()
    assert f"needs {package}" in str(caught.value)
    assert caught.value.instead == 'pip install "tracelens[pandas]"'
    assert caught.value.at is not None
    assert isinstance(caught.value, ImportError)
