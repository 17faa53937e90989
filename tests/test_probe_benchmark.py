"""The benchmark of the proof at load: it times what it says. No test looks at times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tracelens as tl
from benchmarks import probe
from benchmarks.probe_report import COLUMNS, PAGE, cells, markdown, table, write
from benchmarks.settings import Settings
from tests.support.more_families import ALL
from tracelens import proving

FAMILY = "qwen3_moe"


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return json.loads(json.dumps(probe.run(Settings((FAMILY,)), 2, 2, processes=0)))


def test_every_case_has_a_time_for_each_round(report: dict[str, Any]) -> None:
    (found,) = report["measurements"]
    assert found["model"] == FAMILY
    assert tuple(found["cases"]) == probe.CASES
    for case in found["cases"].values():
        assert 0 < case["low"] <= case["median"] <= case["high"]
    asked = {f"{case}/{base}" for case, bases in probe.RATIOS.items() for base in bases}
    assert set(found["ratios"]) == asked
    assert found["verified"] > 20


def test_what_is_timed_as_first_is_proven_and_what_is_known_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    proven: list[str] = []
    real = proving.prove
    monkeypatch.setattr(proving, "prove", lambda model: (proven.append("prove"), real(model))[1])
    monkeypatch.setenv("TRACELENS_CACHE", str(tmp_path))
    monkeypatch.setenv("TRACELENS_PROBE", "1")
    model = ALL[FAMILY].build()
    probe.forget(tmp_path)
    tl.wrap(model)
    assert len(proven) == 1
    tl.wrap(model)
    probe.forget()  # the file is left
    tl.wrap(model)
    tl.wrap(model, probe=False)
    assert len(proven) == 1
    probe.forget(tmp_path)
    tl.wrap(model)
    assert len(proven) == 2


def test_a_run_leaves_the_users_cache_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRACELENS_CACHE", str(tmp_path))
    kept = tmp_path / "sites" / "kept.json"
    kept.parent.mkdir()
    kept.write_text("{}")
    probe.measured("llama", 1, 0)
    assert [file.name for file in kept.parent.iterdir()] == ["kept.json"]


def test_the_report_has_each_figure(report: dict[str, Any], tmp_path: Path) -> None:
    (found,) = report["measurements"]
    row = cells(found)
    assert len(row) == len(COLUMNS)
    assert f"{found['ratios']['first/load']['value']:.3f} [" in row[COLUMNS.index("its ratio to loading")]
    assert FAMILY in table(report)
    write(report, tmp_path, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert page == markdown(report, page=True)
    assert page.startswith(PAGE.rstrip())
    assert json.loads((tmp_path / "probe.json").read_text(encoding="utf-8")) == report
