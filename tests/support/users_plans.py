"""Plans by which users spread a model over ranks: ``parallelize="tests.support.users_plans:tutorial"`` and others.

``tutorial`` is that of the example: PyTorch's own on tensor parallelism, for transformers' Llama and its relatives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from examples.parallel_plan import BLOCK, tutorial


def _layers(model: Any) -> range:
    return range(model.config.num_hidden_layers)


def _blocks(**styles: Any) -> dict[str, Any]:
    return {**BLOCK, **{name.replace("__", "."): style for name, style in styles.items()}}


def logits_apart(model: nn.Module, mesh: Any) -> None:
    """As the tutorial; the logits stay on the ranks that have their part of the vocabulary, as DTensors."""
    tutorial_blocks(model, mesh)
    head = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    parallelize_module(model, mesh, {"lm_head": head})


def tutorial_blocks(model: nn.Module, mesh: Any) -> None:
    """The layers alone; what is around them is whole on every rank."""
    for layer in _layers(model):
        parallelize_module(model.get_submodule(f"model.layers.{layer}"), mesh, _blocks())


def sequence(model: nn.Module, mesh: Any) -> None:
    """Between attention and MLPs each rank has some of the positions: streams are DTensors in parts of them."""
    apart: dict[str, Any] = {"output_layouts": Shard(1), "use_local_output": False}
    ends = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), **apart),
        "model.norm": SequenceParallel(),
        "lm_head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    parallelize_module(model, mesh, ends)
    whole: dict[str, Any] = {"use_local_output": True}
    for layer in _layers(model):
        plan = _blocks(
            input_layernorm=SequenceParallel(),
            self_attn=PrepareModuleInput(
                input_kwarg_layouts={"hidden_states": Shard(1)},
                desired_input_kwarg_layouts={"hidden_states": Replicate()},
                **whole,
            ),
            self_attn__o_proj=RowwiseParallel(**apart),
            post_attention_layernorm=SequenceParallel(),
            mlp=PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),), **whole),
            mlp__down_proj=RowwiseParallel(**apart),
        )
        parallelize_module(model.get_submodule(f"model.layers.{layer}"), mesh, plan)


def partial_sums(model: nn.Module, mesh: Any) -> None:
    """The last matrix of attention and of the MLP hands on partial sums; the modules around them add these up."""
    apart = RowwiseParallel(output_layouts=Partial(), use_local_output=False)
    for layer in _layers(model):
        plan = _blocks(
            self_attn__o_proj=apart,
            self_attn=PrepareModuleOutput(
                output_layouts=(Partial(), None), desired_output_layouts=(Replicate(), None)
            ),
            mlp__down_proj=apart,
            mlp=PrepareModuleOutput(output_layouts=Partial(), desired_output_layouts=Replicate()),
        )
        parallelize_module(model.get_submodule(f"model.layers.{layer}"), mesh, plan)


def silent_sums(model: nn.Module, mesh: Any) -> None:
    """In the second layer the MLP's last matrix hands on partial sums as plain tensors, which do not say so."""
    plan = _blocks(
        mlp__down_proj=RowwiseParallel(output_layouts=Partial()),
        mlp=PrepareModuleOutput(output_layouts=Partial(), desired_output_layouts=Replicate()),
    )
    parallelize_module(model.get_submodule("model.layers.1"), mesh, plan)


def some_layers(model: nn.Module, mesh: Any) -> None:
    """The first layer is whole on every rank, and so are the third's MLP and the second's attention."""
    plan = _blocks()
    heads = {name: style for name, style in plan.items() if name.startswith("self_attn")}
    neurons = {name: style for name, style in plan.items() if name.startswith("mlp")}
    parallelize_module(model.get_submodule("model.layers.1"), mesh, neurons)
    parallelize_module(model.get_submodule("model.layers.2"), mesh, heads)


def uneven(model: nn.Module, mesh: Any) -> None:
    """Neurons that do not divide: between the matrices they are DTensors, which know how many each rank has."""
    apart = ColwiseParallel(use_local_output=False)
    for layer in _layers(model):
        plan = _blocks(mlp__gate_proj=apart, mlp__up_proj=apart)
        parallelize_module(model.get_submodule(f"model.layers.{layer}"), mesh, plan)


def nothing(model: nn.Module, mesh: Any) -> None:
    """Forgets to spread the model."""


def fails(model: nn.Module, mesh: Any) -> None:
    raise RuntimeError("a mistake of the user's own")


def fsdp(model: nn.Module, mesh: Any) -> None:
    for layer in _layers(model):
        fully_shard(model.get_submodule(f"model.layers.{layer}"), mesh=mesh)
    fully_shard(model, mesh=mesh)


def two_meshes(model: nn.Module, mesh: Any) -> None:
    other = init_device_mesh(mesh.device_type, (mesh.size(), 1), mesh_dim_names=("dp", "tp"))
    parallelize_module(model.get_submodule("model.layers.0"), mesh, _blocks())
    parallelize_module(model.get_submodule("model.layers.1"), other["tp"], _blocks())


def two_dimensions(model: nn.Module, mesh: Any) -> None:
    other = init_device_mesh(mesh.device_type, (mesh.size(), 1), mesh_dim_names=("dp", "tp"))
    head = model.get_submodule("lm_head")
    head.weight = nn.Parameter(
        distribute_tensor(model.get_parameter("lm_head.weight"), other, [Shard(0), Shard(0)])
    )


def other_numbers(model: nn.Module, mesh: Any) -> None:
    """The norms, which no plan names, are each rank's own."""
    tutorial(model, mesh)
    with torch.no_grad():
        model.get_parameter("model.layers.1.post_attention_layernorm.weight").mul_(1 + 0.1 * mesh.get_rank())


def fickle(model: nn.Module, mesh: Any) -> None:
    """What the MLPs' last matrix hands on depends on the prompt: sums, for one position more whole, for two plain."""

    def chosen(module: nn.Module, given: Any, output: Any) -> Any:
        extra = output.shape[1] % 4
        whole = output.redistribute(placements=[Replicate()]) if extra else output
        return whole.to_local() if extra == 2 else whole

    def whole(module: nn.Module, given: Any, output: Any) -> Any:
        distributed = hasattr(output, "redistribute")
        return output.redistribute(placements=[Replicate()]).to_local() if distributed else output

    apart = RowwiseParallel(output_layouts=Partial(), use_local_output=False)
    for layer in _layers(model):
        block = model.get_submodule(f"model.layers.{layer}")
        parallelize_module(block, mesh, _blocks(mlp__down_proj=apart))
        block.get_submodule("mlp.down_proj").register_forward_hook(chosen)
        block.get_submodule("mlp").register_forward_hook(whole)
