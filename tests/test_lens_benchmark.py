"""The benchmark of lenses: all contestants read the same, and memory is counted right. No test looks at times."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import lens
from benchmarks.generation_report import Part
from benchmarks.lens import CONTESTANTS, Measurement, disagreement, measure, memory, open_text, run, sampled
from benchmarks.lens_report import added, aims, estimated, markdown, of_steps, reference_fit, write
from benchmarks.live_memory import LiveMemory, most_live
from benchmarks.models import Tiny
from benchmarks.ours_lens import ours
from benchmarks.peers import lens_text, nnsight_lens
from benchmarks.peers.laps import Lap, Laps
from benchmarks.peers.text import Text, difference
from benchmarks.settings import Settings

SMALL = Tiny(layers=3, d_model=16, neurons=24, heads=2, vocabulary=400, tokens=6, new=40)
NEW = 5


def at_once() -> None:
    """Goes on with the next step."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    return open_text(SMALL, tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    measurement = Measurement("tiny", SMALL, NEW, rounds=2)
    found = run(Settings((measurement,)), memory_of=4, reference=(6, 9))
    return json.loads(json.dumps(found))


def test_what_is_compared_is_what_the_model_says(text: Text) -> None:
    right = lens_text.per_step(text)(NEW, at_once)
    whole = torch.cat([text.ids, right["tokens"]], 1)[:, :-1]
    with torch.no_grad():
        states = text.model(input_ids=whole, output_hidden_states=True).hidden_states
        # transformers puts the embedding first, and the final norm over the last.
        normed = [*(text.model.model.norm(state) for state in states[1:-1]), states[-1]]
        best = text.model.lm_head(torch.cat(normed)).log_softmax(-1).topk(5)
    assert torch.equal(right["top_1"], best.indices[..., 0])
    torch.testing.assert_close(right["top_log_probs"], best.values, atol=1e-5, rtol=1e-5)


def test_everybody_reads_the_same(text: Text) -> None:
    right = lens_text.per_step(text)(NEW, at_once)
    ways = {name: way(text) for name, way in CONTESTANTS.items() if name in lens.ANSWERING}
    ways |= {"reference": lens_text.reference(text), "nnsight": nnsight_lens.build(text)["lens"]}
    ways["generated"] = ours(text, positions="generated")
    columns = {name: way(NEW, at_once)["top_1"].shape[1] for name, way in ways.items()}
    assert columns == dict.fromkeys(columns, 10) | {
        "last-only": NEW,
        "reference": NEW,
        "generated": NEW - 1,
    }
    for name, way in ways.items():
        if name != "generated":
            assert disagreement(way(NEW, at_once), right) <= 1e-5, name


