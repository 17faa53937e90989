"""What a direct logit attribution finds: who contributes how much to a logit, as a table and as bars."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from tracelens.errors import LayerRangeError
from tracelens.extras import required
from tracelens.lens.bars import Bars
from tracelens.location import here
from tracelens.view import Line, Shown, Stack, Table, View, html

if TYPE_CHECKING:
    import pandas

Kind = Literal[
    "embed",
    "pos_embed",
    "head",
    "attention",
    "attn_bias",
    "mlp",
    "neuron",
    "mlp_bias",
    "final_norm_bias",
    "unembed_bias",
    "rounding",
]
_SHOWN = 12
_BLOCKS = 20


@dataclass(frozen=True, slots=True)
class Contribution:
    """One component's part of a logit, in logits.

    ``kind``: ``"embed"``, ``"pos_embed"``, ``"head"``, ``"mlp"``, ``"neuron"``; ``"attention"`` for that of a
    layer without heads that mix values (linear attention); ``"attn_bias"`` and ``"mlp_bias"`` for
    what a sublayer adds whatever it reads (the biases of its last projection and of a norm after it; without neurons
    that of the MLP is part of it), ``"final_norm_bias"``, ``"unembed_bias"``; and ``"rounding"``, what is left.
    ``index``: the number of the head or neuron.
    """

    kind: Kind
    layer: int | None
    index: int | None
    contribution: float

    @property
    def label(self) -> str:
        """Its name as papers write it: ``"L9H6"``, ``"L9 MLP"``, ``"L9N1234"``, ``"embed"``."""
        match self.kind:
            case "head":
                return f"L{self.layer}H{self.index}"
            case "neuron":
                return f"L{self.layer}N{self.index}"
            case "mlp":
                return f"L{self.layer} MLP"
            case "attention":
                return f"L{self.layer} attention"
            case "attn_bias":
                return f"L{self.layer} attention bias"
            case "mlp_bias":
                return f"L{self.layer} MLP bias"
            case _:
                return self.kind.replace("_bias", " bias").replace("final_norm", "final norm")


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """The contributions of one kind in one layer: ``values`` [n] float64, as many as heads or neurons, or one."""

    kind: Kind
    layer: int | None
    values: Tensor

    def contributions(self) -> Iterator[Contribution]:
        numbered = self.kind in ("head", "neuron")
        for index, value in enumerate(self.values.tolist()):
            yield Contribution(self.kind, self.layer, index if numbered else None, value)


@dataclass(frozen=True, eq=False, repr=False)
class LogitAttribution(Shown):
    """Who contributes how much to the logit of a token, or to a difference of logits; all rows sum to it.

    ``logit``: the model's own, before a soft-cap (a Python float); ``returned``: what the model returns for it, which
    differs only where logits are capped or scaled after the unembedding. ``position``: the absolute position that the
    logit belongs to. ``token``, ``against``: ids; ``spelt``: what they spell. ``scale``: what the final norm multiplied
    by there. ``parts``: the contributions, in the order of the forward pass. Tensors are float64, on the CPU.
    """

    model: str
    position: int
    at: str
    token: int
    against: tuple[int, ...]
    spelt: Mapping[int, str] = field(repr=False)
    logit: float
    returned: float
    scale: float
    parts: tuple[Part, ...] = field(repr=False)

    @cached_property
    def contributions(self) -> tuple[Contribution, ...]:
        """All rows, in the order of the forward pass; the last one is what rounding leaves."""
        return tuple(row for part in self.parts for row in part.contributions())

    def top(self, count: int) -> tuple[Contribution, ...]:
        """The ``count`` largest contributions, for or against the token, the largest first."""
        return tuple(sorted(self.contributions, key=lambda row: -abs(row.contribution))[:count])

    @property
    def heads(self) -> Tensor:
        """What each head contributes: [layers, heads]; nan in layers whose attention has none that mix values."""
        of = {part.layer: part.values for part in self.parts if part.kind == "head"}
        layers = [part.layer for part in self.parts if part.kind in ("head", "attention")]
        nothing = torch.full_like(next(iter(of.values()), torch.zeros(0, dtype=torch.float64)), float("nan"))
        return torch.stack([of.get(layer, nothing) for layer in layers])

    @property
    def mlps(self) -> Tensor:
        """What each MLP contributes, [layers]; where neurons were asked for, they and the bias together."""
        own = ("mlp", "neuron", "mlp_bias")
        found = torch.zeros(len(self.heads), dtype=torch.float64)
        for part in self.parts:
            if part.kind in own and part.layer is not None:
                found[part.layer] += part.values.sum()
        return found

    def neurons(self, layer: int) -> Tensor:
        """What each neuron of a layer contributes, [neurons], where they were asked for."""
        for part in self.parts:
            if part.kind == "neuron" and part.layer == layer:
                return part.values
        had = [part.layer for part in self.parts if part.kind == "neuron"]
        raise LayerRangeError(
            f"this attribution has no neurons of layer {layer}"
            + (f"; it has those of {', '.join(map(str, had))}" if had else ""),
            at=here(),
            instead=f"model.logit_attribution(prompt, ..., neurons=[{layer}])",
        )

    @property
    def left_over(self) -> float:
        """The logit without all contributions: what rounding leaves of it. It is a row, too."""
        return sum(part.values.sum().item() for part in self.parts if part.kind == "rounding")

    def to_pandas(self) -> pandas.DataFrame:
        """A table with one row for each contribution: kind, layer, index, label, contribution."""
        pandas: Any = required("pandas", extra="pandas", what="attribution.to_pandas()")
        return pandas.DataFrame(
            {
                "kind": [row.kind for row in self.contributions],
                "layer": pandas.array([row.layer for row in self.contributions], dtype="Int64"),
                "index": pandas.array([row.index for row in self.contributions], dtype="Int64"),
                "label": [row.label for row in self.contributions],
                "contribution": [row.contribution for row in self.contributions],
            }
        )

    def bars(self, count: int = 20) -> Bars:
        """A bar plot of the ``count`` largest contributions, which notebooks show; ``.svg``, ``.save(path)``."""
        rows = self.top(count)
        return Bars(self._title, tuple(row.label for row in rows), tuple(row.contribution for row in rows))

    @property
    def what(self) -> str:
        """The logit in words: ``" Paris"``, or ``" Paris" against " Rome"``."""
        token = self.spelt[self.token]
        if not self.against:
            return token
        others = ", ".join(self.spelt[other] for other in self.against)
        return f"{token} against {'the mean of ' if len(self.against) > 1 else ''}{others}"

    @property
    def _title(self) -> str:
        kind = "logit difference" if self.against else "logit"
        return f"{kind} {self.logit:+.3f} of {self.what}, behind {self.at} at position {self.position}"

    def _view(self) -> View:
        rows = self.top(_SHOWN)
        most = max((abs(row.contribution) for row in rows), default=0.0) or 1.0
        cells = [
            (row.label, f"{row.contribution:+.3f}", "█" * round(_BLOCKS * abs(row.contribution) / most))
            for row in rows
        ]
        others = len(self.contributions) - len(rows)
        if others:
            shown = sum(row.contribution for row in rows)
            cells.append((f"{others} more", f"{self.logit - shown:+.3f}", ""))
        cells.append(("sum", f"{self.logit:+.3f}", ""))
        lines: list[View] = [Line(self._title)]
        if self.returned != self.logit:
            lines.append(Line(f"before what the model does to its logits: it returns {self.returned:+.3f}"))
        return Stack((*lines, Table(("component", "logits", ""), tuple(cells))))

    def _repr_html_(self) -> str:
        return self.bars().svg + html(self._view())


@dataclass(frozen=True, eq=False, repr=False)
class LogitAttributions(Sequence[LogitAttribution], Shown):
    """The attributions of several prompts, one for each."""

    each: tuple[LogitAttribution, ...]

    @overload
    def __getitem__(self, index: int) -> LogitAttribution: ...
    @overload
    def __getitem__(self, index: slice) -> LogitAttributions: ...
    def __getitem__(self, index: int | slice) -> LogitAttribution | LogitAttributions:
        """That of one prompt; a slice has those of several."""
        return LogitAttributions(self.each[index]) if isinstance(index, slice) else self.each[index]

    def __len__(self) -> int:
        return len(self.each)

    @property
    def heads(self) -> Tensor:
        """What each head contributes: [prompts, layers, heads]."""
        return torch.stack([one.heads for one in self.each])

    @property
    def mlps(self) -> Tensor:
        """What each MLP contributes: [prompts, layers]."""
        return torch.stack([one.mlps for one in self.each])

    @property
    def logits(self) -> Tensor:
        """The logits, or differences: [prompts]."""
        return torch.tensor([one.logit for one in self.each], dtype=torch.float64)

    def to_pandas(self) -> pandas.DataFrame:
        """A table with one row for each prompt's contributions; the first column is the prompt's number."""
        pandas: Any = required("pandas", extra="pandas", what="attribution.to_pandas()")
        frames = [one.to_pandas() for one in self.each]
        for number, frame in enumerate(frames):
            frame.insert(0, "prompt", number)
        return pandas.concat(frames, ignore_index=True)

    def _view(self) -> View:
        heads = ("prompt", "logits", "of", "largest contributions")
        rows = tuple(
            (
                str(number),
                f"{one.logit:+.3f}",
                one.what,
                ", ".join(f"{row.label} {row.contribution:+.2f}" for row in one.top(3)),
            )
            for number, one in enumerate(self.each)
        )
        return Table(heads, rows)
