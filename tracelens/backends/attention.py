"""The inside of attention: queries and keys as attention uses them, the scores and the pattern.

transformers looks up the function that computes attention in a table, by a name in the configuration. A run that looks
inside puts a name of ours there, and takes it away again whatever happens. Our function asks the model's own to do the
work, with the mask that this one gets without us: looking does not change a bit of what the model computes. Scores and
pattern are computed beside it, for the modules and sites that the run asks for. Only where scores or pattern are
written (or differentiated) are they what the values are mixed with.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any

import torch
from torch import nn

from tracelens.errors import AttentionImplementationError, NestedTraceError, SiteMismatchError

NAME = "tracelens"
"""Our entry in transformers' tables; never the user's choice."""

KNOWN = ("sdpa", "eager", "flex_attention")
"""The implementations whose masks we read. Others are refused: a guessed mask would give a wrong pattern."""

_COUNTED = frozenset(
    {"dropout", "scaling", "sliding_window", "softcap", "s_aux", "is_causal", "position_bias", "cache"}
)
"""Options that are reckoned with, or refused for scores and patterns."""
_PASSED_ON = frozenset(
    {
        *(
            "position_ids",
            "cache_position",
            "position_embeddings",
            "use_cache",
            "deterministic",
            "logits_to_keep",
        ),
        *(
            "output_attentions",
            "output_hidden_states",
            "output_router_logits",
            "return_dict",
            "num_items_in_batch",
        ),
        *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
        *("token_type_ids", "mm_token_type_ids"),
    }
)
"""... and those that say nothing that is not in the mask already. Another one may say which keys a query sees, which a
model hands over in place of a mask when it meets a name that it does not know, as with the sparse attention of
DeepSeek-V3.2: sdpa and eager attention would not look at it, and the model would compute something else."""

Step = Callable[[torch.Tensor], torch.Tensor]
Attention = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


@dataclass(frozen=True, slots=True)
class Visit:
    """What a run does inside one attention module: for each site there, a function that gives the tensor to go on with.

    ``replaces``: are the values mixed with the pattern that is computed here, instead of by the model's own function?
    ``wide``: is the softmax taken in float32 at least, and then cast, as the model's eager function does it?
    ``real``: which keys [B, S] are no padding, or ``None`` if all are real. Whatever is written, no query sees padding,
    so that a row in a batch gives what it gives alone.
    """

    steps: Mapping[str, Step]
    replaces: bool
    wide: bool
    real: Callable[[torch.device], torch.Tensor | None]

    def attend(
        self,
        own: Attention,
        name: str,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Any,
        options: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of ``query`` [B, H, P, d] over ``key`` and ``value`` [B, K, S, d]: [B, P, H, d], and weights."""
        steps = self.steps
        if "v" in steps:
            value = _passed(steps["v"], value)
        if "q_rot" in steps:
            query = _passed(steps["q_rot"], query)
        if "k_rot" in steps:
            key = _passed(steps["k_rot"], key)
        weights: torch.Tensor | None = None
        if "scores" in steps or "pattern" in steps or self.replaces:
            scores = scores_of(name, module, query, key, mask, options)
            if "scores" in steps:
                scores = self.written("scores", scores)
            if "pattern" in steps or self.replaces:
                # float32 has no number for the lowest one of float64, which a query that is padding sees everywhere.
                dtype = torch.promote_types(scores.dtype, torch.float32) if self.wide else None
                weights = _looks(scores, options.get("s_aux"), dtype).to(query.dtype)
                if "pattern" in steps:
                    weights = self.written("pattern", weights)
        if not self.replaces:
            return own(module, query, key, value, mask, **options)
        assert weights is not None
        mixed = nn.functional.dropout(weights, p=options.get("dropout", 0.0), training=module.training)
        return _grouped(mixed, value).transpose(1, 2).contiguous(), weights if name == "eager" else None

    def written(self, site: str, tensor: torch.Tensor) -> torch.Tensor:
        """Scores or pattern after the step of their site; where that wrote, padding stays out of sight."""
        found = self.steps[site](tensor)
        if found is tensor or (real := self.real(found.device)) is None:
            return found
        # The latest ones: the cache of a layer with a sliding window has forgotten those before.
        keys = real[:, None, None, -found.shape[-1] :]
        if site == "pattern":
            return found.masked_fill(~keys, 0.0)
        # Lower than anything that can be written: a query whose keys were all given the lowest number sees them alike,
        # and no padding. A query that is padding sees nothing else, and must not become nan.
        queries = real[:, None, -found.shape[-2] :, None]
        lowest = found.new_full((), torch.finfo(found.dtype).min)
        return torch.where(keys, found, torch.where(queries, found.new_full((), float("-inf")), lowest))


