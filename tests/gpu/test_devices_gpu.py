"""A model on a GPU and the CPU, or on all GPUs: one device's numbers, and results that arrive by themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch

import tracelens as tl
from tests.support.families import FAMILIES
from tests.support.pretend import device_map
from tests.test_memory import BLOCKS
from tests.test_memory import ROWS as MANY

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; `make gpu` on a machine with one"),
]
ROWS = [[3, 14, 15, 9, 2, 6], [5, 3, 8, 9, 7, 9]]
RAGGED = [[3, 14, 15, 9, 2, 6], [5, 3]]


def spread(family: str, **settings: Any) -> Any:
    hf = FAMILIES[family].build(**settings)
    count = torch.cuda.device_count()
    layers = [f"cuda:{index % count}" for index in range(3)] if count > 1 else ["cuda:0", "cpu", "cuda:0"]
    # With the CPU as the main device, its layers run there and are not offloaded.
    return accelerate.dispatch_model(hf, device_map(hf, layers), main_device="cpu")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [ROWS, RAGGED], ids=["even", "ragged"])
def test_several_devices_give_what_one_gives(family: str, rows: list[list[int]]) -> None:
    v = torch.randn(48, generator=torch.Generator().manual_seed(0))
    found = []
    for hf in (FAMILIES[family].build(), spread(family)):
        model = tl.wrap(hf)
        with model.trace(rows) as t:
            model.layers[1].resid_post += 4.0 * v
            model.layers[2].resid_post += 0.5 * model.layers[0].resid_post
            model.layers[:].resid_post.norm(dim=-1).save("norms")
            model.layers[:].mlp_act.save("neurons", dtype=torch.float64)
            (model.layers[0].mlp_out + model.layers[2].resid_mid).save("sum")
            model.logits.save("logits")
        found.append(t.results)
    for name, expected in found[0].items():
        for one, other in zip(found[1][name], expected, strict=True):
            assert one.device.type == "cpu"
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.__name__)
def test_the_blocks_of_the_pretend_devices_give_the_same_here(block: Callable[[Any], None]) -> None:
    found = []
    for hf in (FAMILIES["llama"].build(attn="eager"), spread("llama", attn="eager")):
        model = tl.wrap(hf)
        with model.trace(MANY) as t:
            block(model)
        found.append(t.results)
        if len(found) == 2:
            assert t.report.moved, "nothing travelled, so nothing was spread"
    for name, expected in found[0].items():
        one = found[1][name].cpu()
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(one.float(), expected.float(), rtol=1e-2, atol=1e-3 * scale)


def test_results_arrive_in_pinned_memory_and_only_when_they_are_read() -> None:
    model = tl.wrap(FAMILIES["llama"].build().cuda())
    with model.trace(ROWS) as t:
        model.layers[:].resid_post.save("streams")
        kept = model.layers[2].resid_post.save("kept", device="keep")
    assert t["streams"].is_pinned()
    torch.testing.assert_close(t["streams"][2], kept.value.cpu(), rtol=0, atol=0)


def test_many_runs_do_not_mix_their_results() -> None:
    model = tl.wrap(FAMILIES["llama"].build().cuda())
    results, expected = [], []
    for row in range(40):
        prompt = [[(7 * row + column) % 90 + 2 for column in range(64)]]
        with model.trace(prompt) as t:
            model.layers[:].mlp_act.save("neurons")
            model.logits.save("kept", device="keep")
            model.logits.save("logits")
        results.append(t.results)
        expected.append(model.hf(torch.tensor(prompt).cuda(), use_cache=False).logits)
    for found, logits in zip(results, expected, strict=True):
        torch.testing.assert_close(found["logits"], logits.detach().cpu(), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found["logits"], found["kept"].cpu(), rtol=0, atol=0)


def test_the_predicted_memory_is_below_the_measured_peak() -> None:
    model = tl.wrap(FAMILIES["llama"].build().cuda())
    with model.trace([list(range(2, 66))] * 8, measure=True) as t:
        model.layers[:].mlp_act.save()
    (held,) = t.report.held
    assert 0 < held.bytes <= t.report.peaks[held.place.device]
