"""The thread that keeps the ranks: it starts them, passes on one request at a time, and ends them.

Whoever asks waits for this thread, and may stop waiting at any moment (Ctrl-C, a time limit): the conversation with
the ranks goes on here, so it is never left in the middle of a message.
"""

from __future__ import annotations

import itertools
import math
import os
import queue
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence, Set
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tracelens.backends.ranks.channel import Message, encoded
from tracelens.backends.ranks.failures import failure
from tracelens.backends.ranks.process import Launch, RankProcess, environment, launched, stacks
from tracelens.backends.ranks.ready import Ready
from tracelens.errors import RankDiedError, RankMessageError, RanksClosedError, RankTimeoutError

STARTING = 600.0
"""Seconds for all ranks to start and meet; it takes a few, and longer where many imports come over a network."""
GRACE = 5.0
"""Seconds that the others have to answer when one has failed: they may be waiting for it."""

_serials = itertools.count(1)
_START = "the start"
_ASKER = -1
"""Who says something that is no rank."""


@dataclass(frozen=True)
class Request:
    """What is asked of all ranks: a name of the table of requests, a header of JSON's types, and tensors."""

    name: str
    header: Mapping[str, Any] = field(default_factory=dict[str, Any])
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    timeout: float | None = None


@dataclass(frozen=True)
class Reply:
    """What one rank answered. The tensors are on the CPU, each with memory of its own."""

    rank: int
    header: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]


@dataclass
class Job:
    """A request on its way: who asked waits for :attr:`future`."""

    request: Request | None
    """``None``: only see to it that the ranks run."""
    model: str | None = None
    """The model that has to be loaded first, if a start was without it."""
    remember: str | None = None
    """The model that this request loads."""
    starts: bool = True
    """Is it worth a start of the ranks?"""
    future: Future[list[Reply]] = field(default_factory=Future[list[Reply]])
    heard: queue.SimpleQueue[Reply | None] | None = None
    """Where what ranks say before their answers is put, and ``None`` at the end; each waits for :meth:`Owner.tell`."""
    waiting: Set[int] = frozenset()
    """The threads that wait for whoever asked. It may lose some on the way."""

    def __post_init__(self) -> None:
        self.serial = next(_serials)
        self.parts = _message(self.request, self.serial) if self.request is not None else []