def _looks(scores: torch.Tensor, sinks: torch.Tensor | None, dtype: torch.dtype | None) -> torch.Tensor:
    """The softmax over the keys. A head with a sink (of [H]) may also look at nothing: its rows sum to less than 1.

    The largest is taken away first, as eager attention does it: in bfloat16 that rounds.
    """
    if sinks is None:
        return torch.softmax(scores, dim=-1, dtype=dtype)
    sink = sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    both = torch.cat((scores, sink.to(scores.dtype)), dim=-1)
    return torch.softmax(both - both.max(dim=-1, keepdim=True).values, dim=-1, dtype=dtype)[..., :-1]


def _passed(step: Step, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor [B, H, P, d] after a step that sees it as [B, P, H, d]; the same one if nothing changed."""
    seen = tensor.transpose(1, 2)
    found = step(seen)
    return tensor if found is seen else found.transpose(1, 2)


# --- scores --------------------------------------------------------------------------------------------------------


def scores_of(
    name: str,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: Any,
    options: Mapping[str, Any],
) -> torch.Tensor:
    """What the softmax is taken of, [B, H, P, S], as the eager function of transformers computes it.

    ``mask`` is what the implementation called ``name`` was given. Places that it excludes hold the lowest number.
    """
    # sdpa computes without a soft-cap and without sinks, or refuses them: whichever it is, these are not the model's.
    beyond_sdpa = ("softcap", "s_aux")
    for option in ("position_bias", "cache", *(beyond_sdpa if name == "sdpa" else ())):
        if options.get(option) is not None:
            raise AttentionImplementationError(
                f"{type(module).__name__} computes attention with {option}, which scores and pattern do not know"
                + (" of sdpa" if option in beyond_sdpa else ""),
                instead='model.hf.set_attn_implementation("eager")' if option in beyond_sdpa else None,
            )
    scaling = options.get("scaling")
    scores = _grouped(query, key, transposed=True)
    scores *= query.shape[-1] ** -0.5 if scaling is None else scaling
    cap = options.get("softcap")
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    found = _mask(name, module, mask, scores, options)
    if found is None:
        return scores
    if found.dtype is torch.bool:
        return scores.masked_fill_(~found, torch.finfo(scores.dtype).min)
    return scores + found


def _grouped(left: torch.Tensor, right: torch.Tensor, *, transposed: bool = False) -> torch.Tensor:
    """The products of [B, H, n, m] and [B, K, m, l], in which H / K neighbours on the left share one on the right.

    One product for each head, as eager attention makes them: another grouping would round otherwise. ``transposed``:
    the right one is [B, K, l, m].
    """
    batch, shared, *matrix = right.shape
    heads = left.shape[1]
    if shared != heads:
        right = (
            right[:, :, None].expand(batch, shared, heads // shared, *matrix).reshape(batch, heads, *matrix)
        )
    return left @ (right.transpose(2, 3) if transposed else right)


def _mask(
    name: str, module: nn.Module, mask: Any, scores: torch.Tensor, options: Mapping[str, Any]
) -> torch.Tensor | None:
    """The mask as a tensor that broadcasts to the scores: bool (where to look) or numbers to add; ``None``: no mask."""
    queries, keys = scores.shape[-2:]
    if mask is None:
        causal = options.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        # Without a mask, sdpa is told to be causal; the others look everywhere.
        if name != "sdpa" or queries == 1 or not causal:
            return None
        return torch.ones(queries, keys, dtype=torch.bool, device=scores.device).tril()
    if not isinstance(mask, torch.Tensor):
        from torch.nn.attention.flex_attention import BlockMask, create_mask

        if not isinstance(mask, BlockMask):
            raise AttentionImplementationError(f"a mask of type {type(mask).__name__} cannot be read")
        rows, heads = mask.shape[:2]
        mask = create_mask(mask.mask_mod, rows, heads, queries, keys, device=scores.device)
    if mask.ndim != 4 or mask.shape[-2:] != (queries, keys):
        raise SiteMismatchError(
            f"attention of {queries} positions over {keys} keys was given a mask of shape {list(mask.shape)}"
        )
    return mask


# --- our entry in the tables ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Switched:
    """A configuration that holds our name now, what it held before, and the sessions that need ours."""

    config: Any
    before: str
    needed_by: list[Session] = field(default_factory=list["Session"])


# By the identity of the configuration: models may share one.
_switched: dict[int, _Switched] = {}
# By thread: another thread's use of the same module is none of the run's business.
_visits: dict[tuple[int, nn.Module], Visit] = {}
_lock = threading.Lock()


class Session:
    """The inside of attention for one run. :meth:`remove` can be called at any time, and again."""

    def __init__(self, configs: Sequence[Any], visits: Mapping[nn.Module, Visit]) -> None:
        self._configs = configs
        self._visits = visits
        self._thread = 0

    def start(self) -> None:
        """Puts our name into the configurations; refuses implementations that we do not know."""
        register()
        for module in self._visits:
            own_function(module, implementation(module.config))
        self._thread = threading.get_ident()
        if any((self._thread, module) in _visits for module in self._visits):
            self._visits = {}
            raise NestedTraceError("a trace was run from inside a run of another model with the same modules")
        with _lock:
            for module, visit in self._visits.items():
                _visits[self._thread, module] = visit
            for config in self._configs:
                known = _switched.get(id(config))
                if known is None:
                    known = _switched[id(config)] = _Switched(config, config._attn_implementation)
                known.needed_by.append(self)
                config._attn_implementation_internal = NAME

    def remove(self) -> None:
        """Leaves the configurations as they were before the first session that needs them."""
        with _lock:
            for module in self._visits:
                _visits.pop((self._thread, module), None)
            for config in self._configs:
                known = _switched.get(id(config))
                if known is None:
                    continue
                known.needed_by[:] = [other for other in known.needed_by if other is not self]
                if not known.needed_by:
                    if config._attn_implementation == NAME:
                        config._attn_implementation_internal = known.before
                    del _switched[id(config)]


def implementation(config: Any) -> str:
    """The implementation of attention that a configuration asks for, whatever name of ours stands there now."""
    known = _switched.get(id(config))
    return config._attn_implementation if known is None else known.before


def own_function(module: nn.Module, name: str) -> Attention:
    """The model's own function for an implementation, as its modelling file would look it up."""
    source = _source(type(module))
    if name == "eager":
        found = getattr(source, "eager_attention_forward", None)
    else:
        found = getattr(source, "ALL_ATTENTION_FUNCTIONS", {}).get(name)
    if name not in KNOWN or found is None:
        raise AttentionImplementationError(
            f"this model computes attention by {name!r}, and q_rot, k_rot, scores and pattern can be reached with "
            f"{', '.join(map(repr, KNOWN))} only",
            instead='model.hf.set_attn_implementation("sdpa"), or the sites q, k, v and z, which need no switch',
        )
    return found


@lru_cache(maxsize=256)
def _source(kind: type[nn.Module]) -> Any:
    """The modelling file that the module's forward is written in."""
    owner = next(base for base in kind.__mro__ if "forward" in vars(base))
    return sys.modules[owner.__module__]


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    name = implementation(module.config)
    own = own_function(module, name)
    for option, given in options.items():
        if given is not None and option not in _COUNTED and option not in _PASSED_ON:
            raise AttentionImplementationError(
                f"{type(module).__name__} hands {option} to an implementation of attention that it does not know, and "
                f"something else to {name!r}: looking inside would change what it computes",
                instead="the sites q, k, v and z, or those of the residual stream, which need no switch",
            )
    visit = _visits.get((threading.get_ident(), module))
    if visit is None:
        return own(module, query, key, value, attention_mask, **options)
    return visit.attend(own, name, module, query, key, value, attention_mask, options)


def _mask_of(*args: Any, config: Any, **options: Any) -> Any:
    """The mask that the model's own implementation gets: with another one, a layer could look ahead."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    return ALL_MASK_ATTENTION_FUNCTIONS[implementation(config)](*args, config=config, **options)


@cache
def register() -> None:
    """Adds our function and its mask to transformers' tables, once, before the first run that needs them."""
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask_of)
