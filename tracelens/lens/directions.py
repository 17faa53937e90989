"""Tokens as a user names them, and the combination of logits that they stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from tracelens.errors import OptionError
from tracelens.operand import Operand
from tracelens.spelling import printable
from tracelens.token_texts import one_token, token_texts

if TYPE_CHECKING:
    from tracelens.model import Model

_TOKEN = '" Paris" (a text that is one token, with its space), or an id'


@dataclass(frozen=True, eq=False)
class Directions:
    """For each prompt a token, and those that it is compared with.

    ``ids`` [n]: all tokens. ``coefficients`` [prompts or 1, n] float64: what their logits are multiplied by.
    """

    tokens: tuple[int, ...]
    against: tuple[tuple[int, ...], ...]
    ids: Tensor
    coefficients: Tensor
    spelt: Mapping[int, str]

    def of(self, row: int) -> tuple[int, tuple[int, ...]]:
        """The token of one prompt, and those that it is compared with."""
        return self.tokens[row], self.against[row]


def directions_of(model: Model, token: Any, against: Any, prompts: int) -> Directions:
    """What ``token`` and ``against`` mean for each of the prompts; :class:`OptionError` for what is no token."""
    tokens = _each(model, token, prompts)
    others = _others(model, against, prompts)
    for one, compared in zip(tokens, others, strict=True):
        if one in compared:
            raise OptionError(
                f"token {one} is compared with itself, and a logit has no difference to itself",
                instead="against= with other tokens than token=",
            )
    ids = sorted({*tokens, *(other for compared in others for other in compared)})
    # The same for all prompts where it is the same, so that it is no matter of how many there are.
    alike = len(set(zip(tokens, others, strict=True))) == 1
    coefficients = torch.zeros(1 if alike else prompts, len(ids), dtype=torch.float64)
    for row, own in enumerate(coefficients):
        own[ids.index(tokens[row])] += 1
        for other in others[row]:
            own[ids.index(other)] -= 1 / len(others[row])
    spelt = {id_: _spelt(model, id_) for id_ in ids}
    return Directions(tokens, others, torch.tensor(ids), coefficients, spelt)


def token_id_of(model: Model, token: Any) -> int:
    """The id of a token that was named by a text or by its id; a named error for anything else."""
    if isinstance(token, str):
        return one_token(token, model.tokenizer)
    if isinstance(token, np.integer) or (isinstance(token, Tensor | np.ndarray) and token.ndim == 0):
        token = token.item()
    if isinstance(token, bool) or not isinstance(token, int):
        raise OptionError(f"{token!r} is no token", instead=_TOKEN)
    if not 0 <= token < model.anatomy.vocabulary:
        raise OptionError(
            f"there is no token {token}: the model has {model.anatomy.vocabulary}, 0 to {model.anatomy.vocabulary - 1}",
            instead=_TOKEN,
        )
    return token


def _list(value: Any) -> list[Any] | None:
    """The members of what holds several tokens; ``None`` for a single one."""
    if isinstance(value, Operand) and not value._is_recording():
        value = value._result()
    if isinstance(value, Tensor | np.ndarray) and value.ndim:
        value = value.tolist()
    return list(cast("Sequence[Any]", value)) if isinstance(value, list | tuple | range) else None


def _each(model: Model, token: Any, prompts: int) -> tuple[int, ...]:
    listed = _list(token)
    if listed is None:
        return (token_id_of(model, token),) * prompts
    if len(listed) != prompts:
        raise OptionError(
            f"{len(listed)} tokens were given for {prompts} prompt{'s' if prompts > 1 else ''}",
            instead="token= with one token, or a list with one for each prompt; against= takes several, as their mean",
        )
    return tuple(token_id_of(model, one) for one in listed)


def _others(model: Model, against: Any, prompts: int) -> tuple[tuple[int, ...], ...]:
    if against is None:
        return ((),) * prompts
    listed = _list(against)
    if listed is None:
        return ((token_id_of(model, against),),) * prompts
    own = [_list(one) for one in listed]
    if any(one is not None for one in own):
        if len(own) != prompts or None in own:
            raise OptionError(
                f"against= has {len(own)} lists or tokens for {prompts} prompt{'s' if prompts > 1 else ''}",
                instead="a list of tokens, for every prompt their mean; or for each prompt a list of its own",
            )
        return tuple(_mean_of(model, one or []) for one in own)
    return (_mean_of(model, listed),) * prompts


def _mean_of(model: Model, listed: list[Any]) -> tuple[int, ...]:
    found = tuple(token_id_of(model, one) for one in listed)
    if not found or len(set(found)) != len(found):
        raise OptionError(
            "against= names no token" if not found else "against= names a token twice",
            instead="each token once, of whose logits the mean is taken; or nothing, for the logit of token= itself",
        )
    return found


def _spelt(model: Model, token: int) -> str:
    """A token for people to read, in quotes, because its space matters."""
    text = token_texts([token], model.tokenizer)[token]
    return text if model.tokenizer is None else f'"{printable(text)}"'
