"""Memory of the pretend devices: CPU memory under the name of another device, counted as it comes and goes.

A pretend tensor is a plain ``torch.Tensor`` whose storage says ``pretend:1``. DLPack makes it: the capsule of a CPU
tensor, with the device written over. So storages, views, version counters, parameters and autograd are torch's own, and
every pretend tensor has a CPU tensor over the same bytes for the kernels to work on.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Sequence

import torch

CPU_KEY = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
"""Kernels of this key that only write metadata (sizes, strides, which storage) serve tensors of any device."""

_as_strided = torch.ops.aten.as_strided.default
_set = torch.ops.aten.set_.source_Storage_storage_offset

_DL_CPU, _DL_OTHER = (
    1,
    12,
)  # kDLCPU and kDLExtDev of the DLPack standard: torch reads the second as PrivateUse1
_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype = ctypes.c_void_p
_pointer_of.argtypes = [ctypes.py_object, ctypes.c_char_p]


class _Head(ctypes.Structure):
    """The first fields of a DLManagedTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_index", ctypes.c_int32),
    )


class _Owner(weakref.ref[torch.Tensor]):
    """The CPU tensor under one storage; it lives as long as the storage of the pretend tensors does."""

    __slots__ = ("address", "bytes", "index")


class Meter:
    """Bytes alive per device, and the most there have been since the meter was made."""

    def __init__(self, alive: Sequence[int] = ()) -> None:
        self.alive = dict(enumerate(alive))
        self.before = dict(self.alive)
        self.peak = dict(self.alive)

    def count(self, index: int, size: int) -> None:
        now = self.alive.get(index, 0) + size
        self.alive[index] = now
        if now > self.peak.get(index, 0):
            self.peak[index] = now


_owners: dict[int, _Owner] = {}
_lock = threading.RLock()  # a storage may die, and be counted, while another one is being counted
TOTAL = Meter()
_meters: list[Meter] = []


def start_meter() -> Meter:
    """A meter that starts from what is alive now."""
    with _lock:
        meter = Meter()
        meter.alive, meter.before, meter.peak = dict(TOTAL.alive), dict(TOTAL.alive), dict(TOTAL.alive)
        _meters.append(meter)
    return meter


def stop_meter(meter: Meter) -> None:
    """From now on, ``meter`` stays as it is."""
    with _lock:
        _meters.remove(meter)


def _count(index: int, size: int) -> None:
    with _lock:
        TOTAL.count(index, size)
        for meter in _meters:
            meter.count(index, size)


def _gone(owner: _Owner) -> None:
    del _owners[owner.address]
    _count(owner.index, -owner.bytes)


def adopt(tensor: torch.Tensor, index: int) -> torch.Tensor:
    """``tensor``, which is on the CPU and which nobody else keeps, as a tensor of pretend device ``index``."""
    storage = tensor.untyped_storage()
    size, stride, offset = tensor.size(), tensor.stride(), tensor.storage_offset()
    held = storage.nbytes()
    if tensor.numel() == 0 or held != tensor.numel() * tensor.element_size() or not tensor.is_contiguous():
        # The whole storage changes hands, with whatever part of it the tensor shows.
        base = torch.empty(0, dtype=tensor.dtype).set_(storage, 0, (held // tensor.element_size(),), (1,))
    else:
        base = tensor
    adopted = _renamed(base, _DL_CPU, _DL_OTHER, index)
    if held:
        owner = _Owner(base, _gone)
        owner.address, owner.bytes, owner.index = storage.data_ptr(), held, index
        _owners[owner.address] = owner
        _count(index, held)
    # DLPack also loses the strides of axes of size 1.
    if adopted.stride() != stride or adopted.size() != size:
        adopted = view(adopted, size, stride, offset)
    return adopted


def _renamed(tensor: torch.Tensor, expected: int, device_type: int, index: int) -> torch.Tensor:
    capsule = torch._C._to_dlpack(tensor)
    head = _Head.from_address(_pointer_of(capsule, b"dltensor"))
    assert head.device_type == expected, head.device_type
    head.device_type, head.device_index = device_type, index
    return torch._C._from_dlpack(capsule)


def underlying(tensor: torch.Tensor) -> torch.Tensor:
    """A CPU tensor over the same bytes as a pretend tensor, with its sizes and strides."""
    owner = _owners.get(tensor.untyped_storage().data_ptr())
    if owner is None:  # a storage of no bytes
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    base = owner()
    assert base is not None
    if base.dtype != tensor.dtype:
        return torch.empty(0, dtype=tensor.dtype).set_(
            base.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride()
        )
    return base.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


def address(tensor: torch.Tensor) -> int:
    """Where the storage of a CPU or pretend tensor begins: equal for all views of one storage, on either side."""
    return tensor.untyped_storage().data_ptr()


def view(tensor: torch.Tensor, size: Sequence[int], stride: Sequence[int], offset: int) -> torch.Tensor:
    """A view of the storage of a pretend tensor."""
    return _as_strided.redispatch(CPU_KEY, tensor, size, stride, offset)


def take_over(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Makes ``tensor`` show what ``other`` shows, and returns it: what a resize does."""
    return _set.redispatch(
        CPU_KEY, tensor, other.untyped_storage(), other.storage_offset(), other.size(), other.stride()
    )


def bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    """The whole of a storage, of the CPU or a pretend device, byte by byte."""
    empty = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return _set.redispatch(CPU_KEY, empty, storage, 0, (storage.nbytes(),), (1,))
