"""Which axis of a value has the tokens of one prompt, ``t.prompts[i]``, so that ``.tok`` may address them there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tracelens.errors import TracelensError
from tracelens.ir.ops import Call, Index, IndexPut, Op, PromptRow, PromptTokens, operands, results
from tracelens.ir.retype import retype
from tracelens.ir.types import TensorType

if TYPE_CHECKING:
    from tracelens.values import Value


@dataclass(frozen=True, slots=True)
class Own:
    """The axis with the ``length`` tokens of prompt ``row``."""

    row: int
    length: int
    axis: int


def own_tokens(value: Value) -> Own | None:
    """The axis of a value that has the tokens of one prompt; ``None`` where that is not certain.

    It is for a prompt's part of a site, and for what follows from it by functions that keep positions apart.
    """
    recorder = value._recorder
    number, ops, types = value._id, recorder.ops, recorder.types
    found: list[Own] = []
    for row, length in _prompts_behind(number, ops).items():
        type_ = _as_prompts(row, ops, types, number)
        if type_ is not None and len(type_.position_axes) == 1:
            found.append(Own(row, length, type_.position_axes[0]))
    return found[0] if len(found) == 1 else None


def _chosen(op: Op) -> PromptTokens | None:
    """The prompt that an operation singles out, if it does."""
    if not isinstance(op, Index) or not isinstance(op.index[0] if op.index else None, PromptRow):
        return None
    return next((item for item in op.index if isinstance(item, PromptTokens)), None)


def _prompts_behind(number: int, ops: Sequence[Op]) -> dict[int, int]:
    """The prompts that a value is made of, with their numbers of tokens."""
    wanted = {number}
    found: dict[int, int] = {}
    for op in reversed(ops):
        if not any(out in wanted for out, _ in results(op)):
            continue
        if (chosen := _chosen(op)) is not None:
            found[chosen.row] = chosen.length
        else:
            wanted.update(operands(op))
    return found


def _as_prompts(row: int, ops: Sequence[Op], types: Sequence[TensorType], number: int) -> TensorType | None:
    """The type that a value would have if the prompt's tokens were the positions of a batch of its own.

    Where they go then, they go here. What mixes them, or takes them by number, has none.
    """
    known: dict[int, TensorType | None] = {}
    for op in ops:
        made = results(op)
        chosen = _chosen(op)
        if chosen is not None and chosen.row == row:
            assert isinstance(op, Index)
            base = types[op.base].shape
            own = (base[at] if isinstance(item, PromptTokens) else 1 for at, item in enumerate(op.index))
            known[op.out] = TensorType(op.type.dtype, (*own, *op.type.shape[len(op.index) :]))
        elif any(value in known for value in operands(op)):
            known.update(dict.fromkeys((out for out, _ in made), None))
            known.update(_retyped(op, types, known))
        if made and made[-1][0] >= number:
            break
    return known.get(number)


def _retyped(
    op: Op, types: Sequence[TensorType], known: Mapping[int, TensorType | None]
) -> dict[int, TensorType]:
    if not isinstance(op, Call | Index | IndexPut):
        return {}
    own: dict[int, TensorType] = {}
    for value in operands(op):
        type_ = known.get(value, types[value])
        if type_ is None or (value not in known and type_.symbols):
            return {}  # positions of all prompts are not this prompt's
        own[value] = type_
    try:
        inferred = retype(op, own, None, {})
    except TracelensError:
        return {}
    if (
        inferred is None
        or inferred.pins
        or (inferred.mixes and any(type_.symbols for type_ in inferred.types))
    ):
        return {}  # the tokens may be other ones, or in another order
    return dict(zip((out for out, _ in results(op)), inferred.types, strict=True))
