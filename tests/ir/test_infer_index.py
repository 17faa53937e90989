"""Indexing against torch: basic, integer tensors beside each other and apart, new axes, and real tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tracelens.errors import DtypeError, DynamicShapeError, ShapeError, SymbolicSizeError, TracelensError
from tracelens.ir import dims
from tracelens.ir.dims import Dim
from tracelens.ir.infer import infer_index, infer_index_put, torch_dtype
from tracelens.ir.ops import Slice, Special, TokenAt, TokenList, TokenSlice, TokenText
from tracelens.ir.rules_index import AbstractIndex
from tracelens.ir.types import DType, TensorType, parse_type

B, P, S = dims.B, dims.P, dims.S
WHOLE = Slice()
LAST = Slice(-1, None, None)

one_dim: st.SearchStrategy[Dim] = st.sampled_from([B, P, 1, 2, 3, 5])
bound = st.one_of(st.none(), st.integers(-4, 4))
slices = st.builds(Slice, bound, bound, st.sampled_from([None, None, 1, 2, 3]))
index_tensors = st.builds(
    TensorType,
    st.sampled_from([DType.INT64, DType.INT32]),
    st.sampled_from([(), (1,), (2,), (2,), (3, 1), (1, 2), (3, 2), (5,)]),
)
items = st.one_of(st.integers(-3, 3), slices, slices, st.none(), index_tensors, index_tensors)
indices = st.lists(items, max_size=5).map(tuple)
bases = st.builds(TensorType, st.just(DType.FLOAT32), st.lists(one_dim, min_size=1, max_size=4).map(tuple))
all_sizes = st.fixed_dictionaries({"B": st.integers(1, 3), "P": st.integers(1, 5)})


def key(index: AbstractIndex) -> tuple[object, ...]:
    def one(item: object) -> object:
        if isinstance(item, Slice):
            return slice(item.start, item.stop, item.step)
        if isinstance(item, TensorType):
            return torch.zeros(item.sizes({}), dtype=torch_dtype(item.dtype))
        return item

    return tuple(one(item) for item in index)


def torch_shape(base: TensorType, index: AbstractIndex, sizes: dict[str, int]) -> tuple[int, ...] | None:
    try:
        return tuple(torch.zeros(base.sizes(sizes))[key(index)].shape)
    except (IndexError, RuntimeError, TypeError, ValueError):
        return None


@settings(max_examples=800, deadline=None)
@given(bases, indices, all_sizes)
def test_index_agrees_with_torch(base: TensorType, index: AbstractIndex, sizes: dict[str, int]) -> None:
    truth = torch_shape(base, index, sizes)
    try:
        inferred = infer_index(base, index, sizes)
    except ShapeError:
        # A zero-size axis has no element 0, whatever index tensor asks for it; torch may not look.
        assert truth is None
        return
    if truth is None:
        # The numbers in an index tensor are not known here: an axis without elements is torch's to refuse.
        assert any(isinstance(item, TensorType) for item in index)
        assert 0 in base.sizes(sizes) or any(isinstance(item, Slice) for item in index)
        return
    (result,) = inferred.types
    assert result.sizes(sizes) == truth
    for other in ({"B": 2, "P": 4}, {"B": 3, "P": 7}):
        other = {**other, **{symbol: sizes[symbol] for symbol in inferred.pins}}
        elsewhere = torch_shape(base, index, other)
        if elsewhere is not None:
            assert result.sizes(other) == elsewhere
    assert infer_index(base, index, None) == inferred


@settings(max_examples=800, deadline=None)
@given(bases, indices, st.data(), all_sizes)
def test_index_put_agrees_with_torch(
    base: TensorType, index: AbstractIndex, data: st.DataObject, sizes: dict[str, int]
) -> None:
    shape = torch_shape(base, index, sizes)
    if shape is None or 0 in shape:
        return
    value_shape: list[Dim] = []
    for number in shape:
        like = {dims.evaluate(dim, sizes): dim for dim in base.shape}.get(number, number)
        value_shape.append(data.draw(st.sampled_from([number, like, like, 1, 4])))
    value_shape = value_shape[data.draw(st.integers(0, len(value_shape))) :]
    value_shape = [1] * data.draw(st.sampled_from([0, 0, 1, 2])) + value_shape
    value = TensorType(DType.FLOAT32, tuple(value_shape))
    target = torch.zeros(base.sizes(sizes))
    try:
        target[key(index)] = torch.ones(value.sizes(sizes))
        fits = True
    except (IndexError, RuntimeError, ValueError):
        fits = False
    try:
        inferred = infer_index_put(base, index, value, sizes)
    except ShapeError:
        assert not fits
        return
    assert fits
    assert inferred.types == (base,)


BASE = parse_type("f32[B,P,576]")


@pytest.mark.parametrize(
    ("base", "index", "result", "mixes"),
    [
        ("f32[B,P,576]", (), "f32[B,P,576]", False),
        ("f32[B,P,576]", (WHOLE, -1), "f32[B,576]", False),
        ("f32[B,P,576]", (WHOLE, LAST), "f32[B,1,576]", False),
        ("f32[B,P,576]", (WHOLE, Slice(0, None, 1)), "f32[B,P,576]", False),
        ("f32[B,P,576]", (WHOLE, 0), "f32[B,576]", True),
        ("f32[B,P,576]", (WHOLE, Slice(1, None)), "f32[B,P-1,576]", True),
        ("f32[B,P,576]", (WHOLE, Slice(None, -1)), "f32[B,P-1,576]", True),
        ("f32[B,P,576]", (WHOLE, Slice(None, None, 2)), "f32[B,len(P)[::2],576]", True),
        ("f32[B,P,576]", (0,), "f32[P,576]", True),
        ("f32[B,P,576]", (Slice(0, 1),), "f32[1,P,576]", True),
        ("f32[B,P,576]", (0, -1), "f32[576]", False),
        ("f32[B,576]", (0,), "f32[576]", False),
        ("f32[B,P,576]", (WHOLE, WHOLE, 3), "f32[B,P]", False),
        ("f32[B,P,576]", (WHOLE, WHOLE, Slice(None, 70)), "f32[B,P,70]", False),
        ("f32[B,P,576]", (None,), "f32[1,B,P,576]", False),
        ("f32[B,P,576]", (WHOLE, WHOLE, parse_type("i64[5]")), "f32[B,P,5]", False),
        ("f32[B,P,576]", (WHOLE, parse_type("i64[5]")), "f32[B,5,576]", True),
        ("f32[B,P,576]", (parse_type("i64[5]"),), "f32[5,P,576]", True),
        ("f32[B,P,9,64]", (WHOLE, parse_type("i64[5]"), WHOLE, parse_type("i64[5]")), "f32[5,B,9]", True),
        ("f32[B,9,P,S]", (WHOLE, WHOLE, -1), "f32[B,9,S]", False),
        ("f32[B,9,P,S]", (WHOLE, WHOLE, WHOLE, -1), "f32[B,9,P]", False),
        ("f32[B,9,P,S]", (WHOLE, WHOLE, WHOLE, 0), "f32[B,9,P]", True),
        ("f32[49152,576]", (parse_type("i64[B,P]"),), "f32[B,P,576]", False),
        ("f32[B,P,576]", (WHOLE, TokenAt(3)), "f32[B,576]", False),
        ("f32[B,P,576]", (WHOLE, TokenSlice(1, 3, None, 2)), "f32[B,2,576]", False),
        ("f32[B,P,576]", (WHOLE, TokenList((0, 3, -1))), "f32[B,3,576]", False),
        ("f32[B,P,576]", (WHOLE, TokenText("Paris", None, 2)), "f32[B,2,576]", False),
        ("f32[B,P,576]", (WHOLE, TokenText("Paris", -1, 1)), "f32[B,576]", False),
        ("f32[B,9,P,S]", (WHOLE, 3, TokenAt(0)), "f32[B,S]", False),
        ("f32[B,P,576]", (WHOLE, TokenAt(0), Slice(0, 70)), "f32[B,70]", False),
    ],
)
def test_index(base: str, index: AbstractIndex, result: str, mixes: bool) -> None:
    for sizes in (None, {"B": 2, "P": 7, "S": 7}):
        inferred = infer_index(parse_type(base), index, sizes)
        assert inferred.types == (parse_type(result),)
        assert inferred.mixes is mixes
        assert inferred.pins == frozenset()
        assert inferred.fields is None


@pytest.mark.parametrize(
    ("base", "index", "error"),
    [
        (BASE, (WHOLE, WHOLE, 576), ShapeError),
        (BASE, (WHOLE, WHOLE, -577), ShapeError),
        (BASE, (WHOLE, 9), ShapeError),
        (BASE, (0, 0, 0, 0), ShapeError),
        (BASE, (WHOLE, Slice(None, None, -1)), ShapeError),
        (BASE, (parse_type("bool[B,P]"),), DynamicShapeError),
        (BASE, (WHOLE, WHOLE, parse_type("u8[576]")), DynamicShapeError),
        (BASE, (WHOLE, WHOLE, parse_type("f32[5]")), DtypeError),
        (BASE, (parse_type("i64[2]"), parse_type("i64[3]")), ShapeError),
        (BASE, (TokenAt(0),), ShapeError),
        (BASE, (WHOLE, WHOLE, TokenAt(0)), ShapeError),
        (parse_type("f32[P,576]"), (TokenAt(0),), ShapeError),
        (BASE, (WHOLE, TokenSlice(0, 3, None, None)), SymbolicSizeError),
        (BASE, (WHOLE, TokenText("Paris", None, None)), SymbolicSizeError),
    ],
)
def test_wrong_indices(base: TensorType, index: AbstractIndex, error: type[TracelensError]) -> None:
    with pytest.raises(error):
        infer_index(base, index, {"B": 2, "P": 7})


def test_an_index_that_only_some_sizes_have_is_left_to_the_run() -> None:
    assert infer_index(BASE, (WHOLE, 9), None).types == (parse_type("f32[B,576]"),)


@pytest.mark.parametrize(
    ("index", "value", "pins", "mixes"),
    [
        ((), 0.0, "", False),
        ((), Special.NEGATIVE_ZERO, "", False),
        ((), True, "", False),
        ((WHOLE, -1), 1, "", False),
        ((WHOLE, -1), parse_type("f32[576]"), "", False),
        ((WHOLE, -1), parse_type("f64[B,576]"), "", False),
        ((WHOLE, -1), parse_type("bf16[1,1,1,576]"), "", False),
        ((WHOLE, -1), parse_type("f32[2,576]"), "B", False),
        ((), parse_type("f32[7,576]"), "P", True),
        ((), parse_type("f32[B,P,1]"), "", False),
        ((WHOLE, 0), 0, "", True),
        ((WHOLE, parse_type("i64[3]")), 0, "", True),
        ((0,), 0, "", False),
        ((0,), parse_type("f32[576]"), "", False),
        ((0,), parse_type("f32[P,576]"), "", True),
        ((WHOLE, TokenAt(1)), parse_type("f32[576]"), "", False),
        ((WHOLE, TokenList((1, 2))), parse_type("f32[B,2,576]"), "", False),
    ],
)
def test_index_put(index: AbstractIndex, value: object, pins: str, mixes: bool) -> None:
    inferred = infer_index_put(BASE, index, value, {"B": 2, "P": 7})
    assert inferred.types == (BASE,)
    assert inferred.pins == frozenset(pins)
    assert inferred.mixes is mixes


@pytest.mark.parametrize("value", ["i64[576]", "bool[576]", "c64[576]"])
def test_only_floats_go_into_floats(value: str) -> None:
    with pytest.raises(DtypeError):
        infer_index_put(BASE, (WHOLE, -1), parse_type(value), None)


def test_dtypes_of_other_bases() -> None:
    whole, mask, wave = parse_type("i64[B,P]"), parse_type("bool[B,P]"), parse_type("c64[B,P]")
    for base, value in [(whole, 3), (whole, parse_type("i32[P]")), (mask, False), (wave, 1j), (wave, 2.0)]:
        assert infer_index_put(base, (), value, None).types == (base,)
    for base, value in [(whole, 3.5), (mask, 1), (mask, whole), (whole, mask), (wave, BASE), (BASE, 1j)]:
        with pytest.raises(DtypeError):
            infer_index_put(base, (), value, None)


@pytest.mark.parametrize("value", ["f32[5,576]", "f32[3,B,P,576]", "f32[575]"])
def test_values_that_do_not_broadcast(value: str) -> None:
    for sizes in (None, {"B": 2, "P": 7}):
        with pytest.raises(ShapeError):
            infer_index_put(BASE, (), parse_type(value), sizes)


def test_a_number_for_a_symbol_needs_the_prompt() -> None:
    with pytest.raises(ShapeError, match="symbol"):
        infer_index_put(BASE, (), parse_type("f32[7,576]"), None)
    with pytest.raises(ShapeError, match=r"does not broadcast"):
        infer_index_put(BASE, (), parse_type("f32[7,576]"), {"B": 2, "P": 1})
