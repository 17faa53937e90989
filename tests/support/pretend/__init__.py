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
* No gradients of convolutions, no recurrent cells, sparse or quantised tensors, autocast, ``torch.compile``, nested
  ``torch.func`` transforms of several levels; nothing resizes a storage without its tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from transformers import PreTrainedModel

from tests.support.pretend import device
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


def device_map(
    model: PreTrainedModel,
    layers: Sequence[str],
    *,
    embedding: str | None = None,
    norm: str | None = None,
    head: str | None = None,
) -> dict[str, str]:
    """A map for ``accelerate.dispatch_model``: one device for each decoder layer, and for the modules around them.

    Unless named, the embeddings and the rotary module are where the first layer is, the final norm where the last one
    is, and the head with the norm, or with the embeddings where they share their weight.
    """
    embedding = embedding or layers[0]
    norm = norm or layers[-1]
    head = head or (embedding if model.config.tie_word_embeddings else norm)
    base = model.get_decoder()
    base = getattr(base, "model", base)  # Llama-4 says that it is its own
    prefix = next(path for path, module in model.named_modules() if module is base)
    found: dict[str, str] = {}
    for name, module in base.named_children():
        path = f"{prefix}.{name}"
        if name in ("layers", "h"):
            assert len(module) == len(layers)
            found |= {f"{path}.{index}": device for index, device in enumerate(layers)}
        elif name in ("norm", "ln_f", "final_layer_norm"):
            found[path] = norm
        else:
            found[path] = embedding
    # What else there is, for images.
    for path, _ in model.named_modules():
        beside = path.count(".") == prefix.count(".") and path != prefix
        if path and path.rpartition(".")[0] == prefix.rpartition(".")[0] and beside and path != "lm_head":
            found[path] = embedding
    return {**found, "lm_head": head}


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
