"""The tuned lens: trained as the plan says, on any layout; kept in files that nothing is unpickled from."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import tracelens as tl
from tests.support.dense_families import DENSE
from tests.support.families import D_MODEL, FAMILIES, LAYERS, VOCABULARY
from tests.support.pretend import Pretend, pretend
from tests.support.ranks import PoolOf
from tests.support.spread_models import over_devices
from tests.support.tokenizers import SENTENCES, byte_level_bpe
from tracelens.errors import (
    LensFolderError,
    LensMismatchError,
    LensTrainingError,
    NoTokenizerError,
    OptionError,
)
from tracelens.lens import tuned as tuned_module
from tracelens.lens.fingerprint import fingerprint
from tracelens.lens.head import Head
from tracelens.lens.text_windows import windows_of
from tracelens.lens.training import Plan, Target, learn
from tracelens.lens.translators import Translator

__all__ = ["pretend"]

CONTEXT = 16


def sentences(count: int, seed: int) -> list[list[int]]:
    """Texts of 35 tokens that are drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (35,), generator=generator).tolist() for _ in range(count)]


TEXTS, HELD_OUT = sentences(24, 1), sentences(12, 2)
QUICK: dict[str, Any] = {"steps": 6, "tokens_per_step": 64, "context": CONTEXT}


@pytest.fixture(scope="module")
def hf() -> PreTrainedModel:
    return FAMILIES["llama"].build()


@pytest.fixture(scope="module")
def model(hf: PreTrainedModel) -> tl.Model:
    return tl.wrap(hf)


@pytest.fixture(scope="module")
def lens(model: tl.Model) -> tl.TunedLens:
    return tl.TunedLens.train(model, sentences(200, 3), steps=60, tokens_per_step=256, context=CONTEXT)


def flat(lens: tl.TunedLens) -> Tensor:
    """All maps [L, D + 1, D], on the host."""
    found: list[Tensor] = []
    for weight, bias in lens.translators:
        assert bias is not None
        found.append(torch.cat([weight, bias[None]]).cpu())
    return torch.stack(found)


def built(family: str) -> PreTrainedModel:
    """Granite divides its logits by a number."""
    return DENSE[family].build(num_hidden_layers=LAYERS) if family == "granite" else FAMILIES[family].build()


def by_hand(hf: PreTrainedModel, ids: Tensor, maps: list[nn.Linear] | None = None) -> tuple[Tensor, Tensor]:
    """KL(final || lens) [L, B, P] by transformers' own hidden states and modules, and the final log-probabilities."""
    base = hf.base_model
    norm = getattr(base, "norm", None) or base.ln_f
    cap = getattr(hf.config, "final_logit_softcapping", None)
    with torch.no_grad():
        out = hf(ids, output_hidden_states=True)
    final = out.logits.log_softmax(-1)
    found: list[Tensor] = []
    for number, state in enumerate(out.hidden_states[:-1]):
        logits = hf.lm_head(norm(state if maps is None else state + maps[number](state)))
        logits = logits / getattr(hf.config, "logits_scaling", 1.0)
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        found.append((final.exp() * (final - logits.log_softmax(-1))).sum(-1))
    return torch.stack(found), final


# --- what it is -------------------------------------------------------------------------------------------------------


def test_a_trained_lens_is_nearer_to_the_model_in_every_layer_but_the_last(
    model: tl.Model, lens: tl.TunedLens
) -> None:
    found = lens.evaluate(model, HELD_OUT, context=CONTEXT)
    assert found.kl.shape == (LAYERS + 1,)
    assert (found.kl[:-1] < 0.8 * found.identity_kl[:-1]).all()
    assert found.kl[-1] == found.identity_kl[-1] == 0
    assert found.states[0] == "layers[0].resid_pre"
    assert found.states[-1] == f"layers[{LAYERS - 1}].resid_post"
    # What was learned is no accident of a few windows.
    assert (found.identity_kl - found.kl > 4 * (found.kl_error + found.identity_kl_error))[:-1].all()


