"""Loads this rank's part of a model, by transformers' own tensor, pipeline and expert parallelism."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn

from tracelens.backends.groups import meshes_shared
from tracelens.backends.mesh import local


def load_part(source: str, *, tp: int, pp: int, ep: int, dtype: Any, options: Mapping[str, Any]) -> nn.Module:
    """What this rank has of the model; every rank of the process group calls it. Only that part is read."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed.configuration_utils import DistributedConfig

    sizes: dict[str, Any] = {"tp_size": tp, "pp_size": pp}
    if ep > 1:
        sizes["ep_size"] = ep
    with meshes_shared(), _stages_and_ranks_together() if pp > 1 and tp > 1 else nullcontext():
        model = AutoModelForCausalLM.from_pretrained(
            source, distributed_config=DistributedConfig(**sizes), dtype=dtype, **options
        )
    if "experts_implementation" not in options:
        _suit_experts(model)
    return model.eval()


_ALIGNMENT = 16


def _suit_experts(model: Any) -> None:
    """Has experts computed one row at a time where this rank's rows are too short for torch's grouped product.

    That one takes rows of whole 16 bytes: in bfloat16 a rank's share of an expert must be a multiple of 8 neurons.
    """
    if getattr(model.config, "_experts_implementation", None) != "grouped_mm":
        return
    own = [local(parameter) for parameter in model.parameters() if parameter.ndim == 3]
    if any(tensor.shape[-1] * tensor.element_size() % _ALIGNMENT for tensor in own):
        model.set_experts_implementation("batched_mm")


@contextmanager
def _stages_and_ranks_together() -> Iterator[None]:
    """Keeps transformers from spreading, within a stage, the layers of the others.

    In 5.23 the plan for a stage's ranks still names the layers that the cut into stages has replaced by placeholders,
    and loading ends in a ``KeyError``.
    """
    from importlib import import_module

    from transformers.distributed.pipeline_parallel import PipelineIdentityLayer

    mixin: Any = import_module("transformers.distributed.mixin")

    before: Any = mixin.apply_tensor_parallelism

    def of_this_stage(model: nn.Module, mesh: Any, plan: Mapping[str, str]) -> Any:
        there = {
            name for name, module in model.named_modules() if not isinstance(module, PipelineIdentityLayer)
        }
        there |= {name for name, _ in model.named_parameters()}
        return before(model, mesh, {name: style for name, style in plan.items() if name in there})

    mixin.apply_tensor_parallelism = of_this_stage
    try:
        yield
    finally:
        mixin.apply_tensor_parallelism = before
