"""The benchmark of overhead: it measures all that it says, and compares before it measures. No test looks at times."""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks import device_map
from benchmarks.across_devices import CASES as ACROSS
from benchmarks.across_devices import CONTESTANTS
from benchmarks.across_devices import Spread as Placed
from benchmarks.bout import OWN, Bout
from benchmarks.models import Tiny, write_inputs
from benchmarks.overhead import Measurement, run
from benchmarks.overhead_report import COLUMNS, aims, markdown, table, write
from benchmarks.peers import by_hooks
from benchmarks.peers.client import PeerProcess
from benchmarks.peers.subject import STREAM, Subject, largest_error, load_subject
from benchmarks.ratios import Ratio, Spread
from benchmarks.settings import Settings
from tests.support.pretend import Pretend, pretend

__all__ = ["pretend"]

SMALL = Tiny(layers=3, d_model=16, neurons=24, heads=2, vocabulary=40, tokens=6)


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    # Read back from JSON, as whoever looks at it later does.
    measurement = Measurement("tiny", SMALL, rounds=3, firsts=1, warmups=1)
    return json.loads(json.dumps(run(Settings((measurement,)))))


def test_every_contestant_has_a_row_for_every_case(report: dict[str, Any]) -> None:
    found = {(row["contestant"], row["case"]) for row in report["rows"]}
    everywhere = {"plain", "hooks", "tracelens trace", "tracelens program"}
    expected = {(name, case) for name in everywhere for case in STREAM}
    expected |= {("tracelens trace, mapped", case) for case in ("read-all", "edit-all")}
    assert found == expected
    assert len(report["rows"]) == len(expected)


def test_every_row_has_its_figures(report: dict[str, Any]) -> None:
    for row in report["rows"]:
        assert row["model"] == "tiny"
        assert row["rounds"] == 3
        assert 0 < row["min_ms"] <= row["median_ms"] <= row["max_ms"]
        for ratio in (row["ratio"], row["work_ratio"]):
            assert 0 < ratio["low"] <= ratio["value"] <= ratio["high"]
        assert ("first_ms" in row) == row["contestant"].startswith("tracelens")
        assert ("to_hooks" in row) == row["contestant"].startswith("tracelens")
        assert row["contestant"] == "plain" or row["error"] <= report["about"]["tolerance"]


def test_the_bare_forward_is_the_measure(report: dict[str, Any]) -> None:
    for row in report["rows"]:
        if row["contestant"] == "plain":
            assert row["ratio"] == {"value": 1, "low": 1, "high": 1}
        assert row["ratio"]["value"] == pytest.approx(row["median_ms"] / row["plain_median_ms"])


def test_the_report_says_where_it_was_measured(report: dict[str, Any]) -> None:
    about = report["about"]
    assert about["threads"] == 1
    assert about["torch"] == torch.__version__
    assert all(about[key] for key in ("processor", "python", "transformers", "tracelens", "date"))


