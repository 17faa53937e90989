"""The ranks that hold one place of a model together, and what they do in common.

Layouts are the plan's; the collectives are DTensor's, and so is the arithmetic of stretches that do not divide evenly.
Between them values are plain tensors, each rank's own part: a function that works on parts does so at the speed of a
function.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from tracelens.backends.differentiate import Gradients
from tracelens.backends.enduring import FailedElsewhereError
from tracelens.backends.groups import let_collectives_end
from tracelens.backends.pipeline import Pipeline, pipeline_of
from tracelens.errors import LayoutError
from tracelens.ir.dims import Sizes
from tracelens.ir.infer import torch_dtype
from tracelens.ir.layout import Joined, Layout, OwnType, Partial, Replicate, Shard, owned
from tracelens.ir.types import TensorType

_OPS = {Joined.SUM: "sum", Joined.MEAN: "avg"}
_SEEN: Mapping[Joined, Callable[[torch.Tensor], torch.Tensor]] = {
    # What collectives of numbers would do alone: they lose a nan, and know no booleans.
    Joined.MAX: lambda parts: parts.amax(0),
    Joined.MIN: lambda parts: parts.amin(0),
}


class Mesh:
    """The ranks of a place, seen from one of them."""

    def __init__(self, device_mesh: Any, pipeline: Pipeline | None = None, *, by_user: bool = False) -> None:
        self._mesh = device_mesh
        self.by_user = by_user
        """Did the user spread the model (``parallelize_module``)? Nobody has said then how its tensors lie."""
        self.ranks: int = device_mesh.size()
        self.rank: int = device_mesh.get_local_rank()
        self.pipeline = pipeline
        let_collectives_end()

    @property
    def stage(self) -> int:
        """The number of the place that this rank is of."""
        return 0 if self.pipeline is None else self.pipeline.stage

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        kind: str = self._mesh.device_type
        return (
            torch.device(kind)
            if kind == "cpu"
            else torch.device(kind, torch.accelerator.current_device_index())
        )

    @property
    def leads(self) -> bool:
        """Is this the rank that what its place saved comes to?"""
        return self.rank == 0

    @property
    def has_results(self) -> bool:
        """Is this the rank that all results come to?"""
        return self.leads and self.stage == 0

    def redistributed(
        self, tensor: torch.Tensor, shape: tuple[int, ...], source: Layout, target: Layout
    ) -> torch.Tensor:
        """What this rank has of a value of this ``shape`` in another layout. Every rank of the place takes part."""
        if isinstance(source, Partial) and source.joined is Joined.NORM:
            squares = self.redistributed(tensor.square(), shape, Partial(Joined.SUM), target)
            return squares.sqrt()
        if isinstance(source, Partial) and source.joined in _SEEN:
            every = self.redistributed(tensor.unsqueeze(0), (self.ranks, *shape), Shard(0), target)
            return _SEEN[source.joined](every)
        if isinstance(target, Partial):
            return tensor if self.leads else torch.zeros_like(tensor)
        from torch.distributed.tensor import DTensor

        like = torch.empty(shape, device="meta")
        whole = DTensor.from_local(
            tensor.contiguous(),
            self._mesh,
            [_placement(source)],
            run_check=False,
            shape=like.shape,
            stride=like.stride(),
        )
        return cast(torch.Tensor, whole.redistribute(placements=[_placement(target)]).to_local())

    def collected(
        self, tensor: torch.Tensor, shape: tuple[int, ...], layout: Shard | Partial
    ) -> torch.Tensor | None:
        """The whole of what lies on the ranks in parts, on the rank that leads; the others give theirs away."""
        if isinstance(layout, Shard):
            return self._gathered(tensor, shape, layout.dim)
        if layout.joined in _SEEN:
            every = self._gathered(tensor.unsqueeze(0), (self.ranks, *shape), 0)
            return None if every is None else _SEEN[layout.joined](every)
        return self._summed(tensor, layout.joined)

    def _summed(self, tensor: torch.Tensor, joined: Joined) -> torch.Tensor | None:
        import torch.distributed as dist

        total = tensor.square() if joined is Joined.NORM else tensor.clone()
        dist.reduce(total, group=self._mesh.get_group(), group_dst=0)
        if not self.leads:
            return None
        match joined:
            case Joined.MEAN:
                return total / self.ranks
            case Joined.NORM:
                return total.sqrt()
            case _:
                return total

    def _gathered(self, tensor: torch.Tensor, shape: tuple[int, ...], dim: int) -> torch.Tensor | None:
        import torch.distributed as dist

        group = self._mesh.get_group()
        size = shape[dim]
        each = owned(size, self.ranks, 0)[1]
        missing = each - tensor.shape[dim]
        if missing:  # all send the same number of bytes
            tensor = torch.cat(
                (tensor, tensor.new_zeros((*shape[:dim], missing, *shape[dim + 1 :]))), dim=dim
            )
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(self.ranks)] if self.leads else None
        dist.gather(tensor, parts, group=group, group_dst=0)
        return None if parts is None else torch.cat(parts, dim=dim).narrow(dim, 0, size)

    def zeros(self, type_: TensorType | OwnType, sizes: Sizes) -> torch.Tensor:
        """What a rank that has failed gives in the place of a value."""
        return torch.zeros(type_.sizes(sizes), dtype=torch_dtype(type_.dtype), device=self.device)

    # --- votes ---------------------------------------------------------------------------------------------------

    @property
    def _all(self) -> Any:
        """The group of all ranks of the model."""
        return self._mesh.get_group() if self.pipeline is None else self.pipeline.group

    @property
    def world(self) -> int:
        """How many ranks the model has, of all stages."""
        return int(self._all.size())

    def first_failed(self, failed: bool) -> int | None:
        """The first rank of the model that failed, if one did; every rank of it says whether it did."""
        import torch.distributed as dist

        group = self._all
        none = self.world
        first = torch.tensor([dist.get_rank(group) if failed else none], device=self._mesh.device_type)
        dist.all_reduce(first, dist.ReduceOp.MIN, group=group)
        found = int(first.item())
        return None if found == none else found

    def exchanged(self, own: object) -> list[Any]:
        """What all ranks of the model say, as JSON's types, in their order."""
        import torch.distributed as dist

        group = self._all
        data = torch.frombuffer(bytearray(json.dumps(own).encode()), dtype=torch.uint8)
        data = data.to(self._mesh.device_type)
        size = torch.tensor([len(data)], device=data.device)
        sizes = [torch.zeros_like(size) for _ in range(self.world)]
        dist.all_gather(sizes, size, group=group)
        longest = int(max(one.item() for one in sizes))
        padded = torch.cat((data, data.new_zeros(longest - len(data))))
        found = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(found, padded, group=group)
        texts = [bytes(one[: int(count.item())].tolist()) for one, count in zip(found, sizes, strict=True)]
        return [json.loads(text) for text in texts]

    def told(self, data: bytes, source: int) -> bytes:
        """What rank ``source`` of the model has to tell all others."""
        import torch.distributed as dist

        size = torch.tensor([len(data)], device=self._mesh.device_type)
        dist.broadcast(size, group=self._all, group_src=source)
        buffer = bytearray(data) if len(data) == int(size.item()) else bytearray(int(size.item()))
        text = torch.frombuffer(buffer, dtype=torch.uint8).clone().to(self._mesh.device_type)
        dist.broadcast(text, group=self._all, group_src=source)
        return bytes(text.tolist())

    def together(
        self, gradients: Gradients, loss: torch.Tensor, wrt: Sequence[torch.Tensor]
    ) -> Sequence[torch.Tensor]:
        """Takes gradients, if all ranks have come so far: autograd communicates, and no one can do so in its place."""
        if self.first_failed(False) is not None:
            raise FailedElsewhereError
        return gradients(loss, wrt)

    def apart(self, state: object) -> None:
        """Lets the others know that they are not to take gradients."""
        self.first_failed(True)

    def agreed(self, digest: bytes) -> bool:
        """Have all ranks the same digest?"""
        import torch.distributed as dist

        group = self._all
        own = torch.frombuffer(bytearray(digest), dtype=torch.uint8).clone().to(self._mesh.device_type)
        first = own.clone()
        dist.broadcast(first, group=group, group_src=0)
        same = torch.tensor([int(torch.equal(own, first))], device=own.device)
        dist.all_reduce(same, dist.ReduceOp.MIN, group=group)
        return bool(same.item())


