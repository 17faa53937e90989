"""Direct logit attribution: its parts sum to the model's own logit, and are those that transformers' modules give."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import tracelens as tl
from tests.support.families import D_MODEL, EVERY, HEADS, LAYERS, NEURONS, WITH_NEURONS
from tests.support.offloading import WAYS
from tests.support.pretend import pretend_throughout as pretend_throughout
from tests.support.spread_models import EVERY_WAY, Both, fixture_of, over_devices
from tests.support.tokenizers import byte_level_bpe
from tracelens.errors import (
    AbsentSiteError,
    DecompositionError,
    LayerRangeError,
    NoTokenizerError,
    OptionError,
    RaggedSelectionError,
    TokenMatchError,
    TokenRangeError,
    TracelensError,
)
from tracelens.lens.contributions import Contribution
from tracelens.lens.frozen_norm import balanced_signs

ROWS = [[3, 14, 15, 92, 65, 35], [27, 18, 28]]
TOKEN, OTHERS = 31, (41, 59)
DENSE = [name for name in EVERY if EVERY[name].settings.get("num_experts") is None]


# --- by hand ---------------------------------------------------------------------------------------------------------


class ByHand:
    """One prompt's contributions from hooks on transformers' own modules, in float64, with norms written out here."""

    def __init__(self, hf: PreTrainedModel, ids: list[int], position: int) -> None:
        self.gpt2 = hf.config.model_type == "gpt2"
        self.gemma = hf.config.model_type == "gemma3_text"
        self.hf, self.seen = hf, dict[str, Tensor]()
        names = {module: name for name, module in hf.named_modules()}

        def look(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            for side, value in (("in", args[0] if args else None), ("out", out)):
                value = value[0] if isinstance(value, tuple) else value
                if isinstance(value, Tensor) and value.ndim == 3:
                    self.seen[f"{names[module]} {side}"] = value[0, position].double()

        handles = [module.register_forward_hook(look) for module in hf.modules()]
        with torch.no_grad():
            self.logits = hf(torch.tensor([ids])).logits[0, position].double()
        for handle in handles:
            handle.remove()
        self.prefix = "transformer.h.{}." if self.gpt2 else "model.layers.{}."
        self.norm = "transformer.ln_f" if self.gpt2 else "model.norm"

    def weight(self, path: str) -> Tensor:
        return self.hf.get_parameter(path).detach().double()

    def through(self, path: str, part: Tensor) -> Tensor:
        """A part of what a norm received, as it comes out with the scale of the whole."""
        whole = self.seen[f"{path} in"]
        if self.gpt2:
            scale = (whole.var(correction=0) + self.hf.config.layer_norm_epsilon).rsqrt()
            return (part - part.mean(-1, keepdim=True)) * scale * self.weight(f"{path}.weight")
        scale = ((whole * whole).mean() + self.hf.config.rms_norm_eps).rsqrt()
        return part * scale * (self.weight(f"{path}.weight") + (1.0 if self.gemma else 0.0))

    def logit(self, part: Tensor, direction: Tensor) -> Tensor:
        return self.through(self.norm, part) @ direction

    def direction(self, token: int, against: tuple[int, ...]) -> Tensor:
        unembedding = self.weight("lm_head.weight")
        return unembedding[token] - (unembedding[list(against)].mean(0) if against else 0.0)

    def projected(self, layer: int, module: str, parts: Tensor, after: str) -> Tensor:
        """Rows of what the last projection of a sublayer receives, as they are added to the stream."""
        path = self.prefix.format(layer) + module
        weight = self.weight(f"{path}.weight")
        added = parts @ (weight if self.gpt2 else weight.T)
        return self.through(self.prefix.format(layer) + after, added) if self.gemma else added

    def heads(self, layer: int, direction: Tensor) -> Tensor:
        module = "attn.c_proj" if self.gpt2 else "self_attn.o_proj"
        z = self.seen[self.prefix.format(layer) + module + " in"]
        each = torch.block_diag(
            *z.reshape(HEADS, -1)
        )  # one row for each head, which has its own numbers alone
        return self.logit(self.projected(layer, module, each, "post_attention_layernorm"), direction)

    def neurons(self, layer: int, direction: Tensor) -> Tensor:
        module = "mlp.c_proj" if self.gpt2 else "mlp.down_proj"
        acts = self.seen[self.prefix.format(layer) + module + " in"]
        return self.logit(self.projected(layer, module, acts.diag(), "post_feedforward_layernorm"), direction)

    def mlp(self, layer: int, direction: Tensor) -> Tensor:
        after = "post_feedforward_layernorm" if self.gemma else "mlp"
        return self.logit(self.seen[self.prefix.format(layer) + after + " out"], direction)


@pytest.mark.parametrize("family", EVERY)
def test_parts_are_those_by_hand_and_sum_to_the_models_own_logit(family: str) -> None:
    hf = EVERY[family].build()
    model = tl.wrap(hf)
    neurons = list(range(LAYERS)) if family in DENSE else [2]
    plain = model.logit_attribution(ROWS, TOKEN, position=1)
    difference = model.logit_attribution(ROWS, TOKEN, against=OTHERS, neurons=neurons)
    for row, ids in enumerate(ROWS):
        for found, against, position in ((plain[row], (), 1), (difference[row], OTHERS, -1)):
            hand = ByHand(hf, ids, position)
            raw = hand.seen["lm_head out"]
            direction = hand.direction(TOKEN, against)
            logit = raw[TOKEN] - (raw[list(against)].mean() if against else 0.0)
            returned = hand.logits[TOKEN] - (hand.logits[list(against)].mean() if against else 0.0)
            # Neither the logit itself nor what is left over takes part in the sum.
            total = sum(one.contribution for one in found.contributions if one.kind != "rounding")
            assert total == pytest.approx(logit.item(), rel=0, abs=1e-5)
            assert found.logit == pytest.approx(logit.item(), rel=0, abs=1e-5)
            assert found.returned == pytest.approx(returned.item(), rel=0, abs=1e-5)
            assert sum(one.contribution for one in found.contributions) == pytest.approx(
                found.logit, abs=1e-12
            )
            heads = torch.stack([hand.heads(layer, direction) for layer in range(LAYERS)])
            torch.testing.assert_close(found.heads, heads, rtol=1e-5, atol=1e-6)
            mlps = torch.stack([hand.mlp(layer, direction) for layer in range(LAYERS)])
            torch.testing.assert_close(found.mlps, mlps, rtol=1e-5, atol=2e-6)
            embed = hand.seen["transformer.wte out" if hand.gpt2 else "model.embed_tokens out"]
            assert found.contributions[0].contribution == pytest.approx(
                hand.logit(embed, direction).item(), rel=1e-5, abs=1e-6
            )
            if hand.gpt2:
                values = {(part.kind, part.layer): part.values.sum().item() for part in found.parts}
                layer = hf.transformer.h[1]
                for key, added in (
                    (("pos_embed", None), hand.seen["transformer.wpe out"]),
                    (("attn_bias", 1), layer.attn.c_proj.bias.double()),
                    (("mlp_bias", 1), layer.mlp.c_proj.bias.double()),
                ):
                    if key in values:
                        assert values[key] == pytest.approx(hand.logit(added, direction).item(), abs=1e-6)
                bias = hf.transformer.ln_f.bias.double() @ direction
                assert values["final_norm_bias", None] == pytest.approx(bias.item(), abs=1e-6)
            assert found.position == position % len(ids)
            assert found.at == f"<{ids[position]}>"
        for layer in neurons:  # of the last one: the difference
            torch.testing.assert_close(
                difference[row].neurons(layer), hand.neurons(layer, direction), rtol=1e-5, atol=1e-6
            )


def test_what_the_rows_are() -> None:
    def kinds(family: str, **options: Any) -> list[tuple[str, int | None]]:
        found = tl.wrap(EVERY[family].build()).logit_attribution(ROWS[:1], TOKEN, **options)[0]
        return [(part.kind, part.layer) for part in found.parts]

    ends: list[tuple[str, int | None]] = [("rounding", None)]
    assert kinds("llama") == [
        ("embed", None),
        *((kind, layer) for layer in range(LAYERS) for kind in ("head", "mlp")),
        *ends,
    ]
    assert kinds("gpt2", neurons=[1]) == [
        ("embed", None),
        ("pos_embed", None),
        *((kind, 0) for kind in ("head", "attn_bias", "mlp")),
        *((kind, 1) for kind in ("head", "attn_bias", "neuron", "mlp_bias")),
        *((kind, 2) for kind in ("head", "attn_bias", "mlp")),
        ("final_norm_bias", None),
        *ends,
    ]


def test_a_bias_of_the_unembedding_is_a_row() -> None:
    hf = EVERY["llama"].build()
    hf.lm_head.bias = nn.Parameter(torch.randn(97, generator=torch.Generator().manual_seed(1)))
    found = tl.wrap(hf).logit_attribution(ROWS[0], TOKEN, against=OTHERS)
    assert isinstance(found, tl.LogitAttribution)
    own = next(row for row in found.contributions if row.kind == "unembed_bias")
    expected = hf.lm_head.bias[TOKEN] - hf.lm_head.bias[list(OTHERS)].mean()
    assert own.contribution == pytest.approx(expected.item(), abs=1e-6)
    assert abs(found.left_over) < 1e-5


def test_soft_capped_logits_are_attributed_before_the_cap() -> None:
    model = tl.wrap(EVERY["gemma3"].build())
    found = model.logit_attribution(ROWS, TOKEN)[0]
    assert found.returned == pytest.approx(4.0 * torch.tensor(found.logit / 4.0).tanh().item(), abs=1e-5)
    assert abs(found.returned - found.logit) > 1e-3
    assert f"it returns {found.returned:+.3f}" in repr(found)
    plain = tl.wrap(EVERY["llama"].build()).logit_attribution(ROWS, TOKEN)[0]
    assert plain.returned == plain.logit
    assert "returns" not in repr(plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_other_dtypes_are_computed_in_float32_or_wider(family: str, dtype: torch.dtype) -> None:
    expected = tl.wrap(EVERY[family].build()).logit_attribution(ROWS, TOKEN, neurons=[1])
    found = tl.wrap(EVERY[family].build(dtype=dtype)).logit_attribution(ROWS, TOKEN, neurons=[1])
    allowed = 0.05 if dtype is torch.bfloat16 else 0.01 if dtype is torch.float16 else 1e-5
    torch.testing.assert_close(found.heads, expected.heads, rtol=0, atol=allowed)
    torch.testing.assert_close(found.mlps, expected.mlps, rtol=0, atol=allowed)
    assert all(abs(one.left_over) < allowed for one in found)
    if dtype is torch.float64 and family == "gpt2":  # whose norms compute in the model's dtype
        assert all(abs(one.left_over) < 1e-13 for one in found)


def test_a_layer_norm_of_an_odd_width() -> None:
    model = tl.wrap(EVERY["gpt2"].build(n_embd=45, n_head=5))
    found = model.logit_attribution(ROWS, TOKEN, neurons=1)
    assert all(abs(one.left_over) < 1e-5 for one in found)
    for width in (44, 45):
        assert balanced_signs(width).sum() == 0
        assert balanced_signs(width).abs().min() == 1


# --- tokens and prompts ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama() -> tl.Model:
    return tl.wrap(EVERY["llama"].build())


@pytest.fixture(scope="module")
def speaking() -> tl.Model:
    tokenizer = byte_level_bpe()
    return tl.wrap(EVERY["llama"].build(vocab_size=len(tokenizer)), tokenizer)


def alike(left: tl.LogitAttribution, right: tl.LogitAttribution) -> None:
    assert left.logit == pytest.approx(right.logit, abs=1e-5)
    assert (left.token, left.against, left.position) == (right.token, right.against, right.position)
    for one, other in zip(left.contributions, right.contributions, strict=True):
        assert (one.label, one.layer, one.index) == (other.label, other.layer, other.index)
        assert one.contribution == pytest.approx(other.contribution, abs=1e-5)


def test_texts_are_tokens(speaking: tl.Model) -> None:
    paris, rome = (speaking.tokenizer.encode(word)[0] for word in (" Paris", " Rome"))
    found = speaking.logit_attribution("The capital of France is", " Paris", against=" Rome")
    assert (found.token, found.against) == (paris, (rome,))
    alike(found, speaking.logit_attribution(["The capital of France is"], paris, against=[rome])[0])
    assert found.what == '" Paris" against " Rome"'
    assert found.at == '" is"'
    assert repr(found).startswith(
        f'logit difference {found.logit:+.3f} of " Paris" against " Rome", behind " is"'
    )
    several = speaking.logit_attribution("Paris is", " Rome", against=[" Paris", " Italy"])
    assert several.what == '" Rome" against the mean of " Paris", " Italy"'


def test_a_prompt_gives_one_and_a_list_several(speaking: tl.Model) -> None:
    text = "The capital of France is"
    ids = speaking.tokenizer.encode(text)
    one = speaking.logit_attribution(text, 5)
    for prompt in (ids, torch.tensor([ids]), {"input_ids": torch.tensor([ids])}):
        found = speaking.logit_attribution(prompt, 5)
        assert isinstance(found, tl.LogitAttribution)
        alike(found, one)
    for prompt in ([text], [ids]):
        found = speaking.logit_attribution(prompt, 5)
        assert isinstance(found, tl.LogitAttributions)
        assert len(found) == 1
        alike(found[0], one)


def test_without_a_token_it_is_the_most_likely_one(llama: tl.Model) -> None:
    found = llama.logit_attribution(ROWS, against=TOKEN)
    for row, ids in enumerate(ROWS):
        with torch.no_grad():
            best = llama.hf(torch.tensor([ids])).logits[0, -1].argmax().item()
        assert found[row].token == best
        alike(found[row], llama.logit_attribution(ids, best, against=TOKEN))
    assert found[0].token != found[1].token


def test_each_prompt_may_have_tokens_of_its_own(llama: tl.Model) -> None:
    found = llama.logit_attribution(ROWS, [5, 6], against=[[7], [8, 9]])
    alike(found[0], llama.logit_attribution(ROWS[0], 5, against=7))
    alike(found[1], llama.logit_attribution(ROWS[1], 6, against=[9, 8][::-1]))


@pytest.mark.parametrize("token", [TOKEN, [5, 6, 7]])
def test_in_slices_of_a_batch(llama: tl.Model, token: int | list[int]) -> None:
    prompts = [*ROWS, [4, 5, 6, 7]]
    whole = llama.logit_attribution(prompts, token, neurons=[1])
    parts = llama.logit_attribution(prompts, token, neurons=[1], batch_size=2)
    for left, right in zip(parts, whole, strict=True):
        alike(left, right)


@pytest.mark.parametrize("neurons", [[0, 2], (2, 0), slice(None, None, 2), range(0, 3, 2)])
def test_layers_of_neurons(llama: tl.Model, neurons: Any) -> None:
    found = llama.logit_attribution(ROWS[0], TOKEN, neurons=neurons)
    assert [part.layer for part in found.parts if part.kind == "neuron"] == [0, 2]
    assert found.neurons(2).shape == (NEURONS,)
    assert [part.layer for part in found.parts if part.kind == "mlp"] == [1]
    plain = llama.logit_attribution(ROWS[0], TOKEN)
    torch.testing.assert_close(found.mlps, plain.mlps, rtol=1e-5, atol=1e-6)
    assert not [part for part in plain.parts if part.kind == "neuron"]


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "words", "options"),
    [
        (NoTokenizerError, "no tokenizer", {"token": "x"}),
        (OptionError, "compared with itself", {"token": 5, "against": [4, 5]}),
        (OptionError, "3 tokens were given for 2 prompts", {"token": [5, 6, 7]}),
        (OptionError, "no token 97", {"token": 97}),
        (OptionError, "no token -1", {"token": -1}),
        (OptionError, "True is no token", {"token": True}),
        (OptionError, "names no token", {"token": 5, "against": []}),
        (OptionError, "names a token twice", {"token": 5, "against": [6, 6]}),
        (OptionError, "1 lists or tokens for 2 prompts", {"token": 5, "against": [[6]]}),
        (OptionError, "2 lists or tokens for 2 prompts", {"token": 5, "against": [[6], 7]}),
        (RaggedSelectionError, "outside row 1", {"token": 5, "position": 3}),
        (TokenRangeError, "outside", {"token": 5, "position": 6}),
        (OptionError, "no number of a token", {"token": 5, "position": " is"}),
        (OptionError, "no number of a token", {"token": 5, "position": True}),
        (LayerRangeError, "no layer 3", {"token": 5, "neurons": 3}),
        (LayerRangeError, "goes beyond", {"token": 5, "neurons": slice(0, 9)}),
        (LayerRangeError, "'some'", {"token": 5, "neurons": "some"}),
    ],
)
def test_refusals(llama: tl.Model, error: type[TracelensError], words: str, options: dict[str, Any]) -> None:
    with pytest.raises(error, match=words) as caught:
        llama.logit_attribution(ROWS, **options)
    assert caught.value.at is not None
    assert caught.value.at.filename == __file__


def test_a_text_of_several_tokens_is_refused_with_them(speaking: tl.Model) -> None:
    with pytest.raises(TokenMatchError, match=r'is not one token: it is .*" Paris", .*" is"'):
        speaking.logit_attribution("Paris", " Paris is")
    assert len(speaking.tokenizer.encode("Rome")) > 1
    with pytest.raises(TokenMatchError) as caught:
        speaking.logit_attribution("Paris", "Rome")
    assert caught.value.instead == "' Rome', which is one token"
    with pytest.raises(TokenMatchError, match="no token"):
        speaking.logit_attribution("Paris", "")


def test_experts_have_no_neurons() -> None:
    model = tl.wrap(EVERY["qwen3_moe"].build())
    with pytest.raises(AbsentSiteError, match="mixture of experts"):
        model.logit_attribution(ROWS, TOKEN, neurons="all")
    assert "qwen3_moe" not in WITH_NEURONS


def test_what_had_no_neurons_asked_for_says_so(llama: tl.Model) -> None:
    found = llama.logit_attribution(ROWS[0], TOKEN, neurons=[0, 1])
    with pytest.raises(LayerRangeError, match="no neurons of layer 2; it has those of 0, 1"):
        found.neurons(2)


class Squashed(nn.Module):
    """A norm that no scale and gain can be."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D_MODEL))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) * self.weight


