"""``tracelens steer``, on a tiny model: what the commands print is what the functions give."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import tracelens as tl
from tests.support.families import FAMILIES
from tests.support.ranks import PoolOf
from tests.support.tokenizers import byte_level_bpe
from tracelens import cli
from tracelens.loading import load
from tracelens.steering import SteeringCurve, load_contrast

pytestmark = pytest.mark.usefixtures("one_model")

DATA = Path(__file__).parent / "data" / "contrast_choices.jsonl"
EXTRACT = ["steer", "extract", str(DATA), "--layers", "1-", "--sites", "resid_post", "attn_out"]


@pytest.fixture(scope="module")
def model() -> tl.Model:
    tokenizer = byte_level_bpe(answers=True)
    return tl.wrap(FAMILIES["llama"].build(vocab_size=len(tokenizer), max_position_embeddings=256), tokenizer)


def test_from_a_file_to_a_report(
    model: tl.Model, tmp_path: Path, capsys: pytest.CaptureFixture[str], one_model: list[dict[str, object]]
) -> None:
    file, page, numbers = tmp_path / "v.safetensors", tmp_path / "out.html", tmp_path / "out.json"
    assert cli.main([*EXTRACT, "--seed", "3", "--save", str(file), "--model", "some/model", "--tp", "1"]) == 0
    data = load_contrast(DATA, template="plain", letters="balanced", seed=3)
    v = tl.steering.extract(model, data.train, sites=["resid_post", "attn_out"], layers=[1, 2], seed=3)
    assert capsys.readouterr().out == f"{v.report()}\nwrote {file}\n"
    assert one_model[0] == {"name": "some/model", "device_map": None, "tp": 1, "pp": 1}
    kept = tl.steering.load(file, model)
    assert all((kept[place] == v[place]).all() for place in v)

    texts = tmp_path / "texts.txt"
    texts.write_text("The train leaves at nine.\n\nWater boils.\n", encoding="utf-8")
    measure = [
        "steer",
        "sweep",
        str(file),
        str(DATA),
        "--multipliers",
        "-1",
        "0",
        "1",
        "--controls",
        "2",
        "--seed",
        "3",
    ]
    measure += ["--by", "interval", "--damage", str(texts)]
    chosen = tmp_path / "best.safetensors"
    kept_too = ["--save", str(numbers), "--save-vector", str(chosen)]
    assert cli.main([*measure, "--html", str(page), *kept_too]) == 0
    out = capsys.readouterr().out
    best = tl.steering.choose(model, v, data.validation, [-1, 0, 1], by="interval", seed=3)
    curve = SteeringCurve.load(numbers)
    assert curve.place == best.place
    assert out == f"{best!r}\n\n{curve!r}\nwrote {page}\nwrote {numbers}\nwrote {chosen}\n"
    assert tl.steering.load(chosen, model).places == (best.place,)
    right = tl.steering.sweep(model, best.vector, data.test, [-1, 0, 1], controls=2, seed=3)
    assert isinstance(right, SteeringCurve)
    np.testing.assert_allclose(curve.propensity, right.propensity, atol=1e-6)
    assert curve.facts.part == "test"
    assert curve.damage is not None
    assert curve.damage.texts == 2
    shown = page.read_text(encoding="utf-8")
    for words in ("<svg", "template plain, letters balanced, seed 3", "4 places", "separation"):
        assert words in shown


def test_a_text_for_each_strength(
    model: tl.Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "v.safetensors"
    assert cli.main([*EXTRACT, "--rows", "4", "--save", str(file)]) == 0
    capsys.readouterr()
    asked = [
        "steer",
        "generate",
        str(file),
        "Town 3 calls.",
        "--strength",
        "0",
        "40",
        "--max-new-tokens",
        "5",
    ]
    assert cli.main([*asked, "--site", "resid_post"]) == 0
    assert capsys.readouterr().out.startswith(
        "steered at resid_post of 2 layers at once; --layers and --site"
    )
    assert cli.main([*asked, "--site", "resid_post", "--layers", "2", "--positions", "generated"]) == 0
    out = capsys.readouterr().out
    v = tl.steering.load(file, model).at(sites="resid_post", layers=2)
    lines: list[str] = []
    for strength in (0, 40):
        with model.generate("Town 3 calls.", max_new_tokens=5) as t:
            v.apply(t, float(strength), positions="generated")
        lines.append(f"{strength}: Town 3 calls.{t.text}")
    assert out == "\n".join(lines) + "\n"
    assert lines[0].partition(": ")[2] != lines[1].partition(": ")[2]

    assert cli.main(asked) == 1  # of two sites it has to be said which
    assert "directions at 2 sites" in capsys.readouterr().err


def test_a_model_that_two_processes_share(
    model: tl.Model,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    ranks_of: PoolOf,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, file, numbers = tmp_path / "model", tmp_path / "v.safetensors", tmp_path / "out.json"
    model.hf.save_pretrained(folder)
    assert model.tokenizer is not None
    model.tokenizer.save_pretrained(folder)
    # Ranks that are there already, in place of those that the command would start.
    monkeypatch.setattr("tracelens.loading.load", partial(load, ranks=ranks_of(2)))
    spread = ["--model", str(folder), "--tp", "2", "--rows", "4"]
    assert cli.main([*EXTRACT, *spread, "--save", str(file)]) == 0
    data = load_contrast(DATA, template="plain", letters="balanced", seed=0)
    v = tl.steering.extract(model, data.train[:4], sites=["resid_post", "attn_out"], layers=[1, 2], seed=0)
    made = tl.steering.load(file, model)
    assert made.places == v.places
    for place in v:
        torch.testing.assert_close(made[place], v[place], atol=1e-5 * v.facts.scale[place], rtol=0)

    measure = ["steer", "sweep", str(file), str(DATA), *spread, "--multipliers", "-1", "1", "--controls", "1"]
    assert cli.main([*measure, "--save", str(numbers)]) == 0
    assert f"wrote {numbers}" in capsys.readouterr().out
    found = SteeringCurve.load(numbers)
    best = tl.steering.choose(model, v, data.validation[:4], [-1, 1], seed=0)
    right = tl.steering.sweep(model, best.vector, data.test[:4], [-1, 1], controls=1, seed=0)
    assert isinstance(right, SteeringCurve)
    assert found.place == right.place
    np.testing.assert_allclose(found.propensity, right.propensity, atol=2e-5)
    assert np.ptp(right.propensity, axis=1).max() > 1e-3, "the vector matters"


def test_mistakes_are_one_line_and_come_before_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], one_model: list[dict[str, object]]
) -> None:
    assert cli.main(["steer", "extract", str(DATA), "--save", str(tmp_path / "no" / "v.safetensors")]) == 1
    assert "there is no folder" in capsys.readouterr().err
    assert cli.main(["steer", "extract", str(DATA), "--save", str(tmp_path / "v.pt")]) == 1
    assert "does not end in .safetensors or .gguf" in capsys.readouterr().err
    assert cli.main(["steer", "sweep", str(tmp_path / "none.safetensors"), str(DATA)]) == 1
    assert "there is no file" in capsys.readouterr().err
    assert not one_model
    with pytest.raises(SystemExit):
        cli.main(["steer"])
    assert "extract" in capsys.readouterr().err


def test_the_lines_of_the_page_run(
    model: tl.Model, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the data and the small model of these tests; rows of one file and seed are never shared, so nothing warns."""
    page = Path(__file__).parents[1] / "docs" / "how-to" / "steer_in_the_terminal.md"
    lines = [
        line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("tracelens steer")
    ]
    assert [line.split()[2] for line in lines] == ["extract", "sweep", "generate"]
    (tmp_path / "questions.jsonl").write_bytes(DATA.read_bytes())
    monkeypatch.chdir(tmp_path)
    for line in lines:
        assert cli.main(shlex.split(line)[1:]) == 0, capsys.readouterr().err
    assert {file.name for file in tmp_path.iterdir()} >= {
        "v.safetensors",
        "best.safetensors",
        "out.html",
        "out.json",
    }
    assert "2: I think that parties are" in capsys.readouterr().out
