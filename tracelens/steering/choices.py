"""Questions whose answers have letters: ``(A) Yes``; read from a text, written into one, and balanced."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

_HEAD = re.compile(r"(?m)^[ \t]*Choices:[ \t]*$")
_CHOICE = re.compile(r"^[ \t]*\(([A-Z])\)(.*)$")
_ANSWER = re.compile(r"\s*\(([A-Z])\)\s*")
_TAIL = re.compile(r"\s*Answer:\s*\Z")


@dataclass(frozen=True)
class Question:
    """A question, and the answers that it offers under letters A, B, ...

    ``positive``, ``negative``: the numbers of the answer that shows the behaviour and of the one that does not.
    ``positive_was``: how the matching answer was written in the file, a letter or a word.
    """

    text: str
    choices: tuple[str, ...]
    positive: int
    negative: int
    positive_was: str

    @property
    def prompt(self) -> str:
        """The question with its choices, as the data sets write them."""
        lines = "\n".join(f" ({_letter(number)}) {choice}" for number, choice in enumerate(self.choices))
        return f"{self.text}\n\nChoices:\n{lines}"

    def answer(self, number: int) -> str:
        """An answer: `` (A)``, with the space before it that the data sets write."""
        return f" ({_letter(number)})"

    def led_by(self, number: int) -> Question:
        """The same question of two choices, with the matching answer as choice ``number``."""
        assert len(self.choices) == 2
        if self.positive == number:
            return self
        return replace(
            self, choices=self.choices[::-1], positive=1 - self.positive, negative=1 - self.negative
        )


def _letter(number: int) -> str:
    return chr(ord("A") + number)


def untailed(question: str) -> str:
    """The question without an ``Answer:`` at its end, which templates write."""
    return _TAIL.sub("", question)


def lettered(answer: str) -> int | None:
    """The number of the choice that an answer names by its letter, `` (C)``: 2; ``None`` for an answer in words."""
    found = _ANSWER.fullmatch(answer)
    return None if found is None else ord(found[1]) - ord("A")


def choices_in(question: str) -> tuple[str, tuple[str, ...]] | str:
    """The question alone, and its choices in order; or why there are none. A choice may have several lines."""
    heads = list(_HEAD.finditer(question))
    if not heads:
        return "the question lists no choices"
    text = question[: heads[-1].start()].rstrip()
    found: list[str] = []
    for line in question[heads[-1].end() :].strip("\n").splitlines():
        choice = _CHOICE.match(line)
        if choice is not None:
            if choice[1] != _letter(len(found)):
                return f"choice ({choice[1]}) stands where ({_letter(len(found))}) belongs"
            found.append(choice[2].strip())
        elif found:
            found[-1] += "\n" + line
        elif line.strip():
            return "the choices have no letters"
    if len(found) < 2:
        return "the question lists fewer than two choices"
    return text, tuple(choice.rstrip() for choice in found)
