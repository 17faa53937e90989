"""Python's indices as a graph holds them."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from types import EllipsisType
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from tracelens.advice import instead_of_mask
from tracelens.errors import DynamicShapeError, IndexingError, ShapeError, SymbolicSizeError
from tracelens.ir import dims
from tracelens.ir.ops import WHOLE, IndexItem, Ref, Slice, TokenSelector
from tracelens.ir.text import index_text
from tracelens.ir.types import DType
from tracelens.location import here
from tracelens.operand import Operand
from tracelens.subject import spelling

if TYPE_CHECKING:
    from tracelens.values import Value


def index_of(value: Value, key: Any) -> tuple[IndexItem, ...]:
    """A Python index as the graph holds it: ellipses written out, masks and lists as index tensors."""
    keys = list(key) if isinstance(key, tuple) else [key]
    items: list[IndexItem] = []
    used = sum(_axes_used(item) for item in keys)
    if sum(isinstance(item, EllipsisType) for item in keys) > 1:
        raise IndexingError(
            "an index has one ellipsis at most", at=here(), instead="a colon for each axis: value[:, :, 0]"
        )
    for item in keys:
        if isinstance(item, EllipsisType):
            items += [WHOLE] * (value.ndim - used)
        else:
            items += _item(value, item, sum(part is not None for part in items))
    while items and items[-1] == WHOLE:
        items.pop()
    return tuple(items)


def _item(value: Value, item: Any, axis: int) -> list[IndexItem]:
    if item is None:
        return [None]
    if isinstance(item, bool | np.bool_):
        raise DynamicShapeError(
            "True and False cannot index a value", at=here(), instead="value[None] adds an axis"
        )
    if isinstance(item, slice):
        return [Slice(*(bound(part) for part in (item.start, item.stop, item.step)))]
    if isinstance(item, int | np.integer):
        return [int(item)]
    if isinstance(item, Operand) and hasattr(item, "_type") and item._is_recording():
        if item._type.dtype is DType.BOOL:
            raise DynamicShapeError(
                "indexing with a mask that is computed in the trace gives a shape that depends on the data",
                at=here(),
                instead=instead_of_mask(here(), _spelt(value), value.ndim - item.ndim),
            )
        return [Ref(value._recorder.own(item))]
    if isinstance(item, list | range):
        try:
            item = torch.tensor(list(cast("Sequence[Any]", item)))
        except (TypeError, ValueError, RuntimeError):
            raise _no_index(item) from None
    if isinstance(item, Operand):
        item = item._result()
    if isinstance(item, np.ndarray):
        item = torch.from_numpy(item)
    if isinstance(item, torch.Tensor):
        if item.dtype in (torch.bool, torch.uint8):
            _check_mask(value, item, axis)
            return [Ref(value._recorder.constant(part)) for part in item.nonzero(as_tuple=True)]
        return [Ref(value._recorder.constant(item))]
    raise _no_index(item)


def _spelt(value: Value) -> str | None:
    """The site or the part of a site that the value is, whatever the user called it; ``None`` if it was computed."""
    parts: list[str] = []
    while value._parent is not None and value._index is not None:
        if any(isinstance(item, TokenSelector) for item in value._index):
            return "site.tok[...]"
        parts.append(f"[{index_text(value._index)}]")
        value = value._parent
    return None if value._site is None else spelling(value._site) + "".join(reversed(parts))


def _no_index(item: object) -> IndexingError:
    return IndexingError(
        f"a value cannot be indexed with {item!r}",
        at=here(),
        instead="numbers, slices, None, ..., integer tensors or lists, and masks of booleans",
    )


def _check_mask(value: Value, mask: torch.Tensor, axis: int) -> None:
    """A mask has the very sizes of the axes that it stands for, and is right for prompts of these sizes alone."""
    recorder = value._recorder
    covered = value._type.shape[axis : axis + mask.ndim]
    names = sorted(frozenset[str]().union(*(dims.symbols(dim) for dim in covered)))
    if names and recorder.sizes is None:
        raise SymbolicSizeError(
            f"a mask of shape {list(mask.shape)} is made for one prompt, and this recording is for prompts of any size",
            at=here(),
            instead="model.record(prompt) to record for one size",
        )
    sizes = [dims.evaluate(dim, recorder.sizes or {}) for dim in covered]
    if sizes != list(mask.shape):
        raise ShapeError(
            f"a mask of shape {list(mask.shape)} was used where the value has axes of sizes {sizes}",
            at=here(),
            instead="a mask of the same sizes",
        )
    for name in names:
        recorder.pin(name)


def bound(part: Any) -> int | None:
    if part is None:
        return None
    if isinstance(part, Operand):
        raise DynamicShapeError(
            "a slice bound cannot be a value", at=here(), instead="torch.gather with an index value"
        )
    try:
        return operator.index(part)
    except TypeError:
        raise IndexingError(
            f"a slice bound is a whole number, not {part!r}", at=here(), instead="value[:, 0:3]"
        ) from None


def _axes_used(item: Any) -> int:
    if item is None or isinstance(item, EllipsisType):
        return 0
    if isinstance(item, torch.Tensor | np.ndarray) and str(item.dtype).rpartition(".")[2] in (
        "bool",
        "uint8",
    ):
        return item.ndim
    return 1
