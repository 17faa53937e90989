"""What one part of a vocabulary says of states: a tile of rows and a chunk of tokens at a time, no logits kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

WORKSPACE = 64 * 2**20
"""Bytes that the logits in hand may take, unless it is said otherwise."""
LOWEST = -1e30
"""Below every logit, and yet no infinity, of which differences would be nan."""
_BLOCK = 64
"""Of so many logits in a row the largest is found before the largest of all are."""

Ask = tuple[Any, ...]
"""``("topk", k)``, ``("entropy",)``, ``("logsumexp",)``, ``("kl",)``; ``("log_prob", t)``, ``("rank", t)`` and
``("logit", t)`` of the target number ``t``. A target is a token, or a tensor of tokens that broadcasts to the rows."""
Target = int | Tensor
OF_TARGETS = ("log_prob", "rank", "logit")


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
        found = torch.linalg.vecdot(rows, self.weight[tokens])
        return self._bent(found if self.bias is None else found + self.bias[tokens])

    def _bent(self, logits: Tensor) -> Tensor:
        if self.scale is not None:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
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


def target_logits(head: Head, state: Tensor, targets: Sequence[Tensor], first: int = 0) -> Tensor:
    """The logits of the tokens asked for [t, ...]; the lowest number where another part has the token, or none has."""
    wide = wide_dtype(state.dtype)
    found = state.new_full((len(targets), *state.shape[:-1]), LOWEST, dtype=wide)
    size = head.weight.shape[0]
    for row, target in zip(found, targets, strict=True):
        place = target - first
        here = (place >= 0) & (place < size)
        logits = head.of_tokens(state, place.clamp(0, max(size - 1, 0))) if size else row
        row.copy_(torch.where(here, logits.to(wide), row))
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
    tokens = lead[1:] if reference is None and len(lead) > 1 else lead
    if reference is not None:
        tokens = reference.shape[:-1]
    layers = lead[: len(lead) - len(tokens)].numel()
    columns = tokens.numel()
    floats = torch.empty((need.floats, layers, columns), dtype=wide, device=state.device)
    integers = torch.zeros((need.integers, layers, columns), dtype=torch.int64, device=state.device)
    rows = state.reshape(layers, columns, -1)
    others = None if reference is None else reference.reshape(columns, -1)
    aims = [target.reshape(layers, columns) - first for target in targets]
    known = None if own is None else own.reshape(len(targets), layers, columns)
    vocabulary = head.weight.shape[0]
    tile, chunk, group = _portions(layers, columns, vocabulary, workspace, state.dtype, need)
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


def _portions(
    layers: int, columns: int, vocabulary: int, workspace: int, dtype: torch.dtype, need: Asked
) -> tuple[int, int, int]:
    """How many positions, tokens of the vocabulary and layers are in hand at once.

    For each logit of the layers in hand there are its number, its power and, if need be, the product in the dtype of
    the model and the truth of a comparison; the reference has one of each beside them.
    """
    wide = wide_dtype(dtype).itemsize
    each = 2 * wide + (dtype.itemsize if dtype.itemsize < wide else 0) + bool(need.targets)
    room = max(1, workspace // each)
    beside = int(need.divergence)
    whole = max(1, vocabulary)
    # All layers of as many positions as fit; else chunks of the vocabulary; fewer layers only if nothing else helps.
    chunk = min(whole, max(_CHUNK, room // (layers + beside)))
    group = max(1, min(layers, room // chunk - beside))
    tile = max(1, min(columns, room // ((group + beside) * chunk)))
    if tile == 1 and group == 1:
        chunk = max(min(whole, _LEAST), min(chunk, room // (1 + beside)))
    return tile, chunk, group


_CHUNK = 4096
"""A product with fewer tokens than this would be slow."""
_LEAST = 256
"""Fewer tokens at once would save next to nothing: what is kept of a row is of that size."""


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
        self.rows, self.need, self.aims = rows, need, aims
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
        product = head.logits(self.rows.reshape(-1, self.rows.shape[-1]), low, high)
        logits = product.to(wide).reshape(*self.rows.shape[:-1], high - low)
        most = torch.maximum(self.most, logits.amax(-1))
        if self.need.k:
            self._largest(logits, low)
        for number, aim in enumerate(self.aims):
            self._count(number, aim, logits, low, high)
        shift = self.most - most
        scale = shift.exp()
        below = logits.sub_(most[..., None])
        powers = below.exp()
        if self.weighed is not None:
            self.weighed = scale * (self.weighed + shift * self.total) + torch.linalg.vecdot(powers, below)
        self.total = self.total * scale + powers.sum(-1)
        self.most = most
        if self.crossed is not None and reference is not None:
            moved = reference.before * (reference.shift - shift)
            # In the memory of the powers, which are done with.
            apart = torch.sub(reference.below, below, out=powers)
            crossed = torch.linalg.vecdot(reference.powers.expand_as(apart), apart)
            self.crossed = reference.scale * (self.crossed + moved) + crossed

    def _largest(self, logits: Tensor, low: int) -> None:
        assert self.top is not None
        assert self.at is not None
        k = min(self.need.k, logits.shape[-1])
        values, places = _topk(logits, k)
        values, order = torch.cat([self.top, values], -1).topk(self.need.k, -1)
        self.at = torch.cat([self.at, places + low], -1).gather(-1, order)
        self.top = values

    def _count(self, number: int, aim: Tensor, logits: Tensor, low: int, high: int) -> None:
        place = aim - low
        here = (place >= 0) & (place < high - low)
        found = logits.gather(-1, place.clamp(0, high - low - 1)[..., None])[..., 0]
        # The very number among those that it is compared with: a product of another shape may round otherwise.
        own = torch.where(here, found, self.own[number])
        self.above[number] += (logits > own[..., None]).sum(-1)
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
    places = (chosen[..., None] * _BLOCK + torch.arange(_BLOCK, device=logits.device)).flatten(-2)
    if even < size:
        some = torch.cat([some, logits[..., even:]], -1)
        rest = torch.arange(even, size, device=logits.device).expand(*places.shape[:-1], -1)
        places = torch.cat([places, rest], -1)
    values, order = some.topk(k, -1)
    return values, places.gather(-1, order)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
