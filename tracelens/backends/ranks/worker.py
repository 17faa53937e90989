"""The process of one rank: it answers its owner's requests, and ends when the owner does.

Started by :mod:`tracelens.backends.ranks.process`, with one end of a socket. There is nothing else to reach it by.
"""

from __future__ import annotations

import faulthandler
import os
import select
import shutil
import signal
import socket
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, NoReturn

from tracelens.backends.ranks.channel import Channel, Message, encoded
from tracelens.backends.ranks.failures import described
from tracelens.backends.ranks.instep import InStepError
from tracelens.backends.ranks.requests import HANDLERS, handler
from tracelens.backends.ranks.served import Handlers, Served

_LONGEST_WAIT = timedelta(minutes=30)
"""Of a rank for the others, in a collective: one may still read its part of the model from a slow disk."""


def main(about: Mapping[str, Any], handlers: Handlers = HANDLERS) -> None:
    """Answers requests for as long as the owner is there. Never returns.

    ``about``: ``fd`` of the socket, ``rank``, ``world``, ``device`` (``"cpu"`` or ``"cuda"``), ``store``, the file that
    the ranks meet by, and ``folder``, which is removed when the owner dies without doing so.
    """
    connection = socket.socket(fileno=about["fd"])
    connection.set_inheritable(False)  # a process started here would keep it open
    threading.Thread(target=_end_with_owner, args=(connection, about["folder"]), daemon=True).start()
    # What each thread was doing, in the log: when it crashes, and when the owner asks because its time is up.
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    channel = Channel(connection)
    try:
        served = _joined(about)
    except BaseException as error:
        channel.send(encoded(Message({"serial": 0, "ok": False, "apart": True, "error": _late(error)})))
        _wait_for_the_end()
    channel.send(encoded(Message({"serial": 0, "ok": True, "header": {"pid": os.getpid()}})))
    while True:
        _serve_one(channel, served, handlers)


def _serve_one(channel: Channel, served: Served, handlers: Handlers) -> None:
    """One request and its answer; when it returns, nothing is left of the tensors of both."""
    try:
        request = channel.receive()
    except (EOFError, OSError):
        _wait_for_the_end()
    if "request" not in request.header:
        return  # what a conversation was told after its end
    served.talk = _Talk(channel, request.header["serial"])
    channel.send(_answer(served, request, handlers))


class _Talk:
    """A conversation with the owner in the midst of a request."""

    def __init__(self, channel: Channel, serial: int) -> None:
        self._channel = channel
        self._serial = serial

    def say(self, message: Message) -> None:
        about = {"serial": self._serial, "ok": True, "part": True, "header": message.header}
        self._channel.send(encoded(Message(about, message.tensors)))

    def hears_more(self) -> bool:
        while True:
            try:
                heard = self._channel.receive()
            except (EOFError, OSError):
                _wait_for_the_end()
            if heard.header["serial"] == self._serial:
                return bool(heard.header["more"])


def _answer(served: Served, request: Message, handlers: Handlers) -> list[bytes | memoryview]:
    serial = request.header["serial"]
    before = served.communication()
    try:
        asked = Message(request.header["header"], request.tensors)
        answer = handler(request.header["request"], handlers)(served, asked)
        return encoded(Message({"serial": serial, "ok": True, "header": answer.header}, answer.tensors))
    except InStepError as error:
        if error.__cause__ is None:
            return encoded(Message({"serial": serial, "ok": True, "header": {}}))
        late = _late(error.__cause__, error.when)
        return encoded(Message({"serial": serial, "ok": False, "apart": False, "error": late}))
    except BaseException as error:  # whatever it was, the owner is told
        now = served.communication()
        apart = now != before or None in now.values()
        return encoded(Message({"serial": serial, "ok": False, "apart": apart, "error": _late(error)}))


def _late(error: BaseException, when: float | None = None) -> dict[str, Any]:
    """The error as data, with the moment at which it was caught: several ranks may fail, and one was the first."""
    # Linux has one such clock for all processes.
    return {**described(error), "when": time.monotonic() if when is None else when}


def _joined(about: Mapping[str, Any]) -> Served:
    """Imports what models need, and meets the other ranks."""
    import torch
    import torch.distributed as dist
    import transformers

    transformers.logging.disable_progress_bar()  # nobody would see it move
    rank, world = about["rank"], about["world"]
    device = torch.device(about["device"])
    bound: dict[str, Any] = {}
    if device.type == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
        bound["device_id"] = device
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{about['store']}",
        rank=rank,
        world_size=world,
        timeout=_LONGEST_WAIT,
        **bound,
    )
    _ = transformers.AutoModelForCausalLM  # imported now, not at the first request
    group = dist.group.WORLD
    assert group is not None
    return Served(rank, world, device, group)


def _end_with_owner(connection: socket.socket, folder: str) -> None:
    """Waits until the other end of the socket is closed, by the owner or by its death, and ends this process.

    Whatever the main thread is doing then, a computation or a collective that nobody will ever join.
    """
    watch = select.poll()
    watch.register(
        connection.fileno(), 0
    )  # a hang-up is always reported; what is sent, only if it is asked for
    while not watch.poll():
        pass
    shutil.rmtree(folder, ignore_errors=True)
    if (
        os.getpgrp() == os.getpid()
    ):  # a group of its own: with it go the processes that libraries started here
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(1)


def _wait_for_the_end() -> NoReturn:
    """The owner closed or was told that it failed: the other thread, or the owner, ends this process."""
    while True:
        signal.pause()
