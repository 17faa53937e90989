"""Messages between the owner and a rank: what is sent arrives, and what is no message is refused."""

from __future__ import annotations

import json
import pickle
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import safetensors.torch
import torch

from tracelens.backends.ranks import channel
from tracelens.backends.ranks.channel import MARK, Channel, Message, encoded
from tracelens.errors import RankMessageError

DTYPES = sorted(channel._NAMES, key=str)


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    ours, theirs = socket.socketpair()
    ours.settimeout(20)
    theirs.settimeout(20)
    with ours, theirs:
        yield Channel(ours), Channel(theirs)


def through(ends: tuple[Channel, Channel], message: Message) -> Message:
    sender = threading.Thread(target=ends[0].send, args=(encoded(message),))
    sender.start()
    try:
        return ends[1].receive()
    finally:
        sender.join()


def frame(header: bytes, tensors: bytes = b"") -> bytes:
    return MARK + struct.pack("<QQ", len(header), len(tensors)) + header + tensors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (2, 0, 3), (2, 3, 4)], ids=str)
def test_a_tensor_arrives_as_it_was(
    ends: tuple[Channel, Channel], dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    bits = torch.randint(0, 2, (*shape, dtype.itemsize), dtype=torch.uint8)
    sent = bits.view(dtype).reshape(shape) if bits.numel() else torch.empty(shape, dtype=dtype)
    received = through(ends, Message({}, {"value": sent})).tensors["value"]
    assert received.dtype == dtype
    assert received.shape == shape
    assert torch.equal(received.reshape(-1).view(torch.uint8), sent.reshape(-1).view(torch.uint8))


def test_views_arrive_as_what_they_show(ends: tuple[Channel, Channel]) -> None:
    base = torch.randn(4, 6)
    number = torch.randn(3, dtype=torch.complex64)
    sent = {
        "transposed": base.T,
        "strided": base[::2, 1:],
        "expanded": base[:1].expand(5, 6),
        "conjugate": number.conj(),
        "negative": number.conj().imag,
        "parameter": torch.nn.Parameter(base),
    }
    received = through(ends, Message({}, sent)).tensors
    assert list(received) == list(sent)
    for name, tensor in sent.items():
        assert torch.equal(received[name], tensor), name
        assert not received[name].requires_grad
        # Of its own, and no more than it needs: a small one keeps no big one alive.
        assert received[name].untyped_storage().nbytes() == received[name].nbytes


def test_a_header_arrives_as_it_was(ends: tuple[Channel, Channel]) -> None:
    header = {
        "text": "naïve \u2028 \udc80 \x00",
        "numbers": [0, -1, 2**70, 0.1, 1e-300],
        "nested": {"": [None, True, []]},
        "big": "x" * 3_000_000,
    }
    assert through(ends, Message(header)).header == header


def test_messages_follow_each_other(ends: tuple[Channel, Channel]) -> None:
    for number in range(3):
        received = through(ends, Message({"number": number}, {"n": torch.tensor(number)}))
        assert received.header == {"number": number}
        assert received.tensors["n"] == number


def test_the_tensors_are_a_safetensors_file(ends: tuple[Channel, Channel]) -> None:
    tensors = {"b": torch.randn(3, 5), "a": torch.arange(7), "flags": torch.tensor([True, False])}
    written = b"".join(bytes(part) for part in encoded(Message({}, tensors))[1:])
    for name, tensor in safetensors.torch.load(written).items():
        assert torch.equal(tensor, tensors[name])
    # And one that safetensors wrote, with its own order and metadata, is read.
    file = safetensors.torch.save(tensors, {"by": "safetensors"})
    ends[0].send([frame(b"{}", file)])
    received = ends[1].receive().tensors
    assert set(received) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(received[name], tensor)


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (pickle.dumps({"serial": 1}) + b"\0" * 64, "was to begin here"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", "was to begin here"),
        (MARK + struct.pack("<QQ", 1 << 60, 0), "was announced"),
        (MARK + struct.pack("<QQ", 2, 1 << 60), "was announced"),
        (frame(b"{nonsense"), "not JSON"),
        (frame(b"[1, 2]"), "not an object"),
        (frame(b"\xff\xfe{}"), "not JSON"),
        (frame(b"[" * 100_000), "not JSON"),
        (frame(pickle.dumps({"serial": 1})), "not JSON"),
        (frame(b"{}", b"1234"), "hold no tensors"),
        (frame(b"{}", struct.pack("<Q", 1 << 20) + b"{}"), "was announced"),
        (frame(b"{}", pickle.dumps(torch.zeros(3))), "was announced"),
    ],
)
def test_what_is_no_message_is_refused(ends: tuple[Channel, Channel], sent: bytes, said: str) -> None:
    ends[0].connection.sendall(sent)
    with pytest.raises(RankMessageError, match=said):
        ends[1].receive()


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"t": {**ENTRY, "dtype": "OBJECT"}}, "nothing that can be true"),
        ({"t": {**ENTRY, "shape": [3]}}, "nothing that can be true"),
        ({"t": {**ENTRY, "shape": [-2]}}, "nothing that can be true"),
        ({"t": {**ENTRY, "shape": [True, 2]}}, "nothing that can be true"),
        ({"t": {**ENTRY, "data_offsets": [8, 0]}}, "nothing that can be true"),
        ({"t": {**ENTRY, "data_offsets": [0, 8, 8]}}, "nothing that can be true"),
        ({"t": {**ENTRY, "data_offsets": [8, 16]}}, "begins at byte 8"),
        ({"t": ENTRY, "u": ENTRY}, "begins at byte 0"),
        ({"t": ENTRY, "u": {**ENTRY, "data_offsets": [8, 16]}}, "16 bytes, 8 were announced"),
        ({"t": 3}, "nothing that can be true"),
        ({}, "0 bytes, 8 were announced"),
    ],
)
def test_a_table_of_tensors_that_cannot_be_true_is_refused(
    ends: tuple[Channel, Channel], table: dict[str, Any], said: str
) -> None:
    text = json.dumps(table).encode()
    ends[0].connection.sendall(frame(b"{}", struct.pack("<Q", len(text)) + text + bytes(8)))
    with pytest.raises(RankMessageError, match=said):
        ends[1].receive()


@pytest.mark.parametrize("kept", [0, 1, 10, 40, 60])
def test_a_closed_peer_is_noticed_at_any_byte(ends: tuple[Channel, Channel], kept: int) -> None:
    whole = b"".join(bytes(part) for part in encoded(Message({"a": 1}, {"t": torch.zeros(9)})))
    assert kept < len(whole)
    ends[0].connection.sendall(whole[:kept])
    ends[0].close()
    with pytest.raises(EOFError):
        ends[1].receive()


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (Message({"value": object()}), "not JSON"),
        (Message({"value": b"bytes"}), "not JSON"),
        (Message({"value": torch.zeros(2)}), "tensors travel beside it"),
        (Message({"nested": [{1: "one"}]}), "keys are strings"),
        (Message({}, {"t": torch.zeros(2).to_sparse()}), "ordinary tensor"),
        (Message({}, {"t": torch.zeros(2, dtype=torch.complex128)}), "ordinary tensor"),
        (Message({}, {"t": torch.zeros(2, device="meta")}), "brought to the CPU"),
        (Message({}, {"__metadata__": torch.zeros(2)}), "keeps that name"),
    ],
)
def test_what_would_not_arrive_is_not_sent(message: Message, said: str) -> None:
    with pytest.raises(RankMessageError, match=said):
        encoded(message)
