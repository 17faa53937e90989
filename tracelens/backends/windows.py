"""Layers that look back over a sliding window: in a generation their cache forgets the keys before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tracelens.backends.anatomy import ModelAnatomy
from tracelens.errors import PromptError, SiteMismatchError
from tracelens.ir.dims import KEY
from tracelens.ir.graph import Graph
from tracelens.ir.ops import Read
from tracelens.location import here
from tracelens.subject import spelling


def window_of(config: Any, layer: int) -> int | None:
    """How many positions a layer looks back over; ``None``: over all of them."""
    kinds: list[str] | None = getattr(config, "layer_types", None)
    if kinds is not None and kinds[layer] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)


def require_rows_as_alone(anatomy: ModelAnatomy, lengths: Sequence[int], room: int) -> None:
    """Raises :class:`PromptError` where padding would change what the model makes of a shorter row."""
    counts = anatomy.family.counts_padding
    limit = None if counts is None else counts(anatomy.config)
    if limit is not None and len(set(lengths)) > 1 and max(lengths) + room >= limit:
        raise PromptError(
            f"from {limit} positions on, {anatomy.family.name} models make queries larger by where they stand in the "
            f"row, padding counted, so that a row of {min(lengths)} tokens beside one of {max(lengths)} is not what it "
            "is alone",
            at=here(),
            instead="prompts of one length, or one at a time",
        )


def refuse_forgotten(anatomy: ModelAnatomy, graph: Graph, positions: int, options: Mapping[str, Any]) -> None:
    """Raises :class:`SiteMismatchError` where a generation would come to a step whose keys are not all in the cache.

    Such a step has fewer keys than the text has tokens, and the recording was told that each token has one.
    """
    settings: Any = getattr(anatomy.model, "generation_config", None)
    known: dict[str, Any] = {
        name: options.get(name, getattr(settings, name, None))
        for name in ("use_cache", "cache_implementation", "past_key_values")
    }
    if known["use_cache"] is False or known["cache_implementation"] or known["past_key_values"] is not None:
        return  # a cache of another kind shows what it does when it runs
    new: int = options["max_new_tokens"]
    fed = positions + new - 1  # the last token is not given to the model any more
    for number, op in enumerate(graph.ops):
        if not isinstance(op, Read) or KEY not in op.type.symbols or op.site.layer is None:
            continue
        window = window_of(anatomy.config, op.site.layer)
        if window is None or new == 1 or fed <= window:
            continue
        fits = window - positions + 1
        error = SiteMismatchError(
            f"{op.site} has a key for every token of the text, and layer {op.site.layer} looks back over a sliding "
            f"window of {window}: its cache forgets older keys, and {positions} tokens with up to {new} new ones go "
            "beyond it",
            instead=(f"max_new_tokens={fits}, which stays inside; or " if fits > 1 else "")
            + f"use_cache=False; a number, which needs no count of keys: {spelling(op.site)} = 0.0; or model.trace "
            "over the whole text",
        )
        raise graph.blame(error, number)
