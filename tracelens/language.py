"""The words of a block that are functions: ``tl.where``, ``tl.masked_mean``, ``tl.apply``; and names of tokens."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch

from tracelens.errors import IndexingError, NoTraceError, PositionAxisError, UnsupportedFunctionError
from tracelens.ir import dims
from tracelens.ir.ops import TokenChars, TokenId
from tracelens.ir.sites import Site
from tracelens.ir.types import TensorType
from tracelens.ir.windows import PREFILL
from tracelens.location import here
from tracelens.mapped import MappedValue
from tracelens.operand import Operand, apply_torch, operands_in
from tracelens.own_tokens import own_tokens
from tracelens.recorder import Recorder
from tracelens.values import Value


def where(condition: Any, value: Any, other: Any) -> Any:
    """``value`` where ``condition`` holds, else ``other``: the `if` of a block.

    All three broadcast; at least one is a value. Numbers and tensors are welcome as ``value`` and ``other``.

    >>> gate = (h @ probe > 0)[..., None]                                            # doctest: +SKIP
    >>> model.layers[5].resid_post += tl.where(gate, v, 0.0)                         # doctest: +SKIP
    """
    return apply_torch(torch.where, (condition, value, other), {})


def masked_mean(value: Any) -> Any:
    """The mean over the real tokens of each row: [B, P, ...] becomes [B, ...], padding left out.

    Right for prompts of different lengths, where ``.mean(1)`` is refused. Of one of ``t.prompts`` it is ``.mean(1)``.
    """
    if isinstance(value, MappedValue):
        return value._each(masked_mean)
    if not isinstance(value, Value) or not value._is_recording():
        raise NoTraceError("tl.masked_mean is for values inside a block", at=here(), instead="tensor.mean(1)")
    recorder: Recorder = value._recorder
    if value._type.shape[:2] != (dims.B, dims.P):
        own = own_tokens(value)
        if own is not None and own.axis == 1:
            return cast(Any, value).mean(1)  # of a prompt by itself, which has no padding
        raise PositionAxisError(
            f"tl.masked_mean averages over the position axis of [B, P, ...], and this value is {value._type}",
            at=here(),
            instead="tl.masked_mean(value) before positions are indexed or reduced",
        )
    site = Site("token_mask")
    if recorder.generating:
        if recorder.steps_of(value._id) != PREFILL:
            raise PositionAxisError(
                "tl.masked_mean needs all positions of a row, and in generation a step may hold one of them",
                at=here(),
                instead="tl.masked_mean(t.prefill.layers[i].resid_post) for the mean over the prompt",
            )
        site = site.during(PREFILL)
    mask = Value(recorder, recorder.read(site))
    return value._apply("tracelens.masked_mean", (value, mask), None)


def token_id(id: int) -> TokenId:
    """The one token with this id, for ``.tok``: ``site.tok[tl.token_id(4649)]`` is [B, D], one token of each row.

    Raises :class:`~tracelens.errors.TokenMatchError` at ``.tok[...]`` for a row that has none or several, and
    :class:`~tracelens.errors.IndexingError` for what is no id.

    >>> with model.trace("The capital of France is"):                                # doctest: +SKIP
    ...     h = model.layers[10].resid_post.tok[tl.token_id(4649)].save()            # at " France"
    """
    if isinstance(id, bool) or not hasattr(id, "__index__") or operator.index(id) < 0:
        raise IndexingError(
            f"{id!r} is no token id", at=here(), instead='tl.token_id(4649), or .tok["Paris"] for a text'
        )
    return TokenId(operator.index(id))


def chars(start: int, stop: int) -> TokenChars:
    """The tokens that spell the characters from ``start`` up to ``stop`` of each row's text, for ``.tok``.

    ``site.tok[tl.chars(15, 21)]`` is [B, K, D]. Characters count from 0 in the prompt as it was given; a space before
    the first of them does not matter. Raises :class:`~tracelens.errors.TokenMatchError` at ``.tok[...]`` where they do
    not begin and end as tokens do, and :class:`~tracelens.errors.IndexingError` for what is no span of characters.

    >>> prompt = "The capital of France is"
    >>> start = prompt.index("France")
    >>> with model.trace(prompt):                                                    # doctest: +SKIP
    ...     h = model.layers[10].resid_post.tok[tl.chars(start, start + 6)].save()
    """
    if not all(type(part) is int for part in (start, stop)) or not 0 <= start < stop:
        raise IndexingError(
            f"tl.chars({start!r}, {stop!r}) is no span of characters",
            at=here(),
            instead="two whole numbers, from 0, the first below the second: tl.chars(4, 20)",
        )
    return TokenChars(start, stop, None)


def apply(function: Callable[..., Any], *values: Any, like: Any = None) -> Any:
    """Runs any Python function or module on the real tensors, when they are there.

    ``like`` says what comes back: a value or tensor of the same shape and dtype, or a tuple of them (default: the first
    argument). A result of another shape or dtype is refused when the model runs. Where prompts differ in length, a
    function of positions is called for each row alone, [1, P_i, ...], so that it never sees padding. It must not change
    its arguments. It always runs, saved or not; a graph that holds one is written to a file only with ``trusted=True``.

    >>> model.layers[5].resid_post = tl.apply(my_function, model.layers[5].resid_post)   # doctest: +SKIP
    """
    operands = [operand for operand in operands_in(values, {}) if operand._is_recording()]
    mapped = next((operand for operand in operands if isinstance(operand, MappedValue)), None)
    if mapped is not None:
        return mapped._each_with(
            lambda _, parts: apply(function, *parts[0], like=parts[1]),
            (values, like if like is not None else values[0]),
        )
    if not operands:
        raise NoTraceError(
            "tl.apply needs a value of an open block among its arguments",
            at=here(),
            instead="call the function",
        )
    if not callable(function):
        raise UnsupportedFunctionError(f"{function!r} cannot be called", at=here())
    recorder: Recorder = cast(Value, operands[0])._recorder
    template = values[0] if like is None else like
    several = isinstance(template, tuple | list)
    templates = cast("Sequence[Any]", template) if several else (template,)
    outs = recorder.apply(function, values, tuple(_type(recorder, part) for part in templates))
    results = tuple(Value(recorder, out) for out in outs)
    return results if several else results[0]


def _type(recorder: Recorder, template: Any) -> TensorType:
    if isinstance(template, Operand) and template._is_recording():
        return recorder.types[recorder.own(template)]
    if isinstance(template, torch.Tensor):
        from tracelens.ir.infer import dtype_of

        return TensorType(dtype_of(template.dtype), tuple(template.shape))
    raise UnsupportedFunctionError(
        f"like={template!r} does not say what the function gives",
        at=here(),
        instead="like=value, or like=torch.empty(shape)",
    )
