"""Naming parts of the model: sites, layers, parameters, families, and all of it outside a block."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, BertConfig, BertModel

import tracelens as tl
from tests.errors import GPT2, IDS, LLAMA, D, refused
from tracelens.errors import (
    AbsentSiteError,
    LayerRangeError,
    ModelClosedError,
    NotALanguageModelError,
    NoTraceError,
    OptionError,
    SeveralDevicesError,
    UnknownArchitectureError,
    UnknownParameterError,
    UnknownSiteError,
    WriteTargetError,
)

model, gpt2 = LLAMA.model, GPT2.model


# --- sites -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("resid_pots", "resid_post"),
        ("residpost", "resid_post"),
        ("attn_ot", "attn_out"),
        ("ln1", ".attn_norm"),
    ],
)
def test_an_unknown_site_of_a_layer(name: str, near: str) -> None:
    with refused(UnknownSiteError, "model.layers[1]", repr(name), instead=near), model.trace(IDS):
        getattr(model.layers[1], name)  # <-
    with refused(UnknownSiteError, "model.layers[1]", repr(name), instead=near), model.trace(IDS):
        setattr(model.layers[1], name, 0)  # <-
    with refused(UnknownSiteError, "model.layers[0:2] has", repr(name), instead=near), model.trace(IDS):
        getattr(model.layers[0:2], name)  # <-
    with refused(UnknownSiteError, "model.layers[[0, 2]] has", repr(name), instead=near), model.trace(IDS):
        setattr(model.layers[[0, 2]], name, 0)  # <-


def test_what_to_write_meanwhile() -> None:
    layer, projection = model.layers[1], "model.layers.1.self_attn.q_proj.weight"
    with model.trace(IDS):
        q = (layer.attn_in @ model.param(projection).T).save()
        x = layer.attn_in.save()
        lens = (LLAMA.hf.model.norm(model.layers[-1].resid_post) @ model.unembed.T).save()
        logits = model.logits.save()
    assert_close(q.value, LLAMA.hf.model.layers[1].self_attn.q_proj(x.value).detach(), atol=1e-6, rtol=1e-5)
    assert_close(lens.value, logits.value, atol=1e-5, rtol=1e-5)
    with model.trace(IDS):
        model.layers[1].resid_post = model.layers[1].resid_pre
        before, after = layer.resid_pre.save(), model.layers[2].resid_pre.save()
    assert torch.equal(before.value, after.value)
    config = copy.deepcopy(LLAMA.hf.config)
    eager = tl.wrap(AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval())
    pattern = eager.hf(torch.tensor([IDS]), output_attentions=True).attentions[1]
    assert_close(pattern.sum(-1), torch.ones(1, LLAMA.hf.config.num_attention_heads, 4))


def test_an_unknown_site_of_the_model() -> None:
    with refused(UnknownSiteError, "'logit'", instead="did you mean logits"), model.trace(IDS):
        model.logit.save()  # <-
    with refused(UnknownSiteError, "'logit'", instead="did you mean logits"), model.trace(IDS):
        model.logit = 0  # <-
    with model.trace(IDS):
        model.logits.save()


def test_a_site_in_the_wrong_place() -> None:
    with refused(UnknownSiteError, "site of a layer", instead="model.layers[i].resid_post"), model.trace(IDS):
        model.resid_post.save()  # <-
    with refused(UnknownSiteError, "'logits'", instead="did you mean model.logits?"), model.trace(IDS):
        model.layers[0].logits.save()  # <-


def test_unknown_sites_outside_a_block_are_unknown_too() -> None:
    with refused(UnknownSiteError, "'resid_pots'", instead="resid_post"):
        model.layers[0].resid_pots = 0  # <-
    assert not hasattr(model, "nonsense")
    assert not hasattr(model.layers[0], "nonsense")


def test_a_site_that_the_family_lacks() -> None:
    block = gpt2.trace(IDS)
    with (
        refused(AbsentSiteError, "GPT-2", "'mlp_up'", "use mlp_pre", instead="model.sites()", on=GPT2),
        block,
    ):
        gpt2.layers[0].mlp_up.save()  # <-
    with (
        refused(AbsentSiteError, "'mlp_up'", "use mlp_pre", instead="model.sites()", on=GPT2),
        gpt2.trace(IDS),
    ):
        gpt2.layers[0].mlp_up = 0  # <-
    with refused(AbsentSiteError, "'mlp_up'", instead="model.sites()", on=GPT2), gpt2.trace(IDS):
        gpt2.layers[0:2].mlp_up *= 0  # <-
    with gpt2.trace(IDS):
        h = gpt2.layers[0].mlp_pre.save()
    assert h.value.shape == (1, 4, 80)
    assert "mlp_up" in str(gpt2.sites())
    with refused(AbsentSiteError, "Llama", "'pos_embed'", "RoPE", instead="model.sites()"), model.trace(IDS):
        model.pos_embed.save()  # <-


# --- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [3, -4, 99])
def test_a_layer_out_of_range(index: int) -> None:
    for key in (index, [0, index]):
        with refused(LayerRangeError, f"no layer {index}:", "3 layers, 0 to 2", instead="model.layers[-1]"):
            model.layers[key]  # <-
    with model.trace(IDS):
        last = model.layers[-1].resid_post.save()
        same = model.layers[2].resid_post.save()
    assert torch.equal(last.value, same.value)


def test_a_slice_of_no_layers() -> None:
    with refused(LayerRangeError, "model.layers[3:]", "3 layers, 0 to 2", instead="model.layers[:]"):
        model.layers[3:]  # <-
    with refused(LayerRangeError, "model.layers[2:1]", "chooses no layer", instead="model.layers[:]"):
        model.layers[2:1]  # <-
    with refused(LayerRangeError, "model.layers\\[\\[\\]\\]", instead="model.layers[:]"):
        model.layers[[]]  # <-
    assert len(model.layers[:]) == 3


@pytest.mark.parametrize(
    ("key", "written", "instead"),
    [
        (slice(1, 9), "1:9", "1:"),
        (slice(5, 9), "5:9", ":"),
        (slice(0, 4), "0:4", "0:"),
        (slice(None, 4), ":4", ":"),
        (slice(-4, None), "-4:", ":"),
        (slice(-9, 2), "-9:2", ":2"),
        (slice(0, -4), "0:-4", "0:"),
        (slice(0, 9, 2), "0:9:2", "0::2"),
        (slice(3, None, -1), "3::-1", "::-1"),
        (slice(0, 3, 0), "0:3:0", "::2"),
    ],
)
def test_a_slice_that_goes_beyond_the_model_is_not_clipped(key: slice, written: str, instead: str) -> None:
    says = "goes beyond the model, which has 3 layers, 0 to 2" if key.step != 0 else "a step of 0"
    with refused(LayerRangeError, f"model.layers[{written}] ", says, instead=f"model.layers[{instead}]"):
        model.layers[key]  # <-
    with refused(LayerRangeError, says, instead=f"model.layers[{instead}]"), model.trace(IDS):
        model.layers[key].resid_post += 1.0  # <-


@given(
    start=st.none() | st.integers(-3, 3),
    stop=st.none() | st.integers(-3, 3),
    step=st.none() | st.sampled_from([-3, -2, -1, 1, 2, 3]),
)
def test_a_slice_within_the_model_is_pythons(start: int | None, stop: int | None, step: int | None) -> None:
    wanted = [0, 1, 2][start:stop:step]
    if not wanted or (start == 3 and step is not None and step < 0):
        with pytest.raises(LayerRangeError):
            model.layers[start:stop:step]
        return
    chosen = model.layers[start:stop:step]
    assert [str(layer) for layer in chosen] == [f"model.layers[{index}]" for index in wanted]


@pytest.mark.parametrize("key", ["0", 1.0, None, True, slice("a", None), torch.tensor(1)])
def test_what_does_not_choose_a_layer(key: Any) -> None:
    with refused(LayerRangeError, instead="model.layers[3]"):
        model.layers[key]  # <-


def test_a_value_does_not_choose_a_layer() -> None:
    with refused(LayerRangeError, "value", instead="model.layers[3]"), model.trace(IDS):
        model.layers[model.logits[0, -1].argmax()]  # <-
    with refused(LayerRangeError, "value", instead="model.layers[3]"), model.trace(IDS):
        model.layers[[0, model.logits[0, -1].argmax()]]  # <-


def test_a_layer_is_not_a_tensor() -> None:
    block = model.trace(IDS)
    with (
        refused(WriteTargetError, "a layer is not a tensor", instead="model.layers[0].resid_post = value"),
        block,
    ):
        model.layers[0] = model.layers[1].resid_post  # <-
    with refused(WriteTargetError, "not a tensor", instead="model.layers[0:2].resid_post"), model.trace(IDS):
        model.layers[0:2] = 0  # <-


def test_parameters_cannot_be_assigned() -> None:
    with refused(WriteTargetError, "model.unembed is a parameter", instead="model.lm_head"), model.trace(IDS):
        model.unembed = 0  # <-
    with refused(WriteTargetError, "model.unembed is a parameter", instead="model.lm_head"), model.trace(IDS):
        model.unembed *= 2  # <-
    with (
        refused(WriteTargetError, "'lm_head.weight' is a parameter", instead="lm_head[..., token]"),
        model.trace(IDS),
    ):
        model.unembed[7] = 0  # <-
    with (
        refused(WriteTargetError, "'lm_head.weight' is a parameter", instead="lm_head[..., token]"),
        model.trace(IDS),
    ):
        model.param("lm_head.weight")[7, :3] += 1.0  # <-
    with model.trace(IDS):
        model.lm_head[..., 7] = 0
        logits = model.logits.save()
    assert torch.equal(logits.value[..., 7], torch.zeros(1, 4))


@pytest.mark.parametrize("name", ["layers", "trace", "hf", "config"])
def test_what_is_no_site_cannot_be_assigned(name: str) -> None:
    with refused(WriteTargetError, f"model.{name} is not a site", instead="model.sites()"), model.trace(IDS):
        setattr(model, name, 0)  # <-


# --- parameters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["lm_head.wieght", "lm_head", "lm_head.weight.data"])
def test_an_unknown_parameter(path: str) -> None:
    with refused(UnknownParameterError, repr(path), instead="lm_head.weight"), model.trace(IDS):
        model.param(path).save()  # <-
    with model.trace(IDS):
        w = model.param("lm_head.weight").save()
    assert torch.equal(w.value, LLAMA.hf.lm_head.weight)


# --- outside a block -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "use",
    [
        lambda: model.logits,
        lambda: setattr(model, "logits", 0),
        lambda: model.layers[0].resid_post,
        lambda: setattr(model.layers[0], "resid_post", 0),
        lambda: model.layers[0:2].resid_post,
        lambda: setattr(model.layers[0:2], "resid_post", 0),
        lambda: model.unembed,
        lambda: model.param("lm_head.weight"),
    ],
)
def test_using_the_model_outside_a_block(use) -> None:
    with refused(NoTraceError, "outside a block", instead="with model.trace(prompt) as t:", text="lambda:"):
        use()
    with model.record():
        use()


def test_functions_of_blocks_outside_a_block() -> None:
    with refused(NoTraceError, "tl.masked_mean", instead="tensor.mean(1)"):
        tl.masked_mean(torch.ones(1, 2, 3))  # <-
    with refused(NoTraceError, "tl.apply", instead="call the function"):
        tl.apply(torch.relu, torch.ones(3))  # <-


# --- models ----------------------------------------------------------------------------------------------------------


def test_an_unknown_architecture() -> None:
    bert = BertModel(
        BertConfig(hidden_size=24, num_attention_heads=2, num_hidden_layers=1, intermediate_size=48)
    )
    model: Any = tl.wrap(bert)
    with refused(NotALanguageModelError, "'bert': it is an encoder", instead="model.module(path)"):
        model.layers[0]  # <-


def test_a_model_without_its_head() -> None:
    with refused(UnknownArchitectureError, "LlamaModel", instead="AutoModelForCausalLM"):
        tl.wrap(LLAMA.hf.model)  # <-
    assert tl.wrap(LLAMA.hf).n_layers == 3


@pytest.mark.parametrize("thing", ["gpt2", None])
def test_what_is_no_model(thing: Any) -> None:
    with refused(UnknownArchitectureError, type(thing).__name__, instead="tl.load(name)"):
        tl.wrap(thing)  # <-


def test_a_model_on_several_devices() -> None:
    spread = AutoModelForCausalLM.from_config(GPT2.hf.config)
    spread.lm_head.to("meta")
    with refused(SeveralDevicesError, "cpu, meta", instead="one device"):
        tl.wrap(spread)  # <-


def test_a_model_without_weights() -> None:
    with torch.device("meta"):
        empty = tl.wrap(AutoModelForCausalLM.from_config(LLAMA.hf.config).eval(), LLAMA.tokenizer)
    with empty.record() as r:
        empty.layers[0].resid_post.save("h")
    program = empty.compile(r)
    block = empty.trace(IDS)
    with refused(ModelClosedError, "without weights", instead="weights=False"), block:  # <-
        empty.layers[0].resid_post.save()
    block = empty.trace(IDS)
    with refused(ModelClosedError, "without weights", instead="weights=False"), block:  # <-
        empty.layers[0].resid_post.save()
    with refused(ModelClosedError, "without weights", instead="without weights=False"):
        program(IDS)  # <-
    block = empty.generate(IDS, max_new_tokens=1)
    with refused(ModelClosedError, "without weights", instead="weights=False"), block:  # <-
        empty.layers[0].resid_post *= 1
    # What was recorded without weights runs on the model that has them.
    assert model.compile(r)(IDS)["h"].shape == (1, 4, D)
    assert str(empty.sites()) == str(model.sites())


@pytest.mark.parametrize("count", [-1, 2.5, True, None, "3"])
def test_a_number_of_new_tokens_that_is_none(count: Any) -> None:
    with refused(OptionError, f"max_new_tokens={count!r}", instead="max_new_tokens=20"):
        model.generate(IDS, max_new_tokens=count)  # <-


@pytest.mark.parametrize("graph", [None, "graph {}", 5])
def test_compiling_what_is_no_graph(graph: Any) -> None:
    with refused(OptionError, "takes a graph or a recording", instead="with model.record() as r"):
        model.compile(graph)  # <-
