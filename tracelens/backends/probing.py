"""How the tensors at a model's modules lie on its ranks, seen in one forward pass over a few tokens.

Styles say it of the modules that have weights in parts; of what lies between these (an activation function, the norm of
each head) nobody does. So all ranks run the pass and compare: what has one shape and the same bits everywhere is whole,
and what is shorter by the number of ranks along one axis, and along no other, is in parts. Anything else is not guessed
at, and refused when it is used. The table of named sites is held to the same pass.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tracelens.backends.base import Side
from tracelens.backends.hooks import seat_of, watch
from tracelens.backends.layouts import style_of, styles_of
from tracelens.backends.mesh import local
from tracelens.backends.meta_copy import aside, meta_copy
from tracelens.backends.module_sides import without_data_of_experts
from tracelens.backends.survey import Watcher
from tracelens.backends.transfer import moved, on_cpu
from tracelens.errors import LayoutError
from tracelens.ir.layout import Replicate
from tracelens.ir.module_sites import INPUT, module_site
from tracelens.ir.sites import KINDS, Scope, Site
from tracelens.placement import InParts, Placement, Probed

if TYPE_CHECKING:
    from tracelens.backends.anatomy import ModelAnatomy

_ROWS, _POSITIONS = 2, 3
Shapes = dict[str, tuple[int, ...]]


def probe(anatomy: ModelAnatomy, placement: Placement) -> Probed:
    """How the tensors at modules lie. Every rank of the model calls it, and is given the same answer.

    Raises :class:`~tracelens.errors.LayoutError` on all ranks where a named site lies otherwise than ``placement``
    has it.
    """
    mesh = anatomy.mesh
    assert mesh is not None
    whole: Shapes = {}
    paths: dict[str, str] = {}
    skeleton = without_data_of_experts(meta_copy(anatomy._whole))
    ids = torch.arange(_ROWS * _POSITIONS).reshape(_ROWS, _POSITIONS) % anatomy.widths["V"]
    with aside():
        watcher = _watching(skeleton)
        skeleton(**_inputs(ids.to("meta")))
    for name, path, tensor in _tensors(watcher):
        whole[name], paths[name] = tuple(tensor.shape), path
    own = {
        name: [list(tensor.shape), digest_of(tensor)] for name, _, tensor in _tensors(_passed(anatomy, ids))
    }
    everywhere = _exchanged({"stage": mesh.stage, "tensors": own}, mesh.device)
    parts: dict[str, InParts] = {}
    unclear: dict[str, str] = {}
    styles = styles_of(anatomy.model)
    for name, shape in whole.items():
        stage = placement.of_path(paths[name])
        seen = [rank["tensors"].get(name) for rank in everywhere if rank["stage"] == stage]
        found = lying(shape, seen, mesh.ranks)
        style = style_of(styles, paths[name])
        if isinstance(found, InParts) and style is not None and "packed" in style:
            found = f"is at a module that is spread by the style {style!r}, whose parts are packed into each other"
        if isinstance(found, InParts):
            parts[name] = found
        elif found is not None:
            unclear[name] = found
    probed = Probed(parts, unclear)
    check_named(anatomy, placement, probed, whole)
    return probed


def _inputs(ids: torch.Tensor) -> dict[str, Any]:
    positions = torch.arange(_POSITIONS, device=ids.device).expand(_ROWS, _POSITIONS)
    # A mask of this form is taken as it is: nothing is looked up in its data, which a skeleton lacks.
    mask = torch.ones((_ROWS, 1, _POSITIONS, _POSITIONS), dtype=torch.bool, device=ids.device).tril()
    return {"input_ids": ids, "position_ids": positions, "attention_mask": mask, "use_cache": False}


def _watching(copy: nn.Module) -> Watcher:
    watcher = Watcher({id(module): path for path, module in copy.named_modules()})
    watch(copy.modules(), watcher.before, watcher.after)
    return watcher


def _passed(anatomy: ModelAnatomy, ids: torch.Tensor) -> Watcher:
    """The pass on this rank, watched from where the hooks of a run would be."""
    mesh, model = anatomy.mesh, anatomy.model
    assert mesh is not None
    watcher = Watcher({id(module): path for path, module in model.named_modules()})
    inputs = _inputs(moved(ids, mesh.device))
    seat = seat_of(model)
    with seat.lock, torch.no_grad():
        try:
            for module in model.modules():
                seat.before(module, watcher.before)
                seat.after(module, watcher.after)
            if mesh.pipeline is None:
                model(**inputs)
            else:
                mesh.pipeline.forward(inputs, mesh.pipeline.stages - 1)
        finally:
            seat.clear()
    return watcher


def _tensors(watcher: Watcher) -> list[tuple[str, str, torch.Tensor]]:
    """Every tensor that passed a module: the name of its site, the module's path, and the tensor."""
    return [
        (
            _name(event.path, event.side, key, event.call if watcher.counts[event.path] > 1 else None),
            event.path,
            tensor,
        )
        for event in watcher.events
        for key, tensor in event.tensors.items()
    ]


