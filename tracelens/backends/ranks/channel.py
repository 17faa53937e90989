"""Messages over a connected socket: one JSON header and tensors, never a pickle.

A message is sixteen bytes and eight, then its two parts::

    b"tracelens:rank\\r\\n"   bytes of the header   bytes of the tensors   header   tensors
    16 bytes                8, little-endian      8                      JSON     a safetensors file, or nothing

Tensors are sent out of their own memory, and each arrives in memory of its own, so a big one is not copied on the way
and keeps no other one alive.
"""

from __future__ import annotations

import json
import math
import socket
import struct
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from tracelens.errors import RankMessageError

MARK = b"tracelens:rank\r\n"
_SIZES = struct.Struct("<QQ")
_SIZE = struct.Struct("<Q")
LONGEST_HEADER = 1 << 28
"""Bytes of a header: a graph of a million lines has room."""
MOST_BYTES = 1 << 40
"""Bytes of a message's tensors, together."""

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


@dataclass(frozen=True)
class Message:
    """What is said: ``header``, of JSON's types, and ``tensors`` by name, on the CPU."""

    header: Mapping[str, Any] = field(default_factory=dict[str, Any])
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])


class Channel:
    """One end of a socket, for whole messages. One thread at a time may receive; those that send take turns."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._sending = threading.Lock()

    def send(self, parts: Sequence[bytes | memoryview]) -> None:
        """Sends what :func:`encoded` made of a message; raises ``OSError`` where the peer is gone."""
        with self._sending:
            for part in parts:
                self.connection.sendall(part)

    def receive(self) -> Message:
        """The next message. ``EOFError``: the peer has closed. ``RankMessageError``: that was no message."""
        start = self._take(bytearray(len(MARK) + _SIZES.size))
        if not start.startswith(MARK):
            raise RankMessageError(f"a message was to begin here, and did not: {bytes(start[:16])!r}")
        header_size, tensors_size = _SIZES.unpack_from(start, len(MARK))
        if header_size > LONGEST_HEADER or tensors_size > MOST_BYTES:
            raise RankMessageError(
                f"a message of {header_size} and {tensors_size} bytes was announced; at most {LONGEST_HEADER} and"
                f" {MOST_BYTES} are accepted"
            )
        header = _parsed(self._take(bytearray(header_size)), "the header of a message")
        return Message(header, self._tensors(tensors_size) if tensors_size else {})

    def close(self) -> None:
        """Closes this end; the peer reads the end of what was sent."""
        self.connection.close()

    def _tensors(self, size: int) -> dict[str, torch.Tensor]:
        if size < _SIZE.size:
            raise RankMessageError(f"{size} bytes hold no tensors")
        (table_size,) = _SIZE.unpack(self._take(bytearray(_SIZE.size)))
        if table_size > min(LONGEST_HEADER, size - _SIZE.size):
            raise RankMessageError(f"a table of {table_size} bytes was announced for tensors of {size} bytes")
        table = _parsed(self._take(bytearray(table_size)), "the table of a message's tensors")
        table.pop("__metadata__", None)
        slots = sorted((_slot(name, entry) for name, entry in table.items()), key=lambda slot: slot.start)
        end = 0
        for slot in slots:
            if slot.start != end:
                raise RankMessageError(f"the tensor {slot.name!r} begins at byte {slot.start}, not at {end}")
            end = slot.end
        if end != size - _SIZE.size - table_size:
            raise RankMessageError(
                f"the tensors have {end} bytes, {size - _SIZE.size - table_size} were announced"
            )
        found = {slot.name: self._tensor(slot) for slot in slots}
        return {name: found[name] for name in table}

    def _tensor(self, slot: _Slot) -> torch.Tensor:
        try:
            memory = torch.empty(slot.end - slot.start, dtype=torch.uint8)
        except RuntimeError as error:
            raise RankMessageError(
                f"there is no memory for the tensor {slot.name!r} of {slot.end - slot.start} bytes"
            ) from error
        self._take(memory.numpy())
        return memory.view(slot.dtype).reshape(slot.shape)

    def _take(self, into: Any) -> Any:
        """Fills a buffer."""
        rest = memoryview(into)
        while len(rest):
            count = self.connection.recv_into(rest)
            if not count:
                raise EOFError("the other end of the socket was closed")
            rest = rest[count:]
        return into


@dataclass(frozen=True)
class _Slot:
    """Where a tensor lies in the bytes of all."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def _slot(name: str, entry: object) -> _Slot:
    """One entry of safetensors' table, checked."""
    if isinstance(entry, dict):
        fields = cast("dict[str, Any]", entry)
        dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
        if isinstance(dtype, str) and dtype in _DTYPES and _are_sizes(shape) and _are_sizes(offsets):
            start_end = cast("list[int]", offsets)
            sizes = tuple(cast("list[int]", shape))
            needed = math.prod(sizes) * _DTYPES[dtype].itemsize
            if len(start_end) == 2 and start_end[1] - start_end[0] == needed:
                return _Slot(name, _DTYPES[dtype], sizes, start_end[0], start_end[1])
    raise RankMessageError(f"this says of the tensor {name!r} nothing that can be true: {entry!r:.200}")


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(
        type(size) is int and size >= 0 for size in cast("list[object]", value)
    )


