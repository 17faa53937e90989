"""What all errors of tracelens have in common: a problem, the guilty line, and what to write instead."""

from __future__ import annotations

from tracelens.location import Location


class TracelensError(Exception):
    """The base of all errors that tracelens raises on purpose.

    Attributes: ``problem`` (what is wrong), ``at`` (the guilty line, if one is known), ``also`` (other lines that take
    part, each with a word on its role), ``excerpt`` (a few lines of the graph, with an arrow), ``instead`` (what to
    write).
    """

    def __init__(
        self,
        problem: str,
        *,
        at: Location | None = None,
        also: tuple[tuple[str, Location], ...] = (),
        excerpt: str | None = None,
        instead: str | None = None,
    ) -> None:
        self.problem = problem
        self.at = at
        self.also = also
        self.excerpt = excerpt
        self.instead = instead
        super().__init__(problem)

    def __str__(self) -> str:
        blocks = [self.problem]
        if self.at is not None:
            blocks.append(_quoted("at", self.at))
        blocks += [_quoted(role, location) for role, location in self.also]
        if self.excerpt:
            blocks.append("  graph:\n" + "\n".join("    " + line for line in self.excerpt.splitlines()))
        if self.instead:
            blocks.append("  instead: " + self.instead.replace("\n", "\n           "))
        return "\n".join(blocks)


class Blaming:
    """Adds the user's line to an error that is raised without one: ``with Blaming(location): ...``."""

    __slots__ = ("location",)

    def __init__(self, location: Location) -> None:
        self.location = location

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, TracelensError) and error.at is None:
            error.at = self.location


_LONGEST = 160
"""Of a source line, in characters: a longer one (data, generated code) would hide the message."""


def _quoted(role: str, location: Location) -> str:
    text = location.text
    if len(text) > _LONGEST:
        text = text[:_LONGEST] + " ..."
    return f"  {role} {location}" + (f"\n      {text}" if text else "")