def _name(path: str, side: str, key: tuple[int | str, ...], call: int | None) -> str:
    return module_site(path, side, key, call, after=None, number=1, amid=False).name


def digest_of(tensor: torch.Tensor) -> str:
    """What two tensors have in common if their numbers are the same, bit for bit."""
    data = on_cpu(local(tensor.detach())).contiguous()
    return hashlib.sha256(data.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def lying(shape: tuple[int, ...], seen: Sequence[Any], ranks: int) -> InParts | str | None:
    """How a tensor of this shape lies on the ranks of its place; ``None``: whole. A text says why it is not known."""
    if not seen or any(one is None for one in seen):
        return "is not there in the pass of every rank of its place"
    shapes = {tuple(one[0]) for one in seen}
    if len(shapes) > 1:
        return f"has other shapes on other ranks: {', '.join(map(str, sorted(shapes)))}"
    local = shapes.pop()
    if local == shape:
        if len({one[1] for one in seen}) == 1:
            return None
        return (
            "has the whole shape on every rank, and other numbers on each: partial results, or another order"
        )
    if len(local) == len(shape):
        shorter = [axis for axis, (own, size) in enumerate(zip(local, shape, strict=True)) if own != size]
        if len(shorter) == 1 and local[shorter[0]] * ranks == shape[shorter[0]]:
            return InParts(shorter[0], len(shape))
    return f"is {local} on a rank, where the whole is {shape}"


def _exchanged(own: Mapping[str, Any], device: torch.device) -> list[dict[str, Any]]:
    """What all ranks of the model say, in their order."""
    import torch.distributed as dist

    data = moved(torch.frombuffer(bytearray(json.dumps(own).encode()), dtype=torch.uint8), device)
    world = dist.get_world_size()
    size = torch.tensor([len(data)], device=device)
    sizes = [torch.zeros_like(size) for _ in range(world)]
    dist.all_gather(sizes, size)
    longest = int(max(one.item() for one in sizes))
    padded = torch.cat((data, data.new_zeros(longest - len(data))))
    found = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(found, padded)
    return [
        json.loads(on_cpu(one[: int(count.item())]).numpy().tobytes())
        for one, count in zip(found, sizes, strict=True)
    ]


def check_named(anatomy: ModelAnatomy, placement: Placement, probed: Probed, whole: Shapes) -> None:
    """The named sites that a module's side shows lie there as the table of styles says."""
    for kind in KINDS:
        tap = anatomy.family.taps.get(kind.name)
        if tap is None or tap.side not in (Side.IN, Side.OUT):
            continue
        for layer in anatomy.layers_with(kind.name) if kind.scope is Scope.LAYER else (None,):
            path = anatomy.module_path(tap, layer)
            keys = [(0,), ("hidden_states",)]
            if tap.side is Side.OUT:
                keys = [(tap.key,)] if isinstance(tap.key, int) else [(), (0,)]
            side = INPUT if tap.side is Side.IN else "output"
            name = next((name for key in keys if (name := _name(path, side, key, None)) in whole), None)
            if name is None:
                continue
            declared = not isinstance(placement.layout_of(Site(kind.name, layer)), Replicate)
            problem = probed.unclear.get(name)
            if problem is None and declared != (name in probed.parts):
                there, said = ("whole", "in parts") if declared else ("in parts", "whole")
                problem = f"is {there} on its ranks, where {said} was expected"
            if problem is not None:
                raise LayoutError(
                    f"the site {kind.name!r}, at {name}, {problem}",
                    instead="a model and a version of transformers whose tensor parallelism tracelens knows",
                )
