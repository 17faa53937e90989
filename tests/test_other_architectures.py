"""Models of no family with a table: one sentence of what they are, and the sites of text models inside larger ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch.testing import assert_close

import tracelens as tl
from tests.support.families import FAMILIES, randomise
from tests.support.more_families import MORE
from tracelens import deriving
from tracelens.backends.architectures.llama import LLAMA
from tracelens.errors import AbsentSiteError, NotALanguageModelError, UnknownArchitectureError
from tracelens.ir.sites import KINDS, Scope

IDS = [[3, 4, 5, 9, 11]]
TEXT: dict[str, Any] = {**FAMILIES["qwen2"].settings, "num_hidden_layers": 2}
SIGHT: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
SEEN: dict[str, Any] = {"depth": 1, "num_heads": 2, "patch_size": 8}
SEEN_ANEW: dict[str, Any] = {**SEEN, "hidden_size": 16, "out_hidden_size": 48, "intermediate_size": 16}
ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}
SMALL: dict[str, Any] = {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2}
ENCODER: dict[str, Any] = {**SMALL, "num_attention_heads": 4, "intermediate_size": 80, "pad_token_id": 0}


def built(make: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        model = make()
    randomise(model, 0)
    return model.eval()


@pytest.fixture(autouse=True)
def probing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TRACELENS_PROBE")
    monkeypatch.setenv("TRACELENS_CACHE", str(tmp_path))


# --- the language model in a larger one ----------------------------------------------------

OF_IMAGES: dict[str, Callable[[], Any]] = {
    "llava": lambda: tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(
            text_config=tf.LlamaConfig(**TEXT),
            vision_config=tf.CLIPVisionConfig(**SIGHT),
            image_token_index=96,
        )
    ),
    "mistral3": lambda: tf.Mistral3ForConditionalGeneration(
        tf.Mistral3Config(
            text_config=tf.MistralConfig(**TEXT),
            vision_config=tf.PixtralVisionConfig(**SIGHT, head_dim=8),
            image_token_index=96,
        )
    ),
    "qwen2_vl": lambda: tf.Qwen2VLForConditionalGeneration(
        tf.Qwen2VLConfig(
            text_config={**TEXT, "rope_parameters": ROPE},
            vision_config={**SEEN, "embed_dim": 16, "hidden_size": 48, "mlp_ratio": 1},
            image_token_id=96,
            video_token_id=95,
        )
    ),
    "qwen2_5_vl": lambda: tf.Qwen2_5_VLForConditionalGeneration(
        tf.Qwen2_5_VLConfig(
            text_config={**TEXT, "rope_parameters": ROPE},
            vision_config={**SEEN, "hidden_size": 16, "out_hidden_size": 48, "intermediate_size": 16},
            image_token_id=96,
            video_token_id=95,
        )
    ),
    "qwen3_vl": lambda: tf.Qwen3VLForConditionalGeneration(
        tf.Qwen3VLConfig(
            text_config={**TEXT, "head_dim": 12, "rope_parameters": ROPE},
            vision_config={**SEEN_ANEW, "deepstack_visual_indexes": [0]},
            image_token_id=96,
            video_token_id=95,
        )
    ),
    "qwen3_5": lambda: tf.Qwen3_5ForConditionalGeneration(
        tf.Qwen3_5Config(
            text_config=MORE["qwen3_5"].config().to_dict(),
            vision_config=SEEN_ANEW,
            image_token_id=96,
            video_token_id=95,
        )
    ),
    "qwen3_5_moe": lambda: tf.Qwen3_5MoeForConditionalGeneration(
        tf.Qwen3_5MoeConfig(
            text_config=MORE["qwen3_5_moe"].config().to_dict(),
            vision_config=SEEN_ANEW,
            image_token_id=96,
            video_token_id=95,
        )
    ),
    "llama4": lambda: tf.Llama4ForConditionalGeneration(
        tf.Llama4Config(
            text_config=MORE["llama4"].config().to_dict(),
            vision_config={
                **SIGHT,
                "intermediate_size": 64,
                "vision_output_dim": 16,
                "projector_input_dim": 16,
                "projector_output_dim": 16,
            },
            image_token_index=96,
        )
    ),
}
"""Models of text and images, without a table of their own."""
ALONE = ("qwen3_5", "qwen3_5_moe", "llama4")
"""... and those whose language models have one."""
SITES = tuple(kind.name for kind in KINDS if kind.scope is Scope.LAYER)


@pytest.fixture(scope="module", params=OF_IMAGES)
def seeing(request: pytest.FixtureRequest) -> Any:
    return built(OF_IMAGES[request.param])


def test_the_stream_is_that_of_the_language_model(seeing: Any) -> None:
    model = tl.wrap(seeing)
    assert isinstance(model, tl.Model)
    assert "language_model" in model.anatomy.family.layers
    with model.trace(IDS) as t:
        for layer in range(model.n_layers):
            model.layers[layer].resid_pre.save(f"{layer}")
        model.final_norm.save("last")
        model.logits.save("logits")
    with torch.no_grad():
        plain = seeing(torch.tensor(IDS), output_hidden_states=True)
    for layer in range(model.n_layers):
        assert_close(t[f"{layer}"], plain.hidden_states[layer], rtol=1e-5, atol=1e-5)
    assert_close(t["last"], plain.hidden_states[-1], rtol=1e-5, atol=1e-5)
    assert_close(t["logits"], plain.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ALONE)
def test_every_site_is_that_of_the_language_model_alone(name: str) -> None:
    """The same weights twice, once in a model of text and images and once in the family that has a table."""
    large, alone = built(OF_IMAGES[name]), MORE[name].build()
    inner = large.get_submodule("language_model" if name == "llama4" else "model.language_model")
    weights = {key: value for key, value in inner.state_dict().items() if not key.startswith("lm_head")}
    target: Any = alone if name == "llama4" else alone.model
    assert not target.load_state_dict(weights, strict=False).unexpected_keys
    alone.lm_head.load_state_dict(large.get_output_embeddings().state_dict())
    within, own = tl.wrap(large), tl.wrap(alone)
    read: list[dict[str, torch.Tensor]] = []
    for model in (within, own):
        with model.trace(IDS) as t:
            for site in SITES:
                for layer in model.anatomy.layers_with(site):
                    getattr(model.layers[layer], site).save(f"{layer} {site}")
            model.logits.save("logits")
        read.append(dict(t.results))
    assert len(read[1]) > 35
    assert list(read[0]) == list(read[1])
    for key, expected in read[1].items():
        assert_close(read[0][key], expected, rtol=1e-5, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


def test_a_write_is_what_a_hook_does(seeing: Any) -> None:
    model = tl.wrap(seeing)
    v = torch.linspace(-1, 1, 48)
    with model.trace(IDS):
        model.layers[0].resid_post += v
        logits = model.logits.save()
    clean = seeing(torch.tensor(IDS)).logits
    block = seeing.get_submodule(model.anatomy.family.layers.format(0))
    hook = block.register_forward_hook(lambda _, __, out: out + v)
    try:
        expected = seeing(torch.tensor(IDS)).logits
    finally:
        hook.remove()
    assert (expected - clean).abs().max() > 1e-2
    assert_close(logits.value, expected, rtol=1e-5, atol=1e-5)


def test_rows_of_a_batch_and_generations_are_those_of_single_prompts(seeing: Any) -> None:
    model = tl.wrap(seeing)
    rows = [[3, 4, 5, 9, 11], [7, 8]]
    with model.trace(rows):
        together = model.logits[:, -1].save()
    for row, ids in enumerate(rows):
        expected = seeing(torch.tensor([ids])).logits[:, -1]
        assert_close(together.value[row], expected[0], rtol=1e-4, atol=1e-5)
    with model.generate([[3, 4, 5]], max_new_tokens=4) as t:
        model.layers[1].resid_post[:, -1].norm(dim=-1).save("norm")
    expected = seeing.generate(
        torch.tensor([[3, 4, 5]]), max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=2
    )
    new = expected[0].tolist()[3:]
    assert t.tokens[0][-len(new) :] == new
    assert t["norm"].shape == (len(new), 1)


def test_it_is_loaded_from_a_folder(seeing: Any, tmp_path: Path) -> None:
    seeing.save_pretrained(tmp_path / "model")
    model = tl.load(tmp_path / "model")
    # transformers loads the language models of some by themselves, as AutoModelForCausalLM.
    alone = seeing.config.model_type in ALONE
    assert (type(model.hf) is type(seeing)) != alone
    assert model.anatomy.family.model_types[0].endswith("_text") == alone
    with model.trace(IDS):
        logits = model.logits.save()
    assert_close(logits.value, seeing(torch.tensor(IDS)).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("bias", "kind"), [(False, tl.Model), (True, tl.PlainModel)])
def test_what_is_refused_of_a_language_model_is_refused_in_a_larger_one(
    bias: bool, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a table that refuses what no identity shows."""
    table = replace(LLAMA, refusals={"attention_bias": "it is not to be served"})
    monkeypatch.setattr(deriving, "families_of", lambda _: (table,))
    config = tf.LlavaConfig(
        text_config=tf.LlamaConfig(**TEXT, attention_bias=bias),
        vision_config=tf.CLIPVisionConfig(**SIGHT),
        image_token_index=96,
    )
    assert isinstance(tl.wrap(built(lambda: tf.LlavaForConditionalGeneration(config))), kind)


