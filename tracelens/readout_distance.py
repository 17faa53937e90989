"""How far two distributions over the next token are from each other, made without keeping any logits.

Both are known up to the logarithm of their normaliser, which is asked for before: ``log p = z - total``. Then every
token adds something on its own, so that chunks of the vocabulary and parts of it on ranks are added up::

    js = 1/2 sum p (log p - log m) + q (log q - log m),  m = (p + q) / 2        tv = 1/2 sum |p - q|
"""

from __future__ import annotations

from math import log

import torch
from torch import Tensor

from tracelens.readout_part import Head, wide_dtype
from tracelens.readout_tiles import WORKSPACE, Costs, costs_of_distance, extent, tiles_of


def lens_distance(
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reference: Tensor,
    total: Tensor,
    other_total: Tensor,
    kind: str,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    workspace: int = WORKSPACE,
) -> Tensor:
    """The distance [...] of the distributions of ``state`` [..., D] and ``reference``, which may lack first axes.

    ``total``, ``other_total``: the ``logsumexp`` of each over the whole vocabulary, of which ``weight`` may be a part.
    """
    head = Head(weight, bias, scale, softcap)
    wide = wide_dtype(state.dtype)
    known = [part for part in (state, weight, bias, reference, total, other_total) if part is not None]
    if torch.is_grad_enabled() and any(part.requires_grad for part in known):
        log_probs = head.logits(state).to(wide) - total[..., None]
        others = head.logits(reference).to(wide) - other_total[..., None]
        return _of_tokens(log_probs, others, others.exp(), kind)
    lead = state.shape[:-1]
    layers, columns = extent(lead, reference.shape[:-1])
    rows, others = state.reshape(layers, columns, -1), reference.reshape(columns, -1)
    totals, other_totals = total.reshape(layers, columns, 1), other_total.reshape(columns, 1)
    found = torch.zeros((layers, columns), dtype=wide, device=state.device)
    vocabulary = weight.shape[0]
    form = costs(rows.shape[-1], state.dtype, kind)
    tile, chunk, group = tiles_of(layers, columns, vocabulary, workspace, form)
    for start in range(0, columns, tile):
        width = slice(start, start + tile)
        parts = [
            # Next to each other, for one product; a copy where they are not.
            (slice(at, at + group), rows[at : at + group, width].reshape(-1, rows.shape[-1]))
            for at in range(0, layers, group)
        ]
        for low in range(0, vocabulary, chunk):
            stretch = slice(low, min(low + chunk, vocabulary))
            size = stretch.stop - low
            of_others = head.logits(others[width], low, stretch.stop).to(wide).sub_(other_totals[width])
            powers = of_others.exp_() if kind == "tv" else of_others.exp()
            for some, states in parts:
                logits = head.logits(states, low, stretch.stop).to(wide)
                log_probs = logits.view(-1, len(of_others), size).sub_(totals[some, width])
                del logits
                found[some, width] += _in_place(log_probs, of_others, powers, kind)
                del log_probs
            del of_others, powers
    return found.view(lead)


def costs(width: int, dtype: torch.dtype, kind: str) -> Costs:
    """What is in hand for a state of so many numbers and the logits made of it."""
    return costs_of_distance(width, dtype.itemsize, wide_dtype(dtype).itemsize, kind)


def _of_tokens(log_probs: Tensor, others: Tensor, powers: Tensor, kind: str) -> Tensor:
    if kind == "tv":
        return (log_probs.exp() - powers).abs().sum(-1) / 2
    mean = torch.logaddexp(log_probs, others) - log(2)
    return (log_probs.exp() * (log_probs - mean) + powers * (others - mean)).sum(-1) / 2


def _in_place(log_probs: Tensor, others: Tensor, powers: Tensor, kind: str) -> Tensor:
    """The same, in the memory of the logits."""
    if kind == "tv":
        return log_probs.exp_().sub_(powers).abs_().sum(-1) / 2
    mean = torch.logaddexp(log_probs, others).sub_(log(2))
    own = log_probs.exp()
    own.mul_(log_probs.sub_(mean))
    found = own.sum(-1)
    del own
    apart = torch.sub(others, mean, out=log_probs).mul_(powers)
    # No token takes away from the sum; rounding may.
    return ((found + apart.sum(-1)) / 2).clamp_(min=0)
