"""What can be asked of a rank: one table from the request's name to the function that answers it.

A request is a name of this table and data, so nobody can make a rank run anything else. A line is added here for each
new request; the function may stand in any module of tracelens, and is imported when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import cast

from tracelens.backends.ranks.served import Handler, Handlers

HANDLERS: Handlers = {
    "ping": "tracelens.backends.ranks.checks:ping",
    "collective": "tracelens.backends.ranks.checks:collective",
    "load": "tracelens.serving:load",
    "run": "tracelens.serving:run",
    "generate": "tracelens.serving:generate",
    "stream": "tracelens.serving:stream",
    "drop": "tracelens.serving:drop",
}


def handler(name: object, handlers: Handlers = HANDLERS) -> Handler:
    """The function that answers requests of that name; ``LookupError`` if there is none."""
    found = handlers.get(name) if isinstance(name, str) else None
    if found is None:
        raise LookupError(f"a rank cannot be asked for {name!r}; it answers to " + ", ".join(handlers))
    if not isinstance(found, str):
        return found
    module, _, function = found.partition(":")
    if not module.startswith("tracelens."):
        raise LookupError(f"{found} is no function of tracelens")
    return cast(Handler, getattr(import_module(module), function))
