"""Saved values of prompts of different lengths: a list with one tensor for each, and what can be done with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from tracelens.errors import PerPromptError
from tracelens.ir import dims
from tracelens.ir.ops import Ref
from tracelens.ir.sites import Site
from tracelens.ir.windows import PREFILL
from tracelens.location import here
from tracelens.subject import PADS

if TYPE_CHECKING:
    from tracelens.recorder import Recorder

Parts = Sequence[torch.Tensor]


def not_one_tensor(parts: Parts, what: str) -> PerPromptError:
    """The error for using what was saved for prompts of different lengths as one tensor."""
    return PerPromptError(
        f"{what}: the prompts differ in length, so .value is a list with one tensor for each prompt ({_shapes(parts)})",
        at=here(),
        instead="h[0] is the first prompt's; [part + 1 for part in h.value]; "
        "or save what has no positions, such as h[:, -1]",
    )


def padded_again(recorder: Recorder, value: Any, parts: Parts) -> int:
    """The value [B, P, ...] that a list saved in another block is in this one, whose prompts have the same lengths.

    The real tokens are put into zeros, as an assignment to ``.tok[mask]`` would, so that no operation may take padding
    for a token. Right for prompts of these lengths only, to which the graph is pinned.
    """
    prompt, shape = recorder.prompt, value._type.shape
    if prompt is None:
        raise _refused(parts, "this block has no prompt")
    mask_site = Site("token_mask")
    if recorder.generating:  # a value of the step that is over the prompts, as one that is read there
        mask_site = mask_site.during(PREFILL)
    if shape[:2] != (dims.B, dims.P) or not all(isinstance(dim, int) for dim in shape[2:]):
        raise _refused(
            parts, f"it is {value._type}, and only values with axes [B, P, ...] can be put together again"
        )
    lengths = tuple(part.shape[1] for part in parts)
    if lengths != prompt.lengths:
        raise _refused(
            parts, f"the prompts of this block have {_listed(prompt.lengths)} tokens, not {_listed(lengths)}"
        )
    positions, rest = prompt.sizes["P"], parts[0].shape[2:]
    mask = torch.tensor([[False] * (positions - length) + [True] * length for length in lengths])
    rows, columns = prompt.mask_indices(mask)
    zeros = recorder.constant(torch.zeros(rest, dtype=parts[0].dtype))
    base = recorder.read(mask_site)
    for _ in rest:
        base = _one(recorder, "torch.unsqueeze", _ref(recorder, base), -1)
    base = _one(recorder, "torch.mul", _ref(recorder, base), _ref(recorder, zeros))
    recorder.pin(PADS)
    index = (Ref(recorder.constant(rows)), Ref(recorder.constant(columns)))
    flat = torch.cat([part[0] for part in parts])
    return recorder.put(base, index, flat, by_token=True)


def _ref(recorder: Recorder, number: int) -> Any:
    from tracelens.values import Value

    return Value(recorder, number)


def _one(recorder: Recorder, name: str, *args: object) -> int:
    return recorder.call(name, args)[0][0]


def _refused(parts: Parts, why: str) -> PerPromptError:
    return PerPromptError(
        f"what was saved for {len(parts)} prompts of different lengths is one tensor for each of them, and cannot be "
        f"used here: {why}",
        at=here(),
        instead="a block over the same prompts; or one block for each prompt, with h.value[i]",
    )


def _shapes(parts: Parts) -> str:
    shown = ", ".join(str(tuple(part.shape)) for part in parts[:3])
    return shown + ", ..." * (len(parts) > 3)


def _listed(lengths: Sequence[int]) -> str:
    shown = ", ".join(map(str, lengths[:8]))
    return shown + ", ..." * (len(lengths) > 8)
