"""What one part of a vocabulary says of states: a tile of rows and a chunk of tokens at a time, no logits kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from tracelens.readout_tiles import WORKSPACE, Costs, costs_of_lens, extent, rows_of_targets, tiles_of

LOWEST = -1e30
"""Below every logit, and yet no infinity, of which differences would be nan."""
_BLOCK = 64
"""Of so many logits in a row the largest is found before the largest of all are."""

Ask = tuple[Any, ...]
"""``("topk", k)``, ``("entropy",)``, ``("logsumexp",)``, ``("kl",)``; ``("log_prob", t)``, ``("rank", t)`` and
``("logit", t)`` of the target number ``t``. A target is a token, or a tensor of tokens that broadcasts to the rows."""
Target = int | Tensor


@dataclass(frozen=True)
class Head:
    """How logits are made of normed states: ``scale * (W h + b)``, bent by ``softcap * tanh(. / softcap)``."""

    weight: Tensor
    bias: Tensor | None = None
    scale: float | None = None
    softcap: float | None = None

    def logits(self, rows: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """The logits [n, tokens] of a stretch of the vocabulary, in the dtype of the model."""
        bias = None if self.bias is None else self.bias[start:stop]
        return self._bent(linear(rows, self.weight[start:stop], bias))

    def of_tokens(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """The logit of one token for each row: [n, D] and [n] to [n]."""
        # As a product of matrices does it: summed up in the wide dtype, and rounded once.
        wide = wide_dtype(rows.dtype)
        found = self.weight[tokens].to(wide).mul_(rows).sum(-1)
        if self.bias is not None:
            found += self.bias[tokens]
        return self._bent(found.to(rows.dtype))

    def _bent(self, logits: Tensor) -> Tensor:
        if torch.is_grad_enabled() and logits.requires_grad:
            logits = logits if self.scale is None else logits * self.scale
            return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap
        if self.scale is not None:
            logits.mul_(self.scale)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits


@dataclass(frozen=True)
class Asked:
    """What some asks need to be kept of each row."""

    k: int
    targets: int
    entropy: bool
    divergence: bool

    @property
    def floats(self) -> int:
        return 2 + self.entropy + 3 * self.divergence + self.k + self.targets

    @property
    def integers(self) -> int:
        return self.k + self.targets


def asked(asks: Sequence[Ask], targets: int) -> Asked:
    """What is to be kept to answer all of ``asks``, which are about so many ``targets``."""
    k = max((ask[1] for ask in asks if ask[0] == "topk"), default=0)
    names = {ask[0] for ask in asks}
    return Asked(k, targets, "entropy" in names, "kl" in names)


def spread(targets: Sequence[Target], state: Tensor) -> list[Tensor]:
    """The tokens asked for, for every row."""
    rows = state.shape[:-1]
    return [
        torch.full(rows, target, dtype=torch.int64, device=state.device)
        if isinstance(target, int)
        else target.long().expand(rows)
        for target in targets
    ]


def target_logits(
    head: Head, state: Tensor, targets: Sequence[Tensor], first: int = 0, *, workspace: int = WORKSPACE
) -> Tensor:
    """The logits of the tokens asked for [t, ...]; the lowest number where another part has the token, or none has."""
    wide = wide_dtype(state.dtype)
    found = state.new_full((len(targets), *state.shape[:-1]), LOWEST, dtype=wide)
    size, width = head.weight.shape
    if not size:
        return found
    rows = state.reshape(-1, width)
    some, _ = rows_of_targets(width, state.dtype.itemsize, wide.itemsize, workspace)
    for logits, target in zip(found.view(len(targets), len(rows)), targets, strict=True):
        for start in range(0, len(rows), some):
            part = slice(start, start + some)
            place = target.reshape(-1)[part] - first
            here = (place >= 0) & (place < size)
            own = head.of_tokens(rows[part], place.clamp(0, size - 1)).to(wide)
            logits[part] = own.masked_fill_(~here, LOWEST)
    return found


def part(
    head: Head,
    state: Tensor,
    reference: Tensor | None,
    need: Asked,
    targets: Sequence[Tensor],
    own: Tensor | None,
    *,
    first: int = 0,
    workspace: int = WORKSPACE,
) -> tuple[Tensor, Tensor]:
    """The numbers [n, ...] and whole numbers [n, ...] that :func:`joined` merges.

    ``own``: the logits of the ``targets`` [t, ...], known before, so that those above them can be counted.
    """
    lead = state.shape[:-1]
    wide = wide_dtype(state.dtype)
    layers, columns = extent(lead, None if reference is None else reference.shape[:-1])
    floats = torch.empty((need.floats, layers, columns), dtype=wide, device=state.device)
    integers = torch.zeros((need.integers, layers, columns), dtype=torch.int64, device=state.device)
    rows = state.reshape(layers, columns, -1)
    others = None if reference is None else reference.reshape(columns, -1)
    aims = [target.reshape(layers, columns) - first for target in targets]
    known = None if own is None else own.reshape(len(targets), layers, columns)
    vocabulary = head.weight.shape[0]
    tile, chunk, group = tiles_of(
        layers, columns, vocabulary, workspace, costs(rows.shape[-1], state.dtype, need)
    )
    for start in range(0, columns, tile):
        width = slice(start, start + tile)
        parts = [
            _Rows(
                rows[number : number + group, width],
                need,
                [aim[number : number + group, width] for aim in aims],
                None if known is None else known[:, number : number + group, width],
            )
            for number in range(0, layers, group)
        ]
        of_reference = None if others is None else _Reference(others[width])
        for low in range(0, vocabulary, chunk):
            high = min(low + chunk, vocabulary)
            if of_reference is not None:
                of_reference.take(head, low, high, wide)
            for some in parts:
                some.take(head, low, high, wide, of_reference)
        for number, some in zip(range(0, layers, group), parts, strict=True):
            there = (slice(None), slice(number, number + group), width)
            some.store(floats[there], integers[there], of_reference, first)
    return floats.reshape(-1, *lead), integers.reshape(-1, *lead)


def costs(width: int, dtype: torch.dtype, need: Asked) -> Costs:
    """What is in hand for a state of so many numbers and the logits made of it."""
    return costs_of_lens(
        width,
        dtype.itemsize,
        wide_dtype(dtype).itemsize,
        floats=need.floats,
        integers=need.integers,
        k=need.k,
        divergence=need.divergence,
    )


class _Reference:
    """The distribution that others are compared with, for the positions in hand."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self.most = rows.new_full(rows.shape[:-1], LOWEST, dtype=wide_dtype(rows.dtype))
        self.total = torch.zeros_like(self.most)
        self.shift = self.scale = self.total
        self.before = self.total
        self.below = self.powers = rows

    def take(self, head: Head, low: int, high: int, wide: torch.dtype) -> None:
        logits = head.logits(self.rows, low, high).to(wide)
        most = torch.maximum(self.most, logits.amax(-1))
        self.shift = self.most - most
        self.scale = self.shift.exp()
        self.before = self.total
        self.below = logits.sub_(most[:, None])
        self.powers = self.below.exp()
        self.total = self.total * self.scale + self.powers.sum(-1)
        self.most = most