SPARSE_ATTENTION = {
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "num_key_value_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 6,
    "v_head_dim": 12,
    # Fewer than there are tokens: a query sees the keys that an indexer chose.
    "index_topk": 4,
    "index_head_dim": 8,
    "index_n_heads": 2,
}


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["deepseek_v32", "glm_moe_dsa"])
def test_looking_inside_sparse_attention_is_refused(kind: str, attn: str) -> None:
    """Under a name of attention that it does not know, the model hands the chosen keys over instead of a mask."""
    if kind not in tf.CONFIG_MAPPING:
        pytest.skip(f"transformers {tf.__version__} has no {kind}; a newer one runs this")
    settings = {name: value for name, value in TEXT.items() if name != "layer_types"}
    config: Any = tf.CONFIG_MAPPING[kind](**{**settings, **SPARSE_ATTENTION})
    hf = built(lambda: tf.AutoModelForCausalLM.from_config(config, attn_implementation=attn))
    ids = [list(range(3, 15))]
    with torch.no_grad():
        plain = hf(torch.tensor(ids), output_hidden_states=True)
        config.index_topk = 64
        for layer in hf.model.layers:
            layer.self_attn.indexer.index_topk = 64
        everything = hf(torch.tensor(ids)).logits
        for layer in hf.model.layers:
            layer.self_attn.indexer.index_topk = 4
    assert (everything - plain.logits).abs().max() > 1e-2  # which keys are seen matters
    model = tl.wrap(hf)
    assert isinstance(model, tl.Model)
    with model.trace(ids):
        stream = model.layers[1].resid_pre.save()
        logits = model.logits.save()
    assert torch.equal(logits.value, plain.logits)
    assert torch.equal(stream.value, plain.hidden_states[1])
    for site in ("pattern", "scores", "q_rot"):
        with pytest.raises(AbsentSiteError, match="hands indices to an implementation"), model.trace(ids):
            getattr(model.layers[1], site).save()


