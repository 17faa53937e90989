"""Results on their way to the host: in the order in which streams need it, and waited for when somebody looks."""

from __future__ import annotations

from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor

import tracelens as tl
from tests.support.families import FAMILIES
from tests.support.pretend import Pretend, device_map, pretend
from tracelens.backends import departing
from tracelens.backends.departing import Departures
from tracelens.errors import MutatedActivationError
from tracelens.ir.ops import Save
from tracelens.ir.types import DType, TensorType

__all__ = ["pretend"]

FAR, FARTHER = torch.device("mps", 0), torch.device("xpu", 1)
"""Kinds of devices whose names every torch knows; nothing is ever put on them."""


class Streams:
    """In place of a device's module: writes down what is asked of streams and events, in order."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def module(self, device: torch.device) -> Any:
        log = self.log

        class Stream:
            def __init__(self, device: torch.device) -> None:
                self.name = f"side {device}"

            def wait_stream(self, other: str) -> None:
                log.append(f"{self.name} waits for {other}")

            def __enter__(self) -> None:
                log.append(f"on {self.name}")

            def __exit__(self, *_: object) -> None:
                log.append("off")

        class Event:
            def record(self, stream: Stream) -> None:
                self.name = stream.name
                log.append(f"arrival on {stream.name}")

            def synchronize(self) -> None:
                log.append(f"host waits for {self.name}")

        class Module:
            pass

        found: Any = Module()
        found.Stream, found.Event = Stream, Event
        found.current_stream = lambda device: f"the pass on {device}"
        return found


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    found = Streams()
    monkeypatch.setattr(torch, "get_device_module", found.module)
    monkeypatch.setattr(departing, "_streams", {})
    land = departing.land

    def noted(tensor: Tensor, host: Tensor) -> None:
        found.log.append("copy")
        land(tensor, host)

    monkeypatch.setattr(departing, "land", noted)
    return found


TYPE = TensorType(DType("float32"), (2,))


def departures() -> Departures:
    return Departures(dict.fromkeys(range(3), TYPE), {})


def test_copies_come_after_the_pass_and_arrivals_after_the_copies(streams: Streams) -> None:
    stack, single = Save("stack", (0, 1), stacked=True), Save("single", (2,))
    tensors = [torch.tensor([1.0, 2.0]) + 10 * number for number in range(3)]
    saved = {
        name: [(tensors[value], 0) for value in values]
        for name, values in (("stack", (0, 1)), ("single", (2,)))
    }
    leaving = departures()
    leaving.depart(FAR, [(stack, 0)], saved)
    leaving.depart(FARTHER, [(stack, 1), (single, 0)], saved)
    assert streams.log == [
        "side mps:0 waits for the pass on mps:0",
        "on side mps:0",
        "copy",
        "off",
        "arrival on side mps:0",
        "side xpu:1 waits for the pass on xpu:1",
        "on side xpu:1",
        "copy",
        "copy",
        "off",
        "arrival on side xpu:1",
    ]
    streams.log.clear()
    leaving.wait()
    assert sorted(streams.log) == ["host waits for side mps:0", "host waits for side xpu:1"]
    streams.log.clear()
    leaving.wait()
    assert streams.log == [], "once is enough"
    found, alone = leaving.host(stack), leaving.host(single)
    assert found is not None
    assert alone is not None
    assert torch.equal(found, torch.stack(tensors[:2]))
    assert torch.equal(alone, tensors[2])
    storages = {tensor.untyped_storage().data_ptr() for tensor in (found, alone)}
    assert len(storages) == 2, "each result has memory of its own"
    assert found.untyped_storage().nbytes() == 2 * 2 * 4


def test_a_second_run_uses_the_same_stream(streams: Streams) -> None:
    save = Save("h", (0,))
    for _ in range(2):
        departures().depart(FAR, [(save, 0)], {"h": [(torch.ones(2), 0)]})
    assert len(departing._streams) == 1
    assert streams.log.count("side mps:0 waits for the pass on mps:0") == 2


def test_what_the_model_changed_meanwhile_does_not_leave(streams: Streams) -> None:
    tensor = torch.ones(2)
    seen = tensor._version
    tensor += 1
    with pytest.raises(MutatedActivationError, match="in place"):
        departures().depart(FAR, [(Save("h", (0,)), 0)], {"h": [(tensor, seen)]})
    assert "copy" not in streams.log


def test_nobody_waits_before_somebody_looks(pretend: Pretend, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[object] = []
    module: Any = torch.get_device_module(torch.device("pretend:0"))
    monkeypatch.setattr(module.Event, "synchronize", lambda event: waits.append(event))
    places = pretend.devices(3)
    hf = FAMILIES["llama"].build()
    model = tl.wrap(
        accelerate.dispatch_model(hf, device_map(hf, places), main_device=torch.device(places[0]))
    )
    for layer in range(3):
        with model.trace([[5, 6, 7]]) as t:
            model.layers[layer].resid_post.save("h")
            model.layers[:].resid_post.norm(dim=-1).save("norms")
        assert waits == []
        assert t["h"].device.type == "cpu"
        assert len(waits) == 3, "for each device that something left"
        assert t["norms"].shape[0] == 3
        assert len(waits) == 3
        waits.clear()
