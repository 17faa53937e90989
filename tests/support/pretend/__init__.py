"""The pretend accelerator: several devices in one process, on CPU memory, that behave like GPUs where it matters.

    from tests.support.pretend import pretend  # the fixture

    def test_it(pretend):
        model = accelerate.dispatch_model(model, {"": "pretend:0", "model.layers.2": "pretend:1"}, ...)
        with pretend.watched() as seen:
            ...
        assert seen.between("pretend:0", "pretend:1") == [...]
        assert seen.reads == []

Operations whose operands are on two devices raise what torch raises for GPUs. Copies between devices, values that the
host reads and bytes alive are counted inside ``watched()``. Every operation is the CPU's own kernel on the same bytes:
results equal those of the CPU bit for bit.

Devices may be named by number, as GPUs: ``device_map="auto"`` works if ``max_memory={0: "150KB", 1: ...}`` says how
much there is (accelerate asks only kinds of devices that it knows). Where a map does not say where the model as a whole
runs, accelerate takes any of the devices: pass ``main_device`` to ``dispatch_model``.

Not like a GPU:

* No streams (work is done when a call returns), no pinned memory, and no random generators: the CPU's draws.
* Backward passes run in the calling thread. A backward pass that a test starts in a thread of its own needs
  ``torch.autograd.set_multithreading_enabled(False)`` there.
* Attention with a gradient is computed on the CPU's side of autograd: no second derivatives through it.
* No convolutions, recurrent cells, sparse or quantised tensors, autocast, ``torch.compile``, nested ``torch.func``
  transforms of several levels; nothing resizes a storage without its tensor.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.pretend import device
from tests.support.pretend.maps import device_map
from tests.support.pretend.seen import Copy, HostRead, Seen, watched

__all__ = ["Copy", "HostRead", "Pretend", "Seen", "device_map", "pretend", "pretend_throughout", "watched"]


class Pretend:
    """What the fixture hands to a test."""

    count = device.DEVICES
    watched = staticmethod(watched)

    def devices(self, count: int) -> list[str]:
        """The names of the first ``count`` devices: ``["pretend:0", "pretend:1", ...]``."""
        assert count <= self.count
        return [f"pretend:{index}" for index in range(count)]


def _pretend() -> Iterator[Pretend]:
    reason = device.missing()
    if reason is not None:
        pytest.skip(reason)
    with device.opened():
        yield Pretend()


pretend = pytest.fixture(_pretend, name="pretend")
"""The pretend devices, open for one test; skips where torch cannot have them."""

pretend_throughout = pytest.fixture(_pretend, name="pretend_throughout", scope="module")
"""The same, open for a module: for tests that hypothesis calls many times."""
