"""The benchmark of steering: all make the same vectors and read the same propensities. No test looks at times."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import steering
from benchmarks.models import Tiny
from benchmarks.peers import nnsight_steering
from benchmarks.peers.client import PeerProcess
from benchmarks.peers.steering import NEAR, STEERING, Row, Steering
from benchmarks.peers.subject import largest_error
from benchmarks.settings import Settings
from benchmarks.steering import OWN, Bout, Measurement, pairs, require_effect, run
from benchmarks.steering_report import COLUMNS, markdown, table, words, write

SMALL = Tiny(layers=2, d_model=16, neurons=24, heads=2, vocabulary=300, tokens=6, new=300)
ASKED = Measurement("tiny", SMALL, rounds=2, train=4, test=3, batch=2, multipliers=(-1.0, 0.5, 1.0))


@pytest.fixture(scope="module")
def bout(tmp_path_factory: pytest.TempPathFactory) -> Bout:
    return Bout(ASKED, tmp_path_factory.mktemp("bout"), {})


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    # The hooks once more, as a peer in a process of their own: every environment has that peer.
    pythons = {"hooks": sys.executable, "steering_vectors": str(tmp_path_factory.mktemp("none") / "none")}
    with pytest.MonkeyPatch.context() as patch:
        # Under a name of its own: in this process "hooks" is a contestant already.
        processes = Settings[Measurement].processes
        patch.setattr(
            Settings,
            "processes",
            lambda self, kind: {f"{name} elsewhere": peer for name, peer in processes(self, kind).items()},
        )
        return json.loads(json.dumps(run(Settings((ASKED,), pythons))))


def test_every_contestant_has_a_row_for_every_case(report: dict[str, Any]) -> None:
    (measurement,) = report["measurements"]
    found = [(row["contestant"], row["case"]) for row in measurement["rows"]]
    assert sorted(found) == sorted((name, case) for name in (*OWN, "hooks elsewhere") for case in STEERING)
    assert "No such file" in report["peers"]["steering_vectors elsewhere"]["absent"]


def test_every_row_has_its_figures(report: dict[str, Any]) -> None:
    (measurement,) = report["measurements"]
    assert measurement["rounds"] == 2
    for row in measurement["rows"]:
        assert 0 < row["min_ms"] <= row["median_ms"] <= row["max_ms"]
        count = 4 if row["case"] == "extract" else 3 * 3
        assert row["per_s"] == pytest.approx(1e3 * count / row["median_ms"])
        assert row["error"] <= NEAR[row["case"]]
        for ratio in (row["to_hooks"], row["work_to_hooks"], row["to_tracelens"], row["work_to_tracelens"]):
            assert 0 < ratio["low"] <= ratio["value"] <= ratio["high"]
        if row["contestant"] in ("hooks", "tracelens"):
            assert row[f"to_{row['contestant']}"] == {"value": 1, "low": 1, "high": 1}
    held = {(row["contestant"], row["case"]): row["bytes"] for row in measurement["rows"]}
    for case in STEERING:
        assert held["hooks elsewhere", case] == held["hooks", case] > 0
        # The same tokens through the model, with as much at a time.
        assert 0.5 < held["tracelens plain", case] / held["hooks", case] < 2


def test_tables_hold_every_row(report: dict[str, Any], tmp_path: Path) -> None:
    (measurement,) = report["measurements"]
    lines = [line for line in markdown(report, page=True).splitlines() if line.startswith("|")]
    assert len(lines) == 4 + len(measurement["rows"])
    assert all(line.count("|") == len(COLUMNS) + 1 for line in lines)
    assert "4 pairs to learn from, 3 prompts at 3 multipliers" in table(report)
    write(report, tmp_path / "results", tmp_path / "docs" / "steering.md")
    assert json.loads((tmp_path / "results" / "steering.json").read_text(encoding="utf-8")) == report
    assert "\n".join(lines[:5]) in (tmp_path / "docs" / "steering.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("ends", "verdict"),
    [
        ((1.5, 2.5), "tracelens is 2.0 times as fast"),
        ((0.4, 0.6), "tracelens is slower, by a factor of 2.0"),
        ((0.9, 1.1), "no difference beyond the spread"),
        ((1.1, 1.9), "no difference beyond the spread"),  # its work is not more
    ],
)
def test_who_is_faster_is_told_by_the_interval(ends: tuple[float, float], verdict: str) -> None:
    ratio = {"value": sum(ends) / 2, "low": ends[0], "high": ends[1]}
    work = {"value": 1.0, "low": 0.9, "high": 1.1} if ends == (1.1, 1.9) else ratio
    row = {"case": "sweep", "contestant": "nnsight", "to_tracelens": ratio, "work_to_tracelens": work}
    (line,) = words({"rows": [row, {"case": "sweep", "contestant": "hooks", "absent": "why"}]})
    assert f"beside nnsight: {verdict} (" in line


def test_hooks_find_what_single_passes_find(bout: Bout) -> None:
    """Each text by itself, without padding: hidden states of transformers, and logits of its own forward pass."""
    subject = bout.subject
    rows = [subject.row(pair) for pair in subject.train]
    with torch.no_grad():
        states = [
            [
                subject.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[1][0, -1]
                for ids in row
            ]
            for row in rows
        ]
    wanted = torch.stack([one - other for one, other in states]).mean(0)
    found = bout.own["hooks"]["extract"]()
    torch.testing.assert_close(found["resid_post.0"], wanted, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        single = Row(*map(list, subject.row(subject.test[0])))
        last = subject.model(torch.tensor([single.prompt])).logits[0, -1]
    unsteered = Steering(**{**vars_of(subject), "vector": torch.zeros_like(subject.vector)})
    propensity = steering.hooks_steering.build(unsteered)["sweep"]()["propensity"]
    wanted = (last[single.positive[-1]] - last[single.negative[-1]]).expand(3)
    torch.testing.assert_close(propensity[0], wanted, atol=1e-6, rtol=1e-5)


def vars_of(subject: Steering) -> dict[str, Any]:
    return {name: getattr(subject, name) for name in Steering.__dataclass_fields__}


def test_nnsight_answers_like_the_hooks(bout: Bout) -> None:
    for case, answer in nnsight_steering.build(bout.subject).items():
        assert largest_error(answer(), bout.own["hooks"][case]()) <= NEAR[case], case


def test_our_own_wrong_answer_ends_the_run(bout: Bout, monkeypatch: pytest.MonkeyPatch) -> None:
    bout.check()
    right = bout.own["tracelens"]["extract"]()

    def wrong() -> Any:
        return {name: vector * (1.01 if name == "post_ln.1" else 1) for name, vector in right.items()}

    monkeypatch.setitem(bout.own["tracelens"], "extract", wrong)
    with pytest.raises(AssertionError, match="tracelens is wrong by"):
        bout.check()


def test_vectors_that_do_nothing_end_the_run() -> None:
    with pytest.raises(AssertionError, match="moves by 0"):
        require_effect("sweep", {"propensity": torch.ones(2, 3)})
    with pytest.raises(AssertionError, match=r"\['post_ln.0'\] are zero"):
        require_effect("extract", {"post_ln.0": torch.zeros(4), "resid_post.0": torch.ones(4)})


def test_pairs_have_both_letters_and_none_twice() -> None:
    some = pairs(16)
    more = pairs(8, skip=16)
    assert len(set(some + more)) == 24
    assert {positive for _, positive, _ in some} == {" (A)", " (B)"}
    with pytest.raises(ValueError, match="there are 50 pairs"):
        pairs(40, skip=16)


def test_a_peer_that_is_not_installed_is_absent(tmp_path: Path) -> None:
    with PeerProcess("steering_vectors_steering", str(tmp_path / "none"), threads=1) as peer:
        assert peer.absent is not None