def _placement(layout: Layout) -> Any:
    from torch.distributed.tensor import Partial as Partly
    from torch.distributed.tensor import Replicate as Whole
    from torch.distributed.tensor import Shard as Part

    match layout:
        case Replicate():
            return Whole()
        case Shard():
            return Part(layout.dim)
        case Partial():
            return Partly(_OPS[layout.joined])


def mesh_of(model: nn.Module) -> Mesh | None:
    """The ranks that a model's layers are spread over; ``None`` for a model that one rank has whole.

    Raises :class:`~tracelens.errors.LayoutError` for a model that is spread in a way of which nothing is known.
    """
    pipeline = pipeline_of(model)
    if pipeline is None and not has_distributed(model):
        return None
    found: Any = getattr(model, "_device_mesh", None)
    names: tuple[str, ...] = getattr(found, "mesh_dim_names", None) or ()
    if found is not None and "tp" in names:
        return Mesh(found["tp"], pipeline)
    if pipeline is not None and found is not None and names == ("pp",):
        # transformers 5.17 has no name for the one rank that each stage has.
        from torch.distributed.device_mesh import DeviceMesh

        rows = DeviceMesh(found.device_type, found.mesh.unsqueeze(-1), mesh_dim_names=("pp", "tp"))
        return Mesh(rows["tp"], pipeline)
    if pipeline is not None:
        raise LayoutError(
            "the layers of a stage are spread over ranks, and not by transformers' own tensor parallelism",
            instead="tl.load(name, pp=..., tp=...)",
        )
    return Mesh(users_mesh(model), by_user=True)


