"""Contrast data from files of the model-written evaluations' format."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

from tracelens.errors import Blaming, ContrastError, ContrastFileError
from tracelens.location import here
from tracelens.steering.choices import Question, choices_in, lettered, untailed
from tracelens.steering.contrast import (
    Contrast,
    ContrastRow,
    Refusal,
    Split,
    Template,
    parts_of,
    require_split,
    require_template,
)

KEYS = ("question", "answer_matching_behavior", "answer_not_matching_behavior")


def load_contrast(
    path: str | Path,
    *,
    template: Template = "plain",
    letters: Literal["balanced", "as_written"] = "balanced",
    seed: int = 0,
    split: Split = (0.4, 0.1, 0.5),
    system: str | None = None,
    instruction: str | None = None,
) -> Contrast:
    """Contrast data from a file with a question, a matching and a non-matching answer in each row.

    ``path``: JSON lines, or one JSON list, with the keys ``question``, ``answer_matching_behavior`` and
    ``answer_not_matching_behavior`` (Perez et al. 2022, arXiv:2212.09251; the files of CAA have the same). A question
    may list ``Choices:`` under letters; which of them matches is read from the answer's letter. If several answers do
    not match, the first of them is taken.

    ``template``: ``"plain"`` puts ``Answer:`` behind the question; ``"chat"`` makes it the user's message in the
    tokenizer's chat template; or a function from a :class:`ContrastRow` to a text or to messages. ``system``: the
    system message, in the plain template the text before all else. ``instruction``: what stands after the question.

    ``letters``: with ``"balanced"``, answers in words (`` Yes``, `` No``) become choices (A) and (B), and two choices
    are exchanged, so that in each part of the split the rows whose matching answer was the same have it as A and as B
    in turn: neither letter nor word tells the behaviour. With ``"as_written"`` everything stays as it is. Questions of
    more choices keep their letters. ``seed`` decides about the order of rows in the parts of the ``split``.

    Raises :class:`~tracelens.errors.ContrastFileError` for a file that is not of this form, with the line; rows whose
    answers are not among the choices are left out, and ``data.refused`` says which and why.

    >>> data = tl.steering.load_contrast("corrigible-neutral-HHH.jsonl", template="chat")    # doctest: +SKIP
    """
    with Blaming(here()):
        if letters not in ("balanced", "as_written"):
            raise ContrastError(f"letters={letters!r} is no way with letters", instead='letters="balanced"')
        require_template(template)
        require_split(split)
        file = Path(path)
        rows: list[ContrastRow] = []
        questions: list[Question | None] = []
        refused: list[Refusal] = []
        for line, found in _entries(file):
            read = _read(found, line, words=letters == "as_written")
            if isinstance(read, str):
                refused.append(Refusal(line, read))
                continue
            question, row = read
            questions.append(question)
            rows.append(row)
        if letters == "balanced":
            rows = _balanced(rows, questions, seed, split)
        return Contrast(
            tuple(rows),
            name=file.stem,
            template=template,
            system=system,
            instruction=instruction,
            letters=letters,
            seed=seed,
            split=split,
            refused=tuple(refused),
        )


def _entries(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a file with their lines, or in a JSON list with their numbers, from 1."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ContrastFileError(
            f"{file} cannot be read: {error}", instead="the path of a JSON lines file"
        ) from error
    listed = text.lstrip().startswith("[")
    try:
        entries: list[tuple[int, Any]] = (
            list(enumerate(json.loads(text), 1))
            if listed
            else [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        )
    except ValueError as error:
        raise ContrastFileError(f"{file} is no JSON: {error}", instead=_FORM) from error
    for line, entry in entries:
        if not listed:
            try:
                entry = json.loads(entry)
            except ValueError as error:
                raise ContrastFileError(
                    f"line {line} of {file} is no JSON: {error}", instead=_FORM
                ) from error
        missing = [key for key in KEYS if key not in entry] if isinstance(entry, dict) else list(KEYS)
        if missing:
            raise ContrastFileError(
                f"{'entry' if listed else 'line'} {line} of {file} has no {missing[0]!r}", instead=_FORM
            )
        yield line, cast("dict[str, Any]", entry)


_FORM = '{"question": "...", "answer_matching_behavior": " (A)", "answer_not_matching_behavior": " (B)"} in each line'


def _read(found: dict[str, Any], line: int, *, words: bool) -> tuple[Question | None, ContrastRow] | str:
    """A row, with its question where that has lettered choices; or why it is left out."""
    texts: list[str] = []
    for key in KEYS:
        given = found[key]
        if isinstance(given, list):
            several = cast("list[Any]", given)
            # Several answers may fail to match, and any of them does for a contrast; several that match do not.
            given = several[0] if several and (key == KEYS[2] or len(several) == 1) else None
        if not isinstance(given, str) or not given.strip():
            return f"{key} is not one text"
        texts.append(given)
    question, positive, negative = untailed(texts[0]), *texts[1:]
    if positive.strip() == negative.strip():
        return "both answers are the same"
    one, other = lettered(positive), lettered(negative)
    if one is None and other is None:
        row = ContrastRow(question, positive, negative, (positive, negative), line)
        if words:
            return None, row
        # In the order in which the words sort, that of the rows would tell which matches.
        both = tuple(sorted((positive.strip(), negative.strip()), reverse=True))
        at = both.index(positive.strip())
        return Question(question, both, at, 1 - at, positive.strip()), row
    if one is None or other is None:
        return "one answer is a letter and the other is not"
    listed = choices_in(question)
    if isinstance(listed, str):
        return listed
    text, choices = listed
    for number, answer in ((one, positive), (other, negative)):
        if number >= len(choices):
            return f"the answer{answer} is not among the {len(choices)} choices"
    read = Question(text, choices, one, other, positive.strip())
    options = tuple(read.answer(number) for number in range(len(choices)))
    return read, ContrastRow(question, positive, negative, options, line)


def _balanced(
    rows: Sequence[ContrastRow], questions: Sequence[Question | None], seed: int, split: Split
) -> list[ContrastRow]:
    """The rows with the matching answer as A and as B in turn, among those of a part with the same answer before."""
    found = list(rows)
    parts = parts_of(len(rows), seed, split)
    rest = sorted(set(range(len(rows))).difference(*parts.values()))
    for part in (*parts.values(), rest):
        groups: dict[str, list[int]] = {}
        for number in part:
            question = questions[number]
            if question is not None and len(question.choices) == 2:
                groups.setdefault(question.positive_was, []).append(number)
        turn = 0
        for _, numbers in sorted(groups.items()):
            for number in numbers:
                question = questions[number]
                assert question is not None
                led = question.led_by(turn)
                found[number] = replace(
                    rows[number],
                    prompt=led.prompt,
                    positive=led.answer(led.positive),
                    negative=led.answer(led.negative),
                    options=tuple(map(led.answer, range(2))),
                )
                turn = 1 - turn
    return found
