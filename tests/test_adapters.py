"""Models with adapters of PEFT: the sites are those of the language model in it, adapters included."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, get_peft_model
from torch.testing import assert_close

import tracelens as tl
from tests.support.families import FAMILIES
from tracelens.backends.packed import require_one_process
from tracelens.errors import PackedWeightError, UnknownArchitectureError
from tracelens.lens.fingerprint import fingerprint_of

IDS = [[3, 4, 5, 9]]
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)


def adapted(config: Any, family: str = "llama") -> Any:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # PEFT asks transformers for what it is about to rename
        torch.manual_seed(0)
        return get_peft_model(FAMILIES[family].build(), config).eval()


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


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, target_modules=["o_proj", "lm_head"], init_lora_weights=False),
        LoraConfig(r=4, target_modules=["o_proj", "lm_head"], init_lora_weights=False, use_dora=True),
        IA3Config(target_modules=["o_proj", "lm_head"], feedforward_modules=[], init_ia3_weights=False),
    ],
    ids=["LoRA", "DoRA", "IA3"],
)
def test_what_reads_a_matrix_gets_the_adapted_one(
    config: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The oracle: what comes out of a layer, the logits of the model, and the matrix that PEFT merges."""
    monkeypatch.delenv("TRACELENS_PROBE")
    monkeypatch.setenv("TRACELENS_CACHE", str(tmp_path))
    peft = adapted(config)
    if isinstance(config, IA3Config):
        with torch.no_grad():  # they begin as ones
            for name, scale in peft.named_parameters():
                if "ia3" in name:
                    scale.mul_(torch.linspace(0.5, 2, scale.numel()).reshape(scale.shape))
    model = tl.wrap(peft)
    path = "model.layers.1.self_attn.o_proj"
    projection = peft.base_model.model.get_submodule(path)

    def found() -> dict[str, torch.Tensor]:
        with model.trace(IDS) as t:
            model.layers[1].head_out.sum(2).save("heads")
            model.layers[1].attn_out.save("out")
            (model.final_norm @ model.unembed[5]).save("five")
            model.lens(model.layers[-1].resid_post).topk(3).values.save("lens")
            model.param(f"{path}.weight").save("matrix")
            model.logits.save("logits")
        return dict(t.results)

    on = found()
    assert (on["matrix"] - projection.base_layer.weight).abs().max() > 0.01, "the adapters matter"
    for each in (on, None):
        if each is None:
            with peft.disable_adapter():
                each = found()
            assert_close(each["matrix"], projection.base_layer.weight.detach(), rtol=0, atol=0)
        assert_close(each["heads"], each["out"], rtol=1e-5, atol=1e-5)
        assert_close(each["five"], each["logits"][..., 5], rtol=1e-5, atol=1e-5)
        assert_close(each["lens"], each["logits"].log_softmax(-1).topk(3).values, rtol=1e-5, atol=1e-5)
    assert fingerprint_of(model) != _without(peft, model)
    peft.merge_adapter()
    merged = found()
    assert_close(merged["matrix"], projection.base_layer.weight.detach(), rtol=0, atol=0)
    assert_close(on["matrix"], merged["matrix"], rtol=1e-5, atol=1e-5)


def _without(peft: Any, model: tl.Model) -> Any:
    with peft.disable_adapter():
        return fingerprint_of(model)


def test_a_bias_that_an_adapter_adds_is_part_of_the_bias() -> None:
    peft = adapted(
        LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, lora_bias=True), family="qwen2"
    )
    module = peft.base_model.model.model.layers[1].self_attn.q_proj
    with torch.no_grad():
        module.lora_B["default"].bias.fill_(0.5)
    model = tl.wrap(peft)
    path = "model.layers.1.self_attn.q_proj"
    with model.trace(IDS):
        made = model.layers[1].attn_in @ model.param(f"{path}.weight").T + model.param(f"{path}.bias")
        made = made.save()
        q = model.layers[1].q.save()
    assert_close(made.value, q.value.flatten(2), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(module.base_layer.bias + 0, model.anatomy.parameter(f"{path}.bias"), atol=0.1)


def test_ranks_do_not_make_an_adapted_matrix() -> None:
    peft = adapted(LORA)
    modules = peft.base_model.model.model.layers[1].self_attn
    require_one_process(modules.q_proj, "q_proj.weight", None)
    require_one_process(modules.k_proj, "k_proj.weight", object())
    with pytest.raises(PackedWeightError, match="merge_and_unload"):
        require_one_process(modules.q_proj, "q_proj.weight", object())


def test_a_part_that_is_trained_whole_is_the_one_that_is_read() -> None:
    peft = adapted(LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    head = peft.base_model.model.lm_head
    with torch.no_grad():
        head.modules_to_save["default"].weight.mul_(torch.linspace(0.5, 2, 48))
    model = tl.wrap(peft)
    with model.trace(IDS):
        five = (model.final_norm @ model.unembed[5]).save()
        logits = model.logits.save()
    assert_close(five.value, logits.value[..., 5], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(head.original_module.weight, head.modules_to_save["default"].weight, atol=1e-2)


def test_learned_tokens_are_refused() -> None:
    peft = adapted(PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(UnknownArchitectureError, match="learned tokens") as caught:
        tl.wrap(peft)
    assert "test_adapters.py" in str(caught.value)
