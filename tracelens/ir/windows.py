"""Windows of generation steps, and in which of them a value is there.

Step 0 of a generation is the pass over the prompt; step k makes token k. A site of a generation says in which steps it
is meant; without saying so, in every one. What is made of sites is made anew in each step in which all of them are.
What was made in one step alone is there from then on, as the number that it was: so values of an earlier step can be
used in later ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepWindow:
    """Some generation steps in a row, from ``start`` up to but not including ``stop`` (``None``: to the end)."""

    start: int
    stop: int | None = None

    def __str__(self) -> str:
        return f"{self.start}:{'' if self.stop is None else self.stop}"

    @property
    def words(self) -> str:
        """The window in a sentence: ``"step 0"``, ``"steps 5:10"``, ``"steps 1:"``."""
        return f"step {self.start}" if self.single else f"steps {self}"

    @property
    def single(self) -> bool:
        """Is it one step?"""
        return self.stop == self.start + 1

    @property
    def every(self) -> bool:
        """Is it all of the generation?"""
        return self.start == 0 and self.stop is None

    def within(self, other: StepWindow) -> bool:
        """Is each step of this window one of the other, too?"""
        return other.start <= self.start and (
            other.stop is None or (self.stop is not None and self.stop <= other.stop)
        )

    def overlaps(self, other: StepWindow) -> bool:
        """Is there a step in both?"""
        return (other.stop is None or self.start < other.stop) and (
            self.stop is None or other.start < self.stop
        )

    def __contains__(self, step: int) -> bool:
        return self.start <= step and (self.stop is None or step < self.stop)

    def count(self, steps: int) -> int:
        """How many steps of a generation of ``steps`` steps are in the window."""
        return max(0, (steps if self.stop is None else min(steps, self.stop)) - self.start)


EVERY_STEP = StepWindow(0)
PREFILL = StepWindow(0, 1)
DECODE = StepWindow(1)

_WRITTEN = re.compile(r"(\d+):(\d*)")


def parse_window(text: str) -> StepWindow:
    """The inverse of ``str``; raises ``ValueError`` on anything else, and on a window without steps."""
    found = _WRITTEN.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is no window of generation steps")
    window = StepWindow(int(found[1]), int(found[2]) if found[2] else None)
    if window.stop is not None and window.stop <= window.start:
        raise ValueError(f"{text!r} has no steps")
    return window


class ApartError(Exception):
    """Values that are in no step there together; the message says why."""


def together(windows: Iterable[StepWindow]) -> StepWindow | None:
    """In which steps something is made of values with these windows; ``None`` for none, as of constants.

    Raises :class:`ApartError` for windows of which neither lies in the other, and where a value of one step would be
    needed before that step.
    """
    several: StepWindow | None = None
    latest: StepWindow | None = None
    for window in windows:
        if window.single:
            latest = window if latest is None or window.start > latest.start else latest
        elif several is None or window.within(several):
            several = window
        elif not several.within(window):
            raise ApartError(
                f"a value of {several.words} meets a value of {window.words}, and neither are all of the other's"
            )
    if several is None or latest is None:
        return several or latest
    if latest.start > several.start:
        raise ApartError(
            f"a value of {latest.words} meets a value of {several.words}, which begin before it is there"
        )
    return several


def is_earlier(made: StepWindow | None, window: StepWindow | None) -> bool:
    """Is a value of an earlier step there before all that happens in the steps of ``window``?"""
    return made is not None and window is not None and made.single and made.start < window.start