def _hooked(path: str) -> Callable[[PreTrainedModel], None]:
    def change(hf: PreTrainedModel) -> None:
        hf.get_submodule(path).register_forward_hook(lambda module, args, out: 1.5 * out)

    return change


def _squashed(parent: str, name: str) -> Callable[[PreTrainedModel], None]:
    def change(hf: PreTrainedModel) -> None:
        setattr(hf.get_submodule(parent), name, Squashed())

    return change


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("llama", _hooked("model.layers.1"), "what the layers add to the residual stream"),
        ("llama", _hooked("model.layers.1.self_attn.o_proj"), "the heads of layer 1"),
        ("llama", _hooked("model.layers.1.mlp.down_proj"), "the neurons of layer 1"),
        ("llama", _hooked("lm_head"), "the final norm and the unembedding"),
        ("llama", _squashed("model", "norm"), "the norm that makes final_norm does more"),
        (
            "gemma3",
            _squashed("model.layers.2", "post_attention_layernorm"),
            r"layers\.2\.attn_post_norm does more",
        ),
        (
            "gemma3",
            _squashed("model.layers.1", "post_feedforward_layernorm"),
            r"layers\.1\.mlp_post_norm does more",
        ),
    ],
)
def test_sums_that_are_not_the_models_are_refused(
    family: str, change: Callable[[PreTrainedModel], None], words: str
) -> None:
    hf = EVERY[family].build()
    model = tl.wrap(hf)
    assert len(model.logit_attribution(ROWS, TOKEN, neurons=[1])) == 2
    change(hf)
    with pytest.raises(DecompositionError, match=words) as caught:
        tl.wrap(hf, probe=False).logit_attribution(ROWS, TOKEN, neurons=[1])
    assert caught.value.at is not None
    assert caught.value.at.filename == __file__


