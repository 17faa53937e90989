"""What is known of a value before the run: its dtype and its shape, with the prompt's sizes as symbols."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from tracelens.ir import dims
from tracelens.ir.dims import Dim, Sizes


class DType(Enum):
    """The dtypes that a graph knows, named as torch names them."""

    FLOAT64 = "float64"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    INT64 = "int64"
    INT32 = "int32"
    INT16 = "int16"
    INT8 = "int8"
    UINT8 = "uint8"
    BOOL = "bool"
    COMPLEX64 = "complex64"
    COMPLEX128 = "complex128"

    @property
    def is_floating(self) -> bool:
        return self in _FLOATING

    @property
    def is_complex(self) -> bool:
        return self in (DType.COMPLEX64, DType.COMPLEX128)

    @property
    def itemsize(self) -> int:
        return _BYTES[self]

    @property
    def short(self) -> str:
        """The name in the text form of a graph: ``f32``, ``bf16``, ``i64``."""
        return _SHORT[self]


_FLOATING = frozenset({DType.FLOAT64, DType.FLOAT32, DType.BFLOAT16, DType.FLOAT16})
_BYTES = {
    DType.FLOAT64: 8,
    DType.FLOAT32: 4,
    DType.BFLOAT16: 2,
    DType.FLOAT16: 2,
    DType.INT64: 8,
    DType.INT32: 4,
    DType.INT16: 2,
    DType.INT8: 1,
    DType.UINT8: 1,
    DType.BOOL: 1,
    DType.COMPLEX64: 8,
    DType.COMPLEX128: 16,
}
_SHORT = {
    DType.FLOAT64: "f64",
    DType.FLOAT32: "f32",
    DType.BFLOAT16: "bf16",
    DType.FLOAT16: "f16",
    DType.INT64: "i64",
    DType.INT32: "i32",
    DType.INT16: "i16",
    DType.INT8: "i8",
    DType.UINT8: "u8",
    DType.BOOL: "bool",
    DType.COMPLEX64: "c64",
    DType.COMPLEX128: "c128",
}
DTYPE_BY_SHORT = {short: dtype for dtype, short in _SHORT.items()}


@dataclass(frozen=True, slots=True)
class TensorType:
    """A dtype and a shape: ``f32[B,P,576]``.

    An axis whose size is exactly ``P`` carries the prompt's positions; exactly ``B``, its rows; exactly ``S``, the
    keys that attention looks at.
    """

    dtype: DType
    shape: tuple[Dim, ...]

    def __str__(self) -> str:
        return f"{self.dtype.short}[{','.join(str(dim) for dim in self.shape)}]"

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def position_axes(self) -> tuple[int, ...]:
        """The axes that carry the prompt's positions."""
        return tuple(axis for axis, dim in enumerate(self.shape) if dim == dims.P)

    @property
    def padded_axes(self) -> tuple[int, ...]:
        """The axes that begin with a row's padding: positions, and the keys that attention looks at."""
        return tuple(axis for axis, dim in enumerate(self.shape) if dim in (dims.P, dims.S))

    @property
    def batch_axis(self) -> int | None:
        """The axis that carries the prompt's rows, if there is one."""
        return next((axis for axis, dim in enumerate(self.shape) if dim == dims.B), None)

    @property
    def symbols(self) -> frozenset[str]:
        return frozenset[str]().union(*(dims.symbols(dim) for dim in self.shape))

    def sizes(self, sizes: Sizes) -> tuple[int, ...]:
        """The shape as numbers."""
        return tuple(dims.evaluate(dim, sizes) for dim in self.shape)

    def nbytes(self, sizes: Sizes) -> int:
        total = self.dtype.itemsize
        for size in self.sizes(sizes):
            total *= size
        return total


def parse_type(text: str) -> TensorType:
    """The inverse of ``str(tensor_type)``; raises ``ValueError`` on anything else."""
    name, bracket, rest = text.partition("[")
    if name not in DTYPE_BY_SHORT or not bracket or not rest.endswith("]"):
        raise ValueError(f"{text!r} is not a type")
    inner = rest[:-1]
    # Slice lengths contain brackets but never commas, so that a comma always separates axes.
    return TensorType(
        DTYPE_BY_SHORT[name], tuple(dims.parse(part) for part in inner.split(",")) if inner else ()
    )


def bytes_text(count: int) -> str:
    """A number of bytes for reading: ``"3.8 KiB"``."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
