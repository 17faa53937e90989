"""What a prompt is made of, for finding the places that ``.tok`` addresses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tracelens.prompted import Prompt
from tracelens.view import Shown, Token, TokenRows, View


class PromptTokens(Sequence[tuple[Token, ...]], Shown):
    """The real tokens of a prompt, row by row; shows itself as a grid.

    ``tokens[row][k]`` has the ``position`` k, which ``.tok[k]`` addresses, the text that it spells (``spelt``), and its
    ``id``.
    """

    def __init__(self, prompt: Prompt) -> None:
        batch, tokenizer = prompt.batch, prompt.tokenizer
        spellings = None if tokenizer is None else batch.spellings(tokenizer)
        self.rows = tuple(
            tuple(
                Token(position, "", token, "")
                if spellings is None
                else Token(position, spellings[row].text(position), token, spellings[row].piece(position))
                for position, token in enumerate(batch.tokens(row))
            )
            for row in range(len(batch.lengths))
        )

    def __getitem__(self, row: int) -> tuple[Token, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]  # rows, not slices
        """The tokens of one row."""
        return self.rows[row]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[tuple[Token, ...]]:
        return iter(self.rows)

    def _view(self) -> View:
        return TokenRows(self.rows)
