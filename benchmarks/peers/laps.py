"""Generations that take turns step by step: each makes one token, then the next does.

A generation takes seconds, in which other work on a machine comes and goes. The same step of all contestants lies
within a few of their steps, so that load slows all of them alike.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from threading import Semaphore, Thread
from typing import Any, NamedTuple

import torch

Tick = Callable[[], None]


class Lap(NamedTuple):
    """Seconds from turn to turn by the clock, and of the processor's work for it."""

    clock: float
    work: float


@dataclass(frozen=True)
class Laps:
    """One generation: up to its first token, then one lap a token, then what is left to do."""

    laps: tuple[Lap, ...]
    results: Any

    @property
    def start(self) -> Lap:
        """All that is prepared, and the pass over the prompt."""
        return self.laps[0]

    @property
    def steps(self) -> tuple[Lap, ...]:
        """From the first token on."""
        return self.laps[1:-1]

    @property
    def end(self) -> Lap:
        return self.laps[-1]

    @property
    def whole(self) -> Lap:
        return Lap(sum(lap.clock for lap in self.laps), sum(lap.work for lap in self.laps))


class _Runner:
    """One contestant, which runs when it is let go, and stops at its next tick."""

    def __init__(self, answer: Callable[[Tick], Any]) -> None:
        self._answer = answer
        self._thread = Thread(target=self._run, daemon=True)
        self._threads = torch.get_num_threads()
        self._go, self._back = Semaphore(0), Semaphore(0)
        self._laps: list[Lap] = []
        self._results: Any = None
        self._began = Lap(0.0, 0.0)
        self.failure: Exception | None = None
        self.over = False

    def _run(self) -> None:
        self._go.acquire()
        torch.set_num_threads(self._threads)
        self._begin()
        try:
            self._results = self._answer(self._tick)
            self._finish()
        except Exception as error:  # told to whoever started the turns
            self.failure = error
        self.over = True
        self._back.release()

    def start(self) -> None:
        """Makes it ready for its first turn."""
        self._thread.start()

    def join(self) -> None:
        """Waits until its thread has ended, after its last turn."""
        self._thread.join()

    def turn(self) -> None:
        """Lets it run up to its next tick."""
        self._go.release()
        self._back.acquire()

    def made(self) -> Laps:
        return Laps(tuple(self._laps), self._results)

    def _tick(self) -> None:
        self._finish()
        self._back.release()
        self._go.acquire()
        self._begin()

    def _begin(self) -> None:
        self._began = Lap(time.perf_counter(), time.thread_time())

    def _finish(self) -> None:
        work, clock = time.thread_time(), time.perf_counter()
        self._laps.append(Lap(clock - self._began.clock, work - self._began.work))


def in_turns(answers: Mapping[str, Callable[[Tick], Any]], shuffle: random.Random) -> dict[str, Laps]:
    """Runs all of them, a step each in an order shuffled anew; raises what one of them raised."""
    runners = {name: _Runner(answer) for name, answer in answers.items()}
    for runner in runners.values():
        runner.start()
    left = list(runners.values())
    while left:
        shuffle.shuffle(left)
        for runner in left:
            runner.turn()
        left = [runner for runner in left if not runner.over]
    for runner in runners.values():
        runner.join()
        if runner.failure is not None:
            raise runner.failure
    return {name: runner.made() for name, runner in runners.items()}
