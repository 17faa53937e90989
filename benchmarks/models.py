"""The models that are measured, and the prompts that they get."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file


@dataclass(frozen=True)
class Tiny:
    """A random Llama, so small that what surrounds the forward pass shows."""

    layers: int = 12
    d_model: int = 192
    neurons: int = 528
    heads: int = 6
    vocabulary: int = 512
    tokens: int = 32
    new: int = 96
    """For how many further tokens there are positions."""

    def write(self, folder: Path) -> str:
        """Writes the model's folder; the same weights each time."""
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.d_model,
            intermediate_size=self.neurons,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=self.tokens + self.new,
            tie_word_embeddings=False,
        )
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder / "model")
        return str(folder / "model")


@dataclass(frozen=True)
class SmolLM2:
    """SmolLM2-135M-Instruct, the model that tracelens can fetch."""

    tokens: int = 32

    def write(self, folder: Path) -> str:
        """Gives the model's folder in the cache."""
        from tracelens.pretrained import embedded_model

        return str(embedded_model("smollm2-135m"))


def write_inputs(model_folder: str, file: Path, tokens: int, batch: int = 1) -> None:
    """Prompts (random token ids) and the vector that edits add, long enough to change the logits and the text."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model_folder)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, config.vocab_size, (batch, tokens), generator=generator)
    save_file({"ids": ids, "vector": torch.randn(config.hidden_size, generator=generator)}, file)
