"""The part of the lens benchmark that needs a GPU: a Llama of the shape of 8B with random weights, in bfloat16."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.ours_lens import ours
from benchmarks.peers import lens_text
from benchmarks.peers.text import WRITTEN, Text, plain

NEW, PROMPT, ROUNDS = 128, 32, 5


def on_a_gpu(tell: Callable[[str], None]) -> dict[str, Any]:
    """Times and allocated memory on a GPU; says so where there is none."""
    if not torch.cuda.is_available():
        return {"absent": "not measured: there was no GPU"}
    text = random_llama()
    device = text.ids.device
    ways: dict[str, WRITTEN] = {
        "plain": plain(text),
        "per-step": lens_text.per_step(text),
        "afterwards": lens_text.afterwards(text),
        "tracelens": ours(text),
    }
    for way in ways.values():
        for _ in range(2):
            way(8, lambda: None)
    rows: dict[str, dict[str, Any]] = {name: {"whole_s": [], "bytes": []} for name in ways}
    for number in range(ROUNDS):
        tell(f"on the GPU, round {number + 1} of {ROUNDS}")
        for name, way in ways.items():
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before, began = torch.cuda.memory_allocated(device), time.perf_counter()
            way(NEW, lambda: None)
            torch.cuda.synchronize(device)
            rows[name]["whole_s"].append(time.perf_counter() - began)
            rows[name]["bytes"].append(torch.cuda.max_memory_allocated(device) - before - cache_bytes(text))
    return {"device": torch.cuda.get_device_name(device), "new": NEW, "prompt": PROMPT, "rows": rows}


def cache_bytes(text: Text) -> int:
    config = text.model.config
    width = config.num_key_value_heads * config.head_dim
    return 2 * config.num_hidden_layers * width * (PROMPT + NEW - 1) * 2


def random_llama() -> Text:
    """Weights of the shape of Llama-3.1-8B, and a prompt of random tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    ids = torch.randint(3, config.vocab_size, (1, PROMPT), device="cuda")
    return Text("", model, ids, torch.zeros(config.hidden_size, device="cuda"))
