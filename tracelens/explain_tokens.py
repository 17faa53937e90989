"""Where a block reads and writes in its prompt: the tokens with their positions, and what each selector chooses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tracelens.errors import TracelensError
from tracelens.ir.graph import Graph
from tracelens.ir.ops import Index, IndexPut, Op, OwnTokens, PromptTokens, Read, Ref, TokenSelector
from tracelens.prompt_tokens import PromptTokens as Tokens
from tracelens.prompted import Prompt
from tracelens.selection import written
from tracelens.view import Token

_ROWS, _TOKENS = 8, 64
"""More rows than these, and more tokens of a row, are not shown."""


def tokens_section(graph: Graph, prompt: Prompt) -> str | None:
    """The section of an ``explain()``; ``None`` where no tokens are chosen."""
    rows = Tokens(prompt).rows
    lines = list(dict.fromkeys(_lines(graph, prompt, rows)))
    if not lines:
        return None
    shown = [f"  row {number}: {_row(row)}" for number, row in enumerate(rows[:_ROWS])]
    if len(rows) > _ROWS:
        shown.append(f"  ... and {len(rows) - _ROWS} more rows")
    return "\n".join(["tokens of the prompt, and which of them are read and written", *shown, *lines])


def _row(row: Sequence[Token]) -> str:
    more = f" ... {len(row)} in all" if len(row) > _TOKENS else ""
    return "  ".join(map(_cell, row[:_TOKENS])) + more


def _cell(token: Token) -> str:
    return f"{token.position} {token.shown}" if token.shown else f"{token.position} <{token.id}>"


def _lines(graph: Graph, prompt: Prompt, rows: Sequence[Sequence[Token]]) -> Iterator[str]:
    put = {op.value.id for op in graph.writes if isinstance(op.value, Ref)}
    for op in graph.ops:
        if not isinstance(op, Index | IndexPut):
            continue
        selector = next((item for item in op.index if isinstance(item, TokenSelector | OwnTokens)), None)
        if selector is None or (isinstance(op, IndexPut) and not _is_written(graph, op, put)):
            continue
        verb = "writes" if isinstance(op, IndexPut) else "reads"
        try:
            places = _places(selector, prompt, rows)
        except TracelensError as error:
            places = error.problem.splitlines()[0]
        what, when = _what(graph, op.base)
        yield f"  {verb} {what}{written(selector)}{when}: {places}"


def _is_written(graph: Graph, op: IndexPut, put: set[int]) -> bool:
    """Is it written to its site, at once or as a part of what is?"""
    users = (graph.ops[number] for number in graph.uses[op.out])
    return op.out in put or any(
        isinstance(user, IndexPut) and _is_written(graph, user, put) for user in users
    )


def _what(graph: Graph, value: int) -> tuple[str, str]:
    """The site that a value is, or is a part of, and the steps in which it is meant."""
    op: Op = graph.ops[graph.producer[value]]
    prompt = ""
    while isinstance(op, Index | IndexPut):
        row = next((item.row for item in op.index if isinstance(item, PromptTokens)), None)
        prompt = prompt if row is None else f"prompts[{row}]."
        op = graph.ops[graph.producer[op.base]]
    if not isinstance(op, Read):
        return f"{prompt}a computed value ", ""
    return prompt + op.site.text, "" if op.site.steps is None else f" in {op.site.steps.words}"


def _places(selector: TokenSelector | OwnTokens, prompt: Prompt, rows: Sequence[Sequence[Token]]) -> str:
    columns, pads = prompt.select(selector).columns, prompt.batch.pads
    if isinstance(selector, OwnTokens):
        chosen = [(selector.row, list(columns[0]))]
    else:
        chosen = [(row, [column - pads[row] for column in own]) for row, own in enumerate(columns)]
    parts: list[str] = []
    for row, positions in chosen[:_ROWS]:
        cells = ", ".join(_cell(rows[row][position]) for position in positions[:_TOKENS])
        parts.append(f"{cells} of row {row}" if len(rows) > 1 else cells)
    return "; ".join(parts) + ("; ..." if len(chosen) > _ROWS else "")
