"""One call of an operation on pretend tensors: what GPUs would refuse or count, then the CPU's kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from tests.support.pretend import memory
from tests.support.pretend.seen import saw_read

below_autograd = torch._C._AutoDispatchBelowADInplaceOrView
"""Inside, torch records no gradient and counts no version: its own kernels above ours have done so already."""

_TAKES_CPU_SCALARS = {
    "aten::fill_",
    "aten::masked_fill_",
    "aten::_index_put_impl_",
    "aten::index_put",
    "aten::full_like",
}
"""Operations besides the pointwise ones that take a value without axes from the CPU."""

_NUMBERS = {"aten::remainder"}
"""Operations that come with a number in place of a tensor, and take none there: their variant for numbers does."""

_INDEXING = {"aten::index", "aten::_unsafe_index", "aten::_index_put_impl_", "aten::_unsafe_index_put"}

_HOST_READS = {
    "aten::_local_scalar_dense": "item",
    "aten::nonzero": "nonzero",
    "aten::masked_select": "masked_select",
    "aten::equal": "equal",
    "aten::_unique": "unique",
    "aten::_unique2": "unique",
    "aten::unique_dim": "unique",
    "aten::unique_consecutive": "unique",
    "aten::unique_dim_consecutive": "unique",
    "aten::bincount": "bincount",
    "aten::repeat_interleave": "repeat_interleave",
}
"""Operations whose result, or its size, the host must have."""


@dataclass(frozen=True)
class _Facts:
    """What the checks need to know of one operation."""

    name: str
    pointwise: bool
    indexing: bool
    reads: str | None
    writes: tuple[tuple[int, str], ...]
    """Place and name of each argument that it writes to."""


@cache
def _facts(op: torch._ops.OpOverload) -> _Facts:
    name = op._schema.name
    pointwise = torch.Tag.pointwise in op.tags or name in _TAKES_CPU_SCALARS
    writes = tuple(
        (place, argument.name)
        for place, argument in enumerate(op._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    reads = _HOST_READS.get(name)
    if name == "aten::repeat_interleave" and any(a.name == "self" for a in op._schema.arguments):
        reads = None  # made of the one that returns the repeats, which reads
    return _Facts(name, pointwise, name in _INDEXING, reads, writes)


def _two_devices(one: torch.device, other: torch.device, name: str) -> RuntimeError:
    return RuntimeError(
        f"Expected all tensors to be on the same device, but found at least two devices, {one} and {other}! "
        f"(when checking arguments of {name})"
    )


class _Call:
    """The arguments of one call, with CPU tensors in the place of the pretend ones."""

    def __init__(self, facts: _Facts) -> None:
        self.facts = facts
        self.device: torch.device | None = None
        self.on_cpu: list[torch.Tensor] = []
        self.generators: list[torch.Generator] = []
        self.taken: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def replaced(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, (list, tuple)):
            return [self.replaced(member) for member in value]
        if isinstance(value, torch.device) and value.type == "pretend":
            self._meet(value)
            return torch.device("cpu")
        if isinstance(value, torch.Generator):
            self.generators.append(value)
        return value

    def _tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        device = tensor.device
        if device.type != "pretend":
            self.on_cpu.append(tensor)
            return tensor
        self._meet(device)
        if self.facts.writes and tensor.numel() == 0:
            # An empty result is there to be resized, which a storage of the CPU could not be without moving.
            lent = torch.empty_like(tensor, device="cpu")
        else:
            lent = memory.underlying(tensor)
        self.taken[id(lent)] = (lent, tensor)
        return lent

    def _meet(self, device: torch.device) -> None:
        if self.device is None:
            self.device = device
        elif self.device != device:
            raise _two_devices(self.device, device, self.facts.name)

    def check(self) -> torch.device:
        """Refuses what GPUs refuse; the device of the call."""
        device = self.device
        assert device is not None, self.facts.name
        for tensor in self.on_cpu:
            if tensor.device.type != "cpu" or tensor.dim() > 0 or not self.facts.pointwise:
                raise _two_devices(device, tensor.device, self.facts.name)
        if self.generators:
            raise RuntimeError(f"Expected a 'pretend' device type for generator but found 'cpu' ({device})")
        return device

    def returned(self, value: Any, device: torch.device) -> Any:
        """The pretend tensors for what the CPU's kernel gave."""
        if isinstance(value, torch.Tensor):
            lent = self.taken.get(id(value))
            if lent is not None:
                return lent[1]
            begins = memory.address(value)
            if begins:
                for _, tensor in self.taken.values():
                    if memory.address(tensor) == begins:
                        return memory.view(tensor, value.size(), value.stride(), value.storage_offset())
            return memory.adopt(value, device.index)
        if isinstance(value, (list, tuple)):
            return type(value)(self.returned(member, device) for member in value)
        return value

    def resized(self) -> None:
        """Tensors that the kernel has resized show their new memory."""
        for lent, tensor in self.taken.values():
            if lent.size() != tensor.size():
                memory.take_over(tensor, memory.adopt(lent, tensor.device.index))


def run(op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Any:
    """``op`` on pretend tensors, all of one device."""
    facts = _facts(op)
    if facts.name in _NUMBERS and len(args) > 1 and not isinstance(args[1], torch.Tensor):
        op = op.overloadpacket.Scalar
    if facts.indexing:
        written = args[2] if len(args) > 2 else None
        args = (args[0], _indices(args[0], args[1], written), *args[2:])
    call = _Call(facts)
    with below_autograd():
        lent_args = [call.replaced(value) for value in args]
        lent_kwargs = {name: call.replaced(value) for name, value in kwargs.items()}
        device = call.check()
        for place, name in facts.writes:
            written = args[place] if place < len(args) else kwargs.get(name)
            if isinstance(written, torch.Tensor) and written.device != device:
                raise _two_devices(device, written.device, facts.name)
        if facts.reads is not None:
            saw_read(facts.reads, device)
        result = op(*lent_args, **lent_kwargs)
        if facts.writes:
            call.resized()
        return call.returned(result, device)


def _indices(
    tensor: torch.Tensor, indices: Sequence[torch.Tensor | None], written: torch.Tensor | None
) -> list[torch.Tensor | None]:
    """The indices on the device of the indexed tensor: those from the CPU travel, as they do on GPUs.

    A mask is turned into positions, whose number the host must know, unless one number is written under it.
    """
    filled = written is not None and written.numel() == 1
    found: list[torch.Tensor | None] = []
    for index in indices:
        if index is not None and index.device != tensor.device:
            if index.device.type != "cpu":
                raise RuntimeError(
                    "indices should be either on cpu or on the same device as the indexed tensor "
                    f"({tensor.device}): Expected all tensors to be on the same device, but found at least two "
                    f"devices, {tensor.device} and {index.device}!"
                )
            index = index.to(tensor.device)
        if index is not None and index.dtype in (torch.bool, torch.uint8) and not filled:
            saw_read("nonzero", index.device)
        found.append(index)
    return found
