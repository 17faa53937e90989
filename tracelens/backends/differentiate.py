"""Backward passes: what takes gradients in a hook, and the state of autograd around a run that has some."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tracelens.errors import UndifferentiableModelError, UnusedGradientError
from tracelens.ir.gradients import site_read
from tracelens.ir.graph import Graph
from tracelens.ir.ops import Grad

Gradients = Callable[[torch.Tensor, Sequence[torch.Tensor]], Sequence[torch.Tensor]]
"""Takes the gradients of a loss with respect to tensors."""


def gradients_of(graph: Graph) -> Mapping[int, Gradients]:
    """What takes the gradients of a planned graph, by the numbers of its operations.

    All but the last keep autograd's graph for the next.
    """
    numbers = [number for number, op in enumerate(graph.ops) if isinstance(op, Grad)]
    return {number: _gradients(graph, number, last=number == numbers[-1]) for number in numbers}


def _gradients(graph: Graph, number: int, *, last: bool) -> Gradients:
    op = graph.ops[number]
    assert isinstance(op, Grad)
    reads = [site_read(graph.ops[graph.producer[value]], graph.ops) for value in op.wrt]

    def gradients(loss: torch.Tensor, wrt: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        found: Sequence[torch.Tensor | None] = [None]
        if loss.requires_grad:
            found = torch.autograd.grad(loss, wrt, retain_graph=not last, allow_unused=True)
        if last:
            # What is still to come of the forward pass leaves no history; the run's end resets the mode.
            torch.set_grad_enabled(False)
        whole = [part for part in found if part is not None]
        if len(whole) != len(wrt):
            unused = next(read for part, read in zip(found, reads, strict=False) if part is None)
            raise UnusedGradientError(
                f"the loss does not depend on {'the computed value' if unused is None else unused.site}: nothing that "
                "has a derivative leads from there to it",
                instead="a loss that is computed from that value, or from a site behind the write that it goes into"
                if unused is None
                else "a loss that is computed from that site, or the gradient without it",
            )
        return whole

    return gradients


def usable(tensor: Any) -> Any:
    """The tensor, or a copy if it was made in inference mode: autograd could not keep it for the backward pass."""
    return tensor.clone() if isinstance(tensor, torch.Tensor) and tensor.is_inference() else tensor


def require_differentiable(model: nn.Module) -> None:
    """Raises :class:`UndifferentiableModelError` for a model in a state that makes gradients wrong or impossible."""
    for path, module in model.named_modules():
        if module.training and getattr(module, "gradient_checkpointing", False):
            raise UndifferentiableModelError(
                f"{path or 'the model'} computes its activations again in the backward pass, where no hook would act",
                instead="model.hf.eval(), or the model without gradient checkpointing",
            )
    for path, parameter in model.named_parameters():
        if parameter.is_inference():
            raise UndifferentiableModelError(
                f"the parameter {path!r} was made in inference mode, so autograd cannot use it",
                instead="load the model outside torch.inference_mode()",
            )