class Owner:
    """The ranks of one pool, and the thread that talks to them. Knows nothing of who waits."""

    def __init__(self, world: int, device: str, worker: str, extra: Mapping[str, str]) -> None:
        self.world = world
        self.device = device
        self.worker = worker
        self.extra = dict(extra)
        self.process = os.getpid()
        self.current = Path.cwd()  # of later starts, too: a model's relative path stays what it was
        # mkdtemp makes it for this user alone: whoever could write there could take part in the ranks' meeting.
        self.folder = Path(tempfile.mkdtemp(prefix="tracelens-ranks-"))
        self.ranks: list[RankProcess] = []
        self.remembered: dict[str, Request] = {}
        self.loaded: set[str] = set()
        self.closed = False
        self.restarting = False
        self.doing: str | None = None
        """What the ranks are at."""
        self.job: Job | None = None
        """For whom."""
        self.starts = 0
        self._jobs: deque[Job] = deque()
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._outboxes: list[queue.SimpleQueue[Sequence[bytes | memoryview] | None]] = []
        self._inbox: queue.SimpleQueue[tuple[int, Message | Exception]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="tracelens-ranks", daemon=True)
        self._thread.start()

    # --- from any thread ---

    def submit(self, job: Job) -> None:
        """Puts a job at the end of the line."""
        self._jobs.append(job)
        self._bell.put(None)  # if an interrupt comes between the two, the next job's bell is for both
        if self.closed and job.future.cancel():  # the thread may have ended before it saw the job
            raise RanksClosedError("the ranks were closed before they were asked")

    def tell(self, job: Job, *, more: bool) -> None:
        """Lets ranks that have said something in the midst of a job go on, or has them end it."""
        self._inbox.put((_ASKER, Message({"serial": job.serial, "more": more})))

    def kill(self) -> None:
        """Ends all processes; the thread learns of it by itself."""
        for rank in list(self.ranks):
            rank.kill()

    def shut(self) -> None:
        """Ends the ranks for good and leaves nothing behind."""
        if os.getpid() != self.process:  # a child that this process forked: the ranks are not its own
            return
        self.closed = True
        self.kill()
        self._bell.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(10)
        self._stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    # --- the thread ---

    def _serve(self) -> None:
        while not self.closed:
            self._bell.get()
            while self._jobs:
                job = self._jobs.popleft()
                if not job.future.set_running_or_notify_cancel():
                    continue  # nobody waits any more, and no rank has heard of it
                self.job = job
                try:
                    replies = self._do(job)
                except BaseException as error:
                    self.job = None
                    job.future.set_exception(error)
                else:
                    self.job = None
                    job.future.set_result(replies)
                    del replies  # the waiting side has the tensors, and nobody else
                del job
        self._stop()

    def _do(self, job: Job) -> list[Reply]:
        if self.closed:
            raise RanksClosedError("the ranks were closed before they were asked")
        if self.restarting:
            self.restarting = False
            self._stop()
        if not self.ranks and not job.starts:
            return []
        if not self.ranks:
            self._start()
        for rank in self.ranks:
            if not rank.runs:
                raise self._died(rank, "between two requests")
        if job.model is not None and job.model not in self.loaded and job.model in self.remembered:
            again = self.remembered[job.model]
            serial = next(_serials)
            with Ready(self.world, "loading weights once more") as line:
                message, doing = _message(again, serial), f"{again.name!r}, once more"
                self._exchange(serial, message, doing, again.timeout, line.ready)
            self.loaded.add(job.model)
        if job.request is None:
            return []
        doing, limit = repr(job.request.name), job.request.timeout
        if job.remember is None:
            return self._exchange(job.serial, job.parts, doing, limit, heard=job.heard)
        with Ready(self.world, "loading weights") as line:
            replies = self._exchange(job.serial, job.parts, doing, limit, line.ready)
        self.remembered[job.remember] = job.request
        self.loaded.add(job.remember)
        return replies

    def _start(self) -> None:
        self.starts += 1
        home = self.folder / f"start{self.starts}"
        self._inbox = queue.SimpleQueue()
        self._outboxes = []
        self.loaded.clear()
        try:
            home.mkdir()
            launch = Launch(
                self.world,
                self.device,
                self.folder,
                home,
                self.current,
                self.worker,
                environment(self.extra),
            )
            with Ready(self.world, "starting ranks") as line:
                for number in range(self.world):
                    self._open()
                    rank = launched(launch, number)
                    self.ranks.append(rank)
                    outbox: queue.SimpleQueue[Sequence[bytes | memoryview] | None] = queue.SimpleQueue()
                    self._outboxes.append(outbox)
                    threading.Thread(
                        target=_converse,
                        args=(rank, outbox, self._inbox),
                        name=f"tracelens-rank{number}",
                        daemon=True,
                    ).start()
                self._open()
                self._gather(0, _START, STARTING, line.ready)
        except BaseException:
            self._stop()
            raise

    def _open(self) -> None:
        if self.closed:
            raise RanksClosedError("the ranks were closed while they started")

    def _stop(self) -> None:
        """Ends the processes of this start. The models that were remembered are loaded when they are next needed."""
        # All are killed before any socket closes: a rank that reads the end of its socket takes the folder along.
        for rank in self.ranks:
            rank.kill()
        for outbox in self._outboxes:
            outbox.put(None)
        while self.ranks:
            self.ranks.pop().gone()
        self._outboxes = []
        self.loaded.clear()

    def _exchange(
        self,
        serial: int,
        parts: Sequence[bytes | memoryview],
        doing: str,
        timeout: float | None,
        arrived: Callable[[], None] = lambda: None,
        heard: queue.SimpleQueue[Reply | None] | None = None,
    ) -> list[Reply]:
        self.doing = doing
        try:
            for outbox in self._outboxes:
                outbox.put(parts)
            return self._gather(serial, doing, math.inf if timeout is None else timeout, arrived, heard)
        finally:
            self.doing = None

    def _gather(
        self,
        serial: int,
        doing: str,
        limit: float,
        arrived: Callable[[], None] = lambda: None,
        heard: queue.SimpleQueue[Reply | None] | None = None,
    ) -> list[Reply]:
        """The answers of all ranks to one request, in the order of the ranks.

        ``limit``: seconds for it. Of a conversation that is the time from one word to the next: how long whoever
        asked takes to go on is nothing that the ranks could be late with.
        """
        replies: dict[int, Reply] = {}
        failed: dict[int, Mapping[str, Any]] = {}
        deadline, grace = time.monotonic() + limit, math.inf
        while len(replies) + len(failed) < self.world:
            left = min(deadline, grace) - time.monotonic()
            try:
                number, message = self._inbox.get(timeout=None if left == math.inf else max(left, 0))
            except queue.Empty:
                waiting = [rank for rank in self.ranks if rank.rank not in replies | failed]
                if failed:
                    raise self._failed(doing, failed, waiting) from None
                raise self._late(doing, waiting, limit, talking=heard is not None) from None
            if number == _ASKER:
                if isinstance(message, Message) and message.header["serial"] == serial and not failed:
                    deadline = time.monotonic() + limit
                    self._tell(serial, more=message.header["more"])
                continue
            if isinstance(message, Exception):
                raise self._died(self.ranks[number], f"at {doing}", message)
            about = message.header
            if about.get("serial") != serial or ("part" in about and heard is None):
                unasked = RankMessageError(f"it answered request {about.get('serial')!r}, not {serial}")
                raise self._died(self.ranks[number], f"at {doing}", unasked)
            if "part" in about and heard is not None:
                deadline = math.inf
                heard.put(Reply(number, about["header"], message.tensors))
            elif about["ok"]:
                replies[number] = Reply(number, about["header"], message.tensors)
                arrived()
            else:
                if heard is not None and not failed:
                    self._tell(serial, more=False)  # the others may wait for a word, and not for this rank
                failed[number] = about
                grace = min(grace, time.monotonic() + GRACE)
        if failed:
            raise self._failed(doing, failed, [])
        return [replies[number] for number in range(self.world)]

    def _tell(self, serial: int, *, more: bool) -> None:
        """Has all ranks hear the same; one that has answered by now does not listen to it."""
        parts = encoded(Message({"serial": serial, "more": more}))
        for rank in self.ranks:
            with suppress(OSError):  # of one that is gone the conversation with it hears
                rank.channel.send(parts)

    # --- what goes wrong ---

    def _failed(
        self, doing: str, failed: Mapping[int, Mapping[str, Any]], waiting: Sequence[RankProcess]
    ) -> Exception:
        """Some ranks reported an error, and ``waiting`` did not come to an end."""
        errors = {number: about["error"] for number, about in failed.items()}
        same = len({(error["class"], error["text"]) for error in errors.values()}) == 1
        first = min(errors) if same else min(errors, key=lambda number: errors[number]["when"])
        notes: list[str] = []
        if len(errors) > 1:
            others = ", ".join(str(number) for number in sorted(errors) if number != first)
            notes.append(f"{'the same' if same else 'later'} at rank {others}")
        if waiting:
            stuck = ", ".join(str(rank.rank) for rank in waiting)
            notes.append(f"rank {stuck} did not come to an end without it")
        if waiting or any(about["apart"] for about in failed.values()):
            notes.append(
                "all ranks were ended, since they no longer stood at the same step; the next use starts them"
            )
            self._stop()
        error = failure(first, self.world, doing, errors[first], *notes)
        error.alone = not same or len(errors) < self.world
        return error

    def _late(self, doing: str, waiting: Sequence[RankProcess], limit: float, *, talking: bool) -> Exception:
        """Nothing more came within the time limit."""
        numbers = tuple(rank.rank for rank in waiting)
        where = stacks(waiting)
        self._stop()
        error = RankTimeoutError(
            "\n".join(
                [
                    f"rank {', '.join(map(str, numbers))} of {self.world} did not finish {doing} within {limit:g} s;"
                    " all ranks were ended, and the next use starts them",
                    *(f"rank {number} was here:\n{_indented(text)}" for number, text in where.items()),
                ]
            ),
            instead="a larger timeout=, if this was only slow"
            + ("; each step has that time" if talking else ""),
        )
        error.waiting_for = numbers
        return error

    def _died(self, rank: RankProcess, when: str, reason: Exception | None = None) -> Exception:
        """A rank ended, or says what no rank should."""
        if self.closed or self.restarting:
            return RanksClosedError(f"the ranks were {'closed' if self.closed else 'restarted'} {when}")
        if isinstance(reason, RankMessageError):
            rank.kill()
            how = f"was ended, because what it sent could not be read ({reason.problem})"
        else:
            how = rank.end()
        log = rank.tail()
        text = f"rank {rank.rank} of {self.world} {how}, {when}; the next use starts all ranks anew"
        if log:
            text += f"\n  the end of its output:\n{_indented(log)}"
        self._stop()
        error = RankDiedError(text)
        error.rank = rank.rank
        error.exit_code = rank.process.returncode
        error.log = log
        return error


def _converse(
    rank: RankProcess,
    outbox: queue.SimpleQueue[Sequence[bytes | memoryview] | None],
    inbox: queue.SimpleQueue[tuple[int, Message | Exception]],
) -> None:
    """Sends one rank what is put into its outbox, and passes on what it answers. A thread of its own."""
    try:
        inbox.put((rank.rank, rank.channel.receive()))
        while (parts := outbox.get()) is not None:
            rank.channel.send(parts)
            del parts  # the tensors in it
            talking = True
            while talking:
                message = rank.channel.receive()
                talking = "part" in message.header
                inbox.put((rank.rank, message))
                del message
    except Exception as error:  # the end of the stream, a broken message: the last thing that is heard of it
        inbox.put((rank.rank, error))


def _message(request: Request, serial: int) -> list[bytes | memoryview]:
    about = {"serial": serial, "request": request.name, "header": request.header}
    return encoded(Message(about, request.tensors))


def _indented(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines())
