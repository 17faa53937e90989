"""Says why a function cannot be used where rows differ in length, and what to write instead."""

from __future__ import annotations

from typing import Any

from tracelens.errors import PositionAxisError
from tracelens.location import here

_ALONE = "tl.apply(function, x, like=x[..., -1]), which is called for each prompt alone"
_NEEDS_LOWEST = frozenset(
    {
        "amax",
        "logsumexp",
        "special.logsumexp",
        "softmax",
        "special.softmax",
        "log_softmax",
        "special.log_softmax",
    }
)


def padding_counted(function: str) -> PositionAxisError:
    """For a function over keys that would count those that are padding."""
    short = function.removeprefix("torch.")
    low = short in _NEEDS_LOWEST
    holds = "low enough to leave them out" if low else "False" if short == "any" else "zero"
    fill = 'float("-inf")' if low else "False" if short == "any" else "0.0"
    return PositionAxisError(
        f"{short} would count keys that are padding: the rows of this prompt differ in length, and what the value "
        f"holds at those keys is not {holds}",
        instead=f"x = tl.where(pattern > 0, x, {fill}) before it (with scores: scores > -1e9), {_ALONE}, or trace one "
        "prompt at a time",
    )


def misaligned(what: str, generating: bool, of_keys: bool) -> PositionAxisError:
    """For a function that positions or keys of different rows do not allow; ``of_keys``: it is used on such a value."""
    why = (
        "in generation a step may hold one position or many"
        if generating
        else "the rows of this prompt differ in length"
    )
    if generating:
        newest = "site[..., -1, :] = 0.0" if of_keys else "site[:, -1] += v"
        instead = (
            f"a write to all positions (site += v) or to the newest one ({newest}); to read, the newest one, the "
            "step of the prompt (t.prefill.layers[i].resid_post), or all that is saved, after the block"
        )
    elif of_keys:
        instead = (
            "a sum over keys (x.sum(-1)) of what is zero at padding, as pattern is; the newest query (x[..., -1, :]) "
            f"or key (x[..., -1]); {_ALONE}; or trace one prompt at a time"
        )
    else:
        instead = (
            "address tokens with .tok[...], average with tl.masked_mean, or take each prompt for itself: "
            "for p in t.prompts: p.layers[i].resid_post ..."
        )
    return PositionAxisError(
        f"{what.removeprefix('torch.')} needs positions that line up, but {why}", instead=instead
    )


def graph_misaligned(operation: str, of_keys: bool) -> PositionAxisError:
    """For a recorded operation that rows of different lengths, which the graph meets now, do not allow."""
    right = (
        "or what is zero at padding: tl.where(pattern > 0, x, 0.0)"
        if of_keys
        else ".tok[...] or tl.masked_mean"
    )
    return PositionAxisError(
        "the rows of this prompt differ in length, and an operation of the graph needs positions that line up: "
        f"{operation}",
        instead=f"prompts of one length, {right}",
    )


def padded_size(size: int) -> PositionAxisError:
    """For a size with padding in it that is used as a number."""
    return PositionAxisError(
        f"the size {size} counts padding: the rows of this prompt differ in length, so as a number it is right for the "
        "longest row alone",
        at=here(),
        instead="tl.masked_mean for an average over positions; (pattern > 0).float().sum(-1) for the number of keys "
        "that each query sees; or trace one prompt at a time",
    )


class PaddedSize(int):
    """How many positions or keys there are with padding, where rows differ in length: for shapes, and for nothing else.

    Divided by, it would be wrong for all rows but the longest.
    """

    def _refuse(self, *_: object) -> Any:
        raise padded_size(int(self))

    __truediv__ = __rtruediv__ = __pow__ = __rpow__ = __float__ = _refuse

    def __add__(self, other: Any) -> Any:
        return _still_padded(super().__add__(other))

    def __sub__(self, other: Any) -> Any:
        return _still_padded(super().__sub__(other))

    def __rsub__(self, other: Any) -> Any:
        return _still_padded(super().__rsub__(other))

    def __mul__(self, other: Any) -> Any:
        return _still_padded(super().__mul__(other))

    def __floordiv__(self, other: Any) -> Any:
        return _still_padded(super().__floordiv__(other))

    __radd__, __rmul__ = __add__, __mul__


def _still_padded(result: Any) -> Any:
    return PaddedSize(result) if isinstance(result, int) else result