@pytest.mark.parametrize("path", ["model.layers.1.mlp.down_proj.weight", "lm_head.weight"])
def test_numbers_that_are_none_are_refused(path: str) -> None:
    hf = EVERY["llama"].build()
    with torch.no_grad():
        hf.get_parameter(path)[TOKEN] = float("nan")
    with pytest.raises(DecompositionError):
        tl.wrap(hf).logit_attribution(ROWS, TOKEN)


def test_a_sublayer_that_adds_nothing_contributes_nothing() -> None:
    hf = EVERY["gemma3"].build()
    nn.init.zeros_(hf.model.layers[1].self_attn.o_proj.weight)
    found = tl.wrap(hf).logit_attribution(ROWS, TOKEN)
    assert found.heads[:, 1].abs().max() == 0
    assert found.heads[:, 0].abs().min() > 0


# --- where the layers are --------------------------------------------------------------------------------------------


spread = fixture_of(
    {
        **{f"llama {name}": there for name, there in EVERY_WAY.items()},
        "gemma3 tp2": ("gemma3", {"tp": 2}),
        "gemma3 pp2": ("gemma3", {"pp": 2}),
        "gpt2 device_map": ("gpt2", {}),
        "qwen3_moe tp2": ("qwen3_moe", {"tp": 2}),
    }
)


