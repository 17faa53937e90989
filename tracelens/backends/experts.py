"""What the chosen experts of each token make of it, one by one: transformers returns only their sum.

How a module of experts computes is read off the module itself, which transformers describes for the functions of its
table (``use_experts_implementation``): where the matrices are, which way they lie, whether there are biases and a gate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Weight = Callable[[str], Tensor]
"""A parameter of the module, by its name in it."""

ON_RANKS = (
    "ranks share its experts, and none has what each of them makes; mlp_out is there, and so are router_logits, "
    "expert_index and expert_weights; on one device, or spread by device_map, the model has it"
)


def unfit(module: nn.Module) -> str | None:
    """Why it is not known what a module's experts return one by one, if it is not."""
    kind = type(module).__name__
    if not all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "_apply_gate")):
        return f"{kind} is not among the modules of experts that transformers describes"
    if getattr(module, "has_post_expert_norm", False):
        return f"{kind} norms what each expert returns, which is not taken apart"
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    for name in names:
        matrices = getattr(module, name, None)
        if not isinstance(matrices, Tensor) or matrices.ndim != 3 or not matrices.is_floating_point():
            return f"{kind} does not keep {name} as one tensor of matrices, one for each expert"
    return None


@dataclass(frozen=True, slots=True)
class Routes:
    """Which rows go to which expert: the rows of all tokens, for each of their k places, by expert.

    ``order``: of the rows [k * T], those of one place after those of another, the numbers in the order of their
    experts; ``counts``: how many rows each expert has. ``k``: how many experts a token goes to.
    """

    order: Tensor
    counts: tuple[int, ...]
    k: int

    @classmethod
    def of(cls, index: Tensor, experts: int) -> Routes:
        """The routes of ``index`` [T, k], with numbers below ``experts``."""
        # Place by place and token by token: each expert has its rows as transformers' own loop gives them to it.
        flat = index.t().reshape(-1)
        counts = torch.bincount(flat, minlength=experts).tolist()
        return cls(torch.argsort(flat, stable=True), tuple(counts), index.shape[-1])

    def each(self, rows: Tensor, does: Callable[[int, Tensor], Tensor]) -> Tensor:
        """``does(expert, rows)`` of the rows of each expert that has some: [T, k, n], of ``rows`` [T, k, m]."""
        sorted_ = rows.transpose(0, 1).flatten(0, 1)[self.order]
        parts = [
            does(expert, part)
            for expert, part in enumerate(sorted_.split(self.counts))
            if self.counts[expert]
        ]
        back = torch.empty_like(self.order)
        back[self.order] = torch.arange(len(back), device=back.device)
        return torch.cat(parts)[back].unflatten(0, (self.k, -1)).transpose(0, 1)


def neurons(module: Any, weight: Weight, rows: Tensor, routes: Routes) -> Tensor:
    """The neurons [T, k, N] of the experts of each row of ``rows`` [T, D]."""
    name = "gate_up_proj" if module.has_gate else "up_proj"
    active = module._apply_gate if module.has_gate else module.act_fn
    products = _products(module, weight, name)
    return routes.each(
        rows[:, None].expand(-1, routes.k, -1), lambda expert, own: active(products(expert, own))
    )


def returned(module: Any, weight: Weight, act: Tensor, routes: Routes) -> Tensor:
    """What these experts return [T, k, D], of their neurons [T, k, N]."""
    return routes.each(act, _products(module, weight, "down_proj"))


def _products(module: Any, weight: Weight, name: str) -> Callable[[int, Tensor], Tensor]:
    matrices = weight(name)
    biases = weight(f"{name}_bias") if module.has_bias else None

    def product(expert: int, rows: Tensor) -> Tensor:
        matrix = matrices[expert]
        bias = None if biases is None else biases[expert]
        if not module.is_transposed:
            return nn.functional.linear(rows, matrix, bias)
        found = rows @ matrix
        return found if bias is None else found + bias

    return product


def summed(out: Tensor, weights: Tensor) -> Tensor:
    """What a module of experts returns: the sum of ``out`` [T, k, D], weighted, in the dtype of ``out``."""
    return (out * weights[..., None]).sum(1).to(out.dtype)