class _Rows:
    """What is kept of some layers at the positions in hand: [layers, positions]."""

    def __init__(self, rows: Tensor, need: Asked, aims: list[Tensor], own: Tensor | None) -> None:
        # Next to each other, for one product; a copy where they are not.
        self.rows, self.need, self.aims = rows.reshape(-1, rows.shape[-1]), need, aims
        shape, wide = rows.shape[:-1], wide_dtype(rows.dtype)
        self.most = rows.new_full(shape, LOWEST, dtype=wide)
        self.total = torch.zeros_like(self.most)
        self.weighed = torch.zeros_like(self.most) if need.entropy else None
        self.crossed = torch.zeros_like(self.most) if need.divergence else None
        self.top = rows.new_full((*shape, need.k), LOWEST, dtype=wide) if need.k else None
        self.at = torch.zeros((*shape, need.k), dtype=torch.int64, device=rows.device) if need.k else None
        self.own = [] if own is None else [logit.clone() for logit in own]
        self.above = [torch.zeros(shape, dtype=torch.int64, device=rows.device) for _ in aims]

    def take(self, head: Head, low: int, high: int, wide: torch.dtype, reference: _Reference | None) -> None:
        logits = head.logits(self.rows, low, high).to(wide).view(*self.most.shape, high - low)
        most = torch.maximum(self.most, logits.amax(-1))
        if self.need.k:
            self._largest(logits, low)
        powers = torch.empty_like(logits)
        for number, aim in enumerate(self.aims):
            self._count(number, aim, logits, low, high, powers)
        shift = self.most - most
        scale = shift.exp()
        below = logits.sub_(most[..., None])
        torch.exp(below, out=powers)
        before, self.total = self.total, self.total * scale + powers.sum(-1)
        self.most = most
        # From here on in the memory of the powers, which are done with.
        if self.weighed is not None:
            self.weighed = scale * (self.weighed + shift * before) + powers.mul_(below).sum(-1)
        if self.crossed is not None and reference is not None:
            moved = reference.before * (reference.shift - shift)
            crossed = torch.sub(reference.below, below, out=powers).mul_(reference.powers).sum(-1)
            self.crossed = reference.scale * (self.crossed + moved) + crossed

    def _largest(self, logits: Tensor, low: int) -> None:
        assert self.top is not None
        assert self.at is not None
        k = min(self.need.k, logits.shape[-1])
        values, places = _topk(logits, k)
        values, order = torch.cat([self.top, values], -1).topk(self.need.k, -1)
        self.at = torch.cat([self.at, places + low], -1).gather(-1, order)
        self.top = values

    def _count(self, number: int, aim: Tensor, logits: Tensor, low: int, high: int, room: Tensor) -> None:
        place = aim - low
        here = (place >= 0) & (place < high - low)
        found = logits.gather(-1, place.clamp(0, high - low - 1)[..., None])[..., 0]
        # The very number among those that it is compared with: a product of another shape may round otherwise.
        own = torch.where(here, found, self.own[number])
        # A sum of truths would first make a whole number of each. These are exact, up to 2^24 of them.
        self.above[number] += torch.gt(logits, own[..., None], out=room).sum(-1).long()
        self.own[number] = own

    def store(self, floats: Tensor, integers: Tensor, reference: _Reference | None, first: int) -> None:
        numbers = [self.most, self.total]
        if self.weighed is not None:
            numbers.append(self.weighed)
        if self.crossed is not None and reference is not None:
            numbers += [
                self.crossed,
                reference.most.expand_as(self.most),
                reference.total.expand_as(self.most),
            ]
        if self.top is not None:
            numbers += self.top.unbind(-1)
        for row, new in zip(floats, [*numbers, *self.own], strict=True):
            row.copy_(new)
        counts = [*(self.at.unbind(-1) if self.at is not None else ()), *self.above]
        for row, new in zip(integers, counts, strict=True):
            row.copy_(new)


def _topk(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest and where they are. Those of all are in the ``k`` blocks whose largest are the largest."""
    size = logits.shape[-1]
    blocks = size // _BLOCK
    if blocks < 4 * k:
        return torch.topk(logits, k, -1)
    even = blocks * _BLOCK
    apart = logits[..., :even].unflatten(-1, (blocks, _BLOCK))
    chosen = apart.amax(-1).topk(k, -1).indices
    some = apart.gather(-2, chosen[..., None].expand(*chosen.shape, _BLOCK)).flatten(-2)
    if even < size:
        some = torch.cat([some, logits[..., even:]], -1)
    values, order = some.topk(k, -1)
    block = chosen.gather(-1, (order // _BLOCK).clamp(max=k - 1))
    behind = order - k * _BLOCK
    return values, torch.where(behind < 0, block * _BLOCK + order % _BLOCK, even + behind)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