def test_spread_models_give_the_same(spread: Both) -> None:
    for options in ({"neurons": [2]}, {"against": [[1, 2], [3]], "position": 1}):
        found = spread.spread.logit_attribution(ROWS, [TOKEN, 5], **options)
        expected = spread.one.logit_attribution(ROWS, [TOKEN, 5], **options)
        for left, right in zip(found, expected, strict=True):
            alike(left, right)


def test_directions_go_to_the_layers_and_no_weights_come_back(
    tmp_path: Path, pretend_throughout: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = over_devices("llama", tmp_path).spread
    opened: list[tl.Trace] = []
    real = tl.Model.trace
    monkeypatch.setattr(
        tl.Model, "trace", lambda self, *a, **k: opened.append(real(self, *a, **k)) or opened[-1]
    )
    model.logit_attribution(ROWS, [TOKEN, 5], neurons="all")
    moved = opened[-1].report.moved
    transfers = [one for one in moved if one.what == "transfers"]
    # The norm is on one device and layers on three.
    assert sum(one.bytes for one in transfers) == 2 * len(ROWS) * D_MODEL * 4
    assert not [one for one in moved if one.what == "weights"]
    results = LAYERS * (HEADS + NEURONS + 4) + 8 + 2 * 2
    assert sum(one.bytes for one in moved if one.what == "results") <= len(ROWS) * results * 4


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_offloaded_weights(family: str, tmp_path: Path) -> None:
    expected = tl.wrap(EVERY[family].build()).logit_attribution(ROWS, TOKEN, neurons=[1])
    model = tl.wrap(WAYS["disk"](EVERY[family].build(), tmp_path))
    for left, right in zip(model.logit_attribution(ROWS, TOKEN, neurons=[1]), expected, strict=True):
        alike(left, right)


# --- how it shows itself ---------------------------------------------------------------------------------------------


def test_tables_and_bars(llama: tl.Model) -> None:
    found = llama.logit_attribution(ROWS, TOKEN, against=OTHERS, neurons=[1])
    one = found[0]
    largest = one.top(5)
    assert [abs(row.contribution) for row in largest] == sorted(
        (abs(row.contribution) for row in one.contributions), reverse=True
    )[:5]
    frame = one.to_pandas()
    assert len(frame) == len(one.contributions) == 1 + LAYERS * HEADS + 2 + NEURONS + 1
    assert frame["contribution"].sum() == pytest.approx(one.logit)
    assert list(frame["label"])[:3] == ["embed", "L0H0", "L0H1"]
    both_prompts = found.to_pandas()
    assert next(iter(both_prompts.columns)) == "prompt"
    assert both_prompts.groupby("prompt")["contribution"].sum().tolist() == pytest.approx(
        found.logits.tolist()
    )
    assert found.heads.shape == (2, LAYERS, HEADS)
    assert found.mlps.shape == (2, LAYERS)
    assert found[1:].logits.tolist() == found.logits[1:].tolist()

    lines = repr(one).splitlines()
    assert lines[2].split()[:2] == [*largest[0].label.split(), f"{largest[0].contribution:+.3f}"][:2]
    assert lines[-1].split() == ["sum", f"{one.logit:+.3f}"]
    shown = sum(
        float(line.split("  ")[-1] if "█" not in line else line.split("█")[0].split()[-1])
        for line in lines[2:-1]
    )
    assert shown == pytest.approx(one.logit, abs=0.01)
    assert [line.split()[0] for line in repr(found).splitlines()] == ["prompt", "0", "1"]

    page = one._repr_html_()
    assert "&lt;31&gt;" in page
    assert "<31>" not in page
    svg, _, rest = page.partition("</svg>")
    assert rest.startswith("<div>")
    picture = ET.fromstring(svg + "</svg>")
    titles = [element.text for element in picture.iter() if element.tag.endswith("title")]
    assert titles == [f"{row.label}: {row.contribution:+.4f}" for row in one.top(20)]


def test_bars_are_as_long_as_the_numbers_and_on_their_side(llama: tl.Model, tmp_path: Path) -> None:
    one = llama.logit_attribution(ROWS[0], TOKEN)
    bars = one.bars(6)
    bars.save(tmp_path / "bars.svg")
    picture = ET.parse(tmp_path / "bars.svg")
    drawn = [element for element in picture.iter() if element.tag.endswith("rect") and len(element)]
    (line,) = (element for element in picture.iter() if element.tag.endswith("line"))
    zero, numbers = float(line.attrib["x1"]), [row.contribution for row in one.top(6)]
    assert {number > 0 for number in numbers} == {True, False}
    per = float(drawn[0].attrib["width"]) / abs(numbers[0])
    for element, number in zip(drawn, numbers, strict=True):
        assert float(element.attrib["width"]) == pytest.approx(per * abs(number), abs=0.2)
        left = float(element.attrib["x"])
        assert left == pytest.approx(zero if number > 0 else zero - per * abs(number), abs=0.3)


def test_labels() -> None:
    labels = [
        Contribution(kind, layer, index, 0.0).label
        for kind, layer, index in (
            ("embed", None, None),
            ("pos_embed", None, None),
            ("head", 9, 6),
            ("neuron", 9, 1234),
            ("mlp", 9, None),
            ("attn_bias", 9, None),
            ("mlp_bias", 9, None),
            ("final_norm_bias", None, None),
            ("unembed_bias", None, None),
            ("rounding", None, None),
        )
    ]
    assert labels == [
        "embed",
        "pos_embed",
        "L9H6",
        "L9N1234",
        "L9 MLP",
        "L9 attention bias",
        "L9 MLP bias",
        "final norm bias",
        "unembed bias",
        "rounding",
    ]
