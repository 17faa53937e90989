"""A lens on models over several devices, and with a head that is loaded when it is needed: what one device says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch.testing import assert_close

import tracelens as tl
from tests.support.families import FAMILIES
from tests.support.pretend import Pretend, device_map, pretend, watched

__all__ = ["pretend"]

IDS = [[5, 17, 33, 2, 60, 41], [9, 8, 77, 31, 4, 12]]
D = [f"pretend:{index}" for index in range(3)]
MAPS: dict[str, dict[str, Any]] = {
    "two devices": {"layers": [D[0], D[1], D[1]]},
    "three devices": {"layers": D},
    "the head elsewhere": {"layers": [D[0], D[1], D[1]], "norm": D[1], "head": D[2]},
    "the head in memory": {"layers": [D[0], D[1], D[1]], "norm": D[1], "head": "cpu"},
    "the head on disk": {"layers": [D[0], D[1], D[1]], "norm": D[1], "head": "disk"},
}


def looked_at(model: tl.Model, **options: Any) -> tl.Trace:
    ids = torch.tensor(IDS)
    following = torch.cat([ids[:, 1:], torch.full((2, 1), -1)], 1)
    with model.trace(IDS, **options) as t:
        lens = model.lens(model.layers[:].resid_post, workspace=20000)
        top = lens.topk(3)
        top.values.save("values")
        top.indices.save("indices")
        lens.rank(following).save("rank")
        lens.log_prob(following).save("log_prob")
        lens.kl().save("kl")
        lens.js().save("js")
        lens.tv().save("tv")
        model.lens(model.layers[1].attn_out).entropy().save("entropy")
    return t


@pytest.mark.parametrize("where", MAPS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_devices_say_what_one_says(pretend: Pretend, tmp_path: Path, family: str, where: str) -> None:
    one = looked_at(tl.wrap(FAMILIES[family].build()))
    hf = FAMILIES[family].build()
    places: Any = device_map(hf, **MAPS[where])
    hf = accelerate.dispatch_model(hf, places, main_device=torch.device(D[0]), offload_dir=tmp_path)
    model: Any = tl.wrap(hf)
    with watched() as seen:
        spread = looked_at(model)
    for name in ("indices", "rank"):
        assert torch.equal(one[name], spread[name])
    for name in ("values", "log_prob", "kl", "js", "tv", "entropy"):
        assert_close(one[name], spread[name], atol=1e-5, rtol=1e-5, equal_nan=True)
    # What moves between devices for the block is what the plan says, and none of it is logits.
    plan = spread.plan().plan
    sizes = {"B": 2, "P": 6, "S": 6}
    moved = [one for one in spread.report.moved if one.what == "transfers"]
    assert sum(one.bytes for one in moved) == sum(op.type.nbytes(sizes) for op in plan.transfers) > 0
    assert all(op.type.shape[-1] != 97 and op.type.shape != (97, 48) for op in plan.transfers)
    copies = [one for one in seen.copies if any("backends/execute.py" in line for line in one.lines)]
    assert all(97 not in one.shape or tuple(one.shape) == (97, 48) for one in copies)
