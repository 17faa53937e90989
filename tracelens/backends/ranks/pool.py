"""Ranks, as their owner has them: launched, asked, and ended with it."""

from __future__ import annotations

import math
import os
import queue
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Set
from concurrent.futures import wait
from contextlib import suppress
from types import TracebackType
from typing import Any

import torch

from tracelens.backends.ranks.owner import Job, Owner, Reply, Request
from tracelens.errors import NestedTraceError, OptionError, RanksClosedError, RankTimeoutError
from tracelens.location import here

__all__ = ["Ranks", "Reply", "Request"]

_STEP = 0.2
"""Seconds after which somebody who waits looks up."""
_owners: weakref.WeakSet[Owner] = weakref.WeakSet()
_fork_is_watched = False


class Ranks:
    """``world`` processes that work on one model together, each on its part, for as long as this object lives.

    They are plain processes with one socket each to this one, which nothing listens to; they meet in a folder that is
    this user's alone, and talk to each other over loopback. They end with :meth:`close`, with the ``with`` block, with
    this object, and with this process, also when it is killed.

    ``device``: ``"cpu"`` (gloo) or ``"cuda"`` (NCCL, one GPU each); by default GPUs where there are any.
    ``timeout``: seconds that a request may take, if it does not say so itself; by default no limit. ``env``: more
    environment variables for the ranks.

    All requests go to all ranks, one at a time. After an error that leaves the ranks at different steps, and after the
    death of one, all are started anew at the next use, with the models that were loaded.

    >>> with Ranks(2, device="cpu") as ranks:                                                    # doctest: +SKIP
    ...     [reply.header["rank"] for reply in ranks.ask("ping")]
    [0, 1]
    """

    def __init__(
        self,
        world: int,
        *,
        device: str | None = None,
        timeout: float | None = None,
        env: Mapping[str, str] | None = None,
        _worker: str = "tracelens.backends.ranks.worker",
    ) -> None:
        if sys.platform == "win32":
            raise OptionError("ranks need Linux or macOS: on Windows no socket can be handed to a process")
        if type(world) is not int or world < 1:
            raise OptionError(f"there are 1, 2, ... ranks, not {world!r}")
        if not sys.executable:
            raise OptionError("this program does not say which Python it runs on, so it can start no ranks")
        self.world = world
        self.device = _chosen(device, world)
        self.timeout = _seconds(timeout)
        self._owner = Owner(world, self.device, _worker, env or {})
        _watch_forks()
        _owners.add(self._owner)
        # Also at the end of the interpreter. It holds the owner, which does not hold this object.
        self._end = weakref.finalize(self, self._owner.shut)
        try:
            self._wait(Job(None), None)
        except BaseException:
            self.close()
            raise

    def ask(
        self,
        name: str,
        header: Mapping[str, Any] | None = None,
        tensors: Mapping[str, torch.Tensor] | None = None,
        *,
        model: str | None = None,
        timeout: float | None = None,
        told: Callable[[Reply], bool] | None = None,
        waiting: Set[int] = frozenset(),
    ) -> list[Reply]:
        """Asks all ranks the same, and gives what they answer, in the order of the ranks.

        ``name``: one of the table in ``requests.py``. ``header``: what JSON can hold. ``tensors``: on the CPU; until
        the ranks have answered they are not to be changed. ``model``: the id of a model that the request needs, which
        is loaded first if the ranks were started anew since. ``timeout``: seconds for this request. ``told``: is given
        what a rank says in the midst of it, and says whether the ranks are to go on, which they wait for; ``timeout``
        is then that from one such word to the next. ``waiting``: the threads that wait for what is told: none of them
        may ask the ranks meanwhile, because it would wait for itself.

        Raises ``RankFailedError`` (a rank raised), ``RankDiedError`` (a process ended), ``RankTimeoutError``,
        ``RankMessageError`` (that cannot be sent) and ``RanksClosedError``. Ctrl-C stops the waiting, not the ranks:
        what they do they finish, before the next request and without an answer to this one.
        """
        limit = self.timeout if timeout is None else _seconds(timeout)
        job = Job(Request(name, header or {}, tensors or {}, limit), model, waiting=waiting)
        if told is not None:
            heard = job.heard = queue.SimpleQueue()
            job.future.add_done_callback(lambda _: heard.put(None))
        return self._wait(job, limit, told)

    def load(self, model: str, request: Request) -> list[Reply]:
        """Asks for a model to be loaded, under an id, and remembers the request: see :meth:`remember`."""
        return self._wait(Job(request, remember=model), request.timeout)

    def remember(self, model: str, request: Request) -> None:
        """Has a model loaded by ``request`` before the first :meth:`ask` that says that it needs it, in each start."""
        self._owner.remembered[model] = request
        self._owner.loaded.discard(model)

    def forget(self, model: str) -> None:
        """Does not load that model any more. What the ranks hold of it is let go of by a request of its own."""
        self._owner.remembered.pop(model, None)
        self._owner.loaded.discard(model)

    def drop(self, model: str) -> None:
        """Forgets a model, and has the ranks let go of it when they come to it. Waits for nothing.

        May be called from a finalizer, so in any thread and at any moment.
        """
        self.forget(model)
        if not self._owner.closed and self._owner.process == os.getpid():
            with suppress(RanksClosedError):
                self._owner.submit(Job(Request("drop", {"model": model}), starts=False))

    def restart(self) -> None:
        """Ends all ranks, whatever they are doing, and starts them anew."""
        self._check()
        self._owner.restarting = True
        self._owner.kill()
        self._wait(Job(None), None)

    def close(self) -> None:
        """Ends the ranks. Again: does nothing."""
        self._end()

    @property
    def alive(self) -> bool:
        """Are all processes there? If not, and it was not closed, the next use starts them."""
        owner = self._owner
        running = list(owner.ranks)
        return not owner.closed and len(running) == self.world and all(rank.runs for rank in running)

    @property
    def pids(self) -> tuple[int, ...]:
        """The process of each rank; none while they are not there."""
        return tuple(rank.process.pid for rank in list(self._owner.ranks))

    def log(self, rank: int) -> str:
        """The end of what a rank printed since it was started."""
        return self._owner.ranks[rank].tail() if rank < len(self._owner.ranks) else ""

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = (
            "closed" if self._owner.closed else "alive" if self.alive else "ended, the next use starts them"
        )
        return f"<Ranks: {self.world} on {self.device}, {state}>"

    def _check(self) -> None:
        if self._owner.process != os.getpid():
            raise RanksClosedError(
                "these ranks belong to the process that this one was forked from",
                instead="ask from there, or make ranks of its own here",
            )
        if self._owner.closed:
            raise RanksClosedError("these ranks were closed", instead=f"start others: Ranks({self.world})")

    def _wait(
        self, job: Job, limit: float | None, told: Callable[[Reply], bool] | None = None
    ) -> list[Reply]:
        self._check()
        if job.request is not None:
            self._refuse_own(job)
        self._owner.submit(job)
        future = job.future
        until = math.inf if limit is None else time.monotonic() + limit
        try:
            # In short steps: a signal that another thread was given interrupts no waiting of this one.
            while not future.done():
                left = until - time.monotonic()
                if left <= 0 and future.cancel():
                    doing = self._owner.doing or "an earlier request"
                    raise RankTimeoutError(
                        f"the ranks are still at {doing}, and this request was not begun",
                        instead="a larger timeout=, or ranks.restart() to end that one",
                    )
                # The time of a request that was begun is kept by the owner, from when it was sent.
                pause = min(left, _STEP) if left > 0 else _STEP
                if job.heard is None or told is None:
                    wait([future], pause)
                    continue
                with suppress(queue.Empty):
                    if (said := job.heard.get(timeout=pause)) is not None:
                        self._owner.tell(job, more=told(said))
        except BaseException:
            if not future.cancel() and told is not None:  # if it was not begun, it need not be
                self._owner.tell(job, more=False)
            raise
        return future.result()

    def _refuse_own(self, job: Job) -> None:
        """Raises where the ranks are at a conversation that would go on only after this."""
        now = self._owner.job
        if now is not None and not now.waiting.isdisjoint({threading.get_ident(), *job.waiting}):
            raise NestedTraceError(
                "the ranks were asked in the loop over a stream that they are in the midst of",
                at=here(),
                instead="the same after the loop, which stream.close() ends where it was left",
            )


def _chosen(device: str | None, world: int) -> str:
    if device not in (None, "cpu", "cuda"):
        raise OptionError(f"ranks run on 'cpu' or on 'cuda', one GPU each, not on {device!r}")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and torch.cuda.device_count() < world:
        raise OptionError(
            f"{world} ranks take {world} GPUs, and this process sees {torch.cuda.device_count()}",
            instead='device="cpu"',
        )
    return device


def _seconds(timeout: float | None) -> float | None:
    if timeout is not None and not timeout >= 0:
        raise OptionError(f"a time limit is a number of seconds, not {timeout!r}")
    return timeout


def _watch_forks() -> None:
    """A child that this process forks lets go of the sockets: with them, it would keep the ranks after our death."""
    global _fork_is_watched
    if not _fork_is_watched:
        os.register_at_fork(after_in_child=_let_go)
        _fork_is_watched = True


def _let_go() -> None:
    for owner in list(_owners):
        for rank in owner.ranks:
            rank.channel.close()
