"""The sites: every named tensor of a forward pass, in the order in which the forward pass reaches them.

This is the vocabulary only. What a family of models calls the module that produces a site, and whether it has the
site at all, is in ``tracelens/backends/architectures``.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import lru_cache

from tracelens.ir.dims import B, P, S, Sym
from tracelens.ir.types import DType
from tracelens.ir.windows import StepWindow


class Effect(Enum):
    """What a write to a site changes."""

    STREAM = "stream"  # the residual stream: all later layers see it
    BRANCH = "branch"  # one sublayer's input, inside or output; the stream changes only through that sublayer
    OUTPUT = "output"  # after the last layer
    MODULE = "module"  # one side of a module, by its path: whatever reads that tensor sees it
    NONE = "read-only"


class Scope(Enum):
    INPUT = "input"  # of the model, before the embedding
    BEFORE = "before"  # before the first layer
    LAYER = "layer"
    AFTER = "after"  # after the last layer
    END = "end"  # of a step: after the next token has been chosen


@dataclass(frozen=True, slots=True)
class Kind:
    """One row of the vocabulary.

    ``shape`` uses the size symbols and the model's own widths by name: ``D`` (d_model), ``M`` (neurons), ``V``
    (vocabulary), ``H`` (heads), ``K`` (key and value heads), ``d`` (the width of a head), ``c`` (that of its queries
    and keys, mostly the same), ``E`` (experts), ``k`` (experts for each token), ``N`` (neurons of an expert). ``level``
    orders the rows; rows of one level cannot feed each other, and stand in the order in which modules make them.
    ``dtype``: where it is another than that of the model. ``instead``: what to write to, where the site is read-only.
    ``numbers``: its last axis holds numbers of things of which there are as many as this width says, each once.
    """

    name: str
    scope: Scope
    level: int
    shape: tuple[Sym | str, ...]
    effect: Effect
    meaning: str
    aliases: tuple[str, ...] = ()
    dtype: DType | None = None
    instead: str | None = None
    numbers: str | None = None


_RESIDUAL: tuple[Sym | str, ...] = (B, P, "D")
_NEURONS: tuple[Sym | str, ...] = (B, P, "M")
_TOKENS: tuple[Sym | str, ...] = (B, P, "V")
_HEADS: tuple[Sym | str, ...] = (B, P, "H", "d")
_KV_HEADS: tuple[Sym | str, ...] = (B, P, "K", "d")
_QUERIES: tuple[Sym | str, ...] = (B, P, "H", "c")
_KEYS: tuple[Sym | str, ...] = (B, P, "K", "c")
_LOOKS: tuple[Sym | str, ...] = (B, "H", P, S)
_EXPERTS: tuple[Sym | str, ...] = (B, P, "E")
_CHOSEN: tuple[Sym | str, ...] = (B, P, "k")
_OF_CHOSEN: tuple[Sym | str, ...] = (B, P, "k", "D")
_NEURONS_OF_CHOSEN: tuple[Sym | str, ...] = (B, P, "k", "N")

KINDS: tuple[Kind, ...] = (
    Kind(
        "token_mask",
        Scope.INPUT,
        0,
        (B, P),
        Effect.NONE,
        "True at real tokens, False at padding",
        dtype=DType.BOOL,
    ),
    Kind(
        "token_ids",
        Scope.INPUT,
        0,
        (B, P),
        Effect.NONE,
        "the id of each token that the pass is over",
        dtype=DType.INT64,
    ),
    Kind(
        "positions",
        Scope.INPUT,
        0,
        (B, P),
        Effect.NONE,
        "where each token stands in its text: real tokens, counted from 0; 0 at padding",
        dtype=DType.INT64,
    ),
    Kind("embed", Scope.BEFORE, 0, _RESIDUAL, Effect.STREAM, "what the token embedding returns"),
    Kind("pos_embed", Scope.BEFORE, 1, _RESIDUAL, Effect.STREAM, "the learned position embedding"),
    Kind("resid_pre", Scope.LAYER, 0, _RESIDUAL, Effect.STREAM, "the tensor entering the block"),
    Kind(
        "attn_norm",
        Scope.LAYER,
        1,
        _RESIDUAL,
        Effect.BRANCH,
        "the output of the norm that attention reads",
        ("pre_ln",),
    ),
    Kind("attn_in", Scope.LAYER, 2, _RESIDUAL, Effect.BRANCH, "what the attention module receives"),
    # One level, in the order of the modules: Qwen3 makes q, norms it, and only then makes k.
    Kind("q", Scope.LAYER, 3, _QUERIES, Effect.BRANCH, "the queries, before QK-norm and rotation"),
    Kind("q_normed", Scope.LAYER, 3, _QUERIES, Effect.BRANCH, "the queries after QK-norm"),
    Kind("k", Scope.LAYER, 3, _KEYS, Effect.BRANCH, "the keys, before QK-norm and rotation"),
    Kind("k_normed", Scope.LAYER, 3, _KEYS, Effect.BRANCH, "the keys after QK-norm"),
    Kind("v", Scope.LAYER, 3, _KV_HEADS, Effect.BRANCH, "the values"),
    Kind(
        "q_rot", Scope.LAYER, 5, _QUERIES, Effect.BRANCH, "the queries after rotation, as attention uses them"
    ),
    Kind("k_rot", Scope.LAYER, 5, _KEYS, Effect.BRANCH, "the keys after rotation, as attention uses them"),
    Kind("scores", Scope.LAYER, 6, _LOOKS, Effect.BRANCH, "before the softmax, scale and mask included"),
    Kind("pattern", Scope.LAYER, 7, _LOOKS, Effect.BRANCH, "after the softmax: where each query looks"),
    Kind(
        "z",
        Scope.LAYER,
        9,
        _HEADS,
        Effect.BRANCH,
        "each head's mix of values: what the output projection reads",
    ),
    Kind("attn_out", Scope.LAYER, 10, _RESIDUAL, Effect.BRANCH, "the output projection's result"),
    Kind(
        "attn_post_norm",
        Scope.LAYER,
        11,
        _RESIDUAL,
        Effect.BRANCH,
        "the output of the norm between attention and the stream",
    ),
    Kind("attn_add", Scope.LAYER, 12, _RESIDUAL, Effect.BRANCH, "what attention really adds to the stream"),
    Kind("resid_mid", Scope.LAYER, 13, _RESIDUAL, Effect.STREAM, "resid_pre + attn_add"),
    Kind(
        "mlp_norm",
        Scope.LAYER,
        14,
        _RESIDUAL,
        Effect.BRANCH,
        "the output of the norm that the MLP reads",
        ("post_ln",),
    ),
    Kind("mlp_in", Scope.LAYER, 15, _RESIDUAL, Effect.BRANCH, "what the MLP module receives"),
    # The router's, in layers that are mixtures of experts. Which experts there are comes before how much each counts,
    # so that one's weight can be taken away.
    Kind(
        "router_logits",
        Scope.LAYER,
        16,
        _EXPERTS,
        Effect.BRANCH,
        "the router's score of each expert; experts and weights are chosen anew from what is written",
    ),
    Kind(
        "expert_index",
        Scope.LAYER,
        17,
        _CHOSEN,
        Effect.BRANCH,
        "which experts each token goes to, best first; one that is written takes the weight of its place",
        dtype=DType.INT64,
        numbers="E",
    ),
    Kind(
        "expert_weights",
        Scope.LAYER,
        18,
        _CHOSEN,
        Effect.BRANCH,
        "what the outputs of these experts are multiplied by, in the same order",
    ),
    Kind(
        "expert_act",
        Scope.LAYER,
        19,
        _NEURONS_OF_CHOSEN,
        Effect.BRANCH,
        "the neurons of these experts, in the same order: what each one's down projection reads",
    ),
    Kind(
        "expert_out",
        Scope.LAYER,
        20,
        _OF_CHOSEN,
        Effect.BRANCH,
        "what these experts return, in the same order, before it is weighted and summed",
    ),
    Kind("mlp_pre", Scope.LAYER, 21, _NEURONS, Effect.BRANCH, "the neurons before the activation function"),
    Kind("mlp_up", Scope.LAYER, 21, _NEURONS, Effect.BRANCH, "the linear branch of a gated MLP"),
    Kind(
        "mlp_act", Scope.LAYER, 22, _NEURONS, Effect.BRANCH, "the neurons: the input of the down projection"
    ),
    Kind("mlp_out", Scope.LAYER, 23, _RESIDUAL, Effect.BRANCH, "the raw output of the MLP"),
    Kind(
        "mlp_post_norm",
        Scope.LAYER,
        24,
        _RESIDUAL,
        Effect.BRANCH,
        "the output of the norm between the MLP and the stream",
    ),
    Kind("mlp_add", Scope.LAYER, 25, _RESIDUAL, Effect.BRANCH, "what the MLP really adds to the stream"),
    Kind("resid_post", Scope.LAYER, 26, _RESIDUAL, Effect.STREAM, "the tensor leaving the block"),
    Kind(
        "final_norm",
        Scope.AFTER,
        0,
        _RESIDUAL,
        Effect.OUTPUT,
        "the output of the last norm: what the head reads",
    ),
    Kind("lm_head", Scope.AFTER, 1, _TOKENS, Effect.OUTPUT, "the raw unembedding"),
    Kind("logits", Scope.AFTER, 2, _TOKENS, Effect.OUTPUT, "what the model returns"),
    Kind(
        "next_tokens",
        Scope.END,
        0,
        (B, P),
        Effect.NONE,
        "the id of the token that follows each one; -1 where none is known, and at padding",
        dtype=DType.INT64,
    ),
)

KIND: dict[str, Kind] = {kind.name: kind for kind in KINDS}
CANONICAL: dict[str, str] = {alias: kind.name for kind in KINDS for alias in (kind.name, *kind.aliases)}
LAYER_KINDS = tuple(kind for kind in KINDS if kind.scope is Scope.LAYER)
GLOBAL_KINDS = tuple(kind for kind in KINDS if kind.scope in (Scope.BEFORE, Scope.AFTER))
INPUT_KINDS = tuple(kind for kind in KINDS if kind.scope is Scope.INPUT)
TEXT = (Scope.INPUT, Scope.END)
"""Of the text, and not of the model: every model has these."""
TEXT_KINDS = tuple(kind for kind in KINDS if kind.scope in TEXT)

_SCOPE_RANK = {Scope.INPUT: 0, Scope.BEFORE: 1, Scope.LAYER: 2, Scope.AFTER: 3, Scope.END: 4}

Order = tuple[int, ...]
Sequence = tuple[int, ...]
BEFORE_ALL: Sequence = (-1, 0, 0, 0, 0)
AFTER_ALL: Order = (1 << 62, 0, 0, 0)
"""Where gradients come from: no site of the same forward pass is reached after them."""
_ROW = {kind.name: row for row, kind in enumerate(KINDS)}


@dataclass(frozen=True, slots=True)
class Site:
    """A named tensor of the forward pass: ``Site("resid_post", 3)``, ``Site("logits")``.

    ``steps`` are the generation steps in which it is meant; ``None`` means every step (the only one, in a trace).
    ``row`` is for the sites of a plan: the row of the vocabulary in whose place this model reaches the site, where that
    is another than its own.
    """

    name: str
    layer: int | None = None
    steps: StepWindow | None = None
    row: int | None = field(default=None, kw_only=True, repr=False, compare=False)
    # Sites are the keys of most look-ups, in every line of a block.
    _hash: int = field(default=0, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.name, self.layer, self.steps)))

    def __hash__(self) -> int:
        return self._hash

    @property
    def text(self) -> str:
        """The site in the text form of a graph, where its steps stand after its version."""
        return self.name if self.layer is None else f"layers.{self.layer}.{self.name}"

    def __str__(self) -> str:
        return self.text if self.steps is None else f"{self.text} in {self.steps.words}"

    @property
    def always(self) -> Site:
        """The same tensor of the forward pass, whatever the step."""
        return self if self.steps is None else _during(self, None)

    def during(self, steps: StepWindow | None) -> Site:
        """The same tensor in some generation steps; all of them are not said."""
        steps = None if steps is not None and steps.every else steps
        return self if steps == self.steps else _during(self, steps)

    @property
    def kind(self) -> Kind:
        """The site's row in the vocabulary: its shape, what a write changes, what it means."""
        return KIND[self.name]

    @property
    def order(self) -> Order:
        """The site's place in the forward pass; sites with equal orders cannot feed each other."""
        return _order(self)

    @property
    def sequence(self) -> Sequence:
        """A total order that refines :attr:`order`: the row decides between sites of one level."""
        return (*_order(self), _ROW[self.name] if self.row is None else self.row)

    def precedes(self, other: Site) -> bool:
        """Is this site reached before ``other``, so that a value can travel from here to there?"""
        return self.order < other.order


