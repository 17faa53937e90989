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

Not like a GPU: there are no streams (work is done when a call returns), no pinned memory and no random generators of
its own (the CPU's draw), and backward passes run in the calling thread; a backward pass that a test starts in a thread
of its own needs ``torch.autograd.set_multithreading_enabled(False)`` there. Second derivatives of fused attention, and
convolutions, are not there.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.pretend import device
from tests.support.pretend.maps import device_map
from tests.support.pretend.seen import Copy, HostRead, Seen, watched

__all__ = ["Copy", "HostRead", "Pretend", "Seen", "device_map", "pretend", "watched"]


class Pretend:
    """What the fixture hands to a test."""

    count = device.DEVICES
    watched = staticmethod(watched)

    def devices(self, count: int) -> list[str]:
        """The names of the first ``count`` devices: ``["pretend:0", "pretend:1", ...]``."""
        assert count <= self.count
        return [f"pretend:{index}" for index in range(count)]


@pytest.fixture
def pretend() -> Iterator[Pretend]:
    """The pretend devices, open for one test; skips where torch cannot have them."""
    reason = device.missing()
    if reason is not None:
        pytest.skip(reason)
    with device.opened():
        yield Pretend()
