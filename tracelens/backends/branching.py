"""Which models can end a prompt in several ways at once: those whose attention takes a mask of who sees whom."""

from __future__ import annotations

import torch

from tracelens.backends.anatomy import ModelAnatomy
from tracelens.backends.attention import implementation
from tracelens.backends.windows import window_of
from tracelens.branching import branched
from tracelens.errors import PromptError
from tracelens.location import here
from tracelens.prompted import Prompt


def with_branches(anatomy: ModelAnatomy, prompt: Prompt, branches: int) -> Prompt:
    """The prompt with so many of the last token of each row, each as if it were alone.

    Raises :class:`~tracelens.errors.PromptError` where the model would not compute them so.
    """
    if type(branches) is not int or branches < 1:
        raise PromptError(f"branches={branches!r} is no number of copies", at=here(), instead="branches=7")
    how = implementation(anatomy.config)
    if how not in ("sdpa", "eager"):
        raise PromptError(
            f"this model computes attention by {how!r}, which takes no mask of which token sees which, and that is "
            "what keeps branches apart",
            at=here(),
            instead='model.hf.set_attn_implementation("sdpa"), or one prompt for each',
        )
    longest = max(prompt.lengths)
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
    return Prompt(branched(prompt.batch, branches, kind), prompt.tokenizer, prompt.owner)