def rows_of(reached: Collection[str]) -> dict[str, int]:
    """The rows that sites of one level take in a model that reaches them in the order ``reached``."""
    return dict(zip(reached, sorted(_ROW[name] for name in reached), strict=True))


@lru_cache(maxsize=65536)
def _order(site: Site) -> Order:
    kind = KIND[site.name]
    return (0, _SCOPE_RANK[kind.scope], -1 if site.layer is None else site.layer, kind.level)


@lru_cache(maxsize=65536)
def _during(site: Site, steps: StepWindow | None) -> Site:
    """One object for each, which look-ups find by identity."""
    return replace(site, steps=steps)


def parse_site(text: str) -> Site:
    """The inverse of ``site.text``; raises ``ValueError`` on anything else."""
    parts = text.split(".")
    layer = None
    if parts[0] == "layers" and len(parts) == 3:
        layer, parts = int(parts[1]), parts[2:]
    if len(parts) != 1 or parts[0] not in KIND:
        raise ValueError(f"{text!r} is not a site")
    if (KIND[parts[0]].scope is Scope.LAYER) != (layer is not None):
        raise ValueError(f"{text!r} is not a site")
    return Site(parts[0], layer)


def near(name: str, candidates: tuple[str, ...]) -> tuple[str, ...]:
    """The candidates that ``name`` is likely a misspelling of, best first."""
    return tuple(difflib.get_close_matches(name, candidates, n=3, cutoff=0.6))
