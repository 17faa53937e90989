"""Quantised models: the sites of modules that keep their matrices packed, and what reads these matrices."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import tracelens as tl
from tests.support.families import FAMILIES
from tests.support.packed import Bytes, Flat, FourBits, packed
from tracelens.errors import PackedWeightError

IDS = [[3, 4, 5, 9]]
PATH = "model.layers.1.self_attn.o_proj"


@pytest.fixture(autouse=True)
def probing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TRACELENS_PROBE")
    monkeypatch.setenv("TRACELENS_CACHE", str(tmp_path))


@pytest.fixture(params=[FourBits, Bytes, Flat])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.parametrize("head", [False, True], ids=["body", "with the head"])
def test_a_packed_model_is_the_one_with_its_matrices(kind: Any, head: bool) -> None:
    """The oracle: a model of plain modules, whose weights are what the packed ones stand for."""
    hf = packed(FAMILIES["qwen2"].build(), kind, head=head)
    plain = FAMILIES["qwen2"].build()
    with torch.no_grad():
        for path, module in hf.named_modules():
            if isinstance(module, FourBits | Bytes):
                plain.get_submodule(path).weight.copy_(module.matrix())
    original = FAMILIES["qwen2"].build()
    assert (
        plain.model.layers[0].mlp.up_proj.weight - original.model.layers[0].mlp.up_proj.weight
    ).abs().max() > 1e-4
    models = tl.wrap(hf), tl.wrap(plain)
    assert models[0].check_sites().ok
    assert not models[0].check_sites().derived
    found = []
    for model in models:
        with model.trace(IDS) as t:
            model.layers[0].resid_post += torch.linspace(-1, 1, 48).half()
            model.layers[1].head(2).z = 0.0
            for name in ("q", "z", "attn_out", "mlp_act", "resid_post", "head_out"):
                getattr(model.layers[1], name).save(name)
            model.layers[0].resid_post.mean(0).save("mean")
            lens = model.lens(model.layers[1].resid_post)
            lens.entropy().save("entropy")
            lens.topk(3).values.save("top")
            model.unembed[5].save("row")
            model.param(f"{PATH}.weight").save("matrix")
            model.param("model.layers.1.self_attn.q_proj.weight").save("matrix beside a bias")
            model.logits.save("logits")
        found.append(t.results)
    for name in found[1]:
        assert found[0][name].dtype == torch.float32
        assert_close(found[0][name], found[1][name], rtol=1e-5, atol=1e-5)


def test_gradients_go_through_packed_modules(kind: Any) -> None:
    model = tl.wrap(packed(FAMILIES["llama"].build(), kind))
    with model.trace(IDS):
        h = model.layers[0].resid_post
        g = tl.grad(model.logits[0, -1, 7], h).save()
    assert g.value.abs().max() > 1e-4


class Squares(FourBits):
    """It multiplies by no matrix."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * x)


class Narrow(FourBits):
    """It takes whole numbers only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("expected scalar type Char")


@pytest.mark.parametrize(
    ("other", "words"),
    [(Squares, "does not multiply by one matrix"), (Narrow, "cannot be asked for its matrix")],
)
def test_a_module_that_gives_no_matrix_is_refused(other: Any, words: str) -> None:
    hf = packed(FAMILIES["llama"].build(), FourBits)
    hf.get_submodule("model.layers.1.self_attn").o_proj = other(nn.Linear(48, 48))
    model = tl.wrap(hf, probe=False)
    with pytest.raises(PackedWeightError, match=words), model.trace(IDS):
        model.layers[1].head_out.save()


def test_hooks_of_others_are_no_part_of_the_matrix() -> None:
    hf = packed(FAMILIES["llama"].build(), FourBits)
    module = hf.get_submodule(PATH)
    expected = module.matrix()
    module.register_forward_hook(lambda _, __, out: out * 3)
    model = tl.wrap(hf, probe=False)
    with model.trace(IDS):
        found = model.param(f"{PATH}.weight").save()
    assert_close(found.value, expected, rtol=1e-5, atol=1e-6)


# --- libraries ---


def _quanto(hf: Any) -> None:
    quanto = import_module("optimum.quanto")
    quanto.quantize(hf, weights=quanto.qint8, exclude="lm_head")
    quanto.freeze(hf)


def _torchao(hf: Any) -> None:
    torchao = import_module("torchao.quantization")
    torchao.quantize_(hf, torchao.Int8WeightOnlyConfig())


def _bitsandbytes(bits: int) -> Callable[[Any], None]:
    def into(hf: Any) -> None:
        own: Any = import_module("bitsandbytes").nn

        def module(linear: nn.Linear) -> nn.Module:
            sizes = linear.in_features, linear.out_features, linear.bias is not None
            if bits == 4:
                new = own.Linear4bit(*sizes, compute_dtype=torch.float32, quant_type="nf4")
                new.weight = own.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
            else:
                new = own.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0)
                new.weight = own.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
            new.bias = linear.bias
            return new.to("cpu")

        packed(hf, module)

    return into


@pytest.mark.filterwarnings("ignore")  # of these libraries, about hardware and versions
@pytest.mark.parametrize(
    ("library", "pack"),
    [
        ("optimum.quanto", _quanto),
        ("torchao", _torchao),
        ("bitsandbytes", _bitsandbytes(4)),
        ("bitsandbytes", _bitsandbytes(8)),
    ],
    ids=["quanto", "torchao", "bnb4", "bnb8"],
)
def test_models_of_a_library(library: str, pack: Callable[[Any], None]) -> None:
    pytest.importorskip(
        library,
        reason=f"{library} is no dependency of the tests, which have look-alikes; this runs where it is installed",
    )
    hf = FAMILIES["llama"].build()
    original = copy.deepcopy(hf.get_submodule(PATH).weight.data)
    pack(hf)
    model = tl.wrap(hf)
    assert model.check_sites().ok
    with model.trace(IDS):
        heads = model.layers[1].head_out.save()
        whole = model.layers[1].attn_out.save()
        matrix = model.param(f"{PATH}.weight").save()
        logits = model.logits.save()
    assert_close(heads.value.sum(-2), whole.value, rtol=1e-4, atol=1e-5)
    assert torch.nn.functional.cosine_similarity(matrix.value.flatten(), original.flatten(), dim=0) > 0.98
    assert_close(logits.value, hf(torch.tensor(IDS)).logits, rtol=1e-4, atol=1e-4)
