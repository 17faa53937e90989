"""The same traces on a GPU: constants move by themselves, saves come back, numbers agree."""

from __future__ import annotations

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
    for _ in range(3):
        with model.trace(ROWS):
            model.layers[1].resid_post += v
            model.logits.save()
    assert len(model._compiler.constants._moved) == 1


def test_generation_on_the_gpu() -> None:
    model = tl.wrap(FAMILIES["llama"].build().cuda())
    with model.generate(ROWS[0], max_new_tokens=4) as t:
        model.logits[..., 7] = 1e9
    assert t.tokens == [7] * 4
