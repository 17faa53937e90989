"""The process of a rank that can also be asked for the bare forward pass, without anything of a block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tracelens.backends.ranks import worker
from tracelens.backends.ranks.channel import Message
from tracelens.backends.ranks.requests import HANDLERS
from tracelens.backends.ranks.served import Served


def main(about: Mapping[str, Any]) -> None:
    """What the pool calls in the new process."""
    worker.main(about, {**HANDLERS, "bare": bare})


def bare(served: Served, request: Message) -> Message:
    """One forward pass of this rank's part of a model, in a pipeline as a trace drives it."""
    anatomy = served.models[request.header["model"]].model.anatomy
    mesh, hf = anatomy.mesh, anatomy.model
    inputs = {**request.tensors, "use_cache": False}
    with torch.no_grad():
        if mesh.pipeline is None:
            hf(**inputs)
        else:
            mesh.pipeline.forward(inputs, mesh.pipeline.stages - 1)
    return Message()