@pytest.mark.parametrize("family", [*sorted(FAMILIES), "granite"])
def test_evaluation_is_what_transformers_says(family: str) -> None:
    hf = built(family)
    model = tl.wrap(hf)
    lens = tl.TunedLens.train(model, TEXTS, **{**QUICK, "steps": 3})
    ids = windows_of(model, HELD_OUT, CONTEXT).ids
    maps = [nn.Linear(D_MODEL, D_MODEL) for _ in range(LAYERS)]
    for map_, (weight, bias) in zip(maps, lens.translators, strict=True):
        map_.load_state_dict({"weight": weight, "bias": bias})
    found = lens.evaluate(model, HELD_OUT, context=CONTEXT, batch_size=3)
    assert found.tokens == ids.numel()
    for numbers, errors, wanted in (
        (found.kl, found.kl_error, by_hand(hf, ids, maps)[0]),
        (found.identity_kl, found.identity_kl_error, by_hand(hf, ids)[0]),
    ):
        torch.testing.assert_close(numbers[:-1], wanted.mean((1, 2)), rtol=1e-4, atol=1e-6)
        error = wanted.mean(2).std(1) / len(ids) ** 0.5
        torch.testing.assert_close(errors[:-1], error, rtol=1e-3, atol=1e-6)


def test_the_identity_lens_changes_nothing(model: tl.Model) -> None:
    lens = tl.TunedLens.identity(model)
    lens.check(model)
    with model.trace([[5, 6, 7]]):
        h = model.layers[1].resid_post
        assert lens.translate(h, 1) is h
    found = lens.evaluate(model, HELD_OUT, context=CONTEXT)
    assert torch.equal(found.kl, found.identity_kl)
    assert all(not part.any() for both in lens.translators for part in both)


def test_a_map_belongs_to_a_state_of_the_stream(model: tl.Model, lens: tl.TunedLens) -> None:
    h = torch.randn(2, 5, D_MODEL)
    for number, (weight, bias) in enumerate(lens.translators):
        wanted = h + h @ weight.T + bias
        torch.testing.assert_close(lens.translate(h, number, "resid_pre"), wanted)
        if number:
            torch.testing.assert_close(lens.translate(h, number - 1), wanted)
            assert not torch.allclose(wanted, h, atol=1e-2)
    assert lens.translate(h, LAYERS - 1) is h
    half = lens.translate(h.bfloat16(), 1)
    assert half.dtype == torch.bfloat16
    wide = h.bfloat16().float()
    assert torch.equal(half, lens.translate(wide, 1).bfloat16())
    with pytest.raises(LensMismatchError, match="'attn_out' is none of those"):
        lens.translate(h, 1, "attn_out")
    for layer in (-1, LAYERS):
        with pytest.raises(LensMismatchError, match=f"no layer {layer} among them"):
            lens.translate(h, layer)


