"""``tracelens lens``, on the embedded model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tracelens as tl
from tracelens import cli, lens_command

pytestmark = [pytest.mark.smollm2, pytest.mark.usefixtures("one_model")]

PROMPT = "The capital of France is"
HERE = ["--layers", "0-2,27-", "--positions", "3-"]


@pytest.fixture(scope="module")
def model() -> tl.Model:
    return tl.load("smollm2-135m")


def test_the_table_is_that_of_the_method(model: tl.Model, capsys: pytest.CaptureFixture[str]) -> None:
    layers = [0, 1, 2, 27, 28, 29]
    lens = model.logit_lens(PROMPT, layers=layers, positions=[3, 4])
    assert isinstance(lens, tl.LensResult)
    assert cli.main(["lens", PROMPT, *HERE]) == 0
    plain = capsys.readouterr().out
    assert plain == f"{lens!r}\n"
    assert "Paris" in plain
    assert cli.main(["lens", PROMPT, *HERE, "--metric", "kl"]) == 0
    assert capsys.readouterr().out == f"{lens.table('kl')}\n" != plain


def test_a_generation_goes_to_a_page_and_a_file(
    model: tl.Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, file = tmp_path / "out.html", tmp_path / "out.safetensors"
    asked = ["lens", PROMPT, "--layers", "0,25-", "--components", "attn_out", "resid_post", "--generate", "4"]
    asked += ["--top-k", "3", "--track", " Paris", "--track", " Rome", "--metric", "logsumexp"]
    assert cli.main([*asked, "--html", str(page), "--save", str(file)]) == 0
    assert capsys.readouterr().out == f"wrote {page}\nwrote {file}\n"
    lens = tl.LensResult.load(file)
    right = model.logit_lens(
        PROMPT,
        layers=[0, 25, 26, 27, 28, 29],
        components=("attn_out", "resid_post"),
        generate=4,
        top_k=3,
        track=[" Paris", " Rome"],
        metrics=("logsumexp",),
    )
    assert isinstance(right, tl.LensResult)
    assert (lens.components, lens.layers, lens.tracked) == (right.components, right.layers, right.tracked)
    assert len(lens.positions) == lens.n_prompt + 3
    assert torch.equal(lens.top_ids, right.top_ids)
    # The command asks for more, so that other stretches of the vocabulary are summed at once.
    torch.testing.assert_close(lens.logsumexp, right.logsumexp, atol=1e-5, rtol=1e-6)
    assert "Paris" in page.read_text(encoding="utf-8")


def test_seeds_are_of_texts_that_are_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    def text(*options: str) -> str:
        asked = ["lens", "One day", "--layers", "29", "--generate", "6", "--positions", "generated", *options]
        assert cli.main(asked) == 0
        return capsys.readouterr().out

    drawn = ["--temperature", "1.5", "--seed"]
    assert text(*drawn, "1") == text(*drawn, "1") != text(*drawn, "2")
    assert cli.main(["lens", PROMPT, "--generate", "2", "--seed", "1"]) == 1
    assert "--seed has no effect" in capsys.readouterr().err


def test_where_the_model_goes_and_which_lens(
    model: tl.Model, one_model: list[dict[str, object]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["lens", PROMPT, *HERE, "--model", "a/b", "--device-map", "auto"]) == 0
    assert cli.main(["lens", PROMPT, *HERE, "--tp", "3", "--pp", "2"]) == 0
    assert one_model == [
        {"name": "a/b", "device_map": "auto", "tp": 1, "pp": 1},
        {"name": "smollm2-135m", "device_map": None, "tp": 3, "pp": 2},
    ]
    plain = capsys.readouterr().out
    tl.TunedLens.identity(model).save(tmp_path)
    assert cli.main(["lens", PROMPT, *HERE, "--lens", str(tmp_path)]) == 0
    tuned = capsys.readouterr().out
    assert "tuned" in tuned.splitlines()[0].lower()
    assert "tuned" not in plain.lower()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--layers", "20-5"], "'20-5' in '20-5' ends before it begins"),
        (["--layers", "0-3,x"], "'x' in '0-3,x' is no range"),
        (["--layers", ""], "'' in '' is no range"),
        (["--layers", "25-30"], "--layers 25-30: there are 30 layers, 0 to 29"),
        (["--layers", "last"], "is no range"),
        (["--positions", "4-5"], "--positions 4-5: there are 5 tokens of the prompt, 0 to 4"),
        (["--positions", "generated"], "no text is generated"),
        (["--metric", "surprise"], "--metric surprise: there is none of that name"),
        (["--components", "resid_pots"], "resid_pots"),
        (["--track", " Paris and Rome"], "Paris and Rome"),
        (["--save", "out.xls"], "no ending that names a format"),
        (["--html", "not/there/out.html"], "there is no folder not/there"),
        (["--lens", "not/there"], "not/there"),
        (["--generate", "-1"], "no number of new tokens"),
    ],
    ids=" ".join,
)
def test_what_is_wrong_has_a_name(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert cli.main(["lens", PROMPT, *options]) == 1
    told = capsys.readouterr().err
    assert told.startswith("tracelens: ")
    assert said in told
    assert "test_lens_command.py" not in told


def test_files_and_ranges_are_looked_at_before_the_model_is_loaded(
    one_model: list[dict[str, object]],
) -> None:
    for options in (
        ["--save", "out.xls"],
        ["--html", "not/there/a.html"],
        ["--layers", "3-1"],
        ["--metric", "x"],
    ):
        assert cli.main(["lens", PROMPT, *options]) == 1
    assert not one_model


def test_ranges() -> None:
    parts = lens_command._parts("0-3, 7,25-")
    assert parts == [(0, 3), (7, 7), (25, None)]
    assert lens_command.chosen("--layers", "0-3,2,28-", 30, "layers", ()) == [0, 1, 2, 3, 28, 29]