def test_a_model_that_looks_ahead_is_no_language_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every identity between sites holds in it."""
    config = tf.HeliumConfig(**{**TEXT, "head_dim": 12})
    hf = built(lambda: tf.AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
    assert isinstance(tl.wrap(hf), tl.Model)
    ahead: Any = hf.model.forward

    def seen_by_all(*args: Any, **kwargs: Any) -> Any:
        width = kwargs["input_ids"].shape[1]
        return ahead(*args, **{**kwargs, "attention_mask": torch.zeros(1, 1, width, width)})

    monkeypatch.setattr(hf.model, "forward", seen_by_all)
    assert isinstance(tl.wrap(hf), tl.PlainModel)
    monkeypatch.setattr(deriving, "looks_back_only", lambda _: True)
    assert isinstance(tl.wrap(hf), tl.Model)


# --- one sentence ----------------------------------------------------

WITHOUT_SITES: dict[str, tuple[Callable[[], Any], str]] = {
    "t5": (
        lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(vocab_size=97, d_model=48, d_kv=12, d_ff=80, num_layers=1, num_heads=4)
        ),
        "it is an encoder-decoder model",
    ),
    "bart": (
        lambda: tf.BartForConditionalGeneration(
            tf.BartConfig(
                vocab_size=97,
                d_model=48,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
            )
        ),
        "it is an encoder-decoder model",
    ),
    "bert": (lambda: tf.BertForMaskedLM(tf.BertConfig(**ENCODER)), "it is an encoder"),
    "modernbert": (lambda: tf.ModernBertForMaskedLM(tf.ModernBertConfig(**ENCODER)), "it is an encoder"),
    "eurobert": (
        lambda: tf.EuroBertForMaskedLM(tf.EuroBertConfig(**{**ENCODER, "num_key_value_heads": 2})),
        "it is an encoder",
    ),
    "mamba": (lambda: tf.MambaForCausalLM(tf.MambaConfig(**SMALL)), "it is a state-space or recurrent model"),
    "mamba2": (
        lambda: tf.Mamba2ForCausalLM(tf.Mamba2Config(**SMALL, num_heads=4, head_dim=24)),
        "it is a state-space or recurrent model",
    ),
    "rwkv": (
        lambda: tf.RwkvForCausalLM(tf.RwkvConfig(**SMALL, attention_hidden_size=48)),
        "it is a state-space or recurrent model",
    ),
    "jamba": (
        lambda: tf.JambaForCausalLM(tf.JambaConfig(**TEXT, use_mamba_kernels=False)),
        "some of its layers hand a state",
    ),
    "blip-2": (
        lambda: tf.Blip2ForConditionalGeneration(
            tf.Blip2Config(
                text_config={"model_type": "opt", **ENCODER, "word_embed_proj_dim": 48, "ffn_dim": 80},
                vision_config=SIGHT,
                qformer_config={**ENCODER, "encoder_hidden_size": 16},
            )
        ),
        "it is a model of text and something else",
    ),
}
CANNOT_LOAD = ("t5", "bart", "bert", "modernbert", "eurobert")


@pytest.mark.parametrize("kind", WITHOUT_SITES)
def test_models_without_sites_say_what_they_are(kind: str, tmp_path: Path) -> None:
    make, words = WITHOUT_SITES[kind]
    hf = built(make)
    model: Any = tl.wrap(hf)
    assert isinstance(model, tl.PlainModel)
    with pytest.raises(NotALanguageModelError, match=f"{kind!r}: {words}") as caught:
        _ = model.layers
    assert "model.module(path).output" in str(caught.value.instead)
    assert not [mark for mark in (". ", "\n") if mark in caught.value.problem]
    if kind in CANNOT_LOAD:
        hf.save_pretrained(tmp_path / "model")
        for options in ({}, {"tp": 2}):
            with pytest.raises(UnknownArchitectureError, match=f"{kind!r}: {words}") as refused:
                tl.load(tmp_path / "model", **options)
            assert "tl.wrap(transformers.AutoModelFor" in str(refused.value.instead)
            assert refused.value.at is not None


@pytest.mark.parametrize("kind", ["mamba", "jamba"])
def test_ranks_refuse_before_they_start(kind: str, tmp_path: Path) -> None:
    hf = built(WITHOUT_SITES[kind][0])
    hf.save_pretrained(tmp_path / "model")
    with pytest.raises(UnknownArchitectureError, match=WITHOUT_SITES[kind][1]):
        tl.load(tmp_path / "model", tp=2)


@pytest.mark.parametrize(
    ("kind", "path", "arguments"),
    [
        ("t5", "decoder.block.0", {"input_ids": IDS, "decoder_input_ids": [[1, 2]]}),
        ("bert", "bert.encoder.layer.0", {"input_ids": IDS}),
        ("mamba", "backbone.layers.0.mixer", {"input_ids": IDS}),
    ],
)
def test_their_modules_are_there_by_path(kind: str, path: str, arguments: dict[str, Any]) -> None:
    hf = built(WITHOUT_SITES[kind][0])
    given = {name: torch.tensor(ids) for name, ids in arguments.items()}
    model: Any = tl.wrap(hf)
    with model.trace(**given, use_cache=False) if kind != "bert" else model.trace(**given):
        output = model.module(path).output
        seen = (output[0] if kind == "t5" else output).save()
    found: list[Any] = []
    hook = hf.get_submodule(path).register_forward_hook(lambda _, __, out: found.append(out))
    try:
        hf(**given)
    finally:
        hook.remove()
    expected = found[0] if isinstance(found[0], torch.Tensor) else found[0][0]
    assert_close(seen.value, expected, rtol=1e-5, atol=1e-5)
