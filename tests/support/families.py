"""Tiny random models of every family: small enough for milliseconds, random enough that nothing cancels.

Norm gains and biases are random too. A fresh model of transformers has ones and zeros there, and with them a forgotten
gain, a bias added twice or a swapped norm goes unseen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

LAYERS, D_MODEL, HEADS, KV_HEADS, HEAD_DIM, NEURONS = 3, 48, 4, 2, 12, 80
VOCABULARY, POSITIONS = 97, 64
EXPERTS, CHOSEN = 4, 2

_SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

_ROTARY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": D_MODEL,
    "intermediate_size": NEURONS,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": POSITIONS,
    "tie_word_embeddings": False,
    # Never used in eval mode, so it shows at once when something has left the model in training mode.
    "attention_dropout": 0.1,
    **_SPECIAL_TOKENS,
}

_GEMMA3: dict[str, Any] = {
    **_ROTARY,
    "head_dim": HEAD_DIM,
    # Not the width of a head, so that the two are not taken for each other.
    "query_pre_attn_scalar": 16,
    # Low enough to bend the logits.
    "final_logit_softcapping": 4.0,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    # Shorter than the prompts, so that the window cuts.
    "sliding_window": 4,
}

_QWEN3_MOE: dict[str, Any] = {
    **_ROTARY,
    "head_dim": HEAD_DIM,
    "num_experts": EXPERTS,
    "num_experts_per_tok": CHOSEN,
    "moe_intermediate_size": 40,
    "norm_topk_prob": True,
    # One layer without experts.
    "mlp_only_layers": [2],
}

_GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": D_MODEL,
    "n_inner": NEURONS,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_positions": POSITIONS,
    "tie_word_embeddings": False,
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
    **_SPECIAL_TOKENS,
}


@dataclass(frozen=True)
class Family:
    """One kind of model: its configuration class and the settings that make it tiny."""

    name: str
    config_class: type[PreTrainedConfig]
    settings: Mapping[str, Any] = field(repr=False)

    def config(self, **overrides: Any) -> PreTrainedConfig:
        """A configuration of 3 layers, d_model 48, 4 heads, 80 neurons, 97 tokens and 64 positions."""
        return self.config_class(**{**self.settings, **overrides})

    def build(
        self, seed: int = 0, dtype: torch.dtype = torch.float32, attn: str = "sdpa", **overrides: Any
    ) -> PreTrainedModel:
        """A model with random weights, in eval mode; equal seeds give equal weights up to the dtype's rounding."""
        config = self.config(**overrides)
        # The constructors draw from the global generator, which belongs to the test.
        with torch.random.fork_rng(devices=[]):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attn)
        randomise(model, seed)
        return model.eval()


@torch.no_grad()
def randomise(model: PreTrainedModel, seed: int) -> None:
    """Give every parameter random values, drawn in float32: gains around 1, biases around 0, matrices around 0.

    The matrices are wide enough for every sublayer to matter to the logits, and narrow enough for two ways of computing
    the same attention to agree within 1e-5.
    """
    generator = torch.Generator().manual_seed(seed)
    # Gemma and Qwen3-Next keep a gain as its distance from 1, but for the norm in linear attention.
    from_one = model.config.model_type.startswith(("gemma", "qwen3_next", "qwen3_5"))
    embedding = model.get_input_embeddings().weight
    # An embedding that is the unembedding too would else make logits of three times the size, with the same rounding.
    embedding_width = 0.2 if embedding is model.get_output_embeddings().weight else 0.4
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        if name.endswith("bias"):
            drawn = 0.2 * drawn
        elif parameter.ndim == 1:
            drawn = (0.0 if from_one and "linear_attn.norm" not in name else 1.0) + 0.3 * drawn
        elif parameter is embedding:
            drawn = embedding_width * drawn
        else:
            drawn = 0.15 * drawn
        parameter.copy_(drawn)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("llama", LlamaConfig, {**_ROTARY, "head_dim": HEAD_DIM}),
        Family("mistral", MistralConfig, {**_ROTARY, "head_dim": HEAD_DIM, "sliding_window": None}),
        Family("qwen2", Qwen2Config, _ROTARY),
        Family("qwen3", Qwen3Config, {**_ROTARY, "head_dim": HEAD_DIM}),
        Family("qwen3_moe", Qwen3MoeConfig, _QWEN3_MOE),
        Family("gemma3", Gemma3TextConfig, _GEMMA3),
        Family("gpt2", GPT2Config, _GPT2),
    )
}


def _variant(name: str, base: str, **overrides: Any) -> Family:
    family = FAMILIES[base]
    return Family(name, family.config_class, {**family.settings, **overrides})


VARIANTS: dict[str, Family] = {
    family.name: family
    for family in (
        _variant("llama_tied", "llama", tie_word_embeddings=True),
        _variant("llama_bias", "llama", attention_bias=True, mlp_bias=True),
        # Heads wider than d_model / heads, as in Qwen3-0.6B and Mistral-Nemo: z is not of width d_model.
        _variant("llama_wide", "llama", head_dim=20),
        # Shorter than the prompts, so that the window cuts.
        _variant("mistral_sliding", "mistral", sliding_window=4),
        # One layer in full, the others in a window.
        _variant("qwen2_sliding", "qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1),
        _variant("qwen3_tied", "qwen3", tie_word_embeddings=True),
        _variant("gpt2_tied", "gpt2", tie_word_embeddings=True),
    )
}

EVERY: dict[str, Family] = {**FAMILIES, **VARIANTS}

FEWER = ("gemma3", "qwen3_moe")
"""Families whose blocks are their own and whose modules and language are those of others: where a test goes through
all spellings or modules, it takes fewer of these."""
MOST = tuple(name for name in FAMILIES if name not in FEWER)
WITH_NEURONS = tuple(name for name in FAMILIES if name != "qwen3_moe")
