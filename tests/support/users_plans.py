"""Plans by which users spread a model over ranks, as ``tl.load(name, tp=2, parallelize="tests.support.users_plans:...")``.

The first is that of PyTorch's tutorial on tensor parallelism, for transformers' Llama and its relatives.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)


def _layers(model: Any) -> range:
    return range(model.config.num_hidden_layers)


def _blocks(**styles: Any) -> dict[str, Any]:
    return {
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(),
        "self_attn.o_proj": RowwiseParallel(),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(),
        **{name.replace("__", "."): style for name, style in styles.items()},
    }


def tutorial(model: nn.Module, mesh: Any) -> None:
    """Heads, neurons and the vocabulary on ranks; streams whole."""
    ends = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }
    parallelize_module(model, mesh, ends)
    for layer in _layers(model):
        parallelize_module(model.get_submodule(f"model.layers.{layer}"), mesh, _blocks())


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
