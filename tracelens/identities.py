"""What has to hold between sites in every model, whatever its family: how a table of sites is held to the model.

A site under the right name with another tensor in it has the right shape and raises nothing. But a stream that is not
the sum of what was added to it, or a pattern that is not the soft-max of the scores, shows that some name is wrong.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Read = Mapping[str, Tensor]
"""The sites of one layer, with those of the whole model, and of the next layer as ``next.resid_pre``; in float64."""


@dataclass(frozen=True)
class Identity:
    """Two ways to the same tensor.

    ``text``: as one writes it. ``sites``: what it takes. ``speaks_for``: the sites that are shown to be what they are
    called, where it holds. ``both``: the two sides, of the sites. ``refutes``: is a site wrong where it does not hold?
    ``unless``: where a model has one of these sites, it need not hold.
    """

    text: str
    sites: tuple[str, ...]
    speaks_for: tuple[str, ...]
    both: Callable[[Read, Facts], tuple[Tensor, Tensor] | None]
    refutes: bool = True
    unless: tuple[str, ...] = ()


@dataclass(frozen=True)
class Facts:
    """What an identity needs of the configuration.

    ``activation``: the MLP's function. ``scale``: what the head's logits are multiplied with. ``softcap``: what then
    bends them. ``score_cap``: what bends attention's scores. ``sinks``: has attention something else to look at than
    tokens? ``gated``: is what heads mix multiplied by gates between 0 and 1? ``shared``: is there an expert that all
    tokens go to? ``biased``: may scores be more than products of queries and keys, such as a bias (ALiBi), or of
    rotated ones? ``sigmoid``: does each expert count what a sigmoid makes of its own logit? ``resized``: do queries and
    keys change their length with the rotation? ``epsilon``: what norms add to the mean square of a row.
    """

    activation: Callable[[Tensor], Tensor] | None = None
    scale: float | None = None
    softcap: float | None = None
    score_cap: float | None = None
    sinks: bool = False
    biased: bool = False
    gated: bool = False
    shared: bool = False
    sigmoid: bool = False
    resized: bool = False
    epsilon: float = 0.0


def error(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest number."""
    size = max(one.abs().max().item(), other.abs().max().item())
    gap = (one - other).abs().max().item()
    return 0.0 if size == 0 else gap / size if gap == gap else float("inf")


def _per(one: Tensor, other: Tensor) -> Tensor:
    """A quotient. What is nothing is along anything, and what it is compared with must be nothing, too."""
    return one / other.where(other > 0, 1.0)


def _sum(*names: str) -> Callable[[Read, Facts], tuple[Tensor, Tensor]]:
    """The last is the sum of the others."""

    def both(read: Read, facts: Facts) -> tuple[Tensor, Tensor]:
        *parts, whole = (read[name] for name in names)
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total.expand_as(whole), whole

    return both


def _seen(read: Read) -> Tensor:
    """Where a query may look: a mask writes very small numbers into the scores."""
    return read["scores"] > -1e4


def _softmax(read: Read, facts: Facts) -> tuple[Tensor, Tensor]:
    scores, pattern = read["scores"], read["pattern"]
    if not facts.sinks:
        return scores.softmax(-1), pattern
    # A head's sink takes a share of each of its rows, which no token has: by one number, that of the row where it takes
    # most. The others have to come out with it.
    whole = scores.logsumexp(-1, keepdim=True)
    tokens = pattern.sum(-1, keepdim=True).clamp(1e-12, 1 - 1e-12)
    sinks = (1 - tokens).log() - tokens.log() + whole
    most = (1 - tokens).transpose(0, 1).flatten(1).argmax(-1, keepdim=True)
    own = sinks.transpose(0, 1).flatten(1).gather(-1, most)[None, :, :, None]
    return (scores - torch.logaddexp(whole, own)).exp(), pattern


