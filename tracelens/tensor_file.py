"""Writes safetensors files piece by piece: parts of larger tensors, which may lie in files themselves, are not copied
into memory as a whole first."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, BinaryIO

import torch

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
PIECE = 1 << 26
"""So many bytes are in memory at once, if a tensor can be cut so small."""


def write_tensors(tensors: Mapping[str, torch.Tensor], path: str) -> None:
    """Writes tensors of the host, of any strides, to a safetensors file.

    The file is that of ``safetensors.torch.save_file``, which wants each tensor in one piece of memory; what older
    versions of the format have no name for (complex numbers) goes that way.
    """
    if any(tensor.dtype not in _NAMES for tensor in tensors.values()):
        from safetensors.torch import save_file

        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
        return
    # The wider numbers first, so that each stands at a place that is a multiple of its size.
    order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))
    header: dict[str, Any] = {}
    end = 0
    for key in order:
        tensor = tensors[key]
        begin, end = end, end + tensor.nbytes
        header[key] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    data = json.dumps(header, separators=(",", ":")).encode()
    data += b" " * (-len(data) % 8)
    with open(path, "wb") as file:
        file.write(len(data).to_bytes(8, "little"))
        file.write(data)
        for key in order:
            _write(tensors[key].detach(), file)


def _write(tensor: torch.Tensor, file: BinaryIO) -> None:
    if tensor.nbytes > PIECE and tensor.ndim > 1:
        for part in tensor.unbind(0):
            _write(part, file)
        return
    flat = tensor.contiguous().reshape(-1)
    file.write(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
