"""Where a saved value is that is kept on its device."""

from __future__ import annotations

from pathlib import Path

import accelerate
import pytest
import torch

import tracelens as tl
from tests.support.families import FAMILIES
from tests.support.pretend import Pretend, device_map, pretend
from tracelens.errors import OptionError

__all__ = ["pretend"]

P = ["pretend:0", "pretend:1", "pretend:2"]
IDS = [[5, 6, 7, 8, 9], [11, 12, 13, 14, 15]]


def test_it_is_where_it_was_computed(pretend: Pretend) -> None:
    hf = FAMILIES["llama"].build()
    model = tl.wrap(accelerate.dispatch_model(hf, device_map(hf, P), main_device=torch.device(P[0])))
    with model.trace(IDS) as t:
        early = model.layers[0].resid_post
        model.layers[1].resid_post[:, -1] += early[:, 0]
        model.layers[2].resid_post = early
        model.layers[0].mlp_act.save("site", device="keep")
        (model.layers[0].mlp_act - model.layers[2].mlp_act).save("of two layers", device="keep")
        model.layers[1].resid_post.save("written in part", device="keep")
        model.layers[2].resid_post.save("written from afar", device="keep")
        model.param("model.layers.1.mlp.up_proj.weight").save("parameter", device="keep")
        model.layers[:].resid_mid.save("stack", device="keep")
        model.final_norm.norm(dim=-1).save("after it")
    assert {name: str(tensor.device) for name, tensor in t.results.items()} == {
        "site": P[0],
        "of two layers": P[2],
        "written in part": P[1],
        "written from afar": P[0],
        "parameter": P[1],
        "stack": P[2],
        "after it": "cpu",
    }
    # Layer 2 had it all the same.
    plain = tl.wrap(FAMILIES["llama"].build())
    with plain.trace(IDS):
        plain.layers[2].resid_post = plain.layers[0].resid_post
        norms = plain.final_norm.norm(dim=-1).save()
    torch.testing.assert_close(t["after it"], norms.value, rtol=1e-5, atol=1e-5)


def test_what_is_in_a_file_is_on_no_device(tmp_path: Path) -> None:
    model = tl.wrap(FAMILIES["llama"].build())
    file = str(tmp_path / "h.safetensors")
    for mapped in (False, True):
        with pytest.raises(OptionError, match=r"h\.safetensors.*device=\"keep\"") as caught, model.trace(IDS):
            (model.layers[:] if mapped else model.layers[1]).resid_post.save("h", device="keep", to=file)
        assert caught.value.at is not None
        assert ".resid_post.save(" in caught.value.at.text
        assert "two saves" in str(caught.value.instead)
    with model.trace(IDS) as t:
        h = model.layers[1].resid_post
        h.save("here", device="keep")
        h.save("there", to=file)
    assert torch.equal(t["here"], t["there"])
    assert (tmp_path / "h.safetensors").exists()
