"""What a choice of experts has to be, where it is written or made anew."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tracelens.errors import ExpertChoiceError
from tracelens.ir.sites import Site


def no_choice(index: Tensor, most: int, site: Site) -> ExpertChoiceError | None:
    """Why ``index`` [..., k] chooses no experts of ``most``, if it does not: each a number, and none twice."""
    if index.min() < 0 or index.max() >= most:
        strange = int(index.min()) if index.min() < 0 else int(index.max())
        return ExpertChoiceError(
            f"{strange} was written to {site}, where there are experts 0 to {most - 1}",
            instead="the number of an expert, for each place of each token",
        )
    ordered = index.sort(-1).values
    twice = ordered[..., 1:] == ordered[..., :-1]
    if not twice.any():
        return None
    expert = int(ordered[..., 1:][twice][0])
    return ExpertChoiceError(
        f"what was written to {site} sends a token to expert {expert} twice",
        instead="other experts for each place; layer.expert(i).force() changes only tokens that do not go to it",
    )


def masked_and_chosen(logits: Tensor, decided: Sequence[Tensor]) -> ExpertChoiceError | None:
    """Why no choice follows from written ``logits`` [..., E], if none does: one at minus infinity is never chosen.

    ``decided``: what the router makes of them, weights and numbers of experts [..., k] in any order.
    """
    index = next((part for part in decided if not part.is_floating_point()), None)
    if index is None:
        return None  # what is not chosen counts nothing
    chosen = logits.gather(-1, index)
    if not (chosen == float("-inf")).any():
        return None
    left = int((logits > float("-inf")).sum(-1).min())
    return ExpertChoiceError(
        f"{index.shape[-1]} experts have to be chosen for each token, and what was written to router_logits leaves "
        f"{left} at some token (the others are at minus infinity), or no {index.shape[-1]} that the router may combine",
        instead="fewer experts masked; or expert_weights, where 0 takes one out of a token that goes to it",
    )
