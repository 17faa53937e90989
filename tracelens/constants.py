"""Tensors that a graph captures from the user: by reference, with the version that they had."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch

from tracelens.errors import ConstantChangedError, DtypeError, MetaTensorError
from tracelens.ir.infer import dtype_of, torch_dtype
from tracelens.ir.types import TensorType
from tracelens.location import Location


@dataclass(frozen=True, slots=True, eq=False)
class Captured:
    """A tensor that a graph uses, held by reference.

    Changing it between the line that captured it and the run is a :class:`ConstantChangedError`: the graph could mean
    the old numbers or the new ones, and either guess would be wrong for somebody.
    """

    tensor: torch.Tensor
    type: TensorType
    version: int | None
    source: np.ndarray | None = None
    name: str | None = None
    private: bool = False
    """Can nobody else change the tensor? Of others a copy on a device goes stale without a trace: ``p.data = new``."""

    def check(self, at: Location | None) -> None:
        """Raises :class:`ConstantChangedError` if the tensor is no longer what was captured."""
        if self.source is not None:
            changed = not np.array_equal(
                self.source, self.tensor.numpy(), equal_nan=self.source.dtype.kind in "fc"
            )
        else:
            changed = self.version is not None and self.tensor._version != self.version
        if changed:
            raise ConstantChangedError(
                f"a {self.type} captured by the trace was changed before the run",
                at=at,
                instead="capture a copy (tensor.clone()), or change the tensor before or after the block",
            )

    def payload(self) -> bytes:
        flat = self.tensor.detach().cpu().contiguous().reshape(-1)
        return cast(bytes, flat.view(torch.uint8).numpy().tobytes())

    def owned(self) -> Captured:
        """The same constant with a tensor that nobody else can change."""
        copy = self.tensor.detach().clone()
        return Captured(copy, self.type, copy._version, None, self.name, private=True)


def capture(value: torch.Tensor | np.ndarray | np.generic, name: str | None = None) -> Captured:
    """The constant that ``value`` becomes in a graph.

    Raises :class:`DtypeError` for dtypes that a graph does not know and for float64 numpy arrays, which are nearly
    always float32 numbers that numpy widened on the way, and :class:`MetaTensorError` for tensors without numbers.
    """
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided or value.is_quantized:
            raise DtypeError(
                f"a {value.layout} tensor cannot be used in a trace",
                instead="use a dense tensor: x.to_dense()",
            )
        if value.is_meta:
            raise MetaTensorError(
                "a tensor on the meta device has no numbers, so it cannot be used in a trace",
                instead="a tensor with numbers: torch.zeros(shape); for a weight of the model, which may be offloaded, "
                'model.param("model.norm.weight"), model.unembed, or a call of its module',
            )
        kind = TensorType(dtype_of(value.dtype), tuple(value.shape))
        # Inference tensors keep no version; a copy is the only way to be sure of their numbers.
        if value.is_inference():
            return Captured(value.clone(), kind, None, None, name)
        return Captured(value, kind, value._version, None, name)
    array = np.asarray(value)
    if array.dtype == np.float64:
        raise DtypeError(
            f"a float64 numpy array of shape {array.shape} was used with a traced value",
            instead="array.astype(np.float32), or torch.from_numpy(array) if float64 is meant",
        )
    try:
        # A copy holds the numbers of now; the array itself is looked at again before the run.
        tensor = torch.from_numpy(np.array(array, copy=True, order="C"))
    except TypeError:
        raise DtypeError(f"a numpy array of dtype {array.dtype} cannot be used in a trace") from None
    source = array if isinstance(value, np.ndarray) else None
    return Captured(tensor, TensorType(dtype_of(tensor.dtype), tuple(tensor.shape)), None, source, name)


def from_payload(data: bytes, kind: TensorType, name: str | None) -> Captured:
    """The inverse of :meth:`Captured.payload`."""
    shape = tuple(size for size in kind.shape if isinstance(size, int))
    buffer = (
        torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    )
    tensor = buffer.view(torch_dtype(kind.dtype)).reshape(shape)
    return Captured(tensor, kind, tensor._version, None, name)
