"""The same traces on a GPU: constants move by themselves, saves come back, numbers agree."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

import tracelens as tl
from tests.support.families import FAMILIES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; `make gpu` on a machine with one"),
]
ROWS = [[3, 14, 15, 9, 2, 6], [5, 3]]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trace_on_the_gpu_equals_the_one_on_the_cpu(family: str) -> None:
    results = []
    v = torch.randn(48, generator=torch.Generator().manual_seed(0))
    for device in ("cpu", "cuda"):
        model = tl.wrap(FAMILIES[family].build().to(device))
        with model.trace(ROWS) as t:
            model.layers[1].resid_mid += v
            model.layers[0].resid_post.tok[1] = v
            model.logits.save("logits")
            model.layers[:].resid_post.norm(dim=-1).save("norms")
            tl.masked_mean(model.layers[1].mlp_act).save("mean")
            kept = model.layers[2].resid_post[:, -1].save("kept", device="keep")
        assert kept.value.device.type == device
        results.append(t.results.numpy())
        assert t["mean"].device.type == "cpu"
    for name in results[0]:
        for ours, other in zip(results[0][name], results[1][name], strict=True):
            torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(other), rtol=1e-3, atol=1e-3)


def test_constants_are_moved_once() -> None:
    model = tl.wrap(FAMILIES["llama"].build().cuda())
    v = torch.randn(48)
    with model.record() as r:
        model.layers[1].resid_post += v
        model.logits.save()
    program = model.compile(r)
    for _ in range(3):
        program(ROWS)
    assert len(model._compiler.constants._moved) == 1


def test_generation_on_the_gpu() -> None:
    model = tl.wrap(FAMILIES["llama"].build().cuda())
    with model.generate(ROWS[0], max_new_tokens=4) as t:
        model.logits[..., 7] = 1e9
    assert t.tokens == [7] * 4


def test_steps_and_saves_of_a_generation_equal_those_on_the_cpu(tmp_path: Path) -> None:
    found = []
    v = 0.1 * torch.randn(48, generator=torch.Generator().manual_seed(0))
    for device in ("cpu", "cuda"):
        model = tl.wrap(FAMILIES["llama"].build().to(device))
        with model.generate(ROWS, max_new_tokens=70 - 12, eos_token_id=None) as t:
            t.decode.layers[0].resid_post += v
            t.decode.layers[1].resid_post += 0.1 * t.prefill.layers[2].resid_post.tok[-1][:, None]
            model.layers[:].resid_post.save("all")
            model.layers[:].resid_post.save("filed", to=str(tmp_path / f"{device}.safetensors"))
            kept = model.layers[1].resid_post[:, -1].save("kept", device="keep")
        assert kept.value.device.type == device
        for one, other in zip(t["all"], t["filed"], strict=True):
            assert torch.equal(one, other)
        found.append((t.tokens, t["all"], kept.value.cpu()))
    assert found[0][0] == found[1][0]
    for ours, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[0][2], found[1][2], rtol=1e-3, atol=1e-3)


def test_a_step_of_a_generation_waits_for_nothing() -> None:
    """What waits is transformers' own loop: as often with reads and writes as without."""
    model = tl.wrap(FAMILIES["llama"].build().cuda())
    v = torch.randn(48)
    counts = []
    for looks in (False, True, False, True):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with model.generate(ROWS[0], max_new_tokens=20, eos_token_id=None):
                if looks:
                    model.layers[:].resid_post.save(device="keep")
                    model.layers[1].resid_post += v
                torch.cuda.set_sync_debug_mode("warn")
            torch.cuda.set_sync_debug_mode("default")
        counts.append(len(caught))
    # What is done once, at the start and the end, does not grow with the steps.
    assert abs(counts[3] - counts[2]) < 10


def test_other_values_for_constants_do_not_stay_on_the_gpu() -> None:
    model = tl.wrap(FAMILIES["llama"].build().cuda())
    with model.record() as r:
        model.layers[1].resid_post += tl.constant(1.0, name="strength") * tl.constant(
            torch.ones(48), name="v"
        )
        model.logits[:, -1].save("logits")
    program = model.compile(r)
    program(ROWS[0])
    before = len(model._compiler.constants._moved)
    for number in range(4):
        program(ROWS[0], strength=float(number), v=torch.randn(48))
    assert len(model._compiler.constants._moved) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sweep_and_a_splice_on_the_gpu_equal_those_on_the_cpu(dtype: torch.dtype) -> None:
    class Autoencoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.randn(48, 64, generator=torch.Generator().manual_seed(0)) / 7)

        def encode(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x @ self.w)

        def decode(self, features: torch.Tensor) -> torch.Tensor:
            return features @ self.w.T

    found = []
    for device in ("cpu", "cuda"):
        model = tl.wrap(FAMILIES["llama"].build(dtype=dtype).to(device))
        with model.record() as r:
            with tl.splice(model.layers[1].resid_post, Autoencoder()) as s:
                s.features[..., 17] += tl.constant(0.0, name="strength")
            model.logits[:, -1].save("logits", device="keep")
        sweep = tl.sweep(model.compile(r), ROWS, strength=[0.0, 2.0, 4.0])
        assert sweep.one_by_one is None
        assert sweep["logits"].device.type == device
        found.append(sweep["logits"].float().cpu())
    tolerance = 1e-3 if dtype is torch.float32 else 5e-2
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=tolerance * found[0].abs().max().item())
