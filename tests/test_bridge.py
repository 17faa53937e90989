"""nnsight as an independent oracle: what tracelens runs with its own hooks, nnsight runs too, to the same numbers."""

from __future__ import annotations

import copy
import subprocess
import sys

import nnsight
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tracelens as tl
from tests.properties.drawn import programs, traceable_sites
from tests.properties.programs import perform
from tests.support.batches import EVEN, RAGGED, SINGLE, random_rows
from tests.support.families import FAMILIES, WITH_NEURONS
from tests.support.more_families import MORE
from tests.support.plain import hook_point
from tests.support.tokenizers import words
from tracelens import errors

ROWS = {"single": random_rows(SINGLE), "even": random_rows(EVEN), "ragged": random_rows(RAGGED)}
HF = {name: family.build() for name, family in FAMILIES.items()}
MODELS = {name: tl.wrap(hf) for name, hf in HF.items()}
# nnsight replaces the forward of the modules that it wraps, so it gets models of its own.
NNSIGHT = {name: nnsight.NNsight(copy.deepcopy(hf)) for name, hf in HF.items()}
SITES = {
    name: [site for site in traceable_sites(hf) if hook_point(hf, site)[1] != "inside"]
    for name, hf in HF.items()
}
# Both run the same torch calls on the same tensors; where a fused and a plain order of them differ, by rounding.
RTOL, ATOL = 1e-4, 1e-5
IDS = [[5, 9, 2, 7]]


def parts(value: object) -> list[Tensor]:
    return list(value) if isinstance(value, list) else [value]


def agree(found: tl.Results, wanted: tl.Results) -> None:
    assert list(found) == list(wanted)
    for name in wanted:
        for one, other in zip(parts(found[name]), parts(wanted[name]), strict=True):
            torch.testing.assert_close(one, other, rtol=RTOL, atol=ATOL, equal_nan=True)


# Five families with three kinds of prompts: more than 500 random graphs in all.
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("family", WITH_NEURONS)
@settings(max_examples=40)
@given(data=st.data())
def test_random_graphs_agree_with_nnsight(family: str, rows: str, data: st.DataObject) -> None:
    program = data.draw(programs(SITES[family], aligned=rows != "ragged"), label="block")
    with MODELS[family].trace(ROWS[rows]) as t:
        perform(program, MODELS[family])
    agree(tl.run_with_nnsight(t.graph, NNSIGHT[family], ROWS[rows]), t.results)


@pytest.mark.parametrize("family", WITH_NEURONS)
@pytest.mark.parametrize(
    "site", ["resid_mid", "mlp_act", "q", "v", "z", "attn_out", "resid_post", "embed", "logits"]
)
def test_an_edit_matters_and_agrees(family: str, site: str) -> None:
    model = MODELS[family]
    of_layer = site not in ("embed", "logits")
    with model.trace(IDS) as plain:
        model.logits.save("logits")
    with model.trace(IDS) as t:
        owner = model.layers[1] if of_layer else model
        setattr(owner, site, getattr(owner, site) * 2 + 1)
        model.logits.save("logits")
    assert (t["logits"] - plain["logits"]).abs().max() > 1e-2
    agree(tl.run_with_nnsight(t.graph, NNSIGHT[family], IDS), t.results)


@pytest.mark.parametrize("family", ["falcon_one_norm", "pythia", "phi3"])
def test_fused_and_parallel_blocks_agree(family: str) -> None:
    """Falcon's block goes on to compute in the memory of what its MLP returned."""
    hf = MORE[family].build()
    model = tl.wrap(hf)
    path = model.anatomy.module_path(model.anatomy.family.taps["mlp_out"], 1)
    with model.trace(IDS) as t:
        layer = model.layers[0]
        layer.mlp_out.save("mlp_out")
        new = layer.mlp_out * 2
        layer.mlp_out = new
        new.save("new")
        layer.k *= 2
        layer.mlp_pre += 0.5
        model.module(path).output.save("by path")
        model.logits.save("logits")
    agree(tl.run_with_nnsight(t.graph, nnsight.NNsight(hf), IDS), t.results)


MODULES = {
    "llama": ("model.layers.1.mlp.down_proj", "model.layers.1.self_attn", "model.layers.0.mlp.act_fn"),
    "gpt2": ("transformer.h.1.mlp.c_proj", "transformer.h.1.attn", "transformer.h.0.mlp.act"),
}


