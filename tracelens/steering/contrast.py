"""Contrast data: prompts, each with an answer that shows a behaviour and one that does not."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, cast, overload

from tracelens.errors import Blaming, ContrastError
from tracelens.location import here
from tracelens.view import Line, Shown, Stack, Table, View

if TYPE_CHECKING:
    from tracelens.model import Model
    from tracelens.steering.labels import Labelled, RenderedRow

Part = Literal["all", "train", "validation", "test", "some"]


@dataclass(frozen=True)
class ContrastRow:
    """One row of contrast data.

    ``prompt``: the text before the answer, without what a template puts around it. ``positive``, ``negative``: the
    answer that shows the behaviour and the one that does not, as they were written, a space before them included.
    ``options``: all answers that the prompt offers. ``source``: the row's line in its file, from 1, or its number in a
    list of pairs, from 0.
    """

    prompt: str
    positive: str
    negative: str
    options: tuple[str, ...]
    source: int


Template = Literal["plain", "chat"] | Callable[[ContrastRow], "str | Sequence[Mapping[str, str]]"]
"""How a row becomes what the model is given: by name, or a function from a row to a text or to messages."""

Split = tuple[float, float, float]


@dataclass(frozen=True)
class Refusal:
    """A row that is left out: its number (in a file its line, from 1), and why."""

    row: int
    reason: str


@dataclass(frozen=True, eq=False, repr=False)
class Contrast(Sequence[ContrastRow], Shown):
    """Prompts with two answers each, in the order in which they were written, and a split that a seed decides.

    Made by :func:`load_contrast` and :meth:`pairs`. ``data[3]`` is a row, ``data[10:20]`` some of them; ``data.train``,
    ``data.validation`` and ``data.test`` are shuffled parts that have no row in common.

    >>> data = Contrast.pairs([("2 + 2 =", " 4", " 5"), ("3 + 3 =", " 6", " 7")])
    >>> data[0].positive, len(data.train) + len(data.validation) + len(data.test)
    (' 4', 2)
    """

    rows: tuple[ContrastRow, ...]
    """The rows."""
    name: str = "pairs"
    """What the data are called: the name of the file, without its ending."""
    template: Template = "plain"
    """How a row becomes what the model is given."""
    system: str | None = None
    """What the system message says, or in the plain template the text before all else."""
    instruction: str | None = None
    """What stands after the question."""
    letters: str = "as_written"
    """Where the answers' letters come from: ``"balanced"`` or ``"as_written"``."""
    seed: int = 0
    """What decides about the split."""
    split: Split = (0.4, 0.1, 0.5)
    """The shares of rows for training, validation and test."""
    part: Part = "all"
    """Which part this is: ``"all"``, one of the split, or ``"some"`` for rows that were picked from all."""
    parent: str | None = None
    """The digest of the data that this is a part of; ``None`` for the whole."""
    refused: tuple[Refusal, ...] = ()
    """The rows that were read and left out, with reasons."""
    numbers: tuple[int, ...] = field(default=())
    """The number of each row in the whole."""

    @classmethod
    def pairs(
        cls,
        pairs: Iterable[Sequence[str]],
        *,
        name: str = "pairs",
        template: Template | Literal["none"] = "none",
        system: str | None = None,
        instruction: str | None = None,
        seed: int = 0,
        split: Split = (0.4, 0.1, 0.5),
    ) -> Contrast:
        """Data of your own: ``(prompt, positive, negative)`` for each row, or with further answers behind these.

        By default (``template="none"``) a prompt is given to the model as it is. The other arguments are those of
        :func:`load_contrast`. Raises :class:`~tracelens.errors.ContrastError` for rows that are no such texts.

        >>> Contrast.pairs([("The movie was", " great", " awful")])[0].options
        (' great', ' awful')
        """
        with Blaming(here()):
            rows: list[ContrastRow] = []
            for number, pair in enumerate(pairs):
                if (
                    isinstance(pair, str)
                    or len(pair) < 3
                    or not all(isinstance(text, str) and text for text in pair)  # pyright: ignore[reportUnnecessaryIsInstance]  # users may not be typed
                ):
                    raise _not_three(number, pair)
                prompt, *answers = pair
                if len(set(answers)) < len(answers):
                    raise ContrastError(
                        f"row {number} has the same answer twice: {answers!r}",
                        instead="an answer that shows the behaviour and one that does not",
                    )
                rows.append(ContrastRow(prompt, answers[0], answers[1], tuple(answers), number))
            shape = as_it_is if template == "none" else template
            return cls(
                tuple(rows),
                name=name,
                template=require_template(shape),
                system=system,
                instruction=instruction,
                seed=seed,
                split=require_split(split),
            )

    def __post_init__(self) -> None:
        if not self.rows and self.part == "all":
            reasons = "; ".join(f"line {entry.row}: {entry.reason}" for entry in self.refused[:3])
            raise ContrastError(
                "there are no rows" + (f" that qualify: {reasons}" if reasons else ""),
                instead="at least one prompt with two answers",
            )
        if not self.numbers:
            object.__setattr__(self, "numbers", tuple(range(len(self.rows))))

    # --- parts ---------------------------------------------------------------------------------------------------

    @property
    def train(self) -> Contrast:
        """The rows to make vectors of, shuffled."""
        return self._part("train")

    @property
    def validation(self) -> Contrast:
        """The rows to choose layers and strengths on, shuffled."""
        return self._part("validation")

    @property
    def test(self) -> Contrast:
        """The rows to report, shuffled."""
        return self._part("test")

    def _part(self, part: Literal["train", "validation", "test"]) -> Contrast:
        if self.part != "all":
            raise ContrastError(
                f"these rows are a part of the data already ({self.part!r}), which has no {part} rows of its own",
                at=here(),
                instead=f"data.{part}, of all the data",
            )
        chosen = parts_of(len(self), self.seed, self.split)[part]
        if not chosen:
            raise ContrastError(
                f"no row is left for {part}: {len(self)} rows are split {self.split}",
                at=here(),
                instead="more rows, or other shares: split=(0.5, 0.25, 0.25)",
            )
        return self._some(chosen, part)

    def _some(self, chosen: Sequence[int], part: Part) -> Contrast:
        return replace(
            self,
            rows=tuple(self.rows[number] for number in chosen),
            numbers=tuple(self.numbers[number] for number in chosen),
            part=part,
            parent=self.parent or self.digest,
        )

    @overload
    def __getitem__(self, key: int) -> ContrastRow: ...
    @overload
    def __getitem__(self, key: slice) -> Contrast: ...
    def __getitem__(self, key: int | slice) -> ContrastRow | Contrast:
        """A row; or for a slice some of them, which stay part of what they were (a slice of test rows is test rows)."""
        if isinstance(key, slice):
            chosen = range(len(self))[key]
            if not chosen:
                raise ContrastError(
                    f"no row is chosen: there are {len(self)}", at=here(), instead="data[:10]"
                )
            return self._some(chosen, "some" if self.part == "all" else self.part)
        return self.rows[key]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[ContrastRow]:
        return iter(self.rows)

    # --- what a model sees ---------------------------------------------------------------------------------------

    @property
    def digest(self) -> str:
        """The sha256 of rows, template and settings: equal if and only if the model would be given the same."""
        found = hashlib.sha256()
        settings = [self.template if isinstance(self.template, str) else "function", self.system]
        found.update(json.dumps([*settings, self.instruction]).encode())
        for row in self.rows:
            told = [row.prompt, row.positive, row.negative, list(row.options)]
            if not isinstance(self.template, str):
                told.append(self.rendered(row))  # a function has no name that says what it does
            found.update(json.dumps(told).encode())
        return found.hexdigest()

    @property
    def row_digests(self) -> tuple[str, ...]:
        """A short digest of each row that says which question it asks, however letters and template are chosen."""
        told = ([sorted(row.prompt.split()), sorted(row.options)] for row in self.rows)
        return tuple(hashlib.sha256(json.dumps(one).encode()).hexdigest()[:12] for one in told)

    def rendered(self, row: ContrastRow) -> str | list[dict[str, str]]:
        """What the template makes of a row, without its answer: a text, or messages."""
        if callable(self.template):
            made: Any = self.template(row)
            if isinstance(made, str):
                return made
            if isinstance(made, Sequence) and all(isinstance(part, Mapping) for part in cast("Any", made)):
                return [dict(part) for part in cast("Any", made)]
            raise ContrastError(
                f"the template made a {type(made).__name__} of row {row.source}, not a text or messages",
                instead='template=lambda row: f"Q: {row.prompt}\\nA:"',
            )
        question = row.prompt if self.instruction is None else f"{row.prompt}\n\n{self.instruction}"
        if self.template == "chat":
            before = [] if self.system is None else [{"role": "system", "content": self.system}]
            return [*before, {"role": "user", "content": question}]
        before = "" if self.system is None else f"{self.system}\n\n"
        return f"{before}{question}\n\nAnswer:"

    def tokens(self, model: Model) -> Labelled:
        """The rows as token ids, with the position at which the two answers differ; what does not qualify is refused.

        The label's position is found by comparing ids, and the ids before it are those of the prompt by itself. Raises
        :class:`~tracelens.errors.LabelError` if no row qualifies, with the reasons.
        """
        from tracelens.steering.labels import labelled

        with Blaming(here()):
            return labelled(self, model)

    def show(self, model: Model, row: int = 0) -> RenderedRow:
        """A row as the model is given it: the text, its tokens, and where the label and the decision are.

        Raises :class:`~tracelens.errors.LabelError` for a row that does not qualify, and
        :class:`~tracelens.errors.ContrastError` for one that is not there.

        >>> print(data.show(model, row=0))                                           # doctest: +SKIP
        """
        from tracelens.steering.labels import RenderedRow

        with Blaming(here()):
            if not -len(self) <= row < len(self):
                raise ContrastError(f"there is no row {row} of {len(self)}", instead="row=0")
            return RenderedRow(self, model, row % len(self))

    # --- looks ---------------------------------------------------------------------------------------------------

    def _view(self) -> View:
        template = self.template if isinstance(self.template, str) else name_of(self.template)
        words = f"{self.name}: {len(self)} rows"
        if self.part in ("train", "validation", "test"):
            words += f" for {self.part}"
        elif self.part == "all":
            parts = parts_of(len(self), self.seed, self.split)
            shares = ", ".join(f"{len(rows)} {part}" for part, rows in parts.items())
            words += f" ({shares}; seed {self.seed})"
        words += f"; template {template}, letters {self.letters.replace('_', ' ')}"
        if self.refused:
            words += f"; {len(self.refused)} left out (data.refused)"
        heads = ("row", "prompt", "positive", "negative")
        rows = tuple(
            (str(number), _short(row.prompt), repr(row.positive), repr(row.negative))
            for number, row in zip(self.numbers[:4], self.rows[:4], strict=True)
        )
        more = (Line(f"... and {len(self) - 4} more"),) if len(self) > 4 else ()
        return Stack((Line(words), Table(heads, rows), *more))


