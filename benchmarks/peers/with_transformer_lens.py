"""TransformerLens, as its documentation writes each case: a bridge over the same weights, and its cache and hooks."""

from __future__ import annotations

from importlib.metadata import version as installed
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedTokenizerFast

from benchmarks.peers.subject import HEAD, Answer, Prompted, Results, Subject

NAME = "transformer_lens"
NOTES = {"stop": "with its stop_at_layer", "sweep": "a run with hooks for each strength"}


def version() -> str:
    return installed("transformer-lens")


def build(subject: Subject) -> dict[str, Answer]:
    """A function for each case, on a newly made bridge."""
    # The bridge puts its own modules in the place of the model's, so the bare forward is timed on another copy.
    own = subject.separate()
    bridge = bridge_of(own)
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

    patterns = [f"blocks.{layer}.attn.hook_pattern" for layer in range(n_layers)]
    mixes = [f"blocks.{layer}.attn.hook_z" for layer in range(n_layers)]
    right, wrong = own.tokens

    def cached(names: list[str]) -> Results:
        with torch.no_grad():
            logits, cache = bridge.run_with_cache(ids, names_filter=names)
        found = {f"h{layer}": cache[point] for layer, point in enumerate(names)}
        # z comes flat from some versions of the bridge.
        found = {
            name: tensor.unflatten(-1, own.heads) if tensor.ndim == 3 else tensor
            for name, tensor in found.items()
        }
        return {**found, "logits": logits}

    def zero(value: torch.Tensor, hook: Any) -> torch.Tensor:
        value = value.clone()
        whole = value if value.ndim == 4 else value.unflatten(-1, own.heads)
        whole[:, :, HEAD] = 0
        return value

    def ablate() -> Results:
        with torch.no_grad():
            return {"logits": bridge.run_with_hooks(ids, fwd_hooks=[(point, zero) for point in mixes])}

    def attribution() -> Results:
        with torch.no_grad():
            _, there = bridge.run_with_cache(own.other_ids, names_filter=points)
        here: Results = {}

        def keep_as(point: str) -> Any:
            def keep(value: torch.Tensor, hook: Any) -> None:
                here[point] = value

            return keep

        last = bridge.run_with_hooks(ids, fwd_hooks=[(point, keep_as(point)) for point in points])[0, -1]
        gradients = torch.autograd.grad(last[right] - last[wrong], [here[point] for point in points])
        parts = [
            ((there[point] - here[point]) * gradient).sum(-1)
            for point, gradient in zip(points, gradients, strict=True)
        ]
        return {"attribution": torch.stack(parts).detach()[:, 0]}

    def sweep() -> Results:
        rows: list[torch.Tensor] = []
        for strength in own.strengths:

            def push(value: torch.Tensor, hook: Any, strength: float = strength) -> torch.Tensor:
                return value + strength * vector

            with torch.no_grad():
                rows.append(bridge.run_with_hooks(ids, fwd_hooks=[(points[middle], push)])[0, -1])
        return {"last": torch.stack(rows)}

    return {
        "pattern": lambda: cached(patterns),
        "z": lambda: cached(mixes),
        "ablate": ablate,
        "attribution": attribution,
        "sweep": sweep,
        "read-one": read_one,
        "read-all": read_all,
        "edit-one": edit_one,
        "edit-all": edit_all,
        "stop": stop,
    }


def bridge_of(subject: Prompted) -> Any:
    """A bridge over the model itself; it insists on a tokenizer, and prompts here are token ids, so any will do."""
    words = {f"token{number}": number for number in range(4)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="token0")),
        unk_token="token0",
        bos_token="token1",
        eos_token="token2",
        pad_token="token3",
        name_or_path=subject.folder,
    )
    return TransformerBridge.boot_transformers(
        subject.folder, hf_model=subject.model, device="cpu", dtype=torch.float32, tokenizer=tokenizer
    )
