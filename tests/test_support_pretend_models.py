"""Real models on the pretend accelerator: accelerate spreads and offloads them, and their numbers are the CPU's."""

from __future__ import annotations

from typing import Any

import accelerate
import pytest
import torch
from transformers import PreTrainedModel

from tests.support.families import EVERY, FAMILIES, LAYERS, MOST, VARIANTS
from tests.support.pretend import Pretend, device_map, pretend

__all__ = ["pretend"]

P = [f"pretend:{index}" for index in range(5)]

SPREADS: dict[str, dict[str, Any]] = {
    "two": {"layers": [P[0], P[0], P[1]]},
    "five": {"layers": P[1:4], "embedding": P[0], "norm": P[4]},
    "back and forth": {"layers": [P[0], P[1], P[0]], "embedding": P[1], "norm": P[1], "head": P[0]},
    "cpu": {"layers": [P[0], "cpu", P[1]], "norm": "cpu"},
    "disk": {"layers": ["disk", "cpu", P[1]], "embedding": P[1], "head": "disk"},
}


def prompts() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    return {"input_ids": torch.randint(3, 90, (2, 9), generator=generator), "attention_mask": mask}


def spread(model: PreTrainedModel, name: str, folder: Any) -> PreTrainedModel:
    settings = dict(SPREADS[name])
    if model.config.tie_word_embeddings:
        # Where the embeddings are: accelerate ties the two again, on one device.
        settings.pop("head", None)
    places = device_map(model, **settings)
    return accelerate.dispatch_model(model, places, main_device=P[0], offload_dir=str(folder))


def answers(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        logits = model(**prompts()).logits
        tokens = model.generate(**prompts(), max_new_tokens=4, do_sample=False)
    return logits.cpu(), tokens.cpu()


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [*MOST, *VARIANTS])
def test_a_spread_model_gives_the_same_bits(pretend: Pretend, family: str, attn: str, tmp_path) -> None:
    wanted = answers(EVERY[family].build(attn=attn))
    for name in SPREADS:
        model = spread(EVERY[family].build(attn=attn), name, tmp_path / name)
        found = answers(model)
        assert torch.equal(found[0], wanted[0]), name
        assert torch.equal(found[1], wanted[1]), name
    other = EVERY[family].build(attn=attn, seed=1)
    assert not torch.equal(answers(spread(other, "two", tmp_path))[0], wanted[0])


@pytest.mark.parametrize("family", MOST)
def test_an_offloaded_model_gives_the_same_bits(pretend: Pretend, family: str, tmp_path) -> None:
    wanted = answers(FAMILIES[family].build())
    for_cpu, for_disk = FAMILIES[family].build(), FAMILIES[family].build()
    accelerate.cpu_offload(for_cpu, P[1])
    accelerate.disk_offload(for_disk, str(tmp_path), P[1])
    assert {parameter.device.type for parameter in for_cpu.parameters()} == {"meta"}
    assert {parameter.device.type for parameter in for_disk.parameters()} == {"meta"}
    weights = sum(parameter.nbytes for parameter in FAMILIES[family].build().parameters())
    for model in (for_cpu, for_disk):
        with pretend.watched() as seen, torch.no_grad():
            logits = model(**prompts()).logits
        assert torch.equal(logits, wanted[0])
        # Every weight came once, and went when its module was done.
        moved = seen.moved()[("cpu", P[1])]
        assert weights <= moved <= weights + 1000
        assert seen.extra(P[1]) < weights
        assert torch.equal(model.generate(**prompts(), max_new_tokens=4, do_sample=False), wanted[1])


