"""Lets einops work on values: its patterns become reshapes, permutations and reductions with symbolic sizes.

einops finds backends by looking at the subclasses of its ``AbstractBackend``; defining one is all that is needed.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import EinopsError
from einops._backends import AbstractBackend  # pyright: ignore[reportPrivateUsage]  # the documented way to add a backend

from tracelens.errors import ShapeError
from tracelens.ir import dims
from tracelens.ir.dims import Dim, Sizes
from tracelens.location import here
from tracelens.operand import Operand, apply_torch


class AxisLength:
    """The length of an axis that depends on the prompt, with the arithmetic that einops does on lengths."""

    __slots__ = ("dim", "sizes")
    # Unhashable on purpose: einops then computes with the symbol instead of looking numbers up in its cache.
    __hash__ = None  # pyright: ignore[reportAssignmentType]  # Python's own way to say so

    def __init__(self, dim: Dim, sizes: Sizes | None) -> None:
        self.dim = dim
        self.sizes = sizes

    def __mul__(self, other: Any) -> Any:
        return _length(dims.multiply(self.dim, _dim(other)), self.sizes)

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Any:
        exact = dims.divide(self.dim, _dim(other))
        if exact is None:
            raise ShapeError(
                f"an axis of size {self.dim} cannot be split into parts of {other}, for prompts of any size",
                at=here(),
                instead="split axes whose size does not depend on the prompt",
            )
        return _length(exact, self.sizes)

    def __rfloordiv__(self, other: Any) -> Any:
        return (
            _length(_dim(other), self.sizes) // self
            if not isinstance(other, int)
            else AxisLength(other, self.sizes) // self
        )

    def __eq__(self, other: object) -> bool:
        return self.dim == _dim(other)

    def __repr__(self) -> str:
        return str(self.dim)


def _dim(length: Any) -> Dim:
    return length.dim if isinstance(length, AxisLength) else length


def _length(dim: Dim, sizes: Sizes | None) -> Any:
    return dim if isinstance(dim, int) else AxisLength(dim, sizes)


class _EinopsShape(tuple[Any, ...]):
    """A value's shape. einops shows it only when it reports a pattern that does not fit, and then we report that."""

    __slots__ = ()

    def __format__(self, spec: str) -> str:
        error = sys.exception()
        if isinstance(error, EinopsError):
            raise ShapeError(
                f"einops on a value with axes {tuple(self)}: {str(error).strip()}",
                at=here(),
                instead="a pattern that names each of these axes, with lengths that divide them",
            ) from None
        return super().__format__(spec)


class ValueBackend(AbstractBackend):
    """einops on tracelens values."""

    framework_name = "tracelens.einops_backend"

    def is_appropriate_type(self, tensor: Any) -> bool:
        return isinstance(tensor, Operand)

    def shape(self, x: Any) -> tuple[Any, ...]:
        if not _recording(x):
            return tuple(_tensor(x).shape)
        return _EinopsShape(_length(dim, x._recorder.sizes) for dim in _one(x)._type.shape)

    def reshape(self, x: Any, shape: Sequence[Any]) -> Any:
        if not _recording(x):
            return _tensor(x).reshape(tuple(shape))
        return x._apply("torch.reshape", (x, tuple(_dim(length) for length in shape)), None)

    def transpose(self, x: Any, axes: Sequence[int]) -> Any:
        return apply_torch(torch.permute, (x, tuple(axes)), {})

    def reduce(self, x: Any, operation: str, axes: Sequence[int]) -> Any:
        if operation == "prod":
            for axis in sorted(axes, reverse=True):
                x = apply_torch(torch.prod, (x,), {"dim": axis})
            return x
        function = {"min": torch.amin, "max": torch.amax}.get(operation) or getattr(torch, operation)
        return apply_torch(function, (x,), {"dim": tuple(sorted(axes))})

    def add_axis(self, x: Any, new_position: int) -> Any:
        return apply_torch(torch.unsqueeze, (x, new_position), {})

    def add_axes(self, x: Any, n_axes: int, pos2len: Mapping[int, Any]) -> Any:
        lengths: list[Any] = [-1] * n_axes
        for position, length in pos2len.items():
            x = self.add_axis(x, position)
            lengths[position] = _dim(length)
        if not _recording(x):
            return _tensor(x).expand(tuple(lengths))
        return x._apply("torch.Tensor.expand", (x, tuple(lengths)), None)

    def stack_on_zeroth_dimension(self, tensors: list[Any]) -> Any:
        return apply_torch(torch.stack, (tensors,), {})

    def concat(self, tensors: Sequence[Any], axis: int) -> Any:
        return apply_torch(torch.cat, (list(tensors),), {"dim": axis})

    def is_float_type(self, x: Any) -> bool:
        return bool(x.dtype.is_floating_point)

    def einsum(self, pattern: str, *x: Any) -> Any:
        return apply_torch(torch.einsum, (pattern, *x), {})


def _recording(x: Any) -> bool:
    """Is it part of a block that is open?  What einops makes of finished results on the way are plain tensors."""
    return isinstance(x, Operand) and x._is_recording()


def _tensor(x: Any) -> torch.Tensor:
    return x._result() if isinstance(x, Operand) else x


def _one(x: Any) -> Any:
    """The value itself, or one member of a mapped value."""
    return x._members[0] if hasattr(type(x), "_members") else x