def as_it_is(row: ContrastRow) -> str:
    """The template of data that bring their own: the prompt, unchanged."""
    return row.prompt


def name_of(template: Template) -> str:
    """What a template is called in reports."""
    if isinstance(template, str):
        return template
    return "none" if template is as_it_is else getattr(template, "__qualname__", type(template).__qualname__)


def parts_of(rows: int, seed: int, split: Split) -> dict[str, list[int]]:
    """The numbers of the rows of each part. They depend on the arguments alone, on every machine."""
    draw = random.Random(seed)
    keys = [draw.random() for _ in range(rows)]
    order = sorted(range(rows), key=keys.__getitem__)
    train, validation, test = split
    first = round(train * rows)
    second = min(rows, first + round(validation * rows))
    third = rows if abs(train + validation + test - 1) < 1e-9 else min(rows, second + round(test * rows))
    if test == 0:
        third = second
    return {"train": order[:first], "validation": order[first:second], "test": order[second:third]}


def require_split(split: Any) -> Split:
    """The shares; :class:`ContrastError` for what are none."""
    numbers = tuple(cast("Iterable[Any]", split)) if isinstance(split, tuple | list) else ()
    if (
        len(numbers) != 3
        or not all(isinstance(share, int | float) and share >= 0 for share in numbers)
        or not 0 < sum(numbers) <= 1 + 1e-9
    ):
        raise ContrastError(
            f"split={split!r} is no shares for training, validation and test",
            instead="split=(0.4, 0.1, 0.5)",
        )
    return cast("Split", numbers)


def require_template(template: Any) -> Template:
    """The template; :class:`ContrastError` for what is none."""
    if template in ("plain", "chat") or callable(template):
        return cast("Template", template)
    raise ContrastError(
        f"template={template!r} is no template",
        instead='"plain", "chat", or a function from a row to a text or to messages',
    )


def _not_three(number: int, pair: Any) -> ContrastError:
    """Why a row is none: of two texts, with an empty one, or something else."""
    example = 'Contrast.pairs([("The movie was", " great", " awful"), ...])'
    if not isinstance(pair, str) and len(pair) == 2:
        return ContrastError(
            f"row {number} is two texts, without the prompt that they have in common: {pair!r}",
            instead=f"{example}; or, for texts that have none, Unpaired(positive=[...], negative=[...])",
        )
    if not isinstance(pair, str) and len(pair) > 2 and not pair[0]:
        return ContrastError(
            f"the prompt of row {number} is empty: {pair!r}",
            instead=f"{example}; or, for texts that have none, Unpaired(positive=[...], negative=[...])",
        )
    return ContrastError(f"row {number} is not three texts: {pair!r}", instead=example)


def _short(text: str, most: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"
