"""Text and saves while they are made: a generation that hands over what each step has given."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from queue import Full, Queue
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from tracelens.backends.devices import Devices
from tracelens.backends.gathering import Course, Gathering, Target
from tracelens.errors import OptionError, UnknownSaveError
from tracelens.gathered import of_one_step
from tracelens.generating import StepTold, generate
from tracelens.ir.graph import Graph
from tracelens.location import here
from tracelens.plan import Plan
from tracelens.prompted import Prompt
from tracelens.tracing import Recording
from tracelens.view import Line, Shown, View

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tracelens.generation import Generation


@dataclass(frozen=True)
class StepEvent(Shown):
    """What one step of a generation has given.

    ``step``: its number; 0 is the pass over the prompt. ``tokens``: for each row the id that it chose, ``None`` for
    rows that have ended. ``texts``: for each row what is new of its text; a character of several tokens is there with
    the last of them. ``saves``: what the step saved, by name (``event["h"]``): on an axis of positions those of the
    step, for prompts of different lengths one tensor a row in step 0.
    """

    step: int
    tokens: tuple[int | None, ...]
    texts: tuple[str, ...]
    saves: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def token(self) -> int | None:
        """The id that the first row chose."""
        return self.tokens[0]

    @property
    def text(self) -> str:
        """What is new of the first row's text."""
        return self.texts[0]

    def __getitem__(self, name: str) -> Any:
        if name not in self.saves:
            known = ", ".join(map(repr, self.saves)) or "nothing"
            raise UnknownSaveError(
                f"step {self.step} saved nothing as {name!r}; it saved {known}",
                at=here(),
                instead="event.saves, which has what the step saved",
            )
        return self.saves[name]

    def _view(self) -> View:
        shapes = ", ".join(
            f"{name} {list(value.shape) if isinstance(value, torch.Tensor) else [list(part.shape) for part in value]}"
            for name, value in self.saves.items()
        )
        said = " ".join(map(repr, self.texts))
        return Line(f"<step {self.step}: {said}{f'; {shapes}' if shapes else ''}>")


class _OneStep(Gathering):
    """Has the tensors of one step, and lets go of them with the next."""

    def __init__(self, courses: Sequence[Course], sizes: Mapping[str, int], *, cached: bool) -> None:
        super().__init__(courses, sizes, 1, include_last=False, cached=cached)
        self._now: dict[str, list[torch.Tensor]] = {}

    def open(self, plan: Plan, devices: Devices, step: int) -> Mapping[str, Sequence[Target]]:
        self._now = {}
        found: dict[str, Sequence[Target]] = {}
        for save in plan.graph.saves:
            course = self.courses[save.name]
            targets: list[Target] = []
            members = self._now[save.name] = list[torch.Tensor]()
            for value in save.values:
                target, tensor = course.for_one_step(
                    self.sizes, step, devices.places[plan.home[value]], cached=self.cached
                )
                members.append(tensor)
                targets.append(target)
            found[save.name] = targets
        return found

    def given(self) -> dict[str, list[torch.Tensor]]:
        """What the step has saved, by name: the members of each save."""
        return self._now