@pytest.mark.parametrize("family", MOST)
def test_inference_mode_gives_the_same_bits(pretend: Pretend, family: str, tmp_path) -> None:
    with torch.inference_mode():
        wanted = FAMILIES[family].build()(**prompts()).logits
        found = spread(FAMILIES[family].build(), "five", tmp_path)(**prompts()).logits
    assert found.is_inference()
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(pretend: Pretend, dtype: torch.dtype, tmp_path) -> None:
    wanted = answers(FAMILIES["llama"].build(dtype=dtype))
    found = answers(spread(FAMILIES["llama"].build(dtype=dtype), "five", tmp_path))
    assert found[0].dtype == dtype
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", MOST)
def test_gradients_of_a_spread_model(pretend: Pretend, family: str, attn: str, tmp_path) -> None:
    def gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
        model(**prompts()).logits.float().square().mean().backward()
        return {name: parameter.grad.cpu() for name, parameter in model.named_parameters()}

    wanted = gradients(FAMILIES[family].build(attn=attn))
    found = gradients(spread(FAMILIES[family].build(attn=attn), "back and forth", tmp_path))
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        assert gradient.abs().max() > 0
        assert torch.equal(found[name], gradient), name


def test_each_layer_runs_on_its_device_and_the_stream_crosses_once(pretend: Pretend, tmp_path) -> None:
    model = spread(FAMILIES["llama"].build(), "five", tmp_path)
    places: list[str] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, __, out: places.append(str(out.device)))
    with pretend.watched() as seen, torch.no_grad():
        logits = model(**prompts()).logits
    assert places == P[1:4]
    assert logits.device.type == "cpu"
    stream = (2, 9, 48)
    crossings = [(c.source, c.target, c.bytes) for c in seen.copies if c.shape == stream]
    assert crossings == [(P[at], P[at + 1], 2 * 9 * 48 * 4) for at in range(4)]
    # The mask makes transformers look at it; then nothing until accelerate brings the logits back.
    assert [read.kind for read in seen.reads] == ["item", "item", "copy"]
    assert "masking_utils.py" in seen.reads[0].line
    assert seen.copies[-1].shape == (2, 9, 97)


def test_a_steering_vector_on_the_wrong_device_raises(pretend: Pretend, tmp_path) -> None:
    model = spread(FAMILIES["llama"].build(), "two", tmp_path)
    vector = torch.ones(48)

    def steer(place: str) -> torch.Tensor:
        handle = model.model.layers[LAYERS - 1].register_forward_hook(
            lambda _, __, out: out + vector.to(place)
        )
        try:
            with torch.no_grad():
                return model(**prompts()).logits
        finally:
            handle.remove()

    assert not torch.equal(steer(P[1]), answers(model)[0])
    for wrong in (P[0], "cpu"):
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            steer(wrong)


def test_a_model_moved_as_a_whole_has_no_hooks(pretend: Pretend) -> None:
    model = FAMILIES["qwen2"].build()
    wanted = answers(model)
    accelerate.dispatch_model(model, {"": P[2]})
    assert not hasattr(model, "_hf_hook")
    assert {parameter.device for parameter in model.parameters()} == {torch.device(P[2])}
    with torch.no_grad():
        assert torch.equal(model(**{k: v.to(P[2]) for k, v in prompts().items()}).logits.cpu(), wanted[0])


@pytest.mark.parametrize("family", MOST)
def test_a_saved_model_loads_onto_the_devices(pretend: Pretend, family: str, tmp_path) -> None:
    model = FAMILIES[family].build()
    wanted = answers(model)
    model.save_pretrained(tmp_path)
    places = device_map(model, layers=[P[0], P[1], P[1]])
    loaded = type(model).from_pretrained(tmp_path, device_map=places).eval()
    assert loaded.hf_device_map == places
    with torch.no_grad():
        assert torch.equal(loaded(**prompts()).logits.cpu(), wanted[0])


@pytest.mark.parametrize("way", ["auto", "balanced", "sequential"])
def test_accelerate_may_choose_the_map(pretend: Pretend, way: str, tmp_path) -> None:
    model = FAMILIES["llama"].build()
    wanted = answers(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(
        tmp_path, device_map=way, max_memory={0: "100KB", 1: "150KB", "cpu": "1GB"}
    )
    assert set(loaded.hf_device_map.values()) == {0, 1, "cpu"}
    assert {parameter.device.type for parameter in loaded.parameters()} == {"pretend", "meta"}
    assert torch.equal(answers(loaded.eval())[0], wanted[0])
