"""Models with adapters of PEFT: the sites are those of the language model in it, adapters included."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, get_peft_model
from torch.testing import assert_close

import tracelens as tl
from tests.support.families import FAMILIES
from tracelens.errors import UnknownArchitectureError

IDS = [[3, 4, 5, 9]]
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)


def adapted(config: Any) -> Any:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # PEFT asks transformers for what it is about to rename
        torch.manual_seed(0)
        return get_peft_model(FAMILIES["llama"].build(), config).eval()


def test_sites_have_the_adapters() -> None:
    peft = adapted(LORA)
    model = tl.wrap(peft)
    assert isinstance(model, tl.Model)
    found = model.check_sites()
    assert found.ok
    assert found.derived == ()
    with model.trace(IDS):
        q = model.layers[1].q.save()
        reads = model.layers[1].attn_in.save()
        logits = model.logits.save()
    assert_close(logits.value, peft(torch.tensor(IDS)).logits.detach(), atol=1e-5, rtol=1e-5)
    plain = tl.wrap(FAMILIES["llama"].build())
    with plain.trace(IDS):
        before = plain.logits.save()
    assert not torch.allclose(before.value, logits.value, atol=1e-2), "the adapters matter"
    projection = peft.base_model.model.model.layers[1].self_attn.q_proj
    with torch.no_grad():
        assert_close(q.value.flatten(2), projection(reads.value), atol=1e-6, rtol=1e-6)


def test_writes_through_adapted_modules() -> None:
    peft = adapted(LORA)
    model = tl.wrap(peft)
    with model.trace(IDS):
        model.layers[1].q[:, :, 2] = 0.0
        model.layers[0].mlp_out *= 0.5
        changed = model.logits.save()
    layers = peft.base_model.model.model.layers
    handles = [
        layers[1].self_attn.q_proj.register_forward_hook(
            lambda module, args, out: torch.cat([out[..., :24], 0 * out[..., 24:36], out[..., 36:]], -1)
        ),
        layers[0].mlp.down_proj.register_forward_hook(lambda module, args, out: 0.5 * out),
    ]
    by_hand = peft(torch.tensor(IDS)).logits.detach()
    for handle in handles:
        handle.remove()
    assert not torch.allclose(by_hand, peft(torch.tensor(IDS)).logits, atol=1e-2)
    assert_close(changed.value, by_hand, atol=1e-5, rtol=1e-5)


def test_adapters_that_are_turned_off() -> None:
    peft = adapted(IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]))
    model = tl.wrap(peft)
    with peft.disable_adapter(), model.trace(IDS):
        logits = model.logits.save()
    plain = tl.wrap(FAMILIES["llama"].build())
    with plain.trace(IDS):
        wanted = plain.logits.save()
    assert_close(logits.value, wanted.value, atol=1e-6, rtol=1e-6)


def test_learned_tokens_are_refused() -> None:
    peft = adapted(PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(UnknownArchitectureError, match="learned tokens") as caught:
        tl.wrap(peft)
    assert "test_adapters.py" in str(caught.value)