class Stream:
    """The events of a generation, made as they are asked for; made by :meth:`tracelens.Model.stream`.

    The generation runs in a thread of its own, at most one step ahead. Leaving the loop ends it, as does
    ``stream.close()`` or the end of a ``with`` block; while it runs, the model does nothing else for this thread.
    """

    def __init__(self, generation: Generation, graph: Graph) -> None:
        self._generation = generation
        self._graph = graph
        self._events: Queue[StepEvent | BaseException | None] = Queue(maxsize=1)
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()
        self._over = False
        self._pieces: _Pieces | None = None
        # Who cannot run the model meanwhile. One who has let go of the stream can: after the step that is being made.
        self._waiting: set[int] = set()

    def __iter__(self) -> Iterator[StepEvent]:
        return self

    def __next__(self) -> StepEvent:
        if self._over:
            raise StopIteration
        if self._thread is None:
            self._begin()
        event = self._events.get()
        if isinstance(event, StepEvent):
            return event
        self._finish()
        if event is not None:
            raise event
        raise StopIteration

    def close(self) -> None:
        """Ends the generation, wherever it is; again: does nothing."""
        self._let_go()
        while self._thread is not None and self._thread.is_alive():
            if not self._events.empty():
                self._events.get()
            self._thread.join(0.01)
        self._finish()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._over:
            self._let_go()
            if not self._events.empty():
                self._events.get_nowait()

    def _finish(self) -> None:
        self._over = True
        self._let_go()
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()

    def _let_go(self) -> None:
        self._ended.set()
        self._waiting.clear()

    # --- the other thread ----------------------------------------------------------------------------------------

    def _begin(self) -> None:
        own = self._generation
        assert own._prompt is not None
        compiled = own._compiler.compile_generation(self._graph)
        gathering = _OneStep(compiled.courses, own._prompt.sizes, cached=own.cached)
        self._pieces = _Pieces(own._model.tokenizer, own._prompt)
        # Nothing there leads back to the stream, so that one that is let go of ends its thread.
        self._waiting.add(threading.get_ident())
        work = _Work(self._events, self._ended, gathering, self._pieces, own._prompt, self._waiting)
        # Python waits for it before it exits: a thread that it stops within torch would end the process with an abort.
        self._thread = threading.Thread(target=work.run, args=(own, self._graph, compiled), daemon=False)
        self._thread.start()


class _Work:
    """What the thread does that generates."""

    def __init__(
        self,
        events: Queue[StepEvent | BaseException | None],
        ended: threading.Event,
        gathering: _OneStep,
        pieces: _Pieces,
        prompt: Prompt,
        waiting: set[int],
    ) -> None:
        self.events, self.ended, self.gathering = events, ended, gathering
        self.pieces, self.prompt, self.waiting = pieces, prompt, waiting

    def run(self, own: Generation, graph: Graph, compiled: Any) -> None:
        last: BaseException | None = None
        try:
            generate(
                own._model,
                own._compiler,
                graph,
                compiled,
                self.prompt,
                own._options,
                seed=own._seed,
                told=StepTold(self.gathering, self._told, self.waiting),
            )
        except BaseException as error:
            last = error
        self._hand_over(last)

    def _told(self, step: int, tokens: Sequence[int | None]) -> bool:
        """Hands over a step; does nobody want more?"""
        saves = {
            name: of_one_step(self.gathering.courses[name], members, self.prompt, step)
            for name, members in self.gathering.given().items()
        }
        return not self._hand_over(StepEvent(step, tuple(tokens), self.pieces.after(tokens), saves))

    def _hand_over(self, event: StepEvent | BaseException | None) -> bool:
        """Does somebody want more?  Waits until the event before this one has been taken."""
        main = threading.main_thread()  # which is not alive any more when the interpreter exits
        while not self.ended.is_set() and main.is_alive():
            try:
                self.events.put(event, timeout=0.1)
                return True
            except Full:
                continue
        return False


class _Pieces:
    """The text of each row, piece by piece."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, prompt: Prompt) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[list[int]] = [[] for _ in prompt.lengths]
        self._said = [""] * len(prompt.lengths)

    def after(self, tokens: Sequence[int | None]) -> tuple[str, ...]:
        """What is new of each row's text after one more token."""
        return tuple(self._piece(row, token) for row, token in enumerate(tokens))

    def _piece(self, row: int, token: int | None) -> str:
        if token is None or self._tokenizer is None:
            return ""
        self._tokens[row].append(token)
        text = str(self._tokenizer.decode(self._tokens[row], skip_special_tokens=True))
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""  # the first part of a character
        piece, self._said[row] = text[len(self._said[row]) :], text
        return piece


def graph_of(recorded: Recording | Graph | None) -> Graph:
    """The graph of a recording, the graph itself, or one that does nothing."""
    if recorded is None:
        return Graph(())
    if not isinstance(recorded, Recording | Graph):  # pyright: ignore[reportUnnecessaryIsInstance]  # users may not be typed
        raise OptionError(
            f"{recorded!r} is no graph to generate with",
            instead="with model.record(generation=True) as r: ..., and model.stream(prompt, r, max_new_tokens=20)",
        )
    return recorded.graph if isinstance(recorded, Recording) else recorded
