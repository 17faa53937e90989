"""The error of a rank that nobody waits for."""

from __future__ import annotations


class InStepError(Exception):
    """Raised ``from`` an error after which this rank stands where the others do.

    A handler that fails between two communications leaves the others waiting in the second, or a message on its way
    that the next request would take for its own, so after a failure the ranks are started anew, unless nothing was
    communicated at all. A handler that took part in all that was planned, and reports at the end what went wrong on
    the way, says so with this. Raised from nothing, it says that things went wrong on other ranks alone.

    ``when``: the moment of the error, if it was not just now, by ``time.monotonic()``.
    """

    def __init__(self, when: float | None = None) -> None:
        super().__init__()
        self.when = when