@pytest.mark.parametrize("prompt", [IDS, [[5, 9, 2, 7], [3, 3]]], ids=["one", "ragged"])
@pytest.mark.parametrize("family", MODULES)
def test_sites_by_module_path_agree(family: str, prompt: list[list[int]]) -> None:
    model = MODELS[family]
    down, attention, activation = MODULES[family]
    with model.trace(prompt) as plain:
        model.logits.save("logits")
    with model.trace(prompt) as t:
        model.module(down).input *= 2
        model.module(attention).output[0] += 1
        model.module(attention).inputs["hidden_states"].save("in")
        model.module(activation).output.save("activation")
        model.layers[1].resid_post.save("h")
        model.logits.save("logits")
    assert (parts(t["logits"])[0] - parts(plain["logits"])[0]).abs().max() > 1e-2
    agree(tl.run_with_nnsight(t.graph, NNSIGHT[family], prompt), t.results)


def test_modules_that_are_not_run_are_refused() -> None:
    with MODELS["llama"].record() as r:
        MODELS["llama"].layers[1].skip()
        MODELS["llama"].logits.save()
    with pytest.raises(errors.BridgeError, match="runs every module"):
        tl.run_with_nnsight(r, NNSIGHT["llama"], IDS)


def test_graphs_of_files_and_recordings_run_too(tmp_path) -> None:
    model = MODELS["llama"]
    v = torch.randn(48, generator=torch.Generator().manual_seed(0))
    with model.record() as r:
        model.layers[1].resid_post += v
        model.layers[:].resid_post.save("h")
        model.layers[2].resid_post.tok[-1].save("last", dtype=torch.float64)
    r.graph.to_json(tmp_path / "g.json")
    wanted = model.compile(r)(IDS)
    assert wanted["last"].dtype is torch.float64
    agree(tl.run_with_nnsight(r, NNSIGHT["llama"], IDS), wanted)
    agree(tl.run_with_nnsight(tl.Graph.from_json(tmp_path / "g.json"), NNSIGHT["llama"], IDS), wanted)


def test_a_transformers_model_of_nnsight_is_taken_with_its_tokenizer() -> None:
    tokenizer = words()
    hf = copy.deepcopy(HF["llama"])
    held = nnsight.TransformersModel(hf, tokenizer=tokenizer)
    with MODELS["llama"].record() as r:
        MODELS["llama"].layers[1].resid_post.save("h")
    text = "a b c"
    wanted = tl.wrap(HF["llama"], tokenizer).compile(r)(text)
    agree(tl.run_with_nnsight(r, held, text), wanted)


def test_what_is_not_a_model_of_nnsight_is_refused() -> None:
    with MODELS["llama"].record() as r:
        MODELS["llama"].logits.save()
    with pytest.raises(errors.BridgeError, match="not a model of nnsight"):
        tl.run_with_nnsight(r, HF["llama"], IDS)


def test_graphs_with_gradients_are_refused() -> None:
    with MODELS["llama"].record() as r:
        tl.grad(MODELS["llama"].logits.sum(), MODELS["llama"].layers[1].resid_post).save()
    with pytest.raises(errors.BridgeError, match="gradients"):
        tl.run_with_nnsight(r, NNSIGHT["llama"], IDS)


def test_graphs_that_look_into_the_attention_function_are_refused() -> None:
    with MODELS["llama"].record() as r:
        MODELS["llama"].layers[1].pattern.save()
    with pytest.raises(errors.BridgeError, match="attention function"):
        tl.run_with_nnsight(r, NNSIGHT["llama"], IDS)


def test_routers_are_refused() -> None:
    """Written logits would not choose anything there."""
    model = MODELS["qwen3_moe"]
    with model.record() as r:
        model.layers[1].router_logits += 1.0
        model.logits.save()
    with pytest.raises(errors.BridgeError, match="tokens of all rows one after the other"):
        tl.run_with_nnsight(r, NNSIGHT["qwen3_moe"], IDS)


def test_another_shape_is_refused_before_the_run() -> None:
    with MODELS["llama"].record() as r:
        MODELS["llama"].layers[2].resid_post.save()
    with pytest.raises(errors.TracelensError):
        tl.run_with_nnsight(r, NNSIGHT["gpt2"], [[200]])


def test_importing_tracelens_does_not_import_nnsight() -> None:
    code = "import sys, tracelens; tracelens.run_with_nnsight; sys.exit('nnsight' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
