"""Linear modules as libraries of quantised models have them, without the libraries: same names, shapes and dtypes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_SHIFTS = 4 * torch.arange(8, dtype=torch.int32)


class FourBits(nn.Module):
    """As GPTQ and AWQ: eight numbers in an int32 of ``qweight``, ``scales`` for rows, no ``weight``."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scales = weight.abs().amax(1) / 7
        numbers = (weight / scales[:, None]).round().to(torch.int32) + 8
        packed = (numbers.unflatten(1, (-1, 8)) << _SHIFTS).sum(-1).to(torch.int32)
        self.register_buffer("qweight", packed)
        self.register_buffer("scales", scales.half())
        self.bias = linear.bias

    def matrix(self) -> Tensor:
        numbers = ((self.qweight[..., None] >> _SHIFTS) & 15) - 8
        return numbers.flatten(1) * self.scales.float()[:, None]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.matrix().to(x.dtype), self.bias)


class Bytes(nn.Module):
    """As bitsandbytes in 8 bits: ``weight`` is there, of its usual shape, in int8, and means nothing without scales."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scales = weight.abs().amax(1) / 127
        self.weight = nn.Parameter((weight / scales[:, None]).round().to(torch.int8), requires_grad=False)
        self.register_buffer("SCB", scales)
        self.bias = linear.bias

    def matrix(self) -> Tensor:
        return self.weight.float() * self.SCB[:, None]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.matrix().to(x.dtype), self.bias)


class Flat(Bytes):
    """As bitsandbytes in 4 bits: ``weight`` is one column of bytes."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self._shape = tuple(self.weight.shape)
        flat = (self.weight.data.int() + 128).to(torch.uint8).reshape(-1, 1)
        self.weight = nn.Parameter(flat, requires_grad=False)

    def matrix(self) -> Tensor:
        return (self.weight.reshape(self._shape).float() - 128) * self.SCB[:, None]


def packed(hf: Any, kind: Any, *, head: bool = False) -> Any:
    """The model with all its linear modules replaced; ``head``: the unembedding too, which libraries mostly leave."""
    for path, module in list(hf.named_modules()):
        if isinstance(module, nn.Linear) and (head or path != "lm_head"):
            owner, _, name = path.rpartition(".")
            setattr(hf.get_submodule(owner), name, kind(module))
    return hf
