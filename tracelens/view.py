"""What a notebook or a terminal shows: one small tree, and two renderers that cannot drift apart.

Whatever shows itself (graphs, blocks, results, tables of sites, prompts) says in ``_view()`` what there is to see.
:func:`text` writes that for a terminal, :func:`html` for a notebook.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True, slots=True)
class Line:
    """A line of words."""

    words: str


@dataclass(frozen=True, slots=True)
class Code:
    """Lines whose spacing matters."""

    lines: str


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells under heads. ``empty``: what stands there instead of a table without rows."""

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    empty: str | None = None


@dataclass(frozen=True, slots=True)
class Fold:
    """Something that a notebook shows on a click; a terminal shows it at once."""

    title: str
    inside: View


@dataclass(frozen=True, slots=True)
class Token:
    """One token of a prompt: its place among the row's real tokens, what it spells, and its id.

    ``spelt``: the text itself, of which those of a row make up the whole; a character of several tokens is the last
    one's, and without a tokenizer there is none. ``shown``: the same for people to read, in quotes, because its space
    matters; a special token as it is, and with ``…`` where a token begins or ends inside a character.
    """

    position: int
    spelt: str
    id: int
    shown: str


@dataclass(frozen=True, slots=True)
class TokenRows:
    """The tokens of several prompts, one row each, with the padding that stands before them.

    ``marks``: for each row, or for none, words at some of its positions.
    """

    rows: tuple[tuple[Token, ...], ...]
    marks: tuple[Mapping[int, str], ...] = ()

    @property
    def longest(self) -> int:
        return max((len(row) for row in self.rows), default=0)


@dataclass(frozen=True, slots=True)
class Stack:
    """Several things, one below the other."""

    parts: tuple[View, ...]


View = Line | Code | Table | Fold | TokenRows | Stack


def folded(explained: str) -> tuple[Fold, ...]:
    """The sections of an ``explain()``, each under its first line; the very first is a line for the reader already."""
    sections = explained.split("\n\n")[1:]
    return tuple(Fold(section.splitlines()[0].rstrip(" {"), Code(section)) for section in sections)


WIDTH = 100
"""How many columns a terminal is taken to have: wider rows of tokens are broken."""


class Shown:
    """The base of what shows itself: ``_view`` is the one thing to say."""

    __slots__ = ()

    def _view(self) -> View:
        raise TypeError("Shown is abstract")

    def __repr__(self) -> str:
        return text(self._view())

    def _repr_html_(self) -> str:
        return html(self._view())


def display(shown: Shown) -> None:
    """Shows something where the user looks: as HTML in a notebook, else printed."""
    if in_notebook():
        import IPython.display  # it is there: the notebook runs on it

        IPython.display.display(shown)  # pyright: ignore[reportUnknownMemberType]  # untyped
    else:
        print(text(shown._view()))


def in_notebook() -> bool:
    """Does this process serve a notebook?"""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and hasattr(shell, "kernel")


# --- for a terminal --------------------------------------------------------------------------------------------------


def text(view: View) -> str:
    """The view in characters, without a line break at its end.

    >>> print(text(Table(("name", "shape"), (("v", "(576,)"), ("alpha", "()")))))
    name   shape
    v      (576,)
    alpha  ()
    """
    match view:
        case Line():
            return view.words
        case Code():
            return view.lines
        case Table():
            if not view.rows and view.empty is not None:
                return view.empty
            return _columns((view.heads, *view.rows))
        case Fold():
            return text(view.inside)
        case TokenRows():
            several = len(view.rows) > 1
            return "\n".join(
                _token_lines(row, view.longest - len(row), f"row {number}" if several else "", marks)
                for number, (row, marks) in enumerate(_marked(view))
            )
        case Stack():
            return "\n".join(text(part) for part in view.parts)


def _columns(rows: tuple[tuple[str, ...], ...]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


_HEADS = ("position", "token", "id", "")


def _marked(view: TokenRows) -> Iterator[tuple[tuple[Token, ...], Mapping[int, str]]]:
    return zip(view.rows, view.marks or ({},) * len(view.rows), strict=True)


def _token_lines(row: tuple[Token, ...], pads: int, title: str, marks: Mapping[int, str]) -> str:
    count = f"{len(row)} token{'s' if len(row) != 1 else ''}"
    heading = f"{title}: {count}" if title else count
    if pads:
        heading += f", after {pads} of padding"
    cells = [(*_cell(token), marks.get(token.position, "")) for token in row]
    lines = [heading]
    margin = max(map(len, _HEADS)) + 4
    while cells:
        widths = [max(map(len, cell)) for cell in cells]
        fitting = 1
        while fitting < len(cells) and margin + sum(widths[: fitting + 1]) + 2 * fitting <= WIDTH:
            fitting += 1
        for number, head in enumerate(_HEADS):
            if not any(cell[number] for cell in cells[: None if head else fitting]):
                continue  # without a tokenizer, tokens spell nothing; and few lines have marks
            parts = [cell[number].ljust(width) for cell, width in zip(cells[:fitting], widths, strict=False)]
            lines.append(f"  {head.ljust(margin - 4)}  {'  '.join(parts)}".rstrip())
        cells = cells[fitting:]
        if cells:
            lines.append("")
    return "\n".join(lines)


def _cell(token: Token) -> tuple[str, str, str]:
    return (str(token.position), token.shown, str(token.id))


# --- for a notebook --------------------------------------------------------------------------------------------------


def html(view: View) -> str:
    """The view as HTML without scripts; every word of it is escaped."""
    match view:
        case Line():
            return f"<p>{escape(view.words)}</p>"
        case Code():
            return f"<pre>{escape(view.lines)}</pre>"
        case Table():
            if not view.rows and view.empty is not None:
                return f"<p>{escape(view.empty)}</p>"
            head = "".join(f"<th>{escape(cell)}</th>" for cell in view.heads)
            body = "".join(
                "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in view.rows
            )
            return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        case Fold():
            return f"<details><summary>{escape(view.title)}</summary>{html(view.inside)}</details>"
        case TokenRows():
            return _token_grid(view)
        case Stack():
            return "<div>" + "".join(map(html, view.parts)) + "</div>"


_MARKED = ";outline:2px solid"
_PAD = '<td title="padding" style="opacity:0.4">·</td>'


def _token_grid(view: TokenRows) -> str:
    """A column for each padded position: the rows' last tokens stand below one another, as ``[:, -1]`` has it."""
    several = len(view.rows) > 1
    body = ""
    for number, (row, marks) in enumerate(_marked(view)):
        head = f"<th>row {number}</th>" if several else ""
        cells = "".join(
            f'<td style="text-align:left{_MARKED if token.position in marks else ""}" '
            f'title="position {token.position}, id {token.id}">'
            f'<small style="opacity:0.6">{token.position}</small><br><code>{escape(token.shown)}</code><br>'
            f'<small style="opacity:0.6">{token.id}</small>'
            + (f"<br><b>{escape(marks[token.position])}</b>" if token.position in marks else "")
            + "</td>"
            for token in row
        )
        body += f"<tr>{head}{_PAD * (view.longest - len(row))}{cells}</tr>"
    return f'<div style="overflow-x:auto"><table><tbody>{body}</tbody></table></div>'
