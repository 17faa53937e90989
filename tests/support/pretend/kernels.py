"""Every operation of the pretend devices: the CPU's, on the same bytes, after the checks that GPUs make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from tests.support.pretend import memory
from tests.support.pretend.seen import saw_copy, saw_read

_aten: Any = torch.ops.aten
_below_autograd = torch._C._AutoDispatchBelowADInplaceOrView

_TAKES_CPU_SCALARS = {
    "aten::fill_",
    "aten::masked_fill_",
    "aten::_index_put_impl_",
    "aten::index_put",
    "aten::full_like",
}
"""Operations besides the pointwise ones that take a value without axes from the CPU."""

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

_METADATA = (
    "as_strided",
    "view",
    "_reshape_alias",
    "unfold",
    "view_as_real",
    "view_as_complex",
    "set_.source_Storage",
    "set_.source_Storage_storage_offset",
    "set_.source_Tensor",
)
"""Operations that read and write no value: the CPU's kernels serve any device, and keep the storage."""


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
    if facts.indexing:
        written = args[2] if len(args) > 2 else None
        args = (args[0], _indices(args[0], args[1], written), *args[2:])
    call = _Call(facts)
    with _below_autograd():
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


def _device_index(device: torch.device | None) -> int:
    if device is not None and device.index is not None:
        return device.index
    return torch.pretend.current_device()  # type: ignore[attr-defined]


def _empty(
    size: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    layout: Any = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
    memory_format: torch.memory_format | None = None,
) -> torch.Tensor:
    with _below_autograd():
        made = _aten.empty.memory_format(size, dtype=dtype, layout=layout, memory_format=memory_format)
        return memory.adopt(made, _device_index(device))


def _empty_strided(
    size: Sequence[int],
    stride: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    layout: Any = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
) -> torch.Tensor:
    with _below_autograd():
        made = _aten.empty_strided.default(size, stride, dtype=dtype, layout=layout)
        return memory.adopt(made, _device_index(device))


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """The one kernel behind ``copy_``, ``to`` and ``clone``."""
    if source.device != target.device and source.numel():
        saw_copy(source, target, non_blocking)
    with _below_autograd():
        _plain(target).copy_(_plain(source))
    return target


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return memory.underlying(tensor) if tensor.device.type == "pretend" else tensor


def _to_copy(
    tensor: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    layout: Any = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
    non_blocking: bool = False,
    memory_format: torch.memory_format | None = None,
) -> torch.Tensor:
    """As torch's, but without pinned memory for a copy to the CPU that does not block: there is none here."""
    wanted = torch.preserve_format if memory_format is None else memory_format
    target = tensor.device if device is None else device
    made = torch.empty_like(tensor, dtype=dtype, device=target, memory_format=wanted)
    return made.copy_(tensor, non_blocking=non_blocking)


def _resize(tensor: torch.Tensor, size: Sequence[int], *, memory_format: Any = None) -> torch.Tensor:
    needed = torch.empty(tuple(size), device="meta").numel()
    held = tensor.untyped_storage().nbytes() // tensor.element_size() - tensor.storage_offset()
    stride = torch.empty(tuple(size), device="meta").stride()
    if needed <= held:
        return memory.take_over(tensor, memory.view(tensor, size, stride, tensor.storage_offset()))
    grown = torch.empty(tuple(size), dtype=tensor.dtype, device=tensor.device)
    old = memory.view(tensor, (tensor.numel(),), (1,), tensor.storage_offset())
    memory.view(grown, (tensor.numel(),), (1,), 0).copy_(old)
    return memory.take_over(tensor, grown)


def _same_kind(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """What lets ``module.to("pretend:0")`` keep its parameters, as it does for GPUs."""
    return tensor.layout == other.layout == torch.strided


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **settings: Any,
) -> torch.Tensor:
    """One kernel, the CPU's: torch would choose among its ways by the device, and give other last bits."""
    if dropout_p == 0.0 and torch.is_grad_enabled():
        inputs = [query, key, value] if attn_mask is None else [query, key, value, attn_mask]
        if any(tensor.requires_grad for tensor in inputs):
            return _Attention.apply(query, key, value, attn_mask, is_causal, settings)
    return run(
        _aten.scaled_dot_product_attention.default,
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        **settings,
    )


class _Attention(torch.autograd.Function):
    """Attention with a gradient: computed once more on the CPU, where autograd does the rest."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, mask: Any, causal: bool, settings: Any) -> Any:
        ctx.save_for_backward(query, key, value, mask)
        ctx.causal, ctx.settings = causal, settings
        return run(
            _aten.scaled_dot_product_attention.default, query, key, value, mask, 0.0, causal, **settings
        )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        needs = ctx.needs_input_grad[:4]
        lent = [
            None if tensor is None else _plain(tensor).detach().requires_grad_(need)
            for tensor, need in zip(ctx.saved_tensors, needs, strict=True)
        ]
        with torch.enable_grad():
            out = _aten.scaled_dot_product_attention.default(*lent, 0.0, ctx.causal, **ctx.settings)
        asked = [tensor for tensor, need in zip(lent, needs, strict=True) if need]
        found = iter(torch.autograd.grad(out, asked, _plain(gradient)))
        index = gradient.device.index
        return (*(memory.adopt(next(found), index) if need else None for need in needs), None, None)


def _nothing(*_: Any) -> None:
    """What a stream waits for is done already."""


def register() -> list[torch.library.Library]:
    """Puts the kernels into torch's dispatcher, for the pretend devices alone; the libraries must be kept."""
    aten, everything = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
    own: dict[str, Callable[..., Any]] = {
        "empty.memory_format": _empty,
        "empty_strided": _empty_strided,
        "_copy_from": _copy_from,
        "_to_copy": _to_copy,
        "resize_": _resize,
        "_has_compatible_shallow_copy_type": _same_kind,
        "scaled_dot_product_attention": _attention,
        "record_stream": _nothing,
    }
    own |= {name: partial(_overload(name).redispatch, memory.CPU_KEY) for name in _METADATA}
    for name, kernel in own.items():
        aten.impl(name, kernel, "PrivateUse1")
    aten.impl("scaled_dot_product_attention", _attention, "AutogradPrivateUse1")
    for name in _made_of_others() - own.keys():
        aten.impl(name, partial(run, _overload(name)), "PrivateUse1")
    everything.fallback(run, "PrivateUse1")
    return [aten, everything]


def _made_of_others() -> set[str]:
    """The operations that torch makes of others for a new device, although the CPU has a kernel of its own.

    Made of others, they may differ in the last bits (layer norm does), and each costs several calls.
    """
    composites = (
        "CompositeExplicitAutogradNonFunctional",
        "CompositeExplicitAutograd",
        "CompositeImplicitAutograd",
    )
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return {
        name.removeprefix("aten::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("aten::")
        and has_kernel(name, "CPU")
        and any(has_kernel(name, key) for key in composites)
    }


def _overload(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(_aten, packet), overload or "default")
