"""Every example runs, and what it finds is what it must find."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

import tracelens as tl
from tests.support.families import FAMILIES
from tests.support.pretend import Pretend, pretend
from tests.support.ranks import PoolOf

__all__ = ["pretend"]

pytestmark = pytest.mark.smollm2

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="module")
def model() -> tl.Model:
    return tl.load("smollm2-135m")


def example(name: str):
    return importlib.import_module(f"examples.{name}")


def test_logit_lens(model: tl.Model) -> None:
    words = example("logit_lens").main(model)
    assert len(words) == 30
    assert words[-1][0] == " Paris"
    assert words[0][0] != " Paris"


def test_the_last_layer_of_the_lens_is_the_model(model: tl.Model) -> None:
    ids, probabilities = example("logit_lens").lens(model, "The capital of France is")
    with model.trace("The capital of France is"):
        best = model.logits[0, -1].softmax(-1).topk(3)
        values, indices = best.values.save(), best.indices.save()
    assert torch.equal(ids[-1], indices.value)
    torch.testing.assert_close(probabilities[-1], values.value, rtol=1e-4, atol=1e-6)


def test_parallel_plan(ranks_of: PoolOf, model: tl.Model) -> None:
    plan = "examples.parallel_plan:tutorial"
    with tl.load("smollm2-135m", tp=3, ranks=ranks_of(3), parallelize=plan) as spread:
        found = example("parallel_plan").main(spread)
    expected = example("parallel_plan").main(model)
    assert torch.equal(found["best"], expected["best"])
    for name in ("mean", "q"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


def test_tuned_lens(model: tl.Model, tmp_path: Path) -> None:
    trained, found = example("tuned_lens").main(
        model, steps=1, tokens=16, context=16, most=2, folder=tmp_path, learning_rate=0.1
    )
    assert found.tokens == 32
    # After one step on few tokens it is another lens, and one that can be read.
    assert not torch.equal(found.kl[:-1], found.identity_kl[:-1])
    again = tl.TunedLens.load(tmp_path)
    assert torch.equal(again.translators[29].weight, trained.translators[29].weight)
    seen, held_out = example("tuned_lens").texts()
    known = {paragraph for text in seen for paragraph in text.split("\n\n")}
    assert not known & {paragraph for text in held_out for paragraph in text.split("\n\n")} - {""}


def test_activation_patching(model: tl.Model) -> None:
    grid = example("activation_patching").main(model)
    assert grid.shape == (30, 5)
    # After the last layer only the last position matters, and patching it restores everything.
    torch.testing.assert_close(grid[-1], torch.tensor([0.0, 0, 0, 0, 1]), rtol=0, atol=1e-3)
    # Before attention has moved anything, all of the difference is at the word that differs.
    torch.testing.assert_close(grid[0, :3], torch.zeros(3), rtol=0, atol=1e-3)
    assert grid[0, 3] > 0.9


def test_attribution_patching(model: tl.Model) -> None:
    estimate, patched = example("attribution_patching").main(model)
    assert estimate.shape == patched.shape == (30, 5)
    pair = torch.stack([estimate.flatten(), patched.flatten()])
    assert torch.corrcoef(pair)[0, 1] > 0.98
    # Also without the one place that stands out: both find the same candidates.
    assert patched.argmax() == estimate.argmax()
    pair[:, patched.argmax()] = 0
    assert torch.corrcoef(pair)[0, 1] > 0.9
    assert set(pair[0].topk(3).indices.tolist()) == set(pair[1].topk(3).indices.tolist())


def test_steering(model: tl.Model) -> None:
    found = example("steering").main(model, new_tokens=4)
    assert found[-1] > found[2] > found[0]


def test_neuron_ablation(model: tl.Model) -> None:
    changes = example("neuron_ablation").main(model)
    assert changes.shape == (30, 4)
    assert changes.min() < -0.1
    assert changes.isfinite().all()


def test_one_group_of_all_neurons_is_the_mlp_without_output(model: tl.Model) -> None:
    sweep = example("neuron_ablation").ablation_sweep
    (change,) = sweep(model, "The capital of France is", " Paris", range(4, 5), 1).flatten().tolist()
    token = model.tokenizer.encode(" Paris")[0]
    found = []
    for zero in (False, True):
        with model.trace("The capital of France is"):
            if zero:
                model.layers[4].mlp_out = 0.0
            found.append(model.logits[0, -1].log_softmax(-1)[token].save())
    assert change == pytest.approx(float(found[1].value - found[0].value), abs=1e-4)


def test_sae_with_error_term(model: tl.Model) -> None:
    unchanged, moved = example("sae_with_error_term").main(model)
    assert unchanged == 0
    assert moved > 0.1


def test_save_and_share(model: tl.Model, tmp_path: Path) -> None:
    assert example("save_and_share").main(model, folder=tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["ablation.json", "ablation.safetensors"]


def test_several_gpus(model: tl.Model, pretend: Pretend, capsys: pytest.CaptureFixture[str]) -> None:
    module = example("several_gpus")
    alone = example("several_gpus").main(model)
    assert "sends" not in capsys.readouterr().out
    spread = module.load(pretend.devices(3))
    t = module.main(spread)
    said = capsys.readouterr().out
    assert said.count("  sends %") == 1
    assert "-> place 2" in said
    assert str(t["neurons"].device) == "pretend:2"
    assert t["norms"].device.type == "cpu"
    for name, value in alone.items():
        assert torch.equal(t[name].cpu(), value), name


def test_watch_a_generation(model: tl.Model, capsys: pytest.CaptureFixture[str]) -> None:
    pieces, along = example("watch_a_generation").main(model, first=3, last=6, new_tokens=8)
    assert capsys.readouterr().out.count("+ v") == 3
    within, outside = along[3:6], along[:3] + along[6:]
    assert min(within) > max(outside) + 10  # the vector's length is 54
    with model.generate(example("watch_a_generation").PROMPT, max_new_tokens=8) as t:
        plain = model.layers[14].resid_post[:, -1].save()
    assert t.text.startswith("".join(pieces[:3]))  # nothing is different before the window
    assert plain.value.shape == (8, 1, 576)


def test_every_example_is_tested() -> None:
    names = {file.stem for file in EXAMPLES.glob("*.py")} - {"__init__"}
    text = Path(__file__).read_text(encoding="utf-8")
    assert names
    assert {name for name in names if f'example("{name}").main(' in text} == names


def test_steerability_study(model: tl.Model, tmp_path: Path) -> None:
    data = Path(__file__).resolve().parent / "data"
    small = tl.wrap(
        FAMILIES["llama"].build(vocab_size=len(model.tokenizer), max_position_embeddings=512), model.tokenizer
    )
    sizes = ["--rows", "10", "--controls", "2", "--neutral", "2"]
    found = example("steerability_study").main([str(data), "--out", str(tmp_path), *sizes], small)
    assert [one.data for one in found] == ["contrast_choices", "contrast_words"]
    for one in found:
        assert one.tried == 4
        assert one.rows[0] == 4
        assert one.interval[0] <= one.slope <= one.interval[1]
        assert one.corrected_interval[0] <= one.interval[0]
        assert one.kl["0"] < 1e-6 < one.kl["1.5"]
        # Numbers of a vector that is not the control beside it.
        assert one.slope not in (one.other_data_slope, one.other_position_slope)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "contrast_words" in text
    assert (tmp_path / "contrast_choices.svg").read_text(encoding="utf-8").startswith("<svg")
    written = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert len(written["findings"]) == 2
