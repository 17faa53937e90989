"""``make demo-sharded``: the demo on a model that is spread over several devices.

The GPUs of the machine, where there are two or more; else three pretend devices, which are the CPU's memory under
three names and refuse, as GPUs do, to compute with tensors of two devices. That a model fits shows on GPUs alone.
"""

from __future__ import annotations

import os
from contextlib import nullcontext

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from examples import several_gpus
from tests.support.pretend import device
from tracelens import demo

PRETEND = ("pretend:0", "pretend:1", "pretend:2")


def main() -> int:
    """Runs the demo, and the example of several devices after it."""
    count = torch.cuda.device_count()
    if count < 2 and (reason := device.missing()) is not None:
        print(f"this takes two GPUs, or three pretend devices: {reason}")
        return 1
    with device.opened() if count < 2 else nullcontext():
        if count < 2:
            print(
                f"There are no two GPUs here: these are {len(PRETEND)} pretend devices, on the CPU's memory.\n"
            )
        names = [f"cuda:{index}" for index in range(count)] if count > 1 else list(PRETEND)
        model = several_gpus.load(names)
        demo.run(model)
        print("\n4. Across devices: explain() of a block that reads and writes on all of them\n")
        several_gpus.main(model)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
