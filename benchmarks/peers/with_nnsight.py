"""nnsight, as its documentation writes each case. Gradients are off, as in all others (nnsight leaves them on)."""

from __future__ import annotations

from importlib.metadata import version as installed
from typing import Any

import torch
from nnsight import NNsight

from benchmarks.peers.subject import HEAD, Answer, Results, Subject

NAME = "nnsight"
NOTES = {
    "stop": "with its tracer.stop(); without it all layers run",
    "pattern": "on a model with eager attention; the fused one has no pattern to give",
    "sweep": "a trace for each strength",
}


def version() -> str:
    return installed("nnsight")


def build(subject: Subject) -> dict[str, Answer]:
    """A function for each case, on a newly wrapped model."""
    # nnsight replaces the forward of the modules that it wraps, so the bare forward is timed on another copy.
    own = subject.separate()
    model, ids, vector = NNsight(own.model), own.ids, own.vector
    middle, n_layers = own.layers("read-one")[0], own.n_layers

    def read_one() -> Results:
        with torch.no_grad(), model.trace(ids, use_cache=False):
            hidden = model.model.layers[middle].output.save()
            logits = model.lm_head.output.save()
        return {f"h{middle}": hidden, "logits": logits}

    def read_all() -> Results:
        with torch.no_grad(), model.trace(ids, use_cache=False):
            hidden = [model.model.layers[layer].output.save() for layer in range(n_layers)].save()
            logits = model.lm_head.output.save()
        return {**{f"h{layer}": tensor for layer, tensor in enumerate(hidden)}, "logits": logits}

    def edit_one() -> Results:
        with torch.no_grad(), model.trace(ids, use_cache=False):
            model.model.layers[middle].output = model.model.layers[middle].output + vector
            logits = model.lm_head.output.save()
        return {"logits": logits}

    def edit_all() -> Results:
        with torch.no_grad(), model.trace(ids, use_cache=False):
            for layer in range(n_layers):
                model.model.layers[layer].output = model.model.layers[layer].output + vector
            logits = model.lm_head.output.save()
        return {"logits": logits}

    def stop() -> Results:
        with torch.no_grad(), model.trace(ids, use_cache=False) as tracer:
            hidden = model.model.layers[0].output.save()
            tracer.stop()
        return {"h0": hidden}

    _, width = own.heads
    place = slice(HEAD * width, (HEAD + 1) * width)
    right, wrong = own.tokens
    written_out: list[Any] = []

    def pattern() -> Results:
        if not written_out:
            written_out.append(NNsight(own.eager()))
        eager = written_out[0]
        with torch.no_grad(), eager.trace(ids, use_cache=False):
            patterns = [
                eager.model.layers[layer].self_attn.output[1].save() for layer in range(n_layers)
            ].save()
            logits = eager.lm_head.output.save()
        return {**{f"h{layer}": tensor for layer, tensor in enumerate(patterns)}, "logits": logits}

    def z() -> Results:
        with torch.no_grad(), model.trace(ids, use_cache=False):
            flat = [
                model.model.layers[layer].self_attn.o_proj.input.save() for layer in range(n_layers)
            ].save()
            logits = model.lm_head.output.save()
        return {
            **{f"h{layer}": tensor.unflatten(-1, own.heads) for layer, tensor in enumerate(flat)},
            "logits": logits,
        }

    def ablate() -> Results:
        with torch.no_grad(), model.trace(ids, use_cache=False):
            for layer in range(n_layers):
                values = model.model.layers[layer].self_attn.o_proj.input.clone()
                values[..., place] = 0
                model.model.layers[layer].self_attn.o_proj.input = values
            logits = model.lm_head.output.save()
        return {"logits": logits}

    def attribution() -> Results:
        with torch.no_grad(), model.trace(own.other_ids, use_cache=False):
            there = [model.model.layers[layer].output.save() for layer in range(n_layers)].save()
        with model.trace(ids, use_cache=False):
            hidden = [model.model.layers[layer].output.save() for layer in range(n_layers)].save()
            last = model.lm_head.output[0, -1].save()
        gradients = torch.autograd.grad(last[right] - last[wrong], hidden)
        parts = [
            ((far - near) * gradient).sum(-1)
            for far, near, gradient in zip(there, hidden, gradients, strict=True)
        ]
        return {"attribution": torch.stack(parts).detach()[:, 0]}

    def sweep() -> Results:
        rows: list[torch.Tensor] = []
        for strength in own.strengths:
            with torch.no_grad(), model.trace(ids, use_cache=False):
                model.model.layers[middle].output = model.model.layers[middle].output + strength * vector
                last = model.lm_head.output[0, -1].save()
            rows.append(last)
        return {"last": torch.stack(rows)}

    return {
        "pattern": pattern,
        "z": z,
        "ablate": ablate,
        "attribution": attribution,
        "sweep": sweep,
        "read-one": read_one,
        "read-all": read_all,
        "edit-one": edit_one,
        "edit-all": edit_all,
        "stop": stop,
    }
