"""The kernels of the pretend devices: a few of their own (memory, copies, attention), the CPU's for all the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from tests.support.pretend import memory
from tests.support.pretend.calls import below_autograd, run
from tests.support.pretend.seen import saw_copy

_aten: Any = torch.ops.aten

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


def _device_index(device: torch.device | None) -> int:
    if device is not None and device.index is not None:
        return device.index
    return torch.pretend.current_device()  # there once it is registered


def _empty(
    size: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    layout: Any = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
    memory_format: torch.memory_format | None = None,
) -> torch.Tensor:
    with below_autograd():
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
    with below_autograd():
        made = _aten.empty_strided.default(size, stride, dtype=dtype, layout=layout)
        return memory.adopt(made, _device_index(device))


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """The one kernel behind ``copy_``, ``to`` and ``clone``."""
    if source.device != target.device and source.numel():
        saw_copy(source, target, non_blocking)
    with below_autograd():
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
        # What torch asks a new device for; backwards there is none.
        "convolution_overrideable": partial(run, _aten.convolution.default),
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