def test_a_wrong_answer_ends_the_run(text: Text, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = lens_text.per_step(text)(NEW, at_once)
    for name, change in (("tokens", 1), ("top_1", 1), ("top_log_probs", 1e-3)):
        wrong = dict(right)
        wrong[name] = right[name] + change
        with pytest.raises(AssertionError, match=r"another|apart"):
            disagreement(wrong, right)
        assert difference(wrong, right) > 1e-5

    def apart(text: Text) -> Any:
        way = ours(text)
        return lambda new, tick: {**(found := way(new, tick)), "top_1": found["top_1"] + 1}

    monkeypatch.setitem(lens.CONTESTANTS, "tracelens", apart)
    short = Measurement("tiny", SMALL, NEW, 1, ("plain", "per-step", "tracelens"))
    with pytest.raises(AssertionError, match="another token"):
        measure(short, tmp_path, random.Random(0), lambda told: None)


def test_the_report_has_every_part(report: dict[str, Any], tmp_path: Path) -> None:
    (measurement,) = report["measurements"]
    assert [row["contestant"] for row in measurement["rows"]] == list(CONTESTANTS)
    for row in measurement["rows"]:
        assert len(row["whole_s"]) == 2
        assert (row["error"] is None) == row["contestant"].startswith(("plain", "product"))
        assert row["ratio"]["low"] <= row["ratio"]["value"] <= row["ratio"]["high"]
    told = markdown(report, page=True)
    for words in ("B0 / S", "extrapolated", "Activation memory", "6 + 5 tokens", "not measured", "the floor"):
        assert words in told, words
    assert any("S beside B3" in line for line in aims(measurement))
    write(report, tmp_path / "results", tmp_path / "lens.md")
    kept = {**report, "measurements": [{**measurement, "new": 9}]}
    assert [each["new"] for each in added(kept, tmp_path / "results")["measurements"]] == [5, 9]
    assert (tmp_path / "lens.md").read_text(encoding="utf-8") == told


def test_what_is_left_to_the_end_belongs_to_the_steps() -> None:
    """One contestant does everything in its steps, the other one the same at the end."""
    plain = Laps((Lap(9, 9), *[Lap(1, 1)] * 64, Lap(0, 0)), None)
    each = Laps((Lap(9, 9), *[Lap(3, 2)] * 64, Lap(0, 0)), None)
    late = Laps((Lap(9, 9), *[Lap(1, 1)] * 64, Lap(128, 64)), None)
    for made in (each, late):
        assert of_steps([made], [plain], 0)["value"] == 3
        assert of_steps([made], [plain], 1)["value"] == 2
    assert of_steps([each], [plain], 1) == {"value": 2.0, "low": 2.0, "high": 2.0}
    assert estimated([Part(10, 65)], [late], 101) == 9 + 100 * 3


def test_sampled_steps_make_a_whole(tmp_path: Path) -> None:
    some = Measurement("tiny", SMALL, 20, 1, ("plain", "tracelens"), sample=((6, 20), 2))
    rows = sampled(some, tmp_path, random.Random(0), lambda told: None)
    assert [row["contestant"] for row in rows] == ["plain", "tracelens"]
    assert rows[0]["ratio"]["value"] == 1
    assert all(row["tokens_per_s"] == pytest.approx(20 / row["whole_s"][0]) for row in rows)


def test_the_curve_of_the_reference_loop() -> None:
    """A token after t tokens takes 3 + 2 t seconds; the first of them comes after the prompt."""
    fit = reference_fit({length: [3 + 2 * length] * 2 for length in (10, 20)}, prompt=10)
    assert fit["whole_s"]["64"] == pytest.approx(sum(3 + 2 * length for length in range(10, 10 + 64)))


def test_tensors_are_counted_as_long_as_they_are_there() -> None:
    before = torch.ones(1000)
    with LiveMemory() as memory:
        first = before + 1  # 4,000 bytes
        view = first[:10]
        before.add_(1)  # was there before
        second = torch.cat([first, first])  # 8,000
        assert (memory.live, memory.most) == (12000, 12000)
        del first
        assert memory.live == 12000, "a view still has it"
        del view
        assert memory.live == 8000
        del second
        assert (memory.live, memory.most) == (0, 12000)
    assert most_live(lambda: torch.zeros(5).double())[:2] == (60, 40)


def test_memory_has_its_closed_form(tmp_path: Path) -> None:
    """What all states take, by the token; and rows of logits in hand, which half as many rows halve."""

    def most(way: Any, new: int) -> int:
        return most_live(partial(way, new, at_once))[0]

    wide = open_text(
        Tiny(layers=3, d_model=16, neurons=24, heads=2, vocabulary=40, tokens=6, new=700), tmp_path
    )
    afterwards = lens_text.afterwards(wide, rows=8)
    grown = most(afterwards, 512) - most(afterwards, 256)
    cache = 2 * 3 * 16 * 4 * 256
    # All states of a layer together, and the answers of five tokens, twice while they are put together.
    states, beside = (3 + 1) * 16 * 4 * 256, 16 * 4 * 256 + 2 * 3 * 5 * 12 * 256
    assert states + cache <= grown <= 1.05 * (states + cache + beside)
    many = open_text(
        Tiny(layers=3, d_model=16, neurons=24, heads=2, vocabulary=4000, tokens=6, new=80), tmp_path
    )
    full, half = (most(lens_text.afterwards(many, rows=rows), 70) for rows in (64, 32))
    assert full - half == pytest.approx(32 * 4000 * 4, rel=0.05)
    rows = {row["contestant"]: row["bytes"] for row in memory(SMALL, tmp_path, 4, lambda told: None)["rows"]}
    logits = 4 * 3 * 6 * 400 * 4
    assert logits <= rows["reference"] <= 1.6 * logits + rows["plain"]


def test_tracelens_can_come_after_nnsight() -> None:
    """nnsight gives every object a method ``save``, which the fields of a dataclass would take for their default."""
    code = "import nnsight, tracelens; assert hasattr(object, 'save')"
    subprocess.run([sys.executable, "-c", code], check=True)
