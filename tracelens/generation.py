"""Blocks that text is generated with."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, Any

import torch

from tracelens.backends.generation_options import is_cached, resolved
from tracelens.branching import Branched
from tracelens.errors import NoTokenizerError, PromptError
from tracelens.gathered import ends_of
from tracelens.generating import generate
from tracelens.ir.graph import Graph
from tracelens.location import here
from tracelens.prompted import Prompt
from tracelens.recorder import Recorder
from tracelens.report import RunReport
from tracelens.results import Results
from tracelens.slices import generate_in_slices
from tracelens.tracing import Recording

if TYPE_CHECKING:
    from tracelens.model import Model


class Generation(Recording):
    """A block that text is generated with: reads and writes in every step, or in those that it says.

    Step 0 is the pass over the prompt, and step k the one that makes token k. ``t.prefill``, ``t.decode`` and
    ``t.steps[5:10]`` have the model's sites in some steps; without them a site is meant in all of them. Afterwards
    ``t.text`` and ``t.tokens`` are what is new, ``t["name"]`` and ``t.results`` what was saved:

    * what was saved of one step is as it was there;
    * what has an axis of positions goes on along it: [B, P + N - 1, ...] for N new tokens, because the last of them is
      not given to the model any more (``include_last=True`` does that);
    * all else has the steps as a new first axis, [N, B, ...].

    Rows end at their own ends. Where they differ, or prompts do, positions come back as one tensor a row; on an axis of
    steps, what is beyond a row's end is nan (-1 for integers, False for booleans), and ``t.valid`` [N, B] says where.
    """

    _generating = True

    def __init__(
        self,
        model: Model,
        prompt: Prompt,
        options: Mapping[str, Any],
        *,
        single: bool = False,
        include_last: bool = False,
        seed: int | None = None,
        most: int | None = None,
        batch_size: int | None = None,
    ) -> None:
        if isinstance(prompt.batch, Branched):
            raise PromptError(
                "a prompt with branches ends in several ways at once, and a text has one end",
                at=here(),
                instead="model.trace(...); or a prompt for each branch",
            )
        super().__init__(model, prompt)
        self._options = dict(options)
        self._single = single
        # Without a new token there is none to give to the model.
        self._include_last = include_last and self._options["max_new_tokens"] > 0
        self._seed = seed
        self._most_steps = max(1, self._options["max_new_tokens"]) + include_last
        self._most = most
        self._batch_size = batch_size
        self._new: list[list[int]] | None = None
        self._results: Results | None = None
        self._report: RunReport | None = None

    def _end(self, recorder: Recorder, graph: Graph) -> None:
        assert self._prompt is not None
        compiled = self._compiler.compile_generation(graph)
        prompt, size = self._prompt, self._batch_size
        given = self._model, self._compiler, graph, compiled, prompt, self._options
        drawing: dict[str, Any] = {"include_last": self._include_last, "seed": self._seed}
        if size is not None and size < prompt.sizes["B"]:
            made = generate_in_slices(*given, size, most=self._most, **drawing)
        else:
            if self._most is not None:
                steps = max(1, self._options["max_new_tokens"])
                compiled.require_room(graph, prompt.sizes, steps, self._most, include_last=self._include_last)
            made = generate(*given, **drawing)
        recorder.deliver(made.tensors)
        self._results = Results(compiled.described, made.tensors)
        self._new, self._report = made.tokens, made.report

    @property
    def cached(self) -> bool:
        """Has each step but the first the new tokens alone, because the others are in a cache?"""
        return is_cached(resolved(self._model._hf, self._options), self._options)

    @property
    def results(self) -> Results:
        """The saved tensors by name."""
        if self._results is None:
            raise self._missing("result", "the model has not generated yet")
        return self._results

    def __getitem__(self, name: str) -> Any:
        return self.results[name]

    @property
    def report(self) -> RunReport:
        """What the generation has cost: what the block sent between devices, and how long it took."""
        if self._report is None:
            raise self._missing("report", "the model has not generated yet")
        return self._report

    @property
    def valid(self) -> torch.Tensor:
        """[N, B] bool: which rows were still being written in which step."""
        if self._new is None:
            raise self._missing("step", "the model has not generated yet")
        return ends_of(self._new).valid()

    @property
    def tokens(self) -> list[int] | list[list[int]]:
        """The new token ids, without padding after the end of a text; one list per prompt for a batch."""
        if self._new is None:
            raise self._missing("new token", "the model has not generated yet")
        return self._new[0] if self._single else self._new

    @property
    def text(self) -> str | list[str]:
        """The new text; one per prompt for a batch."""
        tokenizer = self._model.tokenizer
        if self._new is None:
            raise self._missing("new text", "the model has not generated yet")
        if tokenizer is None:
            raise NoTokenizerError(
                "there is no tokenizer to spell the tokens with",
                at=here(),
                instead="t.tokens, or a model with its tokenizer: tl.wrap(model, tokenizer)",
            )
        texts = [str(tokenizer.decode(row, skip_special_tokens=True)) for row in self._new]
        return texts[0] if self._single else texts

    def __repr__(self) -> str:
        if self._new is None:
            return "<generation>"
        if self._model.tokenizer is not None:
            return repr(self.text)
        counts = ", ".join(str(len(row)) for row in self._new)
        return (
            f"<generation: {counts} new tokens>"
            if len(self._new) == 1
            else f"<generation: {counts} new tokens, by row>"
        )

    def _repr_html_(self) -> str:
        if self._new is None or self._model.tokenizer is None:
            return super()._repr_html_()
        texts = [self.text] if isinstance(self.text, str) else self.text
        return "".join(f'<pre style="white-space: pre-wrap">{escape(text)}</pre>' for text in texts)
