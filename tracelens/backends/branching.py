"""Which models can end a prompt in several ways at once: those whose attention takes a mask of who sees whom."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import cast

import torch

from tracelens.backends.anatomy import ModelAnatomy
from tracelens.backends.attention import implementation
from tracelens.backends.windows import window_of
from tracelens.branching import branched, ending
from tracelens.errors import PromptError, PromptTooLongError
from tracelens.location import here
from tracelens.prompted import Prompt

Branches = int | Sequence[Sequence[int]]
"""How many copies of the last token, or for each row the tokens that may come next."""


def with_branches(anatomy: ModelAnatomy, prompt: Prompt, branches: Branches) -> Prompt:
    """The prompt with so many of the last token of each row, or with tokens that may come next, each as if alone.

    Raises :class:`~tracelens.errors.PromptError` where the model would not compute them so.
    """
    ends = None if isinstance(branches, int) else _ends(anatomy, prompt, branches)
    if ends is None and (type(branches) is not int or branches < 1):
        raise PromptError(f"branches={branches!r} is no number of copies", at=here(), instead="branches=7")
    how = implementation(anatomy.config)
    if how not in ("sdpa", "eager"):
        raise PromptError(
            f"this model computes attention by {how!r}, which takes no mask of which token sees which, and that is "
            "what keeps branches apart",
            at=here(),
            instead='model.hf.set_attn_implementation("sdpa"), or one prompt for each',
        )
    takes = inspect.signature(type(anatomy.model).forward).parameters
    if getattr(anatomy.config, "alibi", False) or "position_ids" not in takes:
        raise PromptError(
            "this model's attention goes by the distance of two tokens in the row, and branches stand at one place",
            at=here(),
            instead="one prompt for each branch",
        )
    others = set(getattr(anatomy.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if others:
        raise PromptError(
            f"this model has layers with {' and '.join(sorted(others))}, where no mask says which token sees which",
            at=here(),
            instead="one prompt for each branch",
        )
    longest = max(prompt.lengths) + (ends is not None)
    windows = {window_of(anatomy.config, layer) for layer in range(anatomy.n_layers)} - {None}
    shortest = min((window for window in windows if window is not None), default=longest)
    if longest > shortest:
        raise PromptError(
            f"a layer of this model looks back over a sliding window of {shortest}, the longest prompt has {longest} "
            "tokens, and one mask for all layers cannot say that",
            at=here(),
            instead="shorter prompts, or one prompt for each branch",
        )
    kind = torch.bool if how == "sdpa" else anatomy.dtype
    batch = prompt.batch
    made = branched(batch, cast("int", branches), kind) if ends is None else ending(batch, ends, kind)
    return Prompt(made, prompt.tokenizer, prompt.owner)


def _ends(anatomy: ModelAnatomy, prompt: Prompt, given: Sequence[Sequence[int]]) -> torch.Tensor:
    """The tokens that may come next, [rows, ways]."""
    rows = len(prompt.lengths)
    lists = [list(row) for row in given]
    if (
        len(lists) != rows
        or len({len(row) for row in lists}) != 1
        or not lists[0]
        or not all(type(token) is int and token >= 0 for row in lists for token in row)
    ):
        raise PromptError(
            f"branches={given!r} are not equally many tokens for each of {rows} rows",
            at=here(),
            instead="branches=7, or the ids of tokens that may come next: branches=[[319, 347]]",
        )
    found = torch.tensor(lists)
    size = anatomy.vocabulary
    if size is not None and int(found.max()) >= size:
        raise PromptError(
            f"branches= has the id {int(found.max())}, and the vocabulary has {size}",
            at=here(),
            instead="its ids",
        )
    limit = anatomy.max_positions
    if limit is not None and max(prompt.lengths) + 1 > limit:
        raise PromptTooLongError(
            f"a row has {max(prompt.lengths)} tokens, and one that comes next is beyond the model's {limit} positions",
            at=here(),
            instead="a shorter prompt",
        )
    return found
