"""What states say about the next token: statistics over the whole vocabulary, made without keeping any logits.

The logits of one row are a product with the unembedding, of which a model has one row for each token. They are made a
tile of rows and a chunk of tokens at a time, and what is asked of them is kept in a form that can be merged: from chunk
to chunk here, and between ranks that have a part of the vocabulary each. Per row: the largest logit ``m``; ``s``, the
sum of ``exp(z - m)``; for the entropy ``x``, the sum of ``exp(z - m) (z - m)``; for the divergence from a reference
with logits ``f`` the sum of ``exp(f - mf) ((f - mf) - (z - m))``; the largest ``k`` with their tokens; and how many lie
above the logit of a token. Then::

    log p(v) = z_v - m - log s        entropy = log s - x / s        KL(f || z) = c / sf - log sf + log s

All of it in float32 (float64 for models in float64), while the product is in the dtype of the model, as its own is.
Centred sums lose no digits where all logits are large.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tracelens.readout_part import (
    LOWEST,
    Ask,
    Asked,
    Head,
    Target,
    asked,
    part,
    spread,
    target_logits,
    wide_dtype,
)
from tracelens.readout_tiles import WORKSPACE

# --- the functions that a graph holds ----------------------------------------------------------------------------


def lens(
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reference: Tensor | None,
    targets: Sequence[Target],
    asks: Sequence[Ask],
    *,
    scale: float | None = None,
    softcap: float | None = None,
    workspace: int = WORKSPACE,
) -> tuple[Tensor, ...]:
    """Answers each of ``asks`` for normed states [..., D], in order; the module says how.

    ``reference``: of the same shape, or without its first axes (one for all layers); ``("kl",)`` is the divergence of
    the state's distribution from it, in nats. ``("topk", k)`` gives log-probabilities and tokens, two results.
    """
    head = Head(weight, bias, scale, softcap)
    known = [part for part in (state, weight, bias, reference) if part is not None]
    if torch.is_grad_enabled() and any(part.requires_grad for part in known):
        return _dense(head, state, reference, targets, asks)
    need, aims = asked(asks, len(targets)), spread(targets, state)
    own = target_logits(head, state, aims, workspace=workspace)
    floats, integers = part(head, state, reference, need, aims, own, workspace=workspace)
    return joined(floats[None], integers[None], need, asks, (0,))


def lens_targets(
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Sequence[Target],
    starts: Sequence[int],
    *,
    rank: int,
    workspace: int = WORKSPACE,
    **options: Any,
) -> Tensor:
    """The logits [t, ...] of the tokens asked for, where this rank's part of the vocabulary has them."""
    head = Head(weight, bias, **options)
    return target_logits(head, state, spread(targets, state), starts[rank], workspace=workspace)