def _mixed(read: Read, facts: Facts) -> tuple[Tensor, Tensor]:
    pattern, values = read["pattern"], read["v"]
    values = values.repeat_interleave(pattern.shape[1] // values.shape[2], dim=2)
    mixed = torch.einsum("bhqk,bkhd->bqhd", pattern, values)
    # Of a gate all that is known is that it leaves the sign, and makes nothing larger.
    return read["z"].clamp(mixed.clamp(max=0), mixed.clamp(min=0)) if facts.gated else mixed, read["z"]


def _scored(queries: str, keys: str) -> Callable[[Read, Facts], tuple[Tensor, Tensor] | None]:
    """Scores are products of queries and keys, all times one number, before they are bent."""

    def both(read: Read, facts: Facts) -> tuple[Tensor, Tensor] | None:
        if facts.biased:
            return None
        each = read[keys].repeat_interleave(read[queries].shape[2] // read[keys].shape[2], dim=2)
        products = torch.einsum("bqhd,bkhd->bhqk", read[queries], each)[_seen(read)]
        scores, cap = read["scores"][_seen(read)], facts.score_cap
        scores = scores if cap is None else cap * (scores / cap).atanh()
        return products * _per(products @ scores, products @ products), scores

    return both


def _turned(before: str, after: str) -> Callable[[Read, Facts], tuple[Tensor, Tensor] | None]:
    """A rotation keeps lengths, but for one number that all are multiplied by."""

    def both(read: Read, facts: Facts) -> tuple[Tensor, Tensor] | None:
        if facts.resized:
            return None
        one, other = read[before].norm(dim=-1), read[after].norm(dim=-1)
        return one * _per(other.norm(), one.norm()), other

    return both


def _normed(before: str, after: str) -> Callable[[Read, Facts], tuple[Tensor, Tensor]]:
    """A norm: each row by its length, times one gain for each of its numbers; perhaps centred first, with a bias.

    A row is a head's, with gains that all heads share or have of their own, or all heads' side by side; the one that
    fits best is taken.
    """

    def both(read: Read, facts: Facts) -> tuple[Tensor, Tensor]:
        found: list[tuple[float, tuple[Tensor, Tensor]]] = []
        whole = read[before].ndim - 1
        for start, gains, centred in itertools.product({2, whole}, {2, whole}, (False, True)):
            rows, normed = read[before].flatten(start), read[after].flatten(start)
            rows = rows - rows.mean(-1, keepdim=True) if centred else rows
            unit = _per(rows, (rows.square().mean(-1, keepdim=True) + facts.epsilon).sqrt())
            axes = tuple(range(min(gains, unit.ndim - 1)))
            # The bias of a norm that centres is what the rows have in common.
            bias, own = (normed.mean(axes), unit.mean(axes)) if centred else (0.0, 0.0)
            gain = _per(((unit - own) * (normed - bias)).sum(axes), (unit - own).square().sum(axes))
            sides = (unit - own) * gain + bias, normed
            found.append((error(*sides), sides))
        return min(found, key=lambda one: one[0])[1]

    return both


def _activated(read: Read, facts: Facts) -> tuple[Tensor, Tensor] | None:
    if facts.activation is None:
        return None
    found = facts.activation(read["mlp_pre"])
    return (found * read["mlp_up"] if "mlp_up" in read else found), read["mlp_act"]


def _returned(read: Read, facts: Facts) -> tuple[Tensor, Tensor]:
    found, cap = read["lm_head"] * (1.0 if facts.scale is None else facts.scale), facts.softcap
    return (found if cap is None else cap * (found / cap).tanh()), read["logits"]


def _same(one: str, other: str, *unless: str) -> Identity:
    return Identity(
        f"{one} == {other}",
        (one, other),
        (one, other),
        lambda read, facts: (read[one], read[other]),
        unless=unless,
    )


def _along(one: str, other: str, unless: str) -> Identity:
    """Some families multiply what a sublayer adds with a number of the configuration."""

    def both(read: Read, facts: Facts) -> tuple[Tensor, Tensor]:
        first, second = read[one], read[other]
        return first * _per((first * second).sum(), (first * first).sum()), second

    return Identity(f"{one} ~ {other}", (one, other), (one,), both, unless=(unless,))


def _chosen(read: Read, facts: Facts) -> tuple[Tensor, Tensor] | None:
    if facts.sigmoid:
        return None  # a bias and groups of experts have their say, which no site shows
    index = read["expert_index"].long()
    best = read["router_logits"].topk(index.shape[-1]).values
    return read["router_logits"].gather(-1, index).sort(-1).values, best.sort(-1).values


def _weighed(by_sigmoid: bool) -> Callable[[Read, Facts], tuple[Tensor, Tensor] | None]:
    def both(read: Read, facts: Facts) -> tuple[Tensor, Tensor] | None:
        if facts.sigmoid is not by_sigmoid:
            return None
        logits = read["router_logits"].gather(-1, read["expert_index"].long())
        chances = logits.sigmoid() if by_sigmoid else logits.softmax(-1)
        return chances / chances.sum(-1, keepdim=True), read["expert_weights"] / read["expert_weights"].sum(
            -1, keepdim=True
        )

    return both


def _summed(read: Read, facts: Facts) -> tuple[Tensor, Tensor] | None:
    if facts.shared:
        return None
    return (read["expert_weights"][..., None] * read["expert_out"]).sum(-2), read["mlp_out"]


STREAM = (
    Identity("resid_post == the next layer's resid_pre", ("resid_post", "next.resid_pre"), ("resid_post", "resid_pre"),
             lambda read, facts: (read["resid_post"], read["next.resid_pre"])),
    Identity("resid_pre + attn_add == resid_mid", ("resid_pre", "attn_add", "resid_mid"), ("resid_mid", "attn_add"),
             _sum("resid_pre", "attn_add", "resid_mid")),
    Identity("resid_mid + mlp_add == resid_post", ("resid_mid", "mlp_add", "resid_post"), ("mlp_add", "resid_post"),
             _sum("resid_mid", "mlp_add", "resid_post")),
)  # fmt: skip
"""How a stream grows where attention and MLP come one after the other."""

PARALLEL = (
    STREAM[0],
    Identity("resid_pre + attn_add + mlp_add == resid_post", ("resid_pre", "attn_add", "mlp_add", "resid_post"),
             ("attn_add", "mlp_add", "resid_post"), _sum("resid_pre", "attn_add", "mlp_add", "resid_post")),
)  # fmt: skip
"""... and where both read the same stream."""

IN_A_LAYER = (
    _same("attn_norm", "attn_in"),
    _same("mlp_norm", "mlp_in"),
    _same("resid_pre", "attn_in", "attn_norm"),
    _same("resid_mid", "mlp_in", "mlp_norm"),
    _same("attn_norm", "mlp_in", "mlp_norm", "resid_mid"),
    _along("attn_out", "attn_add", "attn_post_norm"),
    _along("mlp_out", "mlp_add", "mlp_post_norm"),
    _same("attn_post_norm", "attn_add"),
    _same("mlp_post_norm", "mlp_add"),
    Identity("norm(attn_out) ~ attn_post_norm", ("attn_out", "attn_post_norm"), ("attn_out",),
             _normed("attn_out", "attn_post_norm")),
    Identity("norm(mlp_out) ~ mlp_post_norm", ("mlp_out", "mlp_post_norm"), ("mlp_out",),
             _normed("mlp_out", "mlp_post_norm")),
    Identity("norm(q) ~ q_normed", ("q", "q_normed"), ("q",), _normed("q", "q_normed")),
    Identity("norm(k) ~ k_normed", ("k", "k_normed"), ("k",), _normed("k", "k_normed")),
    Identity("softmax(scores) == pattern", ("scores", "pattern"), ("scores", "pattern"), _softmax),
    Identity("pattern @ v == z", ("pattern", "v", "z"), ("v", "z", "pattern"), _mixed),
    Identity("q_rot @ k_rot ~ scores", ("q_rot", "k_rot", "scores"), ("q_rot", "k_rot", "scores"),
             _scored("q_rot", "k_rot")),
    Identity("q @ k ~ scores", ("q", "k", "scores"), ("q", "k", "scores"), _scored("q", "k"), unless=("q_rot",)),
    Identity("|q_normed| ~ |q_rot|", ("q_normed", "q_rot"), ("q_normed",), _turned("q_normed", "q_rot")),
    Identity("|k_normed| ~ |k_rot|", ("k_normed", "k_rot"), ("k_normed",), _turned("k_normed", "k_rot")),
    Identity("|q| ~ |q_rot|", ("q", "q_rot"), ("q",), _turned("q", "q_rot"), unless=("q_normed",)),
    Identity("|k| ~ |k_rot|", ("k", "k_rot"), ("k",), _turned("k", "k_rot"), unless=("k_normed",)),
    Identity("activation(mlp_pre) [* mlp_up] == mlp_act", ("mlp_pre", "mlp_act"), ("mlp_pre", "mlp_up", "mlp_act"),
             _activated),
    Identity("expert_index == router_logits.topk(k)", ("router_logits", "expert_index"),
             ("router_logits", "expert_index"), _chosen, refutes=False),
    Identity("expert_weights ~ softmax of the chosen router_logits",
             ("router_logits", "expert_index", "expert_weights"), ("expert_weights",), _weighed(False), refutes=False),
    Identity("expert_weights ~ sigmoid of the chosen router_logits",
             ("router_logits", "expert_index", "expert_weights"), ("router_logits", "expert_index", "expert_weights"),
             _weighed(True), refutes=False),
    # Some families add an expert that all tokens go to. A run refuses experts whose sum is not what they return.
    Identity("sum of expert_weights * expert_out == mlp_out", ("expert_weights", "expert_out", "mlp_out"),
             ("expert_out", "expert_weights"), _summed, refutes=False),
)  # fmt: skip

OF_THE_MODEL = (
    Identity("embed [+ pos_embed] == resid_pre of the first layer", ("embed", "first.resid_pre"),
             ("embed", "pos_embed"),
             lambda read, facts: (
                 read["embed"] + read["pos_embed"] if "pos_embed" in read else read["embed"], read["first.resid_pre"])),
    Identity("unembedding @ final_norm == lm_head", ("final_norm", "unembedding", "lm_head"),
             ("final_norm", "lm_head"),
             lambda read, facts: (
                 read["final_norm"] @ read["unembedding"].T + read.get("unembedding bias", 0.0), read["lm_head"])),
    Identity("lm_head [scaled] [capped] == logits", ("lm_head", "logits"), ("lm_head", "logits"), _returned),
)  # fmt: skip
