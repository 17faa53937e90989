"""What models without a table are: why they have no sites, in one sentence, and what there is for them instead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tracelens.backends.base import text_of


@dataclass(frozen=True, slots=True)
class Other:
    """A kind of models that no table serves.

    ``words``: what such a model is, and why it has no sites. ``loads``: the class of transformers that loads it, where
    :func:`tracelens.load` does not. ``derives``: may the table of another family be tried on it?
    """

    words: str
    loads: str | None = None
    derives: bool = False


def _is_encoder(config: Any) -> bool:
    """Is it of a type that fills in masked words, and not set up to go on with a text?"""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)


def _has_state(config: Any) -> bool:
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    return any(kind in ("linear_attention", "mamba", "recurrent", "conv") for kind in kinds)


_KINDS: tuple[tuple[Callable[[Any], bool], Other], ...] = (
    (
        lambda config: bool(getattr(config, "is_encoder_decoder", False)),
        Other(
            "it is an encoder-decoder model, of two stacks of layers that read two texts, where sites are those of one "
            "stack that goes on with one text",
            "AutoModelForSeq2SeqLM",
        ),
    ),
    (
        _is_encoder,
        Other(
            "it is an encoder, in which tokens see those after them and no text is gone on with, where sites are those "
            "of models that look back only",
            "AutoModelForMaskedLM",
        ),
    ),
    (
        lambda config: not hasattr(text_of(config), "num_attention_heads"),
        Other(
            "it is a state-space or recurrent model, whose layers hand a state from token to token and have no "
            "attention heads, of which most sites are"
        ),
    ),
    (
        lambda config: _has_state(text_of(config)),
        Other(
            "some of its layers hand a state from token to token instead of attending (state-space, recurrent or "
            "linear attention), and there is no table that says so",
            derives=True,
        ),
    ),
    (
        lambda config: text_of(config) is not config,
        Other(
            "it is a model of text and something else, and no table of sites fits the language model in it",
            derives=True,
        ),
    ),
)


def other(config: Any) -> Other:
    """What a model is for which there is no table."""
    for is_so, kind in _KINDS:
        if is_so(config):
            return kind
    return Other("", derives=True)


def sentence(config: Any) -> str:
    """Why there is no table for a model: its type, and what it is."""
    words = other(config).words
    return f"there is no site table for models of type {config.model_type!r}" + (
        f": {words}" if words else ""
    )
