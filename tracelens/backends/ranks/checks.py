"""The requests that show that ranks are there and reach each other."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from tracelens.backends.ranks.channel import Message
from tracelens.backends.ranks.served import Served
from tracelens.backends.transfer import moved, on_cpu


def ping(served: Served, request: Message) -> Message:
    """What was sent, and who this is."""
    about = {
        "rank": served.rank,
        "world": served.world,
        "device": str(served.device),
        "pid": os.getpid(),
        "threads": torch.get_num_threads(),
        "models": sorted(served.models),
        "sent": dict(request.header),
    }
    return Message(about, request.tensors)


def collective(served: Served, request: Message) -> Message:
    """The sum over all ranks of the tensor ``value`` times (rank + 1): n ranks give n (n + 1) / 2 times the tensor."""
    if "value" not in request.tensors:
        raise ValueError("a collective is asked for with a tensor called 'value'")
    total = moved(request.tensors["value"], served.device) * (served.rank + 1)
    dist.all_reduce(total, group=served.group)
    return Message({}, {"total": on_cpu(total)})
