"""One line of the text form of a graph, in tokens, for :mod:`tracelens.ir.parse`."""

from __future__ import annotations

import json
import re

from tracelens.errors import GraphSyntaxError

_TOKEN = re.compile(
    r"""\s*(?:
      (?P<string>"(?:[^"\\]|\\.)*")
    | (?P<value>%\d+)
    | (?P<entry>\#\d+)
    | (?P<sym><[^<>]*>)
    | (?P<number>-?(?:\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+|inf\b|nan\b))
    | (?P<word>[A-Za-z_][\w.]*)
    | (?P<mark><-|\.\.\.|\.(?=[a-z])|[()\[\]{},:=@*+-])
    )""",
    re.VERBOSE,
)


class Line:
    """One line of text, read from left to right."""

    def __init__(self, source: str, number: int) -> None:
        self.source = source
        self.number = number
        self.tokens: list[str] = []
        position = 0
        stripped = source.rstrip()
        while position < len(stripped):
            match = None
            if (arrow := re.compile(r"\s*<-").match(stripped, position)) is not None:
                match = arrow
            else:
                match = _TOKEN.match(stripped, position)
            if match is None:
                raise self.error("unreadable text")
            self.tokens.append(match.group().strip())
            position = match.end()
        self.position = 0

    def error(self, problem: str) -> GraphSyntaxError:
        return GraphSyntaxError(f"line {self.number} of the graph text: {problem}: {self.source.strip()!r}")

    @property
    def next(self) -> str:
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def take(self, expected: str | None = None) -> str:
        token = self.next
        if not token or (expected is not None and token != expected):
            raise self.error(f"expected {expected!r}, found {token!r}" if expected else "it ends too early")
        self.position += 1
        return token

    def accept(self, token: str) -> bool:
        if self.next == token:
            self.position += 1
            return True
        return False

    def integer(self) -> int:
        token = self.take()
        if not re.fullmatch(r"-?\d+", token):
            raise self.error(f"expected an integer, found {token!r}")
        return int(token)

    def value(self) -> int:
        token = self.take()
        if not token.startswith("%"):
            raise self.error(f"expected a value, found {token!r}")
        return int(token[1:])

    def entry(self) -> int:
        token = self.take()
        if not token.startswith("#"):
            raise self.error(f"expected an entry, found {token!r}")
        return int(token[1:])

    def string(self) -> str:
        token = self.take()
        try:
            found: object = json.loads(token)
        except ValueError:
            found = None
        if not isinstance(found, str):
            raise self.error(f"expected a quoted string, found {token!r}")
        return found
