"""Reads and writes the tokens that a selector chose, row by row.

``batch_axis`` is ``None`` where an axis is of the tokens of one prompt alone.
"""

from __future__ import annotations

from typing import Any

import torch

from tracelens.backends.transfer import moved
from tracelens.errors import WriteTargetError
from tracelens.selection import Selection


def take_tokens(
    tensor: torch.Tensor, selection: Selection, batch_axis: int | None, axis: int
) -> torch.Tensor:
    """The selected positions of ``axis``, where the axis was (or without it, for one token a row)."""
    alike = _alike(tensor, selection, batch_axis)
    if alike is not None:
        return tensor[(slice(None),) * axis + (alike,)]
    front, back = _in_front(tensor, batch_axis, axis)
    taken = front[moved(selection.rows, tensor.device), moved(selection.cols, tensor.device)]
    if selection.drops:
        # [B, ...]: the batch axis returns to where it was, less one if the position axis stood before it.
        assert batch_axis is not None
        return taken.movedim(0, batch_axis - (axis < batch_axis))
    return taken.movedim((0, 1), back)


def put_tokens(
    tensor: torch.Tensor, selection: Selection, batch_axis: int | None, axis: int, value: Any
) -> None:
    """Assigns a number, or a tensor of the same dtype, to the selected positions of ``axis``, in place."""
    if selection.repeats:
        raise WriteTargetError(
            "a token is selected twice in a row, so that assigning to it has no one meaning",
            instead="each token once",
        )
    alike = _alike(tensor, selection, batch_axis)
    if alike is not None:
        tensor[(slice(None),) * axis + (alike,)] = value
        return
    front, back = _in_front(tensor, batch_axis, axis)
    rows, columns = moved(selection.rows, tensor.device), moved(selection.cols, tensor.device)
    if isinstance(value, torch.Tensor):
        shape = list(tensor.shape)
        if selection.drops:
            del shape[axis]
            assert batch_axis is not None
            value = value.expand(shape).movedim(batch_axis - (axis < batch_axis), 0)
        else:
            shape[axis] = columns.shape[1]
            value = value.expand(shape).movedim(back, (0, 1))
    front[rows, columns] = value


def _alike(tensor: torch.Tensor, selection: Selection, batch_axis: int | None) -> Any:
    """The index of the position axis alone, where all rows agree on one; a prompt of its own has no other rows."""
    uniform = selection.uniform
    if uniform is None and batch_axis is None and len(selection.columns) == 1:
        return moved(selection.cols[0], tensor.device)
    return uniform


def _in_front(
    tensor: torch.Tensor, batch_axis: int | None, axis: int
) -> tuple[torch.Tensor, tuple[int, int]]:
    if batch_axis is None:
        raise ValueError("rows that select different positions need a batch axis")
    return tensor.movedim((batch_axis, axis), (0, 1)), (batch_axis, axis)