def lens_part(
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reference: Tensor | None,
    own: Tensor | None,
    targets: Sequence[Target],
    asks: Sequence[Ask],
    starts: Sequence[int],
    *,
    rank: int,
    workspace: int = WORKSPACE,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """What this rank's part of the vocabulary says: numbers [1, n, ...] and whole numbers [1, m, ...], to be merged.

    ``own``: what the largest of :func:`lens_targets` over all ranks is.
    """
    need, head = asked(asks, len(targets)), Head(weight, bias, **options)
    aims = spread(targets, state)
    floats, integers = part(head, state, reference, need, aims, own, first=starts[rank], workspace=workspace)
    return floats[None], integers[None]


def lens_joined(
    floats: Tensor, integers: Tensor, targets: int, asks: Sequence[Ask], starts: Sequence[int]
) -> tuple[Tensor, ...]:
    """The answers, of what all parts [ranks, n, ...] have said; ``starts``: with which token each begins."""
    return joined(floats, integers, asked(asks, targets), asks, starts)


# --- all parts together ------------------------------------------------------------------------------------------


def joined(
    floats: Tensor, integers: Tensor, need: Asked, asks: Sequence[Ask], starts: Sequence[int]
) -> tuple[Tensor, ...]:
    """The answers to ``asks``, of what the parts of a vocabulary [parts, n, ...] have each found."""
    most = floats[:, 0].amax(0)
    scale = (floats[:, 0] - most).exp()
    shift = floats[:, 0] - most
    totals = floats[:, 1]
    total = (scale * totals).sum(0)
    at = 2
    found: dict[str, Tensor] = {"logsumexp": most + total.log()}
    if need.entropy:
        weighed = (scale * (floats[:, at] + shift * totals)).sum(0)
        found["entropy"] = (total.log() - weighed / total).clamp(min=0)
        at += 1
    if need.divergence:
        crossed, other, others = floats[:, at], floats[:, at + 1], floats[:, at + 2]
        highest = other.amax(0)
        lowered = other - highest
        sum_of_others = (lowered.exp() * others).sum(0)
        crossed = (lowered.exp() * (crossed + others * (lowered - shift))).sum(0)
        # Rounding may leave it a little below zero, where a divergence never is.
        found["kl"] = (crossed / sum_of_others - sum_of_others.log() + total.log()).clamp(min=0)
        at += 3
    if need.k:
        values = floats[:, at : at + need.k].movedim(1, -1)
        tokens = integers[:, : need.k].movedim(1, -1)
        if len(starts) == 1:
            found["values"], found["tokens"] = values[0], tokens[0]
        else:
            begin = torch.tensor(starts, device=integers.device).reshape(-1, *(1,) * (values.ndim - 1))
            values, order = torch.cat(values.unbind(0), -1).topk(need.k, -1)
            found["values"] = values
            found["tokens"] = torch.cat((tokens + begin).unbind(0), -1).gather(-1, order)
        at += need.k
    own = floats[:, at:].amax(0)
    above = integers[:, need.k :].sum(0)
    answers: list[Tensor] = []
    for ask in asks:
        match ask[0]:
            case "topk":
                answers.append(found["values"][..., : ask[1]] - found["logsumexp"][..., None])
                answers.append(found["tokens"][..., : ask[1]].contiguous())
            case "entropy" | "logsumexp" | "kl":
                answers.append(found[ask[0]])
            case _:
                number = ask[1]
                missing = own[number] <= LOWEST
                if ask[0] == "rank":
                    answers.append(torch.where(missing, -1, above[number]))
                else:
                    logit = own[number].masked_fill(missing, torch.nan)
                    answers.append(logit if ask[0] == "logit" else logit - found["logsumexp"])
    return tuple(answers)


def _dense(
    head: Head,
    state: Tensor,
    reference: Tensor | None,
    targets: Sequence[Target],
    asks: Sequence[Ask],
) -> tuple[Tensor, ...]:
    """The same from whole logits, through which derivatives are taken."""
    wide = wide_dtype(state.dtype)
    logits = head.logits(state).to(wide)
    total = logits.logsumexp(-1)
    log_probs = logits - total[..., None]
    answers: list[Tensor] = []
    for ask in asks:
        match ask[0]:
            case "topk":
                answers += log_probs.topk(ask[1], -1)
            case "entropy":
                answers.append(-(log_probs.exp() * log_probs).sum(-1))
            case "logsumexp":
                answers.append(total)
            case "kl":
                assert reference is not None
                other = head.logits(reference).to(wide).log_softmax(-1)
                answers.append((other.exp() * (other - log_probs)).sum(-1))
            case _:
                (target,) = spread((targets[ask[1]],), state)
                known = (target >= 0) & (target < logits.shape[-1])
                place = target.clamp(0, logits.shape[-1] - 1)[..., None]
                own = logits.gather(-1, place)[..., 0]
                if ask[0] == "rank":
                    answers.append(torch.where(known, (logits > own[..., None]).sum(-1), -1))
                else:
                    found = own if ask[0] == "logit" else own - total
                    answers.append(torch.where(known, found, torch.nan))
    return tuple(answers)
