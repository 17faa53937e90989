"""Qwen3-MoE: layers with experts and without, what they have no site for, and the router by its path."""

from __future__ import annotations

import pytest
import torch

import tracelens as tl
from tests.conformance.test_reads import close
from tests.support.batches import EVEN, batch, random_rows
from tests.support.families import FAMILIES
from tests.support.plain import plain_logits, untouched
from tracelens.errors import AbsentSiteError

ROWS = random_rows(EVEN)


@pytest.mark.parametrize("name", ["mlp_pre", "mlp_up", "mlp_act"])
def test_neurons_of_experts_are_refused_by_name(name: str) -> None:
    model = tl.wrap(FAMILIES["qwen3_moe"].build())
    for layer in range(3):
        with pytest.raises(AbsentSiteError, match="experts work on the rows") as failure, model.trace(ROWS):
            getattr(model.layers[layer], name).save()
        assert "model.module" in failure.value.problem


def test_the_reason_names_a_path_that_works_in_a_layer_without_experts() -> None:
    hf = FAMILIES["qwen3_moe"].build()
    model = tl.wrap(hf)
    with untouched(hf), model.trace(ROWS) as t:
        model.layers[2].mlp_in.save("mlp_in")
        model.layers[2].mlp_out.save("mlp_out")
        model.module("model.layers.2.mlp.down_proj").input.save("neurons")
    mlp = hf.model.layers[2].mlp
    close(t["neurons"], torch.nn.functional.silu(mlp.gate_proj(t["mlp_in"])) * mlp.up_proj(t["mlp_in"]))
    close(t["mlp_out"], mlp.down_proj(t["neurons"]))


def test_the_router_is_read_and_its_weights_are_written_by_path() -> None:
    hf = FAMILIES["qwen3_moe"].build()
    model, path = tl.wrap(hf), "model.layers.1.mlp.gate"
    with untouched(hf), model.trace(ROWS) as t:
        router = model.module(path)
        router.output[0].save("logits")
        router.output[2].save("experts")
        router.output[1] = router.output[1] * 0.5
        model.layers[1].mlp_in.save("mlp_in")
        model.logits.save("out")
    rows = t["mlp_in"].flatten(0, 1)
    close(t["logits"], rows @ hf.get_submodule(path).weight.T)
    assert torch.equal(t["experts"], t["logits"].softmax(-1).topk(2, dim=-1).indices)
    plain = plain_logits(hf, batch(ROWS))
    hook = hf.get_submodule(path).register_forward_hook(lambda _, args, out: (out[0], out[1] * 0.5, out[2]))
    expected = plain_logits(hf, batch(ROWS))
    hook.remove()
    assert torch.equal(t["out"], expected)
    assert (expected - plain).abs().max() > 1e-3
