"""Indexing and writing an axis of which every rank has a stretch, against plain indexing of the whole tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tracelens.ir.layout import Layout, Partial, Replicate, Shard, owned
from tracelens.ir.ops import WHOLE, Call, Index, IndexItem, IndexPut, Ref, Slice
from tracelens.ir.types import DType, TensorType
from tracelens.own_part import own_picks
from tracelens.sharding import AxisIndex, axis_index, own_part
from tracelens.simulate import join, split


@st.composite
def indexed(draw: Any) -> tuple[torch.Tensor, int, int, list[Any]]:
    """A tensor of distinct numbers, the axis that is in parts, over how many ranks, and an index into it."""
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    axis = draw(st.integers(0, len(shape) - 1))
    shape[axis] = draw(st.integers(1, 9))
    dtype = draw(st.sampled_from([torch.float32, torch.int64]))
    base = torch.arange(1, torch.Size(shape).numel() + 1).reshape(shape).to(dtype)
    index: list[Any] = []
    for at in range(draw(st.integers(axis, len(shape) - 1)) + 1):
        index += [None] * draw(st.sampled_from([0, 0, 0, 1]))
        index.append(draw(entries(shape[at], tensors=at == axis)))
    index += [None] * draw(st.sampled_from([0, 0, 1]))
    return base, axis, draw(st.sampled_from([2, 3, 4])), index


@st.composite
def entries(draw: Any, size: int, *, tensors: bool) -> Any:
    kind = draw(st.sampled_from(["int", "slice", "slice", "whole", *(["tensor"] * 2 if tensors else [])]))
    number = st.integers(-size, size - 1)
    if kind == "int":
        return draw(number)
    if kind == "whole":
        return slice(None)
    if kind == "slice":
        bound = st.none() | st.integers(-size - 2, size + 2)
        return slice(draw(bound), draw(bound), draw(st.sampled_from([None, 1, 2, 3, 7])))
    return torch.tensor(draw(st.lists(number, min_size=1, max_size=7)))


def items(index: list[Any], types: dict[int, TensorType]) -> tuple[IndexItem, ...]:
    """The index as a graph holds it; its tensors are values, whose types are added."""
    found: list[IndexItem] = []
    for entry in index:
        if isinstance(entry, slice):
            found.append(Slice(entry.start, entry.stop, entry.step))
        elif isinstance(entry, torch.Tensor):
            number = len(types)
            types[number] = TensorType(DType.INT64, tuple(entry.shape))
            found.append(Ref(number))
        else:
            found.append(entry)
    return tuple(found)


def _typed(tensor: torch.Tensor) -> TensorType:
    return TensorType(DType.FLOAT32 if tensor.dtype is torch.float32 else DType.INT64, tuple(tensor.shape))


def found_for(base: torch.Tensor, axis: int, index: list[Any]) -> tuple[AxisIndex, dict[int, TensorType]]:
    types = {0: _typed(base)}
    found = axis_index(items(index, types), types[0], axis, types)
    assume(found is not None)
    assert found is not None
    return found, types


@settings(max_examples=400)
@given(indexed())
def test_what_ranks_take_adds_up_to_what_is_indexed(case):
    base, axis, ranks, index = case
    found, types = found_for(base, axis, index)
    wanted = base[tuple(index)]
    parts = split(base, Shard(axis), ranks)
    op = Index(9, _typed(wanted), 0, items(index, {0: types[0]}))
    if found.item == WHOLE:
        shares = [part[tuple(index)] for part in parts]
        layout: Layout = Shard(found.there)
    else:
        own = [own_part(op, {0: Shard(axis)}, types, ranks, rank) for rank in range(ranks)]
        shares = [one.take(part, tuple(index)) for one, part in zip(own, parts, strict=True) if one]
        layout = Partial()
        assert [share.shape for share in shares] == [wanted.shape] * ranks
    assert torch.equal(join(shares, layout), wanted)
    for share, part in zip(shares, parts, strict=True):
        assert share.dtype is part.dtype


@settings(max_examples=400)
@given(indexed(), st.data())
def test_what_ranks_put_is_what_is_written(case, data):
    base, axis, ranks, index = case
    found, types = found_for(base, axis, index)
    there = base[tuple(index)].shape
    # A number, or a tensor that is broadcast: it may lack leading axes, or be one wide in others.
    shape = [size if data.draw(st.booleans()) else 1 for size in there]
    shape = shape[data.draw(st.integers(0, len(shape))) :]
    value: Any = -torch.arange(1, torch.Size(shape).numel() + 1).reshape(shape).to(base.dtype)
    entry = index[found.entry]
    if isinstance(entry, torch.Tensor) and len(set((entry % base.shape[axis]).tolist())) < len(entry):
        # Of several values for one element torch does not say which one stays.
        value = value.flatten()[0] if value.numel() else value.new_zeros(())
    if data.draw(st.sampled_from([False, False, True])):
        value = -7
    wanted = base.clone()
    wanted[tuple(index)] = value
    parts = split(base, Shard(axis), ranks)
    before = base.clone()
    op = IndexPut(9, types[0], 0, items(index, {0: types[0]}), 0)
    results: list[torch.Tensor] = []
    for rank, part in enumerate(parts):
        one = own_part(op, {0: Shard(axis)}, types, ranks, rank)
        if one is None:
            result, given_value = part.clone(), value
            own = found.there - (len(there) - value.ndim) if isinstance(value, torch.Tensor) else -1
            if own >= 0 and value.shape[own] != 1:
                given_value = split(value, Shard(own), ranks)[rank]
            result[tuple(index)] = given_value
        else:
            result = one.put(part, tuple(index), value)
        low, high = owned(base.shape[axis], ranks, rank)
        assert result.shape[axis] == high - low
        results.append(result)
    assert torch.equal(torch.cat(results, axis), wanted)
    assert torch.equal(base, before), "the stretch that the rank had has been changed"


@pytest.mark.parametrize(
    "index",
    [
        (torch.tensor([0, 1]), slice(None), torch.tensor([0, 1])),  # two tensors move axes together
        (0, torch.tensor([1, 2])),  # and so does a tensor beside a number
        (slice(None), torch.tensor([True, False, True, False])),
        (slice(None), torch.tensor([[0, 1], [2, 3]])),
    ],
    ids=["tensors", "number", "mask", "grid"],
)
def test_what_moves_axes_is_left_to_whole_values(index: tuple[Any, ...]) -> None:
    base = torch.zeros(2, 4, 2)
    types = {0: _typed(base)}
    graph_index = items(list(index), types)
    for entry, item in zip(index, graph_index, strict=True):
        if isinstance(item, Ref) and entry.dtype is torch.bool:
            types[item.id] = TensorType(DType.BOOL, tuple(entry.shape))
    assert axis_index(graph_index, types[0], 1, types) is None


# --- functions that pick by number -----------------------------------------------------------------------------------


@st.composite
def picks(draw: st.DrawFn) -> tuple[str, torch.Tensor, int, int, torch.Tensor]:
    """A function, what it picks from, along which axis, on how many ranks, and the numbers."""
    function = draw(st.sampled_from(["torch.gather", "torch.take_along_dim"]))
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    axis = draw(st.integers(0, len(shape) - 1))
    shape[axis] = draw(st.integers(1, 9))
    base = torch.arange(1, torch.Size(shape).numel() + 1).reshape(shape)
    if draw(st.booleans()):
        base = base.float()
    # gather may take fewer of other axes, take_along_dim one for all of them.
    smaller = st.integers(1, 5) if function == "torch.gather" else st.just(1)
    other = [min(size, draw(smaller)) if draw(st.booleans()) else size for size in shape]
    other[axis] = draw(st.integers(0, 4))
    index = torch.randint(
        shape[axis], other, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))
    )
    return function, base, axis, draw(st.sampled_from([2, 3, 4])), index


@settings(max_examples=300)
@given(picks(), st.booleans())
def test_what_ranks_pick_adds_up_to_what_is_picked(case, negative):
    function, base, axis, ranks, index = case
    plain = torch.gather if function == "torch.gather" else torch.take_along_dim
    wanted = plain(base, dim=axis, **{"index" if plain is torch.gather else "indices": index})
    types = {0: _typed(base), 1: _typed(index)}
    dim = axis - base.ndim if negative else axis
    last = (Ref(1), dim) if plain is torch.take_along_dim else (dim, Ref(1))
    op = Call((9,), (_typed(wanted),), function, (Ref(0), *last))
    parts = split(base, Shard(axis), ranks)
    own = [own_picks(op, {0: Shard(axis), 1: Replicate()}, types, ranks, rank) for rank in range(ranks)]
    shares = [one(part, index) for one, part in zip(own, parts, strict=True) if one]
    assert [share.shape for share in shares] == [wanted.shape] * ranks
    assert torch.equal(join(shares, Partial()), wanted)
    if index.numel():
        wrong = index.clone()
        wrong.view(-1)[-1] = base.shape[axis]
        for one, part in zip(own, parts, strict=True):
            assert one is not None
            with pytest.raises(IndexError, match=f"index {base.shape[axis]} is out of bounds"):
                one(part, wrong)


def test_other_picks_need_the_whole():
    base = TensorType(DType.FLOAT32, (4, 6))
    types = {0: base, 1: TensorType(DType.INT64, (4, 6)), 2: TensorType(DType.BOOL, (4, 6))}
    gather = Call((9,), (base,), "torch.gather", (Ref(0), 1, Ref(1)))
    whole = Replicate()
    assert own_picks(gather, {0: Shard(1), 1: whole}, types, 2, 0) is not None
    assert own_picks(gather, {0: Shard(0), 1: whole}, types, 2, 0) is None
    assert own_picks(gather, {0: Shard(1), 1: Shard(1)}, types, 2, 0) is None
    assert own_picks(gather, {0: whole, 1: whole}, types, 2, 0) is None
    booleans = Call((9,), (types[2],), "torch.gather", (Ref(2), 1, Ref(1)))
    assert own_picks(booleans, {2: Shard(1), 1: whole}, types, 2, 0) is None
    flat = Call((9,), (base,), "torch.take_along_dim", (Ref(0), Ref(1)))
    assert own_picks(flat, {0: Shard(1), 1: whole}, types, 2, 0) is None


@pytest.mark.parametrize("number", [-7, 6])
def test_a_number_that_no_rank_has_is_an_error_on_all(number):
    base = torch.arange(12.0).reshape(2, 6)
    index = (slice(None), torch.tensor([1, number]))
    types = {0: _typed(base)}
    op = Index(9, _typed(base[:, :2]), 0, items(list(index), types))
    for rank, part in enumerate(split(base, Shard(1), 3)):
        own = own_part(op, {0: Shard(1)}, types, 3, rank)
        assert own is not None
        with pytest.raises(IndexError, match=f"index {number} is out of bounds for an axis of size 6"):
            own.take(part, index)
        with pytest.raises(IndexError, match=f"index {number} is out of bounds"):
            own.put(part, index, 0.0)
