"""The benchmark of generation: all write the same tokens, take turns, and are compared. No test looks at times."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import generation, ours_text
from benchmarks.generation import Measurement, Sample, compared, run
from benchmarks.generation_report import (
    COLUMNS,
    Part,
    added,
    aims,
    estimated,
    markdown,
    side_by_side,
    table,
    write,
)
from benchmarks.models import Tiny, write_inputs
from benchmarks.peers import hooks_text, nnsight_text
from benchmarks.peers.laps import Lap, Laps, in_turns
from benchmarks.peers.text import GENERATING, Text, difference, plain
from benchmarks.settings import Settings

SMALL = Tiny(layers=3, d_model=16, neurons=24, heads=2, vocabulary=40, tokens=6, new=20)
NEW = 5


def at_once() -> None:
    """Goes on with the next step."""


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    # The hooks once more, as a peer in a process of their own: every environment has that peer.
    measurement = Measurement("tiny", SMALL, 2, NEW, rounds=2, uncached=4)
    return json.loads(json.dumps(run(Settings((measurement,), {"hooks": sys.executable}))))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    folder = tmp_path_factory.mktemp("text")
    model_folder = SMALL.write(folder)
    write_inputs(model_folder, folder / "inputs.safetensors", SMALL.tokens, 2)
    return Text.load(model_folder, folder / "inputs.safetensors")


def test_every_contestant_has_a_row_for_every_case(report: dict[str, Any]) -> None:
    (measurement,) = report["measurements"]
    found = [(row["contestant"], row["case"]) for row in measurement["rows"] if row["contestant"] != "plain"]
    own = [("tracelens", case) for case in GENERATING]
    hooks = [("hooks", case) for case in GENERATING if case != "nothing"]
    assert sorted(found) == sorted([*own, *hooks, *hooks])
    assert sum(row["contestant"] == "plain" for row in measurement["rows"]) == 2


def test_every_row_has_its_figures(report: dict[str, Any]) -> None:
    for row in report["measurements"][0]["rows"]:
        assert "absent" not in row
        assert row["new"] in (4, NEW)
        assert len(row["whole_s"]) == row["rounds"]
        for ratio in (row["step_ratio"], row["work_ratio"]):
            assert 0 < ratio["low"] <= ratio["value"] <= ratio["high"]
        assert row["contestant"] == "plain" or row["error"] <= 1e-4
        if row["contestant"] == "plain":
            assert row["step_ratio"] == {"value": 1, "low": 1, "high": 1}
            assert row["more_us"] == 0


def test_tables_hold_every_row(report: dict[str, Any]) -> None:
    lines = [line for line in markdown(report, page=True).splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(report["measurements"][0]["rows"])
    assert all(line.count("|") == len(COLUMNS) + 1 for line in lines)
    assert "batch 2, 6 + 5 tokens" in table(report)


def test_hooks_read_what_transformers_has(text: Text) -> None:
    answers = hooks_text.build(text)
    found = answers["read-all"](NEW, at_once)
    whole = torch.cat([text.ids, found["tokens"]], 1)[:, :-1]
    with torch.no_grad():
        expected = text.separate().model(input_ids=whole, output_hidden_states=True).hidden_states
    assert found["stream"].shape == (3, 2, 6 + NEW - 1, 16)
    # transformers puts the embedding first, and the final norm over the last.
    torch.testing.assert_close(found["stream"][:-1], torch.stack(expected[1:-1]), atol=1e-5, rtol=1e-5)
    assert torch.equal(answers["read-one"](NEW, at_once)["stream"], found["stream"][[1]])
    assert not torch.equal(answers["steer-all"](NEW, at_once)["tokens"], found["tokens"])


def test_nnsight_answers_like_the_hooks(text: Text) -> None:
    expected, answers = hooks_text.build(text), nnsight_text.build(text)
    assert set(answers) == set(GENERATING) - {"uncached"}
    for case, answer in answers.items():
        right = plain(text) if case == "nothing" else expected[case]
        assert difference(answer(NEW, at_once), right(NEW, at_once)) <= 1e-5, case


def test_our_own_wrong_answer_ends_the_run(text: Text) -> None:
    made = {("plain", ""): plain(text), ("hooks", "read-all"): hooks_text.build(text)["read-all"]}
    made[("tracelens", "read-all")] = ours_text.build(text)["read-all"]
    laps = {who: Laps((), answer(NEW, at_once)) for who, answer in made.items()}
    assert compared(laps, NEW)["tracelens", "read-all"] <= 1e-5
    wrong = dict(laps["tracelens", "read-all"].results)
    wrong["stream"] = wrong["stream"] * 1.01
    with pytest.raises(AssertionError, match="tracelens is wrong by"):
        compared(laps | {("tracelens", "read-all"): Laps((), wrong)}, NEW)
    wrong["tokens"] = wrong["tokens"].flip(1) + 1
    with pytest.raises(AssertionError, match="another text in read-all"):
        compared(laps | {("tracelens", "read-all"): Laps((), wrong)}, NEW)


def test_a_token_is_not_nearly_right() -> None:
    right = {"tokens": torch.tensor([[40000, 5]])}
    assert difference({"tokens": torch.tensor([[40000, 5]])}, right) == 0
    assert difference({"tokens": torch.tensor([[40000, 6]])}, right) == float("inf")
    with pytest.raises(ValueError, match="results are"):
        difference(right | {"stream": torch.ones(1)}, right)


def test_turns_are_taken_step_by_step() -> None:
    seen: list[str] = []

    def steps(name: str, count: int) -> Any:
        def answer(tick: Any) -> str:
            for _ in range(count):
                seen.append(name)
                tick()
            return name

        return answer

    found = in_turns({"a": steps("a", 3), "b": steps("b", 3), "c": steps("c", 1)}, random.Random(0))
    assert [sorted(seen[at:to]) for at, to in ((0, 3), (3, 5))] == [["a", "b", "c"], ["a", "b"]]
    assert {name: (laps.results, len(laps.laps)) for name, laps in found.items()} == {
        "a": ("a", 4),
        "b": ("b", 4),
        "c": ("c", 2),
    }


def test_an_error_in_a_turn_is_raised() -> None:
    def fails(tick: Any) -> None:
        tick()
        raise KeyError("gone")

    with pytest.raises(KeyError, match="gone"):
        in_turns({"fails": fails, "goes on": lambda tick: tick()}, random.Random(0))


def test_steps_are_compared_side_by_side() -> None:
    # Load that makes a step of both ten times slower is no spread.
    base = [0.001 * (10 if number % 3 else 1) for number in range(30)]
    steady = side_by_side([2 * each for each in base], base)
    assert (steady.value, steady.low, steady.high) == (2.0, 2.0, 2.0)
    laps = Laps((Lap(3.0, 1.0), Lap(0.5, 0.5), Lap(0.5, 0.5), Lap(1.0, 1.0)), None)
    assert laps.whole == Lap(5.0, 3.0)
    assert len(laps.steps) == 2


@pytest.mark.parametrize(("high", "verdict"), [(1.05, "met"), (1.06, "within the spread"), (1.2, "missed")])
def test_an_aim_is_met_only_by_its_interval(high: float, verdict: str) -> None:
    ratio = {"value": high - 0.01, "low": high - 0.02, "high": high}
    row = {"case": "read-all", "contestant": "tracelens", "step_ratio": ratio, "work_ratio": ratio}
    (line,) = aims({"model": "smollm2", "rows": [row]})
    assert line.endswith(f": {verdict}")


def test_measurements_are_added_to_those_of_before(report: dict[str, Any], tmp_path: Path) -> None:
    write(report, tmp_path, tmp_path / "docs" / "generation.md")
    assert json.loads((tmp_path / "generation.json").read_text(encoding="utf-8")) == report
    other = report | {"measurements": [report["measurements"][0] | {"batch": 8}]}
    both = added(other, tmp_path)
    assert [each["batch"] for each in both["measurements"]] == [2, 8]
    assert added(report, tmp_path) == report
    page = (tmp_path / "docs" / "generation.md").read_text(encoding="utf-8")
    assert page.startswith("# What reads and steering cost while text is generated")


def test_a_newer_row_takes_the_place_of_its_like(report: dict[str, Any], tmp_path: Path) -> None:
    write(report, tmp_path, None)
    (before,) = report["measurements"]
    newer = [row for row in before["rows"] if row["case"] == "uncached"]
    assert [row["contestant"] for row in newer] == ["plain", "hooks", "tracelens", "hooks"]
    kept, new = added(report | {"measurements": [before | {"rows": newer}]}, tmp_path)["measurements"]
    # The plain generation without a cache had nothing left beside it; the other still has.
    assert kept["rows"] == [row for row in before["rows"] if row["case"] != "uncached"]
    assert new["rows"] == newer
    shown = markdown({"measurements": [kept, new], "peers": {}})
    assert shown.count("## tiny") == 1
    assert shown.count("load average") == 2


def test_a_peer_that_is_absent_now_was_there_before(report: dict[str, Any], tmp_path: Path) -> None:
    write(report, tmp_path, None)
    there = report["peers"]["hooks"]
    assert "version" in there
    absent = added(report | {"peers": {"hooks": {"absent": "no"}, "nnsight": {"absent": "no"}}}, tmp_path)
    assert absent["peers"] == {"hooks": there, "nnsight": {"absent": "no"}}
    write(absent, tmp_path, None)
    found = added(report | {"peers": {"nnsight": there}}, tmp_path)
    assert found["peers"] == {"hooks": there, "nnsight": there}


def test_a_sample_reaches_from_the_prompt_to_the_last_step() -> None:
    sample = Sample.of(6, 12, 3, 2)
    assert sample == Sample((6, 10, 15), 2)
    # A text of 6 + 12 tokens: its last step has all but the last token before it.
    assert sample.lengths[-1] + sample.steps == 6 + 12 - 1
    with pytest.raises(ValueError, match="2 lengths or more and 1 to 11 steps, not 3 and 12"):
        Sample.of(6, 12, 3, 12)


def test_a_whole_text_is_estimated_from_sampled_steps() -> None:
    def made(part: Part) -> Laps:
        # A step takes as many seconds as there are tokens before it; what a whole text ends with is in none.
        clocks = [float(part.length + number) for number in range(part.new)] + [1000.0]
        return Laps(tuple(Lap(clock, clock) for clock in clocks), None)

    whole = Part(6, 12)
    sampled = [Part(length, 3) for length in (6, 10, 15)]
    right = sum(lap.clock for lap in made(whole).laps[:-1])
    # Beyond the middle of the first and of the last steps the time is taken to stay: half a second each.
    assert estimated(sampled, [made(part) for part in sampled], 12) == pytest.approx(right, abs=1.0)
    assert (
        estimated([*sampled[:1], *sampled], [made(part) for part in [*sampled[:1], *sampled]], 12) > right - 1
    )


def test_sampled_steps_are_told_from_whole_texts() -> None:
    sample = Sample.of(SMALL.tokens, 12, 3, 2)
    measurement = Measurement(
        "tiny", SMALL, 2, 12, 1, cases=("read-one", "uncached"), peer_cases=("both",), sample=sample
    )
    report = json.loads(json.dumps(run(Settings((measurement,), {"hooks": sys.executable}))))
    rows = report["measurements"][0]["rows"]
    assert [(row["contestant"], row["case"]) for row in rows] == [
        ("plain", "read-one"),
        ("hooks", "read-one"),
        ("tracelens", "read-one"),
        ("plain", "uncached"),
        ("hooks", "uncached"),
        ("tracelens", "uncached"),
        ("hooks", "both"),
    ]
    for row in rows:
        times = row["sampled"].pop("step_ms")
        assert row["sampled"] == {"lengths": [6, 10, 15], "steps": 2}
        assert [len(each) for each in times] == [2, 2, 2]
        assert (times == row["plain_sampled_ms"]) == (row["contestant"] == "plain")
        assert (row["new"], row["rounds"], row["end_ms"]) == (12, 1, None)
        assert row["contestant"] == "plain" or row["error"] <= 1e-4
        assert row["whole_s"][0] > row["start_ms"] / 1e3
    shown = markdown(report)
    assert "Sampled, not all steps: 2 after each of these lengths of the text: 6, 10, 15." in shown
    assert shown.count("≈") == 2 * 2 + 5 * 3


def test_a_peer_without_an_interpreter_is_absent(tmp_path: Path) -> None:
    measurement = Measurement("tiny", SMALL, 1, 3, rounds=1, cases=("read-all",))
    report = generation.run(Settings((measurement,), {"nnsight": str(tmp_path / "none")}))
    assert "No such file" in report["peers"]["nnsight"]["absent"]
    assert "nnsight: absent" in table(report)
