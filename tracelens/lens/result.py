"""What a lens read: for each component, layer and position the likeliest next tokens, and numbers beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tracelens.errors import LensSelectionError
from tracelens.ir.sites import near
from tracelens.lens.statistics import DERIVED, DIFFERENCE, OF_TOKENS, STATISTICS, STORED, Statistic, of_token
from tracelens.lens.statistics import difference as difference_of
from tracelens.lens.terminal import ROWS
from tracelens.lens.terminal import table as terminal_table
from tracelens.lens.wholeness import check
from tracelens.lens.windows import Window, chosen
from tracelens.location import here
from tracelens.view import WIDTH

if TYPE_CHECKING:
    import pandas

    from tracelens.lens.comparison import LensComparison
    from tracelens.viz.heat_map import Picture


@dataclass(frozen=True, eq=False, repr=False)
class LensResult:
    """What a lens read of one prompt: C components (sites), L layers, T positions, the k likeliest tokens of each.

    ``components``: names of sites. ``layers``, ``positions``: absolute, in order; positions count the tokens of the
    prompt from 0 and go on into generated text from ``n_prompt`` on. ``token_ids`` [T] int64: the tokens at these
    positions; ``next_ids`` [T] int64: the token that follows each, -1 where none is known. ``top_ids`` [C, L, T, k]
    int64 and ``top_log_probs`` [C, L, T, k] float32: the likeliest tokens and their log-probabilities (nats, over the
    whole vocabulary), likeliest first. ``statistics``: [C, L, T] each, float32, but ``rank`` int64; of ``log_prob``
    (of the next token, nan where none is known), ``rank`` (of the next token, from 0, -1 where none is known),
    ``entropy``, ``kl``, ``js`` (nats), ``tv`` and ``logsumexp``. ``tracked``: tokens that were asked for, by their
    texts; ``tracked_log_probs`` and ``tracked_ranks`` [C, L, T, n]. ``text_of``: what every token here spells.

    In a notebook it shows itself as a heat map, in a terminal as a table. Raises :class:`~tracelens.errors.
    LensResultError` where its parts do not fit together.
    """

    components: tuple[str, ...]
    layers: tuple[int, ...]
    positions: tuple[int, ...]
    token_ids: Tensor
    next_ids: Tensor
    n_prompt: int
    top_ids: Tensor
    top_log_probs: Tensor
    statistics: Mapping[str, Tensor]
    text_of: Mapping[int, str]
    model: str = ""
    lens: str = "logit lens"
    tracked: Mapping[str, int] = field(default_factory=dict[str, int])
    tracked_log_probs: Tensor | None = None
    tracked_ranks: Tensor | None = None

    def __post_init__(self) -> None:
        check(self)
        for name in ("statistics", "text_of", "tracked"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    # --- parts ---------------------------------------------------------------------------------------------------

    @property
    def top_k(self) -> int:
        """How many of the likeliest tokens there are in each cell."""
        return self.top_ids.shape[-1]

    @property
    def tokens(self) -> tuple[str, ...]:
        """What the tokens at the positions spell."""
        return tuple(self.text_of[token] for token in self.token_ids.tolist())

    @property
    def next_tokens(self) -> tuple[str | None, ...]:
        """What the tokens spell that follow each position; ``None`` where none is known."""
        return tuple(None if token < 0 else self.text_of[token] for token in self.next_ids.tolist())

    def __getitem__(self, component: str) -> LensResult:
        """The same of one component: ``lens["attn_out"]``."""
        at = self._component(component)
        return self._part((component,), self.layers, self.positions, [at], None, None)

    def at(self, *, layers: Window = None, positions: Window = None) -> LensResult:
        """A window: ``lens.at(layers=[0, 15, 29], positions=slice(-10, None))``.

        Numbers are absolute, as in ``lens.layers`` and ``lens.positions``; negative ones count from the end of those
        that are there. A slice takes what it spans, with a step every so many. An int keeps its axis. Raises
        :class:`~tracelens.errors.LensSelectionError` for what is not there.
        """
        row = chosen(layers, self.layers, "layer")
        column = chosen(positions, self.positions, "position")
        return self._part(
            self.components,
            tuple(self.layers[at] for at in row),
            tuple(self.positions[at] for at in column),
            None,
            row,
            column,
        )

    def _part(
        self,
        components: tuple[str, ...],
        layers: tuple[int, ...],
        positions: tuple[int, ...],
        *indices: list[int] | None,
    ) -> LensResult:
        def part(tensor: Tensor) -> Tensor:
            for axis, index in enumerate(indices):
                if index is not None:
                    tensor = tensor.index_select(axis, torch.tensor(index))
            return tensor

        def of_positions(tensor: Tensor) -> Tensor:
            return tensor if indices[2] is None else tensor[torch.tensor(indices[2])]

        return replace(
            self,
            components=components,
            layers=layers,
            positions=positions,
            token_ids=of_positions(self.token_ids),
            next_ids=of_positions(self.next_ids),
            top_ids=part(self.top_ids),
            top_log_probs=part(self.top_log_probs),
            statistics={name: part(tensor) for name, tensor in self.statistics.items()},
            tracked_log_probs=None if self.tracked_log_probs is None else part(self.tracked_log_probs),
            tracked_ranks=None if self.tracked_ranks is None else part(self.tracked_ranks),
        )

    def _component(self, name: str) -> int:
        if name not in self.components:
            raise LensSelectionError(
                f"this lens has no component {name!r}; it has {', '.join(map(repr, self.components))}",
                at=here(),
                instead="one of these; or ask for more: model.logit_lens(prompt, components=[...])",
            )
        return self.components.index(name)

    # --- numbers -------------------------------------------------------------------------------------------------

    def statistic(self, name: str, *tokens: str) -> Tensor:
        """One number of each cell, [C, L, T]: a stored or derived statistic by its name.

        ``statistic("entropy")``; of a tracked token ``statistic("rank", " Paris")``, likewise ``log_prob``, ``prob``
        and ``cross_entropy``; and ``statistic("log_prob_difference", " Paris", " Rome")``. float32, but ranks int64.
        """
        self.described(name, *tokens)
        if name == DIFFERENCE:
            return self.log_prob_difference(*tokens)
        if tokens:
            ranks, log_probs = self.tracked_ranks, self.tracked_log_probs
            assert ranks is not None
            assert log_probs is not None
            at = self._tracked(tokens[0])
            return ranks[..., at] if name == "rank" else _DERIVED[name](log_probs[..., at])
        if name in STORED:
            return self.statistics[name]
        if name in ("top_prob", "top_log_prob"):
            return _DERIVED[name.removeprefix("top_")](self.top_log_probs[..., 0])
        return _DERIVED[name](self.statistics["log_prob"])

    def described(self, name: str, *tokens: str) -> Statistic:
        """What :meth:`statistic` gives for the same words, or a named refusal."""
        if name == DIFFERENCE and len(tokens) == 2:
            for token in tokens:
                self._tracked(token)
            return difference_of(*tokens)
        if name in OF_TOKENS and len(tokens) == 1:
            self._tracked(tokens[0])
            return of_token(name, tokens[0])
        if tokens or name == DIFFERENCE:
            raise LensSelectionError(
                f"{name!r} is not a statistic of {len(tokens)} tracked tokens",
                at=here(),
                instead=f"one of {', '.join(map(repr, OF_TOKENS))} with one token, or {DIFFERENCE!r} with two",
            )
        if name not in self.names:
            hint = f"one of {', '.join(map(repr, self.names))}"
            if name in STATISTICS:
                missing = name if name in STORED else "log_prob"
                hint = f"ask for it: model.logit_lens(prompt, metrics=[..., {missing!r}]); or {hint}"
            elif close := near(name, tuple(self.names)):
                hint = f"{close[0]!r}; or {hint}"
            raise LensSelectionError(f"this lens has no statistic {name!r}", at=here(), instead=hint)
        return STATISTICS[name]

    @property
    def names(self) -> tuple[str, ...]:
        """The statistics that :meth:`statistic` has without a token."""
        known = {*self.statistics, "top_prob", "top_log_prob"}
        if "log_prob" in self.statistics:
            known |= set(DERIVED)
        return tuple(name for name in STATISTICS if name in known)

    def _tracked(self, token: str) -> int:
        if token not in self.tracked:
            known = f"it tracks {', '.join(map(repr, self.tracked))}" if self.tracked else "it tracks none"
            raise LensSelectionError(
                f"this lens does not track the token {token!r}; {known}",
                at=here(),
                instead=f"model.logit_lens(prompt, track=[{token!r}])",
            )
        return list(self.tracked).index(token)

    @property
    def probs(self) -> Tensor:
        """The probabilities of the likeliest tokens, [C, L, T, k] float32, over the whole vocabulary."""
        return self.top_log_probs.exp()

    @property
    def prob(self) -> Tensor:
        """The probability of the next token, [C, L, T] float32; nan where none is known."""
        return self.statistic("prob")

    @property
    def log_prob(self) -> Tensor:
        """The log-probability of the next token in nats, [C, L, T] float32; nan where none is known."""
        return self.statistic("log_prob")

    @property
    def cross_entropy(self) -> Tensor:
        """The cross-entropy with the next token in nats, [C, L, T] float32: minus its log-probability."""
        return self.statistic("cross_entropy")

    @property
    def rank(self) -> Tensor:
        """The rank of the next token, [C, L, T] int64: how many tokens are likelier; -1 where none is known."""
        return self.statistic("rank")

    @property
    def entropy(self) -> Tensor:
        """The entropy of what the layer says, in nats, [C, L, T] float32."""
        return self.statistic("entropy")

    @property
    def kl(self) -> Tensor:
        """KL(final || layer) in nats, [C, L, T] float32: what the layer lacks of what the model says in the end."""
        return self.statistic("kl")

    @property
    def js(self) -> Tensor:
        """The Jensen-Shannon divergence from what the model says in the end, in nats, [C, L, T] float32."""
        return self.statistic("js")

    @property
    def tv(self) -> Tensor:
        """The total variation from what the model says in the end, [C, L, T] float32, between 0 and 1."""
        return self.statistic("tv")

    @property
    def logsumexp(self) -> Tensor:
        """The log of the sum of exp(logits), [C, L, T] float32: a logit is a log-probability plus this."""
        return self.statistic("logsumexp")

    def log_prob_difference(self, first: str, second: str) -> Tensor:
        """By how many nats ``first`` is likelier than ``second``, [C, L, T] float32; both are tracked tokens.

        It is also the difference of their logits, since both logarithms have the same sum beneath.
        """
        at = [self._tracked(first), self._tracked(second)]
        assert self.tracked_log_probs is not None
        return self.tracked_log_probs[..., at[0]] - self.tracked_log_probs[..., at[1]]

    def compare(self, other: LensResult, names: tuple[str, str] = ("first", "second")) -> LensComparison:
        """This run beside another one of the same tokens, cell by cell.

        ``plain.compare(steered, names=("plain", "steered"))``; differences are those of the other one minus this one.

        Raises :class:`~tracelens.errors.LensComparisonError` where tokens, layers or components differ.
        """
        from tracelens.lens.comparison import LensComparison

        return LensComparison(self, other, names)

    # --- elsewhere -----------------------------------------------------------------------------------------------

    def table(self, statistic: str | None = None, *tokens: str, width: int = WIDTH, rows: int = ROWS) -> str:
        """The likeliest tokens as lines of text, beside each a number if a ``statistic`` is named.

        At most ``rows`` layers, and the last positions that fit into ``width`` columns; it says what it leaves out.
        """
        return terminal_table(self, statistic, *tokens, width=width, rows=rows)

    def __repr__(self) -> str:
        return self.table(rows=max(ROWS // len(self.components), ROWS // 4))

    def plot(self, statistic: str = "top_prob", *tokens: str) -> Picture:
        """A picture of one statistic, layers upwards and positions to the right: ``lens.plot("entropy")``.

        Up to 40 positions have the likeliest tokens in their cells. Words as in :meth:`statistic`; several components
        are drawn below one another. ``lens.plot("kl").save("kl.svg")`` writes it.
        """
        from tracelens.viz.lens_picture import of_result

        return of_result(self, statistic, *tokens)

    def _repr_html_(self) -> str:
        from tracelens.viz.lens_page import embedded, shown

        return embedded([shown(self)])

    def to_html(self, path: str | Path) -> Path:
        """Writes a page with an interactive heat map: one file, which needs no network and nothing beside it.

        It has the likeliest token of every layer and position, shaded by a statistic of choice; pointing at a cell, or
        going there with the arrow keys, shows the others with their probabilities.
        """
        from tracelens.viz.lens_page import page, shown

        Path(path).write_text(page([shown(self)]), encoding="utf-8")
        return Path(path)

    def to_pandas(self) -> pandas.DataFrame:
        """A table with one row per component, layer and position.

        ``token`` and ``next_token`` with their ids (no next token: missing), whether the position is ``generated``,
        each statistic, then ``top_1``, ``top_1_id``, ``top_1_log_prob`` and so on, then ``log_prob: x`` and
        ``rank: x`` for each tracked token x.
        """
        from tracelens.lens.table import to_pandas

        return to_pandas(self)

    def save(self, path: str | Path) -> Path:
        """Writes everything to a file, as its ending says: ``.safetensors``, ``.parquet``, ``.csv`` or ``.json``.

        ``LensResult.load(path)`` gives it back, number for number. Parquet needs pyarrow: ``pip install
        "tracelens[pandas]"``.
        """
        from tracelens.lens.files import save

        return save(self, Path(path))

    @staticmethod
    def from_logits(logits: Tensor, token_ids: Sequence[int], **options: Any) -> LensResult:
        """A result of logits that are there already, [C, L, T, V]; ``options`` are the rest of a result's parts.

        They are those of :func:`tracelens.lens.dense.from_logits`: ``tokenizer``, ``components``, ``layers``,
        ``positions``, ``next_ids``, ``final``, ``n_prompt``, ``top_k``, ``track``, ``model``, ``lens``.

        >>> logits = torch.tensor([0.0, 2.0, 1.0]).expand(1, 1, 2, 3)
        >>> LensResult.from_logits(logits, [2, 1], top_k=2).rank
        tensor([[[ 0, -1]]])
        """
        from tracelens.lens.dense import from_logits

        return from_logits(logits, token_ids, **options)

    @staticmethod
    def load(path: str | Path) -> LensResult:
        """Reads what :meth:`save` has written."""
        from tracelens.lens.files import load

        return load(Path(path))


_DERIVED: dict[str, Callable[[Tensor], Tensor]] = {
    "log_prob": lambda log_prob: log_prob,
    "prob": torch.exp,
    "cross_entropy": torch.neg,
}
