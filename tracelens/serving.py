"""What a rank does for the process that owns it: loads its part of a model, runs graphs on it, lets go of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from tracelens.backends.places import placement
from tracelens.backends.ranks.channel import Message
from tracelens.backends.sharded_loading import load_part
from tracelens.errors import PlansDifferError
from tracelens.generating import generate as generated
from tracelens.model import Model
from tracelens.remote import digest, placement_data, prompt_from, results_data, unpacked

if TYPE_CHECKING:
    from tracelens.backends.ranks.served import Served


def load(served: Served, request: Message) -> Message:
    """This rank's part of a model; the answer says how all of it lies."""
    header = request.header
    part = load_part(
        header["source"],
        tp=header["tp"],
        pp=header["pp"],
        ep=header["ep"],
        dtype=_dtype(header["dtype"]),
        options=header["options"],
    )
    model = Model(part)
    model._compiler.owned = True
    served.models[header["model"]] = model
    return Message(
        {
            "placement": placement_data(placement(model.anatomy)),
            "dtype": str(model.anatomy.dtype).removeprefix("torch."),
            "bytes": sum(_nbytes(tensor) for tensor in part.parameters()),
        }
    )


def _dtype(name: str) -> Any:
    return getattr(torch, name) if isinstance(getattr(torch, name, None), torch.dtype) else name


def _nbytes(tensor: Any) -> int:
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).nbytes


def run(served: Served, request: Message) -> Message:
    """One forward pass; the first rank answers with what was saved."""
    model, graph, compiled, prompt = _asked(served, request, generating=False)
    ran = model._compiler.run(graph, compiled, prompt)
    mesh = model.anatomy.mesh
    if mesh is not None and not mesh.has_results:
        return Message()
    header, tensors = results_data({name: get() for name, get in ran.tensors.items()})
    return Message({**header, "seconds": ran.report.seconds}, tensors)


def generate(served: Served, request: Message) -> Message:
    """New tokens, drawn alike on all ranks."""
    model, graph, compiled, prompt = _asked(served, request, generating=True)
    torch.manual_seed(request.header["seed"])
    tokens = generated(model, model._compiler, graph, compiled, prompt, request.header["options"])
    return Message({"tokens": tokens})


def _asked(served: Served, request: Message, *, generating: bool) -> tuple[Model, Any, Any, Any]:
    header, tensors = request.header, dict(request.tensors)
    model: Model = served.models[header["model"]]
    graph = unpacked(header["graph"], tensors.pop("constants"))
    compiled = model._compiler.compile(graph, generating=generating)
    if digest(compiled.plan) != header["digest"]:
        raise PlansDifferError(
            f"rank {served.rank} has made another plan than the process that recorded the block",
            instead="one version of tracelens, torch and transformers everywhere",
        )
    selectors = tuple(selector for _, selector in compiled.selectors)
    return model, graph, compiled, prompt_from(header, tensors, selectors, model.anatomy)


def drop(served: Served, request: Message) -> Message:
    """Lets go of a model."""
    served.models.pop(request.header["model"], None)
    return Message()