def _parsed(text: bytearray, what: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RankMessageError(f"{what} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise RankMessageError(f"{what} is not an object but {found!r:.80}")
    return cast("dict[str, Any]", found)


# --- sending -----------------------------------------------------------------------------------------------------


def encoded(message: Message) -> list[bytes | memoryview]:
    """The bytes of a message, in parts that :meth:`Channel.send` sends; checked before anything is sent.

    ``RankMessageError``: the header is not JSON (keys of other types than ``str`` would arrive as other keys, so they
    are refused; a tuple arrives as a list), or a tensor is not an ordinary one on the CPU.
    """
    header = _json(message.header, "the header of a message")
    tensors = _tensor_parts(message.tensors) if message.tensors else []
    size = sum(len(part) for part in tensors)
    if len(header) > LONGEST_HEADER or size > MOST_BYTES:
        raise RankMessageError(
            f"a message of {len(header)} and {size} bytes; at most {LONGEST_HEADER} and {MOST_BYTES} are sent",
            instead="send less at a time; arrays of numbers travel as tensors",
        )
    return [MARK + _SIZES.pack(len(header), size) + header, *tensors]


def _json(value: Mapping[str, Any], what: str) -> bytes:
    _check_keys(value, what)
    try:
        return json.dumps(value, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise RankMessageError(f"{what} is not JSON: {error}", instead="tensors travel beside it") from error


def _check_keys(value: object, what: str) -> None:
    if isinstance(value, Mapping):
        for key, part in cast("Mapping[object, object]", value).items():
            if not isinstance(key, str):
                raise RankMessageError(f"{what} has the key {key!r}, and JSON's keys are strings")
            _check_keys(part, what)
    elif isinstance(value, (list, tuple)):
        for part in cast("Sequence[object]", value):
            _check_keys(part, what)


def _tensor_parts(tensors: Mapping[str, torch.Tensor]) -> list[bytes | memoryview]:
    memories = {name: _memory(name, tensor) for name, tensor in tensors.items()}
    table: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + len(memories[name])
        table[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    header = _json(table, "the names of tensors")
    header += b" " * (-len(header) % 8)  # safetensors' own alignment
    return [_SIZE.pack(len(header)) + header, *(memory for memory in memories.values() if len(memory))]


def _memory(name: str, tensor: torch.Tensor) -> memoryview:
    if name == "__metadata__":
        raise RankMessageError(
            "a tensor cannot be called '__metadata__': safetensors keeps that name for itself"
        )
    plain = tensor.detach()
    if type(plain) is not torch.Tensor or plain.layout is not torch.strided or plain.dtype not in _NAMES:
        raise RankMessageError(
            f"{name!r} is a {type(plain).__name__} of {plain.dtype}, {plain.layout}, which cannot be sent",
            instead="an ordinary tensor: to_local(), dequantize() or to(dtype) makes one",
        )
    if plain.device.type != "cpu":
        raise RankMessageError(f"{name!r} is on {plain.device}, and is to be brought to the CPU first")
    whole = plain.resolve_conj().resolve_neg().contiguous()
    if not whole.numel():
        return memoryview(b"")
    return whole.reshape(-1).view(torch.uint8).numpy().data
