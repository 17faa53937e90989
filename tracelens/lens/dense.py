"""Lens results from logits that are there already: of another program, or of a model small enough to keep them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tracelens.errors import LensResultError
from tracelens.location import here
from tracelens.token_texts import token_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tracelens.lens.result import LensResult


def from_logits(
    logits: Tensor,
    token_ids: Sequence[int],
    *,
    final: Tensor | None = None,
    components: Sequence[str] = ("resid_post",),
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    next_ids: Sequence[int] | None = None,
    n_prompt: int | None = None,
    top_k: int = 10,
    track: Mapping[str, int] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    model: str = "",
    lens: str = "logit lens",
) -> LensResult:
    """A result of ``logits`` [C, L, T, V] of any float dtype, computed in float32, with every statistic.

    ``token_ids``: the T tokens; ``next_ids``: what follows each, else the next of ``token_ids``. ``final`` [T, V]: what
    the model says in the end, which kl, js and tv are taken from; else the last layer of the last component. Several
    times the memory of the logits is needed: ``model.logit_lens`` never has them all.
    """
    from tracelens.lens.result import LensResult

    if not isinstance(logits, Tensor) or logits.ndim != 4:  # pyright: ignore[reportUnnecessaryIsInstance]  # users may not be typed
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__  # pyright: ignore[reportUnnecessaryIsInstance]  # as above
        raise LensResultError(
            f"logits are {shape}", at=here(), instead="a tensor [components, layers, positions, vocabulary]"
        )
    log_probs = logits.detach().float().log_softmax(-1)
    last = (logits[-1, -1] if final is None else final).detach().float().log_softmax(-1)
    T = logits.shape[2]
    following = torch.tensor([*token_ids[1:], -1] if next_ids is None else list(next_ids))
    tracked = dict(track or {})
    log_prob, rank = _of(log_probs, following)
    log_prob[..., following < 0] = float("nan")
    rank[..., following < 0] = -1
    followed = [_of(log_probs, torch.full((T,), token)) for token in tracked.values()]
    top = log_probs.topk(top_k)
    ids = {
        *torch.tensor(token_ids).tolist(),
        *following.tolist(),
        *top.indices.unique().tolist(),
        *tracked.values(),
    }
    return LensResult(
        components=tuple(components),
        layers=tuple(range(logits.shape[1])) if layers is None else tuple(layers),
        positions=tuple(range(T)) if positions is None else tuple(positions),
        token_ids=torch.tensor(token_ids),
        next_ids=following,
        n_prompt=len(token_ids) if n_prompt is None else n_prompt,
        top_ids=top.indices,
        top_log_probs=top.values,
        statistics={
            "log_prob": log_prob,
            "rank": rank,
            "entropy": _expected(log_probs, -log_probs),
            "kl": _expected(last, last - log_probs),
            "js": _jensen_shannon(last, log_probs),
            "tv": (last.exp() - log_probs.exp()).abs().sum(-1) / 2,
            "logsumexp": logits.detach().float().logsumexp(-1),
        },
        text_of=token_texts(ids - {-1}, tokenizer),
        model=model,
        lens=lens,
        tracked=tracked,
        tracked_log_probs=torch.stack([log_prob for log_prob, _ in followed], -1) if tracked else None,
        tracked_ranks=torch.stack([rank for _, rank in followed], -1) if tracked else None,
    )


def _of(log_probs: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability and rank of one token per position."""
    places = tokens.clamp(min=0)[:, None].expand(*log_probs.shape[:-1], 1)
    own = log_probs.gather(-1, places)
    return own[..., 0], (log_probs > own).sum(-1)


def _expected(log_probs: Tensor, values: Tensor) -> Tensor:
    """The mean of ``values`` under these probabilities; what never happens counts nothing, however large it is."""
    return torch.where(log_probs > -torch.inf, log_probs.exp() * values, 0.0).sum(-1)


def _jensen_shannon(first: Tensor, second: Tensor) -> Tensor:
    mean = torch.logaddexp(first, second) - torch.tensor(2.0).log()
    return (_expected(first, first - mean) + _expected(second, second - mean)) / 2
