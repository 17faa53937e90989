"""Says why a function cannot be used where rows differ in length, and what to write instead."""

from __future__ import annotations

from tracelens.errors import PositionAxisError

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
        instead = f"a write to all positions (site += v) or to the newest one ({newest})"
    elif of_keys:
        instead = (
            "a sum over keys (x.sum(-1)) of what is zero at padding, as pattern is; the newest query (x[..., -1, :]) "
            f"or key (x[..., -1]); {_ALONE}; or trace one prompt at a time"
        )
    else:
        instead = "address tokens with .tok[...], average with tl.masked_mean, or trace one prompt at a time"
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