def test_a_lens_is_used_in_a_block(hf: PreTrainedModel, lens: tl.TunedLens) -> None:
    ids = [[5, 6, 7, 8, 9]]
    fresh = tl.wrap(hf)  # whose unembedding has not been looked at yet
    with fresh.trace(ids) as t:
        streams = fresh.layers[:].resid_post
        fresh.lens(streams, lens=lens).log_prob(11).save("all")
        fresh.lens(streams).log_prob(11).save("plain")
        fresh.lens(streams, lens=tl.TunedLens.identity(fresh)).log_prob(11).save("identity")
        for layer in range(LAYERS):
            h = fresh.layers[layer].resid_post
            fresh.lens(h, lens=lens).log_prob(11).save(f"one {layer}")
            fresh.lens(h * 1.0, lens=lens, layer=layer).log_prob(11).save(f"computed {layer}")
        # A value knows which site it is of, or a part of.
        fresh.lens(fresh.layers[2].resid_pre[:, -1], lens=lens).log_prob(11).save("pre")
        fresh.lens(fresh.layers[1:].resid_pre, lens=lens).log_prob(11).save("all pre")
    with torch.no_grad():
        out = hf(torch.tensor(ids), output_hidden_states=True)
        wanted = []
        for h, (weight, bias) in zip(out.hidden_states[1:-1], lens.translators[1:], strict=True):
            wanted.append(hf.lm_head(hf.model.norm(h + h @ weight.T + bias)).log_softmax(-1)[..., 11])
        wanted.append(out.logits.log_softmax(-1)[..., 11])
    wanted = torch.stack(wanted)
    torch.testing.assert_close(t["all"], wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(t["plain"][:-1], wanted[:-1], atol=1e-2)
    assert torch.equal(t["identity"], t["plain"])
    for layer in range(LAYERS):
        for name in ("one", "computed"):
            torch.testing.assert_close(t[f"{name} {layer}"], wanted[layer], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(t["pre"], wanted[1, :, -1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(t["all pre"], wanted[:-1], rtol=1e-4, atol=1e-4)


def test_logit_lens_takes_a_tuned_one(model: tl.Model, lens: tl.TunedLens) -> None:
    prompt = HELD_OUT[0][:9]
    plain = model.logit_lens(prompt, generate=3)
    same = model.logit_lens(prompt, generate=3, lens=tl.TunedLens.identity(model))
    tuned = model.logit_lens(prompt, generate=3, lens=lens)
    assert torch.equal(same.top_log_probs, plain.top_log_probs)
    assert torch.equal(tuned.top_ids[:, -1], plain.top_ids[:, -1])  # the last layer is the model itself
    assert not torch.allclose(tuned.top_log_probs[:, :-1], plain.top_log_probs[:, :-1], atol=1e-2)
    assert (tuned.lens, same.lens) == ("tuned lens of LlamaForCausalLM", "logit lens of LlamaForCausalLM")
    streams = model.logit_lens(prompt, components=("resid_pre", "resid_post"), lens=lens)
    torch.testing.assert_close(streams.top_log_probs[0, 1:], streams.top_log_probs[1, :-1])
    with pytest.raises(LensMismatchError, match="'attn_out' is none of those"):
        model.logit_lens(prompt, components=("attn_out",), lens=lens)


def test_what_is_no_state_is_refused_in_a_block(model: tl.Model, lens: tl.TunedLens) -> None:
    with model.trace([[5, 6, 7]]):
        for value in (model.layers[1].mlp_out[:, 0], model.layers[:].attn_out):
            with pytest.raises(LensMismatchError, match="_out' is none of those"):
                model.lens(value, lens=lens)
        with pytest.raises(LensMismatchError, match="_out' is none of those"):
            model.lens(model.layers[1].mlp_out, lens=lens, layer=1)
        with pytest.raises(LensMismatchError, match="which state of the stream"):
            model.lens(model.layers[:].resid_pre * 1.0, lens=lens)
        with pytest.raises(OptionError, match="a map of its own"):
            lens.translate(model.layers[:].resid_post, 1)
        model.logits.save()


def test_it_shows_itself(model: tl.Model, lens: tl.TunedLens) -> None:
    assert repr(lens) == f"<tuned lens of LlamaForCausalLM: {LAYERS} maps, d_model {D_MODEL}>"
    assert tl.TunedLens.identity(model).name == "logit lens of LlamaForCausalLM"
    assert len(lens) == LAYERS
    assert lens.training is not None
    assert "60 steps over 437 windows" in repr(lens.training)
    found = lens.evaluate(model, HELD_OUT, context=CONTEXT)
    table = found.to_pandas()
    assert list(table["state"]) == list(found.states)
    np.testing.assert_array_equal(table["kl"], found.kl.numpy())
    html = found._repr_html_()
    assert html.count("<tr>") == LAYERS + 2
    assert f"{found.identity_kl[0]:.4f}" in html


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*sorted(FAMILIES), "granite"])
def test_the_gradients_are_those_of_autograd(family: str) -> None:
    hf = built(family)
    head = Head(tl.wrap(hf))
    ids = torch.tensor(TEXTS[:2])
    generator = torch.Generator().manual_seed(0)
    maps = [nn.Linear(D_MODEL, D_MODEL) for _ in range(LAYERS)]
    for map_ in maps:
        for part in map_.parameters():
            part.data = 0.05 * torch.randn(part.shape, generator=generator)
    wanted, _ = by_hand(hf, ids, maps)
    (wanted.sum() * 0.25).backward()
    with torch.no_grad():
        base = hf.base_model
        states = []
        hook = (getattr(base, "norm", None) or base.ln_f).register_forward_pre_hook(
            lambda _, args: states.append(args[0])
        )
        out = hf(ids, output_hidden_states=True)
        hook.remove()
    target = Target.of(head, states[0].flatten(0, 1))
    for number, map_ in enumerate(maps):
        ours = Translator(nn.Parameter(map_.weight.detach()), nn.Parameter(map_.bias.detach()))
        lost = learn(head, target, out.hidden_states[number].flatten(0, 1), ours, 0.25)
        assert lost == pytest.approx(wanted[number].sum().item(), rel=1e-4)
        for mine, theirs in zip(ours, map_.parameters(), strict=True):
            assert theirs.grad is not None
            scale = theirs.grad.abs().max().item()
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_training_is_the_published_plan(hf: PreTrainedModel, model: tl.Model, optimizer: str) -> None:
    """Against a loop over transformers' hidden states with torch's own optimizers and schedule."""
    steps, warmup = 6, 2 if optimizer == "adam" else 0
    lens = tl.TunedLens.train(
        model, TEXTS, **QUICK, optimizer=optimizer, seed=3, warmup=warmup, weight_decay=0.01, clip=0.25
    )
    windows = windows_of(model, TEXTS, CONTEXT)
    maps = nn.ModuleList(nn.Linear(D_MODEL, D_MODEL) for _ in range(LAYERS))
    for part in maps.parameters():
        nn.init.zeros_(part)
    if optimizer == "sgd":
        chosen = torch.optim.SGD(maps.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
    else:
        chosen = torch.optim.Adam(
            maps.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01, amsgrad=True
        )
    rates = [(k + 1) / (warmup + 1) if k < warmup else (steps - k) / (steps - warmup) for k in range(steps)]
    schedule = torch.optim.lr_scheduler.LambdaLR(chosen, lambda k: rates[min(k, steps - 1)])
    losses = []
    for step in range(steps):
        ids = windows.drawn(step, 4, 3)
        chosen.zero_grad()
        divergences = by_hand(hf, ids, list(maps))[0].mean((1, 2))
        divergences.sum().backward()
        losses.append(divergences.tolist())
        assert nn.utils.clip_grad_norm_(maps.parameters(), 0.25) > 0.25
        chosen.step()
        schedule.step()
    assert lens.training is not None
    torch.testing.assert_close(lens.training.losses.float(), torch.tensor(losses), rtol=1e-4, atol=1e-5)
    wanted = torch.stack([torch.cat([map_.weight, map_.bias[None]]) for map_ in maps]).detach()
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(flat(lens), wanted, rtol=1e-2, atol=2e-5)


def test_small_tiles_and_batches_train_the_same(model: tl.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tl.TunedLens.train(model, TEXTS, **QUICK)
    assert not torch.equal(flat(whole), torch.zeros_like(flat(whole)))
    monkeypatch.setattr("tracelens.lens.training._WORKSPACE", 12 * VOCABULARY * 7)
    parts = tl.TunedLens.train(model, TEXTS, **QUICK, batch_size=3)
    torch.testing.assert_close(flat(parts), flat(whole), rtol=1e-3, atol=1e-5)


def test_equal_seeds_train_equal_lenses(model: tl.Model) -> None:
    first, second, other = (tl.TunedLens.train(model, TEXTS, **QUICK, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(flat(first), flat(second))
    assert not torch.allclose(flat(first), flat(other), atol=1e-4)


def test_the_user_may_have_switched_gradients_off(model: tl.Model) -> None:
    wanted = tl.TunedLens.train(model, TEXTS, **QUICK)
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            assert torch.equal(flat(tl.TunedLens.train(model, TEXTS, **QUICK)), flat(wanted))


def test_a_lens_without_shifts(model: tl.Model, tmp_path: Path) -> None:
    lens = tl.TunedLens.train(model, TEXTS, **QUICK, bias=False)
    assert all(bias is None and weight.any() for weight, bias in lens.translators)
    found = tl.TunedLens.load(lens.save(tmp_path))
    assert all(bias is None for _, bias in found.translators)
    assert (
        found.evaluate(model, HELD_OUT, context=CONTEXT).kl[0]
        < 0.99 * found.evaluate(model, HELD_OUT, context=CONTEXT).identity_kl[0]
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_training_that_was_stopped_ends_as_one_that_was_not(
    model: tl.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    options: dict[str, Any] = {**QUICK, "optimizer": optimizer}
    whole = tl.TunedLens.train(model, TEXTS, **options)

    def stopped(parts: Any, *args: Any) -> Any:
        for number, part in enumerate(parts):
            if number == 5:
                raise KeyboardInterrupt
            yield part

    kept = {"checkpoint": tmp_path / "deep" / "inside", "checkpoint_every": 2}
    monkeypatch.setattr(tuned_module, "watched", stopped)
    with pytest.raises(KeyboardInterrupt):
        tl.TunedLens.train(model, TEXTS, **options, **kept)
    seen: list[range] = []

    def noted(parts: Any, *args: Any) -> Any:
        seen.append(parts)
        return iter(parts)

    monkeypatch.setattr(tuned_module, "watched", noted)
    found = tl.TunedLens.train(model, TEXTS, **options, **kept)
    assert seen == [range(4, 6)]
    assert torch.equal(flat(found), flat(whole))
    assert found.training is not None
    assert whole.training is not None
    assert torch.equal(found.training.losses, whole.training.losses)
    # And once more, when it is done already.
    again = tl.TunedLens.train(model, TEXTS, **options, **kept)
    assert seen[1] == range(6, 6)
    assert torch.equal(flat(again), flat(whole))


def test_a_checkpoint_of_another_training_is_refused(model: tl.Model, tmp_path: Path) -> None:
    options: dict[str, Any] = {**QUICK, "steps": 2, "checkpoint": tmp_path}
    tl.TunedLens.train(model, TEXTS, **options)
    with pytest.raises(LensTrainingError, match="seed: 0 there, 5 here"):
        tl.TunedLens.train(model, TEXTS, **options, seed=5)
    with pytest.raises(LensTrainingError, match="texts: "):
        tl.TunedLens.train(model, HELD_OUT, **options)
    with pytest.raises(LensTrainingError, match="unembed_sha256: "):
        tl.TunedLens.train(tl.wrap(FAMILIES["llama"].build(seed=7)), TEXTS, **options)
    file = tmp_path / "training.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(LensTrainingError, match="no intact checkpoint"):
        tl.TunedLens.train(model, TEXTS, **options)


def test_numbers_that_are_no_longer_finite_stop_a_training(model: tl.Model) -> None:
    with pytest.raises(
        LensTrainingError, match=r"in step \d the divergence of the map of layers\[0\]\.resid_pre"
    ):
        tl.TunedLens.train(model, TEXTS, **QUICK, learning_rate=1e38, clip=1e38)


def test_a_head_of_an_unknown_kind_is_refused(hf: PreTrainedModel) -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 1.01 * super().forward(x)

    other = FAMILIES["llama"].build()
    other.lm_head.__class__ = Scaled
    with pytest.raises(LensTrainingError, match="makes something else of its last layer"):
        tl.TunedLens.train(tl.wrap(other), TEXTS, **QUICK)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"steps": 0}, "steps=0"),
        ({"tokens_per_step": 2.5}, "tokens_per_step=2.5"),
        ({"context": 1}, "context=1"),
        ({"context": 65}, "from 2 to 64"),
        ({"optimizer": "lbfgs"}, "no optimizer 'lbfgs'"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"seed": "7"}, "seed='7'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"checkpoint_every": 0}, "checkpoint_every=0"),
    ],
)
def test_options_that_make_no_plan_are_refused(model: tl.Model, wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words) as caught:
        tl.TunedLens.train(model, TEXTS, **{**QUICK, **wrong})
    assert caught.value.at is not None
    assert caught.value.at.filename == __file__


def test_the_warm_up_of_adam_happens() -> None:
    plan = Plan(10, 64, 16, "adam", 1.0, 0.9, 1e-3, 1.0, 4, True, 0)
    assert [round(plan.rate(step), 3) for step in range(10)] == [
        0.2, 0.4, 0.6, 0.8, 1.0, 0.833, 0.667, 0.5, 0.333, 0.167
    ]  # fmt: skip


# --- texts ------------------------------------------------------------------------------------------------------------


def test_windows_of_texts_begin_as_texts_do_and_have_ends_between_texts(hf: PreTrainedModel) -> None:
    tokenizer = byte_level_bpe(bos=True)
    model = tl.wrap(FAMILIES["llama"].build(vocab_size=len(tokenizer)), tokenizer)
    found = windows_of(model, SENTENCES, 10)
    assert (found.ids[:, 0] == tokenizer.bos_token_id).all()
    plain = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in SENTENCES]
    stream = [id for ids in plain for id in (*ids, tokenizer.eos_token_id)]
    assert found.ids[:, 1:].flatten().tolist() == stream[: found.ids[:, 1:].numel()]
    assert len(stream) - found.ids[:, 1:].numel() < 9
    tokens, size = sum(map(len, plain)), sum(len(text.encode()) for text in SENTENCES)
    assert found.bits_per_byte == pytest.approx(tokens / size / np.log(2))
    # Any iterable of texts, and one text, are texts.
    assert torch.equal(windows_of(model, iter(SENTENCES), 10).ids, found.ids)
    assert windows_of(model, SENTENCES[0], 10).ids[0, 1:].tolist() == plain[0][:9]
    # A tokenizer that puts nothing before a text.
    model = tl.wrap(model.hf, byte_level_bpe())
    assert windows_of(model, SENTENCES, 10).ids.flatten().tolist()[:20] == stream[:20]


def test_every_epoch_has_every_window_once(model: tl.Model) -> None:
    windows = windows_of(model, TEXTS, CONTEXT)
    count = len(windows.ids)
    assert windows.bits_per_byte is None
    drawn = torch.cat([windows.drawn(step, 5, 0) for step in range(2 * count)])
    epochs = drawn.view(10, count, CONTEXT)
    wanted = sorted(windows.ids.tolist())
    assert all(sorted(epoch.tolist()) == wanted for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0], windows.ids)
    # Steps of more windows than there are.
    assert torch.equal(windows.drawn(1, 2 * count + 3, 0), drawn[2 * count + 3 : 4 * count + 6])


@pytest.mark.parametrize(
    ("texts", "error", "words"),
    [
        (["words"], NoTokenizerError, "no tokenizer"),
        ([[3, 4, 5]], OptionError, "3 tokens, and one window alone takes 16"),
        ([], OptionError, "0 tokens"),
        (7, OptionError, "not int"),
        ([[3, 4], None], OptionError, r"texts\[1\] is a NoneType"),
    ],
)
def test_texts_that_are_none_are_refused(
    model: tl.Model, texts: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        tl.TunedLens.train(model, texts, **QUICK)


# --- other layouts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_over_several_devices(pretend: Pretend, tmp_path: Path, family: str) -> None:
    models = over_devices(family, tmp_path)
    # Without the tokenizer that transformers makes up for a folder that has none.
    spread, one = tl.wrap(models.spread.hf), models.one
    found = tl.TunedLens.train(spread, TEXTS, **QUICK)
    wanted = tl.TunedLens.train(one, TEXTS, **QUICK)
    assert found.translators[0].weight.device.type == "pretend"
    torch.testing.assert_close(flat(found), flat(wanted), rtol=1e-3, atol=1e-5)
    found.check(one)
    kl = found.evaluate(spread, HELD_OUT, context=CONTEXT).kl
    torch.testing.assert_close(kl, wanted.evaluate(one, HELD_OUT, context=CONTEXT).kl)


@pytest.mark.parametrize("spread", [{"tp": 2}, {"pp": 2}], ids=["tp", "pp"])
def test_on_ranks(tiny_folder: Path, ranks_of: PoolOf, spread: dict[str, Any]) -> None:
    wanted = tl.TunedLens.train(tl.load(tiny_folder), TEXTS, **QUICK)
    with tl.load(tiny_folder, **spread, ranks=ranks_of(2)) as model:
        found = tl.TunedLens.train(model, TEXTS, **QUICK)
        torch.testing.assert_close(flat(found), flat(wanted), rtol=1e-3, atol=1e-5)
        with model.trace([[5, 6, 7]]):
            lens = model.lens(model.layers[:].resid_post, lens=wanted).entropy().save()
        with pytest.raises(LensMismatchError, match="whose unembedding is another one"):
            tl.TunedLens.train(tl.wrap(FAMILIES["llama"].build(seed=4)), TEXTS, **QUICK).check(model)
    one = tl.load(tiny_folder)
    with one.trace([[5, 6, 7]]):
        same = one.lens(one.layers[:].resid_post, lens=wanted).entropy().save()
    torch.testing.assert_close(lens.value, same.value, rtol=1e-4, atol=1e-5)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pickled", [False, True])
def test_a_saved_lens_comes_back(model: tl.Model, lens: tl.TunedLens, tmp_path: Path, pickled: bool) -> None:
    tl.TunedLens.identity(model).save(tmp_path, pickled=not pickled)  # what lies there already is replaced
    folder = lens.save(tmp_path, pickled=pickled)
    assert sorted(file.name for file in folder.iterdir()) == [
        "config.json", "params.pt" if pickled else "params.safetensors"
    ]  # fmt: skip
    found = tl.TunedLens.load(str(folder))
    assert torch.equal(flat(found), flat(lens))
    assert found.config == lens.config
    assert found.name == lens.name
    found.check(model)
    with pytest.raises(LensFolderError, match="is a file"):
        lens.save(folder / "config.json")


def test_the_tuned_lens_package_reads_what_is_written(
    lens: tl.TunedLens, hf: PreTrainedModel, tmp_path: Path
) -> None:
    folder = lens.save(tmp_path, pickled=True)
    config = json.loads((folder / "config.json").read_text())
    # The fields of its TunedLensConfig; it ignores others, with a warning.
    assert {name: config[name] for name in config if name != "tracelens"} == {
        "base_model_name_or_path": "LlamaForCausalLM",
        "d_model": D_MODEL,
        "num_hidden_layers": LAYERS,
        "bias": True,
        "base_model_revision": None,
        "unembed_hash": their_hash(hf.lm_head.weight.detach().numpy()),
        "lens_type": "linear_tuned_lens",
    }
    theirs = nn.ModuleList(nn.Linear(D_MODEL, D_MODEL) for _ in range(LAYERS))
    theirs.load_state_dict(torch.load(folder / "params.pt", weights_only=True))
    assert torch.equal(theirs[1].weight, lens.translators[1].weight)


def their_hash(matrix: np.ndarray) -> str:
    """As tuned-lens 0.2.0 has it."""
    return hashlib.sha256(str.encode(np.array_str(matrix, precision=1))).hexdigest()


def theirs(folder: Path, hf: PreTrainedModel, **changes: Any) -> Path:
    """A folder as tuned-lens 0.2.0 writes one, in float16."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Any] = {}
    for layer in range(LAYERS):
        state[f"{layer}.weight"] = (0.1 * torch.randn(D_MODEL, D_MODEL, generator=generator)).half()
        state[f"{layer}.bias"] = (0.1 * torch.randn(D_MODEL, generator=generator)).half()
    config = {
        "base_model_name_or_path": "somebody/llama",
        "d_model": D_MODEL,
        "num_hidden_layers": LAYERS,
        "bias": True,
        "base_model_revision": None,
        "unembed_hash": their_hash(hf.lm_head.weight.detach().numpy()),
        "lens_type": "linear_tuned_lens",
        "of_a_later_version": 3,
    }
    state |= changes.pop("state", {})
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    torch.save({name: part for name, part in state.items() if part is not None}, folder / "params.pt")
    return folder


def test_a_lens_of_the_tuned_lens_package_is_read(
    hf: PreTrainedModel, model: tl.Model, tmp_path: Path
) -> None:
    lens = tl.TunedLens.load(theirs(tmp_path, hf))
    lens.check(model)
    stored = torch.load(tmp_path / "params.pt", weights_only=True)
    for layer, (weight, bias) in enumerate(lens.translators):
        assert torch.equal(weight, stored[f"{layer}.weight"].float())
        assert bias is not None
        assert torch.equal(bias, stored[f"{layer}.bias"].float())
    assert lens.name == "tuned lens of somebody/llama"
    with pytest.raises(LensMismatchError, match="trained for somebody/llama, whose unembedding is another"):
        lens.check(tl.wrap(FAMILIES["llama"].build(seed=1)))


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("was-run",)


def test_code_in_a_file_is_not_run(
    hf: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = theirs(tmp_path / "evil", hf)
    torch.save({"0.weight": Evil()}, folder / "params.pt")
    with pytest.raises(LensFolderError, match="other things are not unpickled"):
        tl.TunedLens.load(folder)
    (folder / "params.pt").write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(LensFolderError, match="other things are not unpickled"):
        tl.TunedLens.load(folder)
    assert not (tmp_path / "was-run").exists()
    pickle.loads(pickle.dumps(Evil()))
    assert (tmp_path / "was-run").exists()  # so the files could have


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"d_model": 24}, "no map for d_model 24"),
        ({"num_hidden_layers": LAYERS + 1}, r"3\.bias is missing, 3\.weight is missing"),
        ({"num_hidden_layers": LAYERS - 1}, r"2\.bias is something else"),
        ({"bias": False}, r"0\.bias is something else"),
        ({"lens_type": "quadratic"}, "type 'quadratic'"),
        ({"d_model": "48"}, r"no config\.json of a tuned lens"),
        ({"tracelens": 3}, r"no config\.json of a tuned lens"),
        ({"state": {"1.weight": None}}, r"1\.weight is missing"),
        ({"state": {"input_adapter.weight": torch.zeros(2)}}, "input_adapter.weight is something else"),
        ({"state": {"1.bias": torch.full((D_MODEL,), torch.nan)}}, "not finite"),
        ({"state": {"1.bias": torch.zeros(D_MODEL, dtype=torch.int64)}}, "int64"),
    ],
)
def test_folders_that_are_not_intact_are_refused(
    hf: PreTrainedModel, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(LensFolderError, match=words):
        tl.TunedLens.load(theirs(tmp_path, hf, **changes))


def test_files_that_are_not_there_are_told(lens: tl.TunedLens, tmp_path: Path) -> None:
    with pytest.raises(LensFolderError, match="there is no tuned lens in"):
        tl.TunedLens.load(tmp_path)
    lens.save(tmp_path)
    (tmp_path / "params.safetensors").write_bytes(b"12345678")
    with pytest.raises(LensFolderError, match="not an intact safetensors file"):
        tl.TunedLens.load(tmp_path)
    (tmp_path / "params.safetensors").unlink()
    with pytest.raises(LensFolderError, match=r"neither params\.safetensors nor params\.pt"):
        tl.TunedLens.load(tmp_path)


def test_lenses_come_from_the_hub(
    hf: PreTrainedModel, lens: tl.TunedLens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        LensFolderError, match=r"no folder 'gpt2' here.* from AlignmentResearch/tuned-lens"
    ) as caught:
        tl.TunedLens.load("gpt2")
    assert isinstance(caught.value.__cause__, LocalEntryNotFoundError)

    hub = tmp_path / "hub"
    hub.mkdir()
    asked: list[tuple[str, str, str, str | None]] = []

    def download(*, filename: str, repo_id: str, repo_type: str, revision: str | None) -> str:
        asked.append((repo_type, repo_id, filename, revision))
        file = hub / repo_id / filename
        if not file.exists():
            raise huggingface_hub.errors.EntryNotFoundError(f"no {filename}")
        return str(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    space = hub / "AlignmentResearch/tuned-lens/lens/somebody"
    space.mkdir(parents=True)
    found = tl.TunedLens.load(str(theirs(space / "llama", hf).relative_to(space.parent)), revision="v1")
    assert found.name == "tuned lens of somebody/llama"
    assert asked == [
        ("space", "AlignmentResearch/tuned-lens", "lens/somebody/llama/config.json", "v1"),
        ("space", "AlignmentResearch/tuned-lens", "lens/somebody/llama/params.pt", "v1"),
    ]
    lens.save(hub / "me/mine/deep")
    assert torch.equal(flat(tl.TunedLens.load("deep", repo="me/mine")), flat(lens))
    lens.save(hub / "me/mine", pickled=True)
    assert torch.equal(flat(tl.TunedLens.load(".", repo="me/mine")), flat(lens))
    assert asked[2:] == [
        ("model", "me/mine", "deep/config.json", None),
        ("model", "me/mine", "deep/params.safetensors", None),
        ("model", "me/mine", "config.json", None),
        ("model", "me/mine", "params.safetensors", None),
        ("model", "me/mine", "params.pt", None),
    ]
    with pytest.raises(LensFolderError, match="no lens of that name could be had from me/mine"):
        tl.TunedLens.load("nowhere", repo="me/mine")


# --- for which model --------------------------------------------------------------------------------------------------


def test_a_lens_of_another_model_is_refused(hf: PreTrainedModel, lens: tl.TunedLens, tmp_path: Path) -> None:
    for other, words in (
        (FAMILIES["llama"].build(num_hidden_layers=2), "3 layers, and this model has 2"),
        (FAMILIES["llama"].build(hidden_size=24), "48 d_model, and this model has 24"),
        (FAMILIES["llama"].build(seed=1), "whose unembedding is another one"),
    ):
        model = tl.wrap(other)
        with pytest.raises(LensMismatchError, match=words):
            lens.check(model)
        with pytest.raises(LensMismatchError, match=words):
            lens.evaluate(model, HELD_OUT, context=CONTEXT)
    trusted = tl.TunedLens.load(lens.save(tmp_path), verify=False)
    trusted.check(tl.wrap(FAMILIES["llama"].build(seed=1)))
    with pytest.raises(LensMismatchError, match="3 layers"):
        trusted.check(tl.wrap(FAMILIES["llama"].build(num_hidden_layers=2)))
    # A number in the middle, which the tuned-lens package would not see; and it is noticed when it changes.
    fresh = FAMILIES["llama"].build()
    model = tl.wrap(fresh)
    lens.check(model)
    with torch.no_grad():
        fresh.lm_head.weight[40, 20] += 1
    assert their_hash(fresh.lm_head.weight.detach().numpy()) == lens.config.unembed_hash
    with pytest.raises(LensMismatchError, match="whose unembedding is another one"):
        lens.check(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_same_model_in_another_precision_is_the_same(lens: tl.TunedLens, dtype: torch.dtype) -> None:
    hf = FAMILIES["llama"].build(dtype=dtype)
    model = tl.wrap(hf)
    lens.check(model)
    found = tl.TunedLens.train(model, TEXTS, **QUICK)
    assert found.translators[0].weight.dtype == torch.float32
    found.check(tl.wrap(FAMILIES["llama"].build(dtype=dtype).float()))
    # From what is rounded coarsely nothing more is known, so the other coarse rounding is another matrix.
    kl = found.evaluate(model, HELD_OUT, context=CONTEXT)
    assert (kl.kl[:2] < kl.identity_kl[:2]).all()


def test_the_loose_digest_is_that_of_the_tuned_lens_package() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((5, 4), (97, 48), (5000, 12)):
        matrix = 0.02 * torch.randn(shape, generator=generator)
        wanted = their_hash(matrix.numpy())
        with np.printoptions(edgeitems=1, precision=8, suppress=True, linewidth=20, threshold=5):
            assert their_hash(matrix.numpy()) != wanted
            assert fingerprint(matrix).loose[0] == wanted
        assert their_hash(matrix.half().numpy()) in fingerprint(matrix).loose