def test_tables_hold_every_row(report: dict[str, Any]) -> None:
    rows = [line for line in markdown(report).splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(report["rows"])
    assert all(line.count("|") == len(COLUMNS) + 1 for line in rows)
    shown = table(report)
    for case in STREAM.values():
        assert shown.count(f"\n{case} ") == 1
    assert "aim, tracelens program" in shown


@pytest.mark.parametrize(
    ("clock", "work", "verdict"),
    [
        ((1.02, 1.04), (1.01, 1.05), "met"),
        ((1.02, 1.04), (1.01, 1.06), "within the spread"),  # the work may be more than was aimed at
        ((1.02, 1.04), (1.06, 1.08), "missed"),
        ((1.06, 1.08), (1.02, 1.04), "missed"),
    ],
)
def test_an_aim_is_met_only_by_clock_and_work(
    clock: tuple[float, float], work: tuple[float, float], verdict: str
) -> None:
    row = {"model": "tiny", "case": "read-one", "contestant": "tracelens trace"}
    row |= {
        name: {"value": sum(ends) / 2, "low": ends[0], "high": ends[1]}
        for name, ends in (("ratio", clock), ("work_ratio", work))
    }
    (line,) = aims({"rows": [row]}, {"name": "tiny"})
    assert line.endswith(f": {verdict}")


def test_files_hold_the_report_and_the_page(report: dict[str, Any], tmp_path: Path) -> None:
    write(report, tmp_path / "results", tmp_path / "docs" / "overhead.md")
    assert json.loads((tmp_path / "results" / "overhead.json").read_text(encoding="utf-8")) == report
    rows = "\n".join(line for line in markdown(report).splitlines() if line.startswith("|"))
    assert rows in (tmp_path / "results" / "overhead.md").read_text(encoding="utf-8")
    assert rows in (tmp_path / "docs" / "overhead.md").read_text(encoding="utf-8")


def test_a_peer_that_cannot_be_imported_is_absent() -> None:
    # Without site-packages the interpreter finds no torch, whatever is installed on this machine.
    with PeerProcess("nnsight", str(without_packages()), threads=1) as peer:
        assert peer.absent is not None
        assert "ModuleNotFoundError" in peer.absent


def test_a_peer_without_an_interpreter_is_absent_and_named_in_the_table(tmp_path: Path) -> None:
    settings = Settings(
        (Measurement("tiny", SMALL, rounds=1, firsts=0, warmups=0),), {"nnsight": str(tmp_path / "none")}
    )
    report = run(settings)
    assert "No such file" in report["peers"]["nnsight"]["absent"]
    assert "nnsight: absent" in table(report)
    assert "nnsight" not in {row["contestant"] for row in report["rows"]}


def test_a_worker_answers_like_the_process_that_asks(tmp_path: Path) -> None:
    """The protocol with a peer that every environment has: the hooks."""
    with PeerProcess("hooks", sys.executable, threads=1) as peer:
        assert peer.absent is None
        bout = Bout("tiny", SMALL.write(tmp_path), tokens=SMALL.tokens, scratch=tmp_path, peers=[])
        # Under a name of its own: in this process "hooks" is a contestant already.
        peer.name = "hooks elsewhere"
        bout.peers = {peer.name: peer}
        bout.notes[peer.name] = {"stop": "a note"}
        peer.ask("open", name="tiny", folder=bout.subject.folder, inputs=str(tmp_path / "inputs.safetensors"))
        bout.check()
        bout.firsts(1)
        bout.round(random.Random(0), keep=True)
    rows = [row for row in bout.rows() if row["contestant"] == "hooks elsewhere"]
    assert [row["case"] for row in rows] == list(STREAM)
    assert all(row["error"] == 0.0 and row["first_ms"] > 0 for row in rows)
    assert rows[-1]["note"] == "a note"


def test_a_peer_that_is_wrong_is_not_timed(tmp_path: Path) -> None:
    bout = Bout("tiny", SMALL.write(tmp_path), tokens=SMALL.tokens, scratch=tmp_path, peers=[])

    class Wrong:
        def ask(self, do: str, **request: Any) -> dict[str, Any]:
            return {"seconds": 0.001, "error": 0.5 if request["case"] == "edit-one" else 0.0}

    bout.peers = {"wrong": Wrong()}
    bout.check()
    assert bout.failures == {("wrong", "edit-one"): "its answer is wrong by 0.5"}


def test_our_own_wrong_answer_ends_the_run(tmp_path: Path) -> None:
    bout = Bout("tiny", SMALL.write(tmp_path), tokens=SMALL.tokens, scratch=tmp_path, peers=[])
    right = bout.own["tracelens trace"]["read-one"]
    bout.own["tracelens trace"]["read-one"] = lambda: {
        name: tensor * 1.001 for name, tensor in right().items()
    }
    with pytest.raises(AssertionError, match="tracelens trace is wrong by"):
        bout.check()


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = tmp_path_factory.mktemp("subject")
    model_folder = SMALL.write(folder)
    write_inputs(model_folder, folder / "inputs.safetensors", SMALL.tokens)
    return load_subject("tiny", model_folder, folder / "inputs.safetensors")


def test_hooks_by_hand_agree_with_transformers(subject: Subject) -> None:
    answers = by_hooks.build(subject)
    with torch.no_grad():
        output = subject.model(input_ids=subject.ids, use_cache=False, output_hidden_states=True)
    found = answers["read-all"]()
    # transformers puts the embedding first, and the final norm over the last.
    for layer in range(subject.n_layers - 1):
        assert torch.equal(found[f"h{layer}"], output.hidden_states[layer + 1])
    assert torch.equal(found["logits"], output.logits)
    assert set(answers["stop"]()) == {"h0"}
    assert torch.equal(answers["stop"]()["h0"], output.hidden_states[1])


def test_nobody_leaves_hooks_behind(subject: Subject) -> None:
    own = subject.separate()
    # transformers itself leaves hooks on a model that was asked for hidden states.
    before = hooks_on(own)
    for build in OWN.values():
        for answer in build(own).values():
            answer()
    assert hooks_on(own) == before


def hooks_on(subject: Subject) -> list[list[object]]:
    return [
        [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        for module in subject.model.modules()
    ]


def test_largest_error() -> None:
    right = {"h0": torch.tensor([1.0, -4.0]), "h1": torch.tensor([2.0, 2.0])}
    assert largest_error({"h": torch.tensor([[1.0, -4.0], [2.0, 2.0]])}, right) == 0.0
    assert largest_error({"h0": torch.tensor([2.0, -4.0]), "h1": right["h1"]}, right) == 0.25
    assert largest_error({"h0": torch.tensor([math.nan, -4.0]), "h1": right["h1"]}, right) == math.inf
    with pytest.raises(ValueError, match="results are"):
        largest_error({"h0": right["h0"]}, right)
    with pytest.raises(ValueError, match="shape"):
        largest_error({"h0": right["h0"][:1], "h1": right["h1"]}, right)


def test_ratio_of_medians_and_its_interval() -> None:
    base = [0.001 * (1 + number % 5) for number in range(40)]
    steady = Ratio.of([2 * each for each in base], base)
    # Rounds are resampled whole, so that load that slows both sides alike is no spread.
    assert (steady.value, steady.low, steady.high) == pytest.approx((2, 2, 2))
    shuffled = Ratio.of(list(reversed([2 * each for each in base])), base)
    assert shuffled.low < shuffled.value < shuffled.high
    assert Spread.of([0.003, 0.001, 0.002]) == Spread(2.0, 1.0, 3.0)
    with pytest.raises(ValueError, match="as many rounds"):
        Ratio.of([1.0], [1.0, 2.0])


# --- what travels between devices ------------------------------------------------------------------------------------

OWN_AND_HOOKS = ("tracelens", "hooks by hand")


def test_what_travels_is_counted(pretend: Pretend, tmp_path: Path) -> None:
    folder = SMALL.write(tmp_path)
    ids = torch.tensor([[3, 5, 7, 9, 11, 13]])
    report = device_map.run(
        lambda: device_map.spread(LlamaForCausalLM.from_pretrained(folder)), ids, torch.full((16,), 0.1)
    )
    report = json.loads(json.dumps(report))
    rows = {(row["contestant"], row["case"]): row for row in report["rows"]}
    assert set(rows) == {(name, case) for name in (*OWN_AND_HOOKS, "nnsight") for case in ACROSS} | {
        ("nnsight, as on one device", case) for case in ("patch", "steer")
    }
    for case in ("patch", "steer"):
        assert "two devices" in rows["nnsight, as on one device", case]["fails"]
    ours = {case: rows["tracelens", case] for case in ACROSS}
    # Three layers on three devices: a vector of 16 numbers to each, in every run of a block.
    inputs = 3 * ids.nbytes
    assert ours["steer"]["first"]["in"][1] == ours["steer"]["again"]["in"][1] == 3 * 64 + inputs
    assert rows["hooks by hand", "steer"]["again"]["in"] == [4, 3 * 64 + ids.nbytes]
    assert ours["patch"]["first"]["between"] == rows["hooks by hand", "patch"]["first"]["between"] == [1, 64]
    assert ours["norms"]["first"]["out"] == [3, 3 * 6 * 4]
    assert ours["norms"]["first"]["between"] == [0, 0]
    assert all(row[time]["waits"] == 0 for row in ours.values() for time in ("first", "again"))
    assert rows["hooks by hand", "norms"]["first"]["waits"] == rows["nnsight", "norms"]["first"]["waits"] == 3
    device_map.write(report, tmp_path / "results", tmp_path / "docs" / "device_map.md")
    assert json.loads((tmp_path / "results" / "device_map.json").read_text(encoding="utf-8")) == report
    table = [line for line in device_map.markdown(report).splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(rows)
    assert all(line.count("|") == len(device_map.COLUMNS) + 1 for line in table)
    assert "\n".join(table) in (tmp_path / "docs" / "device_map.md").read_text(encoding="utf-8")


def test_a_wrong_answer_is_not_counted(
    pretend: Pretend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = SMALL.write(tmp_path)
    right = CONTESTANTS["tracelens"]

    def wrong(placed: Placed) -> dict[str, Any]:
        return {"one": lambda: [part * 1.01 for part in right(placed)["one"]()]}

    monkeypatch.setitem(CONTESTANTS, "tracelens", wrong)
    with pytest.raises(AssertionError, match="tracelens, one"):
        device_map.run(
            lambda: device_map.spread(LlamaForCausalLM.from_pretrained(folder)),
            torch.tensor([[3, 5, 7]]),
            torch.full((16,), 0.1),
            ("tracelens",),
        )


def without_packages() -> Path:
    """A Python that has the standard library only."""
    return Path(sys.base_prefix) / "bin" / Path(sys.executable).resolve().name
