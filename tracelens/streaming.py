"""Text and saves while they are made: a generation that hands over what each step has given."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, Full, Queue
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from tracelens.errors import NestedTraceError, OptionError, TracelensError, UnknownSaveError
from tracelens.generating import generate
from tracelens.ir.graph import Graph
from tracelens.ir.ops import Save
from tracelens.location import NOWHERE, Location, here
from tracelens.prompted import Prompt
from tracelens.telling import StepMade, StepTold
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


class Stream:
    """The events of a generation, made as they are asked for; made by :meth:`tracelens.Model.stream`.

    The generation runs in a thread of its own, at most one step ahead. Leaving the loop ends it, by ``break`` or by an
    error, as does ``stream.close()`` or the end of a ``with`` block; events that are taken with ``next(stream)`` leave
    it open. While it is, the model does nothing else for this thread.
    """

    def __init__(self, generation: Generation, graph: Graph, opened: Location) -> None:
        self._generation = generation
        self._opened = opened
        self._graph = graph
        self._events: Queue[StepEvent | BaseException | None] = Queue(maxsize=1)
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()
        self._over = False
        self._pieces: _Pieces | None = None
        # Who cannot run the model meanwhile. One who has let go of the stream can: after the step that is being made.
        self._waiting: set[int] = set()

    def __iter__(self) -> Iterator[StepEvent]:
        if self._over:
            raise NestedTraceError(
                "this stream has ended, and its steps are gone through once",
                at=here(),
                also=(("it was made at", self._opened),),
                instead="list(stream) to keep all events; model.stream(...) again to generate anew",
            )
        return _Loop(self)

    def __next__(self) -> StepEvent:
        if self._over:
            raise StopIteration
        if self._thread is None:
            self._begin()
        event = self._events.get()
        if isinstance(event, StepEvent):
            return event
        self._finish()
        if isinstance(event, TracelensError) and event.at in (None, NOWHERE):
            event.at = self._opened
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
        self._left()

    def _left(self) -> None:
        """Ends it without waiting for the step that is being made."""
        if not self._over:
            self._over = True
            self._let_go()
            with suppress(Empty):  # so that the thread need not find out by itself
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
        compiled = own._compiler.compile_stream(self._graph)
        self._pieces = _Pieces(own._model.tokenizer, own._prompt)
        # Nothing there leads back to the stream, so that one that is let go of ends its thread.
        self._waiting.add(threading.get_ident())
        work = _Work(self._events, self._ended, self._pieces, own._prompt, self._waiting)
        # Python waits for it before it exits: a thread that it stops within torch would end the process with an abort.
        self._thread = threading.Thread(target=work.run, args=(own, self._graph, compiled), daemon=False)
        self._thread.start()


class _Loop:
    """One loop over a stream: nobody but the loop holds it, so that leaving the loop is its end, and the stream's."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def __iter__(self) -> _Loop:
        return self

    def __next__(self) -> StepEvent:
        return next(self._stream)

    def __del__(self) -> None:
        self._stream._left()


class _Work:
    """What the thread does that generates."""

    def __init__(
        self,
        events: Queue[StepEvent | BaseException | None],
        ended: threading.Event,
        pieces: _Pieces,
        prompt: Prompt,
        waiting: set[int],
    ) -> None:
        self.events, self.ended = events, ended
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
                told=StepTold(self._told, self.waiting),
            )
        except BaseException as error:
            last = error
        self._hand_over(last)

    def _told(self, made: StepMade) -> bool:
        """Hands over a step; does nobody want more?"""
        pieces = self.pieces.after(made.tokens)
        return not self._hand_over(StepEvent(made.step, made.tokens, pieces, made.saves))

    def _hand_over(self, event: StepEvent | BaseException | None) -> bool:
        """Does somebody want more?  Waits until the event before this one has been taken."""
        main = threading.main_thread()  # which is not alive any more when the interpreter exits
        while not self.ended.is_set() and main.is_alive():
            try:
                self.events.put(event, timeout=0.1)
                return not self.ended.is_set()
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
    """The graph of a recording, the graph itself, or one that does nothing; refuses what no stream can do."""
    if recorded is None:
        return Graph(())
    if not isinstance(recorded, Recording | Graph):  # pyright: ignore[reportUnnecessaryIsInstance]  # users may not be typed
        raise OptionError(
            f"{recorded!r} is no graph to generate with",
            instead="with model.record(generation=True) as r: ..., and model.stream(prompt, r, max_new_tokens=20)",
        )
    graph = recorded.graph if isinstance(recorded, Recording) else recorded
    for number, op in enumerate(graph.ops):
        if isinstance(op, Save) and op.to is not None:
            name = "h" if op.name.startswith("#") else op.name
            raise graph.blame(
                OptionError(
                    f"to={str(op.to)!r} writes a file, and a stream hands over what each step has saved and writes no "
                    "file",
                    instead=f'.save("{name}") and event["{name}"]; or with model.generate(prompt, max_new_tokens=...) '
                    "as t: ..., which writes it",
                ),
                number,
            )
    return graph
