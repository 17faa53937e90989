"""A model that you spread over ranks by a plan of your own, that of PyTorch's tutorial on tensor parallelism.

Three processes, which this one launches; on a machine with GPUs each takes one.

    python -m examples.parallel_plan
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import tracelens as tl

PROMPT = "The capital of France is"


ENDS = {
    "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
    "lm_head": ColwiseParallel(output_layouts=Replicate()),
}
BLOCK = {
    "self_attn.q_proj": ColwiseParallel(),
    "self_attn.k_proj": ColwiseParallel(),
    "self_attn.v_proj": ColwiseParallel(),
    "self_attn.o_proj": RowwiseParallel(),
    "mlp.gate_proj": ColwiseParallel(),
    "mlp.up_proj": ColwiseParallel(),
    "mlp.down_proj": RowwiseParallel(),
}


def tutorial(model: nn.Module, mesh: Any) -> None:
    """Heads, neurons and rows of the vocabulary on ranks; every rank calls it with the whole model."""
    parallelize_module(model, mesh, ENDS)
    for layer in model.get_submodule("model.layers").children():
        parallelize_module(layer, mesh, BLOCK)


def main(model: tl.Model | None = None) -> tl.Results:
    """Runs a block over neurons and heads of all ranks, and prints what they exchange for it."""
    if model is None:
        model = tl.load("smollm2-135m", tp=3, parallelize="examples.parallel_plan:tutorial")
    with model.trace(PROMPT) as t:
        model.layers[1].mlp_act[..., :70] = 0
        model.layers[8].head(3).z = 0
        model.layers[5].mlp_act.mean(-1).save("mean")
        model.layers[4].q.save("q")
        model.logits[:, -1].argmax(-1).save("best")
    print(t.explain())
    print(repr(model.tokenizer.decode(t["best"])))
    return t.results


if __name__ == "__main__":
    main()
