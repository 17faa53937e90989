"""The demo and the command line, on the embedded model."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import tracelens as tl
from examples import several_gpus
from tests.support import sharded_demo
from tests.support.pretend import Pretend, pretend
from tracelens import cli, demo

__all__ = ["pretend"]

pytestmark = pytest.mark.smollm2


@pytest.fixture(scope="module")
def model() -> tl.Model:
    return tl.load("smollm2-135m")


@pytest.fixture(scope="module")
def said(model: tl.Model) -> str:
    lines: list[str] = []
    demo.run(model, lines.append)
    return "\n".join(lines)


def test_the_demo_shows_what_the_model_says(model: tl.Model, said: str) -> None:
    text = said
    assert "smollm2-135m (Llama, 30 layers" in text
    assert model.tokenizer is not None
    ids = model.tokenizer(demo.PROMPT, return_tensors="pt")
    with torch.no_grad():
        probabilities = model.hf(**ids).logits[0, -1].softmax(-1)
    top = probabilities.argmax()
    last = demo.logit_lens(model, demo.PROMPT)[-1]
    # The last layer's lens is the model's own prediction.
    assert last.tokens[0] == model.tokenizer.decode([top]) == " Paris"
    assert last.probabilities[0] == pytest.approx(probabilities[top].item(), abs=1e-4)
    assert "' Paris'" in text
    for line in ("resid_post +=", "post_ln +=", "stop after layers.20.resid_post", "demo.py:"):
        assert line in text


def test_the_lens_of_every_layer_is_the_norm_and_the_head(model: tl.Model) -> None:
    assert model.tokenizer is not None
    ids = model.tokenizer(demo.PROMPT, return_tensors="pt")
    with torch.no_grad():
        states = model.hf(**ids, output_hidden_states=True).hidden_states
        for row in demo.logit_lens(model, demo.PROMPT)[:-1:7]:
            logits = model.hf.lm_head(model.hf.model.norm(states[row.layer + 1][0, -1]))
            best = logits.softmax(-1).topk(3)
            assert row.tokens == tuple(model.tokenizer.decode([token]) for token in best.indices)
            assert row.probabilities == pytest.approx(best.values.tolist(), abs=1e-4)


def test_a_steered_text_is_what_a_hand_written_hook_gives(model: tl.Model) -> None:
    v = demo.contrast_vector(model, "resid_post", demo.LAYER)
    strength = demo.STRENGTH["resid_post"]
    assert model.tokenizer is not None
    ids = model.tokenizer(demo.STORY, return_tensors="pt")
    handle = model.hf.model.layers[demo.LAYER].register_forward_hook(
        lambda _m, _a, output: output + strength * v
    )
    try:
        tokens = model.hf.generate(
            **ids, max_new_tokens=demo.NEW_TOKENS, do_sample=False, repetition_penalty=demo.PENALTY
        )
    finally:
        handle.remove()
    expected = model.tokenizer.decode(tokens[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert demo.steered(model, "resid_post", demo.LAYER, strength) == expected
    assert demo.steered(model, "resid_post", demo.LAYER, -strength) != expected


def numbers_of(text: str) -> list[str]:
    """The demo without what it says of devices: the lens and the texts."""
    _, told = text.split("\n", 1)
    return told.partition("3. What ran")[0].splitlines()


def test_three_devices_give_the_numbers_of_one(
    said: str, pretend: Pretend, capsys: pytest.CaptureFixture[str]
) -> None:
    with pretend.watched() as seen:
        assert sharded_demo.main() == 0
    told = capsys.readouterr().out
    here, _, rest = told.partition("model: ")[2].partition("\n4. Across devices")
    assert len(numbers_of(said)) > 50
    assert numbers_of(here) == numbers_of(said)
    assert {copy.source for copy in seen.copies} >= set(sharded_demo.PRETEND), "it did run there"
    assert "place 2 (pretend:2): layers 20 to 29, final_norm" in here
    assert "send %" in rest
    assert "next: ' Paris'" in rest


def test_three_devices_give_the_streams_of_one_bit_for_bit(model: tl.Model, pretend: Pretend) -> None:
    spread = several_gpus.load(pretend.devices(3))
    found: list[list[torch.Tensor]] = []
    for each in (model, spread):
        with each.trace(demo.PROMPT):
            streams, logits = each.layers[:].resid_post.save(), each.logits.save()
        found.append([streams.value, logits.value, demo.contrast_vector(each, "resid_post", demo.LAYER)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(*(demo.logit_lens(each, demo.PROMPT) for each in (model, spread)), strict=True):
        assert one.tokens == other.tokens
        # The product with the transposed unembedding is rounded by where its operands lie in memory.
        assert one.probabilities == pytest.approx(other.probabilities, rel=1e-5)


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"tracelens {tl.__version__}\n"
    assert cli.main(["sites", "smollm2-135m"]) == 0
    out = capsys.readouterr().out
    assert "layers[i].mlp_norm" in out
    assert "post_ln" in out
    assert cli.main([]) == 0
    assert "demo" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["nonsense"])


def test_help_does_not_import_torch() -> None:
    code = "import sys; from tracelens.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "demo" in done.stdout