def users_mesh(model: nn.Module) -> Any:
    """The one row of ranks that a user spread a model's layers over with ``parallelize_module``."""
    fsdp: Any = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if fsdp is not None and any(isinstance(module, fsdp) for module in model.modules()):
        raise LayoutError(
            "the model's parameters are gathered for each layer by FSDP (fully_shard), which is not supported",
            instead="ranks that share each layer: tl.load(name, tp=...), or parallelize_module(model, mesh, plan)",
        )
    found: Any = None
    for path, tensor in model.named_parameters():
        mesh: Any = getattr(tensor, "device_mesh", None)
        if mesh is None:
            continue
        found = mesh if found is None else found
        if mesh != found:
            raise LayoutError(
                f"the model's parameters are spread over several meshes of ranks: {path!r} is on {mesh}, and others "
                f"are on {found}",
                instead="one mesh for all of the plan",
            )
    if found.ndim != 1:
        raise LayoutError(
            f"the model's parameters are spread over a mesh of {found.ndim} dimensions ({found}), of which only one "
            "could share layers",
            instead='parallelize_module(model, mesh["tp"], plan), and nothing that spreads them a second time',
        )
    return found


def has_distributed(model: nn.Module) -> bool:
    """Is a parameter of the model spread over ranks?"""
    # A model that holds DTensors has imported their module; importing it here would cost a second.
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(isinstance(tensor, module.DTensor) for tensor in model.parameters())


def own_part_of(model: nn.Module, path: str) -> torch.Tensor:
    """What this rank has of a parameter or buffer."""
    owner, _, name = path.rpartition(".")
    return local(getattr(model.get_submodule(owner), name))


def local(tensor: Any) -> torch.Tensor:
    """What this rank has of a tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def skeleton(model: nn.Module) -> nn.Module:
    """A model of the same configuration as the ranks have together, without numbers."""
    hf: Any = model
    with torch.device("meta"):
        whole = type(hf)._from_config(copy.deepcopy(hf.config), dtype=hf.dtype)
    return whole.train(hf.training)
