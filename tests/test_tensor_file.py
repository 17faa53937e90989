"""Files that are written piece by piece are those of safetensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tracelens import tensor_file

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool
)  # fmt: skip


def numbers(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return (100 * torch.randn(shape)).to(dtype)


@pytest.mark.parametrize("piece", [1 << 26, 16])
def test_what_is_written_is_read_back(piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_file, "PIECE", piece)
    tensors: dict[str, torch.Tensor] = {}
    for dtype in DTYPES:
        whole = numbers(3, 5, 7, dtype=dtype)
        name = str(dtype)
        tensors |= {
            f"{name}.whole": whole,
            f"{name}.part": whole[:, 1:4],
            f"{name}.turned": whole.permute(2, 0, 1),
            f"{name}.number": whole[0, 0, 0],
            f"{name}.nothing": whole[:, :0],
        }
    path = tmp_path / "x.safetensors"
    tensor_file.write_tensors(tensors, str(path))
    with safe_open(str(path), framework="pt") as file:
        assert sorted(file.keys()) == sorted(tensors)
        for key, tensor in tensors.items():
            found = file.get_tensor(key)
            assert found.dtype == tensor.dtype
            assert torch.equal(found, tensor)
    largest = max(tensor.nbytes for tensor in tensors.values())
    assert largest > 16


def test_a_name_with_signs_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensor_file.write_tensors({'a "b" \u00e9\n': torch.ones(2)}, str(path))
    with safe_open(str(path), framework="pt") as file:
        assert torch.equal(file.get_tensor('a "b" \u00e9\n'), torch.ones(2))
