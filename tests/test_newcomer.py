"""What a newcomer stumbled over: plausible uses that once gave plausible wrong numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import tracelens as tl
from tests.support.families import FAMILIES
from tracelens import errors

HF = FAMILIES["llama"].build()
MODEL = tl.wrap(HF)
IDS = [[5, 9, 2, 7]]
RAGGED = [[5, 9, 2, 7], [11, 4]]


@pytest.mark.parametrize("layers", [[1, 2], [2, 0]])
def test_the_layer_column_names_the_layers_of_computed_values(layers: list[int]) -> None:
    with MODEL.trace(IDS) as t:
        h = MODEL.layers[layers].resid_post
        h.norm(dim=-1).save("norm")
        (h - MODEL.layers[1].attn_out).mean(-1).save("difference")
        h.save("h")
    for name in ("norm", "difference", "h"):
        table = t.results.to_pandas(name)
        assert list(dict.fromkeys(table["layer"])) == layers
    norm = t.results.to_pandas("norm").set_index(["layer", "row", "position"])["value"]
    for layer in layers:
        with MODEL.trace(IDS) as one:
            MODEL.layers[layer].resid_post.norm(dim=-1).save("norm")
        np.testing.assert_array_equal(norm.loc[layer].to_numpy(), one["norm"][0].numpy())


def test_a_stack_that_belongs_to_no_layers_does_not_say_layer() -> None:
    with MODEL.trace(IDS) as t:
        (MODEL.layers[:].resid_post * 0 + MODEL.embed).save("same")
        torch.stack([MODEL.layers[0].resid_post, MODEL.embed]).save("stack")
    assert list(t.results.to_pandas("same")["layer"].unique()) == [0, 1, 2]
    assert "layer" not in t.results.to_pandas("stack")


def test_a_file_that_was_written_again_is_not_read_as_the_old_result(tmp_path) -> None:
    file = str(tmp_path / "h.safetensors")
    with MODEL.trace(IDS) as first:
        h = MODEL.layers[0].resid_post.save("h", to=file)
    kept = h.value.clone()
    assert torch.equal(first["h"], kept)
    with MODEL.trace([[1, 2]]) as second:
        MODEL.layers[0].resid_post.save("h", to=file)
    assert second["h"].shape == (1, 2, 48)
    for read in (lambda: h.value, lambda: first["h"], lambda: first.results["h"]):
        with pytest.raises(errors.SavedFileError, match="written again"):
            read()
    (tmp_path / "h.safetensors").unlink()
    with pytest.raises(errors.SavedFileError, match="removed"):
        _ = second["h"]


def test_a_file_is_found_again_from_another_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with MODEL.trace(IDS):
        h = MODEL.layers[0].resid_post.save(to="h.safetensors")
        plain = MODEL.layers[0].resid_post.save()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert torch.equal(h.value, plain.value)


def test_an_applied_function_gives_each_row_what_it_would_get_alone() -> None:
    shapes: list[tuple[int, ...]] = []

    def centred(z: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shapes.append(tuple(z.shape))
        return z - z.mean(1, keepdim=True), (z.mean(1) * w)

    w = torch.linspace(0, 1, 48)

    def block() -> None:
        h = MODEL.layers[0].resid_post
        new, mean = tl.apply(centred, h, w, like=(h, h[:, -1]))
        MODEL.layers[0].resid_post = new
        mean.save("mean")
        MODEL.layers[2].resid_post.save("h")

    with MODEL.trace(RAGGED) as t:
        block()
    assert shapes == [(1, 4, 48), (1, 2, 48)]
    padded = MODEL.prepare(RAGGED).batch.input_ids
    assert padded.shape == (2, 4)
    for row, ids in enumerate(RAGGED):
        with MODEL.trace([ids]) as alone:
            block()
        torch.testing.assert_close(t["h"][row], alone["h"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(t["mean"][row], alone["mean"][0], rtol=1e-5, atol=1e-6)


def test_an_applied_function_without_rows_in_its_result_is_refused_where_rows_differ() -> None:
    with pytest.raises(errors.PositionAxisError, match="without a row axis"), MODEL.trace(RAGGED):
        tl.apply(lambda z: z.mean((0, 1)), MODEL.layers[0].resid_post, like=torch.empty(48)).save()


def test_applied_functions_see_no_padding_in_generation_either() -> None:
    seen: list[tuple[int, ...]] = []

    def note(z: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(z.shape))
        return z * 1.5

    def run(prompt: list[list[int]]) -> list[list[int]]:
        with MODEL.generate(prompt, max_new_tokens=3) as t:
            MODEL.layers[0].resid_post = tl.apply(note, MODEL.layers[0].resid_post)
        return t.tokens

    together = run(RAGGED)
    assert seen == [(1, 4, 48), (1, 2, 48), (2, 1, 48), (2, 1, 48)]
    assert together == [run([ids])[0] for ids in RAGGED]


def test_a_model_that_drops_at_random_is_refused() -> None:
    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=50, n_positions=16)
    hf = GPT2LMHeadModel(config)
    model = tl.wrap(hf)
    assert hf.training

    def run() -> torch.Tensor:
        with model.trace([1, 2, 3]) as t:
            model.logits.save("logits")
        return t["logits"]

    with pytest.raises(errors.TrainingModeError, match=r"transformer\.drop"):
        run()
    with pytest.raises(errors.TrainingModeError), model.generate([1, 2, 3], max_new_tokens=1):
        pass
    assert hf.training
    hf.eval()
    assert torch.equal(run(), run())


def test_training_mode_without_anything_random_is_fine() -> None:
    family = FAMILIES["llama"]
    hf = family.build()
    hf.config.attention_dropout = 0.0
    for module in hf.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    hf.train()
    model = tl.wrap(hf)
    with model.trace(IDS) as t:
        model.logits.save("logits")
    assert hf.training
    with torch.no_grad():
        assert torch.equal(t["logits"], hf(torch.tensor(IDS)).logits)


def test_turning_all_axes_round_is_refused() -> None:
    with MODEL.trace(IDS) as t:
        h = MODEL.layers[0].resid_post
        with pytest.raises(errors.UnsupportedFunctionError, match="turn round all 3 axes"):
            _ = h.T
        h[0].T.save("T")
        h.mT.save("mT")
        h.save("h")
    assert torch.equal(t["T"], t["h"][0].T)
    assert torch.equal(t["mT"], t["h"].mT)


def test_several_sequences_for_one_prompt_all_come_back() -> None:
    torch.manual_seed(0)
    with MODEL.generate([5, 9, 2], max_new_tokens=4, do_sample=True, num_return_sequences=3) as t:
        pass
    assert len(t.tokens) == 3
    assert all(len(row) <= 4 for row in t.tokens)


def test_a_layer_named_twice_is_refused() -> None:
    with MODEL.trace(IDS), pytest.raises(errors.LayerRangeError, match="twice"):
        MODEL.layers[[1, 1]].resid_post += 1.0


def test_numpy_integers_choose_layers() -> None:
    with MODEL.trace(IDS) as t:
        for layer in np.arange(3):
            MODEL.layers[layer].resid_post.save(f"h{layer}")
        MODEL.layers[list(np.arange(3))].resid_post.save("all")
    assert torch.equal(t["all"], torch.stack([t[f"h{layer}"] for layer in range(3)]))


def test_a_write_that_nothing_sees_stands_in_the_explanation() -> None:
    with MODEL.trace(IDS) as t:
        MODEL.layers[2].resid_post += 100
        MODEL.layers[0].resid_post *= 2
        MODEL.layers[1].resid_post.save()
    unseen = [line for line in t.explain().splitlines() if "not done" in line]
    assert len(unseen) == 1
    assert "layers.2.resid_post" in unseen[0]
    assert "test_newcomer.py:" in unseen[0]
