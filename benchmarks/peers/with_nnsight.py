"""nnsight, as its documentation writes each case. Gradients are off, as in all others (nnsight leaves them on)."""

from __future__ import annotations

from importlib.metadata import version as installed

import torch
from nnsight import NNsight

from benchmarks.peers.subject import Answer, Results, Subject

NAME = "nnsight"
NOTES = {"stop": "with its tracer.stop(); without it all layers run"}


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

    return {
        "read-one": read_one,
        "read-all": read_all,
        "edit-one": edit_one,
        "edit-all": edit_all,
        "stop": stop,
    }
