"""TransformerLens, as its documentation writes each case: a bridge over the same weights, and its cache and hooks."""

from __future__ import annotations

from importlib.metadata import version as installed
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedTokenizerFast

from benchmarks.peers.subject import Answer, Results, Subject

NAME = "transformer_lens"
NOTES = {"stop": "with its stop_at_layer"}


def version() -> str:
    return installed("transformer-lens")


def build(subject: Subject) -> dict[str, Answer]:
    """A function for each case, on a newly made bridge."""
    # The bridge puts its own modules in the place of the model's, so the bare forward is timed on another copy.
    own = subject.separate()
    bridge: Any = TransformerBridge.boot_transformers(
        own.folder, hf_model=own.model, device="cpu", dtype=torch.float32, tokenizer=no_text(own)
    )
    ids, vector = own.ids, own.vector
    middle, n_layers = own.layers("read-one")[0], own.n_layers
    points = [f"blocks.{layer}.hook_resid_post" for layer in range(n_layers)]

    def add(value: torch.Tensor, hook: Any) -> torch.Tensor:
        return value + vector

    def read_one() -> Results:
        with torch.no_grad():
            logits, cache = bridge.run_with_cache(ids, names_filter=points[middle])
        return {f"h{middle}": cache[points[middle]], "logits": logits}

    def read_all() -> Results:
        with torch.no_grad():
            logits, cache = bridge.run_with_cache(ids, names_filter=points)
        return {**{f"h{layer}": cache[point] for layer, point in enumerate(points)}, "logits": logits}

    def edit_one() -> Results:
        with torch.no_grad():
            return {"logits": bridge.run_with_hooks(ids, fwd_hooks=[(points[middle], add)])}

    def edit_all() -> Results:
        with torch.no_grad():
            return {"logits": bridge.run_with_hooks(ids, fwd_hooks=[(point, add) for point in points])}

    def stop() -> Results:
        with torch.no_grad():
            _, cache = bridge.run_with_cache(ids, names_filter=points[0], stop_at_layer=1)
        return {"h0": cache[points[0]]}

    return {
        "read-one": read_one,
        "read-all": read_all,
        "edit-one": edit_one,
        "edit-all": edit_all,
        "stop": stop,
    }


def no_text(subject: Subject) -> PreTrainedTokenizerFast:
    """The bridge insists on a tokenizer; prompts here are token ids, so any will do."""
    words = {f"token{number}": number for number in range(4)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="token0")),
        unk_token="token0",
        bos_token="token1",
        eos_token="token2",
        pad_token="token3",
        name_or_path=subject.folder,
    )
