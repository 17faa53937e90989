"""Models that their users spread over ranks: ``torch.distributed.tensor.parallel.parallelize_module``.

What the user decided is seen in the parameters, which are DTensors, and in the tensors at modules: DTensors, which say
how they lie, or plain tensors, which :mod:`tracelens.backends.probing` looks at on all ranks. Steps work on what the
rank itself has of a tensor; the model gets a DTensor back where it had one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import nn

from tracelens.backends.execute import State
from tracelens.backends.groups import meshes_shared
from tracelens.backends.mesh import has_distributed, local
from tracelens.backends.side_hooks import ForwardStopped, HookCode, done
from tracelens.backends.transfer import module_on
from tracelens.errors import LayoutError, OptionError, SiteMismatchError
from tracelens.ir.layout import WHOLE_EVERYWHERE, Layout, Partial, Shard, owned

# --- tensors ---------------------------------------------------------------------------------------------------------


def said(tensor: torch.Tensor) -> Layout | str | None:
    """How a DTensor says that it lies; a text says what about it is not known. ``None`` for a plain tensor."""
    placements: Any = getattr(tensor, "placements", None)
    if placements is None:
        return None
    known: Any = sys.modules["torch.distributed.tensor"]
    if len(placements) == 1:
        (one,) = placements
        # Kinds that are derived from these lie otherwise: in strides, or masked.
        if type(one) is known.Replicate:
            return WHOLE_EVERYWHERE
        if type(one) is known.Shard:
            return Shard(one.dim % tensor.ndim)
        if type(one) is known.Partial and one.reduce_op == "sum":
            return Partial()
    return f"lies on its ranks as {placements}"


def settled(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank has of a tensor, once a collective that is still under way has brought it."""
    found = local(tensor)
    module: Any = sys.modules.get("torch.distributed._functional_collectives")
    if module is None or not isinstance(found, module.AsyncCollectiveTensor):
        return found
    underway: Any = found
    # Waiting by itself would leave autograd out.
    return underway.clone() if underway.requires_grad else underway.trigger_wait()


def fits(tensor: torch.Tensor, layout: Layout, ranks: int, rank: int) -> bool:
    """Has this rank of a DTensor what it should by its layout?"""
    shape = list(tensor.shape)
    if isinstance(layout, Shard):
        start, end = owned(shape[layout.dim], ranks, rank)
        shape[layout.dim] = end - start
    return list(local(tensor).shape) == shape


def like(new: torch.Tensor, tensor: Any) -> torch.Tensor:
    """What a rank has of a DTensor that lies as another one."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        new,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


# --- hooks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LocalHookCode(HookCode):
    """All that is done at a hook point that may be given a DTensor. ``layout``: of the tensor that is there, where
    several ranks have it."""

    layout: Layout | None = WHOLE_EVERYWHERE

    def steps(self, state: State, tensor: Any) -> Any:
        """The tensor after the steps, as distributed as it was."""
        shown = said(tensor)
        # A plain tensor says nothing, but that it is to be added up it would have to say.
        wrong = isinstance(self.layout, Partial) if shown is None else shown != self.layout
        if wrong and self.layout is not None:
            error = SiteMismatchError(
                f"{self.site} lies otherwise than when the model was looked at: "
                f"{'a plain tensor' if shown is None else shown}, and not {self.layout}"
            )
            return self.failed(state, tensor, error)
        found = done(self.body, state, settled(tensor))
        if self.stops:
            raise ForwardStopped
        if not self.writes:
            return tensor
        return found if shown is None else like(found, tensor)


def refuse_stand_in(module: nn.Module, path: str, *, distributed: bool) -> None:
    """Refuses to leave out a module that returns DTensors, or around which hooks make some of what it returns."""
    if module._forward_hooks or module._forward_pre_hooks:
        reason = "hooks on it, as plans put there, expect what it returns itself"
    elif distributed:
        reason = "it returns DTensors, of which others are not made up"
    else:
        return
    raise LayoutError(
        f"module {path!r} cannot be left out: {reason}",
        instead="a write to what it returns, or the module around it",
    )


# --- parameters ------------------------------------------------------------------------------------------------------


def parameter_layouts(own: nn.Module) -> tuple[dict[str, Layout], frozenset[str]]:
    """How parameters and buffers lie that are DTensors, by path; and those of which nobody knows."""
    found: dict[str, Layout] = {}
    strange: set[str] = set()
    for path, tensor in _tensors(own):
        layout = said(tensor)
        if isinstance(layout, Shard):
            found[path] = layout
        elif layout is not None and layout != WHOLE_EVERYWHERE:
            strange.add(path)
    return found, frozenset(strange)


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


# --- loading ---------------------------------------------------------------------------------------------------------


def require_name(name: object) -> None:
    """Raises :class:`~tracelens.errors.OptionError` for what does not name a function of a module."""
    module, colon, function = name.partition(":") if isinstance(name, str) else ("", "", "")
    words = (*module.split("."), function)
    if not colon or not all(word.isidentifier() for word in words):
        raise OptionError(
            f"parallelize={name!r} does not name a function that every rank can import",
            instead='parallelize="my_plans:tutorial", for def tutorial(model, mesh) in my_plans.py',
        )


def load_parallelized(
    source: str, name: str, *, ranks: int, dtype: Any, options: Mapping[str, Any]
) -> nn.Module:
    """This rank's part of a model that a user's function spreads; every rank of the process group calls it.

    Every rank reads the whole model into the host's memory first; the function is given it and a mesh of the ranks.
    """
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM

    require_name(name)
    module, _, function = name.partition(":")
    try:
        spread: Any = getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise OptionError(
            f"parallelize={name!r} could not be imported on a rank: {error}",
            instead="a module beside the script, or one that is installed; a notebook's own cells are in no module",
        ) from error
    if not dist.is_initialized():
        dist.init_process_group()
    device = torch.accelerator.current_accelerator() if dist.get_backend() == "nccl" else None
    kind = "cpu" if device is None else device.type
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options).eval()
    with meshes_shared():
        distributed: Any = dist
        mesh = distributed.init_device_mesh(kind, (ranks,), mesh_dim_names=("tp",))
    given = spread(model, mesh)
    found: Any = model if given is None else given
    if not isinstance(found, nn.Module) or not has_distributed(found):
        raise LayoutError(
            f"{name} has spread no parameter of the model over the ranks",
            instead="parallelize_module(model, mesh, plan) in it",
        )
    return found if device is None else module_on(found, device)
