"""Whether the parts of a lens result fit together: shapes, dtypes, orders, and a text for every token."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tracelens.errors import LensResultError
from tracelens.lens.statistics import STORED
from tracelens.location import here

if TYPE_CHECKING:
    from tracelens.lens.result import LensResult


def check(result: LensResult) -> None:
    """Raises where the parts do not fit together."""
    _names(result)
    C, L, T = len(result.components), len(result.layers), len(result.positions)
    _tensor("token_ids", result.token_ids, (T,), "T", torch.int64)
    _tensor("next_ids", result.next_ids, (T,), "T", torch.int64)
    k = result.top_ids.shape[-1] if isinstance(result.top_ids, Tensor) and result.top_ids.ndim else 0
    if k < 1:
        raise _wrong(
            "top_ids has no last axis of the likeliest tokens", "at least the likeliest one: top_k=1"
        )
    _tensor("top_ids", result.top_ids, (C, L, T, k), "C, L, T, k", torch.int64)
    _tensor("top_log_probs", result.top_log_probs, (C, L, T, k), "C, L, T, k", torch.float32)
    for name, tensor in result.statistics.items():
        if name not in STORED:
            raise _wrong(f"{name!r} is not a statistic of a lens", f"one of {', '.join(STORED)}")
        dtype = torch.int64 if name == "rank" else torch.float32
        _tensor(f"statistics[{name!r}]", tensor, (C, L, T), "C, L, T", dtype)
    _tracked(result, (C, L, T, len(result.tracked)))
    _texts(result)


def _names(result: LensResult) -> None:
    for what, values in (
        ("components", result.components),
        ("layers", result.layers),
        ("positions", result.positions),
    ):
        kind = str if what == "components" else int
        if not isinstance(values, tuple) or not values or any(type(value) is not kind for value in values):
            raise _wrong(f"{what} is {_short(values)}", f"a tuple of at least one {kind.__name__}")
        if len(set(values)) != len(values):
            raise _wrong(f"{what} names something twice: {_short(values)}", "each of them once")
    for what, numbers in (("layers", result.layers), ("positions", result.positions)):
        if any(later <= earlier for earlier, later in pairwise(numbers)) or numbers[0] < 0:
            raise _wrong(
                f"{what} are not counted upwards from 0: {_short(numbers)}", "absolute numbers in order"
            )
    if type(result.n_prompt) is not int or result.n_prompt < 1:
        raise _wrong(f"n_prompt is {result.n_prompt!r}", "the number of tokens of the prompt")


def _tensor(name: str, tensor: Any, shape: tuple[int, ...], axes: str, dtype: torch.dtype) -> None:
    right = f"a tensor of {str(dtype).removeprefix('torch.')}, [{axes}] = {list(shape)}"
    if not isinstance(tensor, Tensor):
        raise _wrong(f"{name} is {_short(tensor)}", right)
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise _wrong(
            f"{name} is {list(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}, and does not fit to "
            f"{shape[0]} {'positions' if axes == 'T' else 'components'} and what is beside it",
            right,
        )
    if tensor.requires_grad or tensor.device.type != "cpu":
        raise _wrong(
            f"{name} is on {tensor.device}"
            + (" and part of a graph of autograd" if tensor.requires_grad else ""),
            "a detached tensor on the CPU",
        )


def _tracked(result: LensResult, shape: tuple[int, ...]) -> None:
    for name, tensor, dtype in (
        ("tracked_log_probs", result.tracked_log_probs, torch.float32),
        ("tracked_ranks", result.tracked_ranks, torch.int64),
    ):
        if not result.tracked and tensor is None:
            continue
        _tensor(name, tensor, shape, "C, L, T, n", dtype)


def _texts(result: LensResult) -> None:
    ids = torch.cat([result.token_ids, result.next_ids[result.next_ids >= 0], result.top_ids.reshape(-1)])
    missing = [token for token in ids.unique().tolist() if not result.text_of.get(token)]
    if missing:
        raise _wrong(
            f"text_of has no text for the token{'s' * (len(missing) > 1)} {_short(missing)}",
            "a text for every token that occurs: token_texts(ids, tokenizer)",
        )
    if bool((result.next_ids < -1).any()) or bool((result.token_ids < 0).any()):
        raise _wrong(
            "there are negative token ids", "ids of tokens; -1 in next_ids alone, where none is known"
        )


def _short(thing: object) -> str:
    shown = repr(thing)
    return shown if len(shown) <= 80 else shown[:77] + "..."


def _wrong(problem: str, instead: str) -> LensResultError:
    return LensResultError(
        f"the parts of a lens result do not fit together: {problem}", at=here(), instead=instead
    )
