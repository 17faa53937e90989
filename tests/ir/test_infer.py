"""Names, spellings, sizes, refusals and the memo."""

from __future__ import annotations

import math

import einops
import pytest
import torch
import torch.nn.functional as F

from tracelens.errors import (
    DtypeError,
    DynamicShapeError,
    ForbiddenFunctionError,
    InPlaceError,
    RandomFunctionError,
    ShapeError,
    TracelensError,
    UnsupportedFunctionError,
)
from tracelens.ir import dims
from tracelens.ir.abstract import AbstractArg, Inferred
from tracelens.ir.infer import (
    canonical_call,
    dtype_of,
    infer_call,
    masked_mean,
    memo_clear,
    name_of,
    resolve,
    static_argument,
    torch_dtype,
)
from tracelens.ir.ops import Slice, Special
from tracelens.ir.types import DType, parse_type

B, P = dims.B, dims.P
SIZES = {"B": 2, "P": 7, "S": 7}


def T(text: str) -> AbstractArg:
    return parse_type(text)


def call(
    name: str, *args: AbstractArg, sizes: dict[str, int] | None = None, **kwargs: AbstractArg
) -> Inferred:
    return infer_call(name, args, tuple(kwargs.items()), sizes)


def texts(inferred: Inferred) -> list[str]:
    return [str(type_) for type_ in inferred.types]


# --- names and spellings -----------------------------------------------------------------------------------------


class Recorded:
    """Hears which function torch calls for an expression, as a value does while recording."""

    heard: tuple[str, tuple[object, ...], dict[str, object]] | None = None
    shape = (2, 3)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        assert name_of(function) is not None
        cls.heard = canonical_call(function, tuple(args), dict(kwargs or {}))
        return cls()


V = Recorded()
X = torch.ones(3)


def heard(value: object) -> tuple[str, tuple[object, ...], dict[str, object]]:
    assert Recorded.heard is not None
    result, Recorded.heard = Recorded.heard, None
    return result


@pytest.mark.parametrize(
    ("write", "expected"),
    [
        (lambda: X + V, ("torch.add", (X, V), {})),
        (lambda: X - V, ("torch.sub", (X, V), {})),
        (lambda: X / V, ("torch.div", (X, V), {})),
        (lambda: X // V, ("torch.floor_divide", (X, V), {})),
        (lambda: X % V, ("torch.remainder", (X, V), {})),
        (lambda: X**V, ("torch.pow", (X, V), {})),
        (lambda: X @ V, ("torch.matmul", (X, V), {})),
        (lambda: X == V, ("torch.eq", (X, V), {})),
        (lambda: X < V, ("torch.lt", (X, V), {})),
        (lambda: X & V, ("torch.bitwise_and", (X, V), {})),
        (lambda: V - X, ("torch.sub", (V, X), {})),
        (lambda: V / X, ("torch.div", (V, X), {})),
        (lambda: V // X, ("torch.floor_divide", (V, X), {})),
        (lambda: V**X, ("torch.pow", (V, X), {})),
        (lambda: V @ X, ("torch.matmul", (V, X), {})),
        (lambda: V % X, ("torch.remainder", (V, X), {})),
        (lambda: torch.absolute(V), ("torch.abs", (V,), {})),
        (lambda: torch.multiply(V, 2), ("torch.mul", (V, 2), {})),
        (lambda: F.softmax(V, -1), ("torch.softmax", (V, -1), {})),
        (lambda: F.softmax(V, -1, dtype=torch.float64), ("torch.softmax", (V, -1), {"dtype": DType.FLOAT64})),
        (lambda: torch.nn.Softmax(-1)(V), ("torch.softmax", (V, -1), {})),
        (lambda: F.relu(V), ("torch.nn.functional.relu", (V,), {})),
        (lambda: F.gelu(V, approximate="tanh"), ("torch.nn.functional.gelu", (V,), {"approximate": "tanh"})),
        (lambda: F.layer_norm(V, (3,)), ("torch.nn.functional.layer_norm", (V, (3,)), {})),
        (lambda: F.dropout(V, 0.1, training=False), ("torch.Tensor.contiguous", (V,), {})),
        (lambda: torch.nn.Dropout(0.1).eval()(V), ("torch.Tensor.contiguous", (V,), {})),
        (lambda: torch.einsum("a,a->", [V, X]), ("torch.einsum", ("a,a->", V, X), {})),
        (lambda: torch.norm(V), ("torch.norm", (V,), {})),
        (lambda: torch.split(V, [1, 2]), ("torch.split", (V, (1, 2)), {})),
        (lambda: torch.cat([V, X], dim=-1), ("torch.cat", ((V, X),), {"dim": -1})),
        (lambda: X.where(V, X), ("torch.where", (V, X, X), {})),
        (lambda: torch.special.expit(V), ("torch.special.expit", (V,), {})),
        (lambda: torch.linalg.vector_norm(V), ("torch.linalg.vector_norm", (V,), {})),
        (lambda: X.to(V), ("torch.Tensor.type_as", (X, V), {})),
        (lambda: torch.broadcast_tensors(V, X), ("torch.broadcast_tensors", (V, X), {})),
        (lambda: F.linear(V, X, X), ("torch.nn.functional.linear", (V, X, X), {})),
        (lambda: F.normalize(V, dim=-1), ("torch.nn.functional.normalize", (V,), {"dim": -1})),
    ],
    ids=lambda part: part[0] if isinstance(part, tuple) else "",
)
def test_what_arrives_in_torch_function(write, expected) -> None:
    name, args, kwargs = heard(write())
    assert name == expected[0]
    assert kwargs == expected[2]
    assert len(args) == len(expected[1])
    for got, wanted in zip(args, expected[1], strict=True):
        assert got is wanted or got == wanted or (isinstance(got, Recorded) and isinstance(wanted, Recorded))


@pytest.mark.parametrize(
    ("function", "args", "kwargs", "expected"),
    [
        (torch.Tensor.view, (V, 1, 2), {}, ("torch.reshape", (V, (1, 2)), {})),
        (torch.Tensor.view, (V, (1, 2)), {}, ("torch.reshape", (V, (1, 2)), {})),
        (torch.Tensor.view, (V, [1, -1]), {}, ("torch.reshape", (V, (1, -1)), {})),
        (torch.Tensor.view, (V, torch.int32), {}, ("torch.Tensor.view", (V, DType.INT32), {})),
        (torch.Tensor.reshape, (V, -1), {}, ("torch.reshape", (V, (-1,)), {})),
        (torch.Tensor.permute, (V, 1, 0), {}, ("torch.permute", (V, (1, 0)), {})),
        (torch.Tensor.expand, (V, 2, -1), {}, ("torch.Tensor.expand", (V, (2, -1)), {})),
        (torch.Tensor.repeat, (V, 2), {}, ("torch.Tensor.repeat", (V, (2,)), {})),
        (torch.Tensor.flip, (V, 0, 1), {}, ("torch.flip", (V, (0, 1)), {})),
        (torch.Tensor.unflatten, (V, 1, (2, -1)), {}, ("torch.unflatten", (V, 1, (2, -1)), {})),
        (torch.Tensor.mean, (V, 1), {"keepdim": True}, ("torch.mean", (V, 1), {"keepdim": True})),
        (torch.Tensor.max, (V,), {"dim": -1}, ("torch.max", (V,), {"dim": -1})),
        (torch.Tensor.float, (V,), {}, ("torch.Tensor.to", (V, DType.FLOAT32), {})),
        (torch.Tensor.bool, (V,), {}, ("torch.Tensor.to", (V, DType.BOOL), {})),
        (torch.Tensor.to, (V, torch.float16), {"copy": True}, ("torch.Tensor.to", (V, DType.FLOAT16), {})),
        (torch.Tensor.to, (V,), {"dtype": torch.int64}, ("torch.Tensor.to", (V, DType.INT64), {})),
        (torch.Tensor.to, (V, X), {}, ("torch.Tensor.type_as", (V, X), {})),
        (torch.Tensor.where, (V, X, 0.0), {}, ("torch.where", (X, V, 0.0), {})),
        (torch.Tensor.polygamma, (V, 2), {}, ("torch.polygamma", (2, V), {})),
        (torch.Tensor.clip, (V, 0, 1), {}, ("torch.clamp", (V, 0, 1), {})),
        (torch.Tensor.__rsub__, (V, 2), {}, ("torch.sub", (2, V), {})),
        (torch.Tensor.__neg__, (V,), {}, ("torch.neg", (V,), {})),
        (torch.Tensor.__invert__, (V,), {}, ("torch.bitwise_not", (V,), {})),
        (torch.Tensor.mT.__get__, (V,), {}, ("torch.transpose", (V, -2, -1), {})),
        (torch.Tensor.T.__get__, (V,), {}, ("torch.t", (V,), {})),
        (torch.Tensor.real.__get__, (V,), {}, ("torch.real", (V,), {})),
        (torch.Tensor.clone, (V,), {"memory_format": torch.preserve_format}, ("torch.clone", (V,), {})),
        (torch.sum, (V,), {"out": None}, ("torch.sum", (V,), {})),
        (einops.rearrange, (V, "a b -> b a"), {}, ("einops.rearrange", (V, "a b -> b a"), {})),
        (einops.repeat, (V, "a b -> a b c"), {"c": 2}, ("einops.repeat", (V, "a b -> a b c"), {"c": 2})),
        (masked_mean, (V, X), {}, ("tracelens.masked_mean", (V, X), {})),
    ],
)
def test_spellings(function, args, kwargs, expected) -> None:
    name, got, named = canonical_call(function, args, kwargs)
    assert (name, named) == (expected[0], expected[2])
    assert all(one is other or one == other for one, other in zip(got, expected[1], strict=True))


@pytest.mark.parametrize(
    ("function", "args", "kwargs", "error"),
    [
        (torch.add, (V, V), {"out": X}, InPlaceError),
        (F.relu, (V,), {"inplace": True}, InPlaceError),
        (F.relu, (V, True), {}, InPlaceError),
        (F.leaky_relu, (V, 0.1, True), {}, InPlaceError),
        (F.dropout, (V,), {}, RandomFunctionError),
        (F.dropout, (V, 0.1, True), {}, RandomFunctionError),
        (F.scaled_dot_product_attention, (V, V, V), {"dropout_p": 0.1}, RandomFunctionError),
        (F.scaled_dot_product_attention, (V, V, V, None, 0.1), {}, RandomFunctionError),
        (F.batch_norm, (V, X, X), {"training": True}, InPlaceError),
        (F.embedding, (V, X), {"max_norm": 1.0}, InPlaceError),
        (torch.where, (V,), {}, DynamicShapeError),
        (F.one_hot, (V,), {}, DynamicShapeError),
        (F.softmax, (V,), {}, UnsupportedFunctionError),
        (torch.Tensor.to, (V, "cuda"), {}, UnsupportedFunctionError),
        (torch.Tensor.to, (V, torch.device("cpu")), {}, UnsupportedFunctionError),
        (torch.Tensor.to, (V,), {"device": "cpu", "dtype": torch.float32}, UnsupportedFunctionError),
        (torch.zeros_like, (V,), {"device": "cpu"}, UnsupportedFunctionError),
        (torch.Tensor.add_, (V, 1), {}, InPlaceError),
        (torch.bernoulli, (V,), {}, RandomFunctionError),
        (torch.nonzero, (V,), {}, DynamicShapeError),
        (len, (V,), {}, UnsupportedFunctionError),
    ],
)
def test_calls_that_no_graph_can_hold(function, args, kwargs, error) -> None:
    with pytest.raises(error):
        canonical_call(function, args, kwargs)


def test_a_graph_from_elsewhere_cannot_hold_them_either() -> None:
    value = T("f32[B,P,8]")
    for name, args, kwargs, error in [
        ("torch.nn.functional.relu", (value, True), {}, InPlaceError),
        ("torch.add", (value, value), {"out": value}, InPlaceError),
        ("torch.Tensor.add_", (value, 1), {}, InPlaceError),
        ("torch.rand", (3,), {}, RandomFunctionError),
        ("torch.nn.functional.dropout", (value,), {}, RandomFunctionError),
        ("torch.load", ("file",), {}, UnsupportedFunctionError),
    ]:
        with pytest.raises(error):
            call(name, *args, **kwargs)


@pytest.mark.parametrize(
    ("given", "held"),
    [
        (None, None),
        (True, True),
        (3, 3),
        (2.5, 2.5),
        (-0.0, Special.NEGATIVE_ZERO),
        (1j, 1j),
        ("mean", "mean"),
        (torch.bfloat16, DType.BFLOAT16),
        (torch.Size([2, 3]), (2, 3)),
        ([1, [2, 3]], (1, (2, 3))),
        (slice(None, -1), Slice(None, -1, None)),
        (..., ...),
        (dims.P, dims.P),
    ],
)
def test_static_arguments(given: object, held: object) -> None:
    found = static_argument(given)
    assert found == held
    assert type(found) is type(held)


def test_static_arguments_that_no_graph_can_hold() -> None:
    for bad in (torch.device("cpu"), object(), {"a": 1}, torch.float8_e4m3fn):
        with pytest.raises((UnsupportedFunctionError, DtypeError)):
            static_argument(bad)


def test_dtypes_go_both_ways() -> None:
    for dtype in DType:
        assert dtype_of(torch_dtype(dtype)) is dtype
    with pytest.raises(DtypeError):
        dtype_of(torch.complex32)


def test_resolve_runs_what_a_graph_holds() -> None:
    value = torch.arange(24.0).reshape(2, 3, 4)
    assert torch.equal(resolve("torch.Tensor.to")(value, torch.int64), value.long())
    assert torch.equal(resolve("torch.sub")(2, value), 2 - value)
    stacked = resolve("einops.rearrange")((value, value), "n b p d -> b p n d")
    assert torch.equal(stacked, torch.stack([value, value], dim=2))
    with pytest.raises(ForbiddenFunctionError):
        resolve("torch.sort_of")


def test_masked_mean() -> None:
    value = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    value[0, :2] = math.inf  # padding may hold anything
    torch.testing.assert_close(masked_mean(value, mask)[0], value[0, 2:].mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(masked_mean(value, mask)[1], value[1].mean(0), rtol=1e-6, atol=1e-6)
    assert masked_mean(value.bfloat16(), mask).dtype is torch.bfloat16
    inferred = call("tracelens.masked_mean", T("bf16[B,P,9,64]"), T("bool[B,P]"), sizes=SIZES)
    assert texts(inferred) == ["bf16[B,9,64]"]
    assert not inferred.mixes
    assert not inferred.pins
    assert call("tracelens.masked_mean", T("f32[B,P,9]"), T("bool[2,7]"), sizes=SIZES).pins == {"B", "P"}
    for value_type, mask_type in [
        ("f32[B,P,9]", "f32[B,P]"),
        ("f32[B,9,P]", "bool[B,P]"),
        ("i64[B,P,9]", "bool[B,P]"),
        ("f32[B,P,9]", "bool[P]"),
        ("f32[B,P,9]", "bool[2,8]"),
    ]:
        with pytest.raises((ShapeError, DtypeError)):
            call("tracelens.masked_mean", T(value_type), T(mask_type), sizes=SIZES)


# --- sizes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "other", "result", "pins", "mixes"),
    [
        ({"B": 2, "P": 7}, "f32[7,8]", "f32[B,P,8]", "P", True),
        ({"B": 2, "P": 7}, "f32[1,8]", "f32[B,P,8]", "", False),
        ({"B": 2, "P": 7}, "f32[8]", "f32[B,P,8]", "", False),
        ({"B": 2, "P": 7}, "f32[2,1,8]", "f32[B,P,8]", "B", False),
        ({"B": 1, "P": 7}, "f32[4,1,8]", "f32[4,P,8]", "B", False),
        ({"B": 1, "P": 7}, "f32[1,1,8]", "f32[B,P,8]", "", False),
        ({"B": 2, "P": 1}, "f32[7,8]", "f32[B,7,8]", "P", True),
        ({"B": 2, "P": 7}, "f32[2,7,8]", "f32[B,P,8]", "BP", True),
        ({"B": 2, "P": 7}, "f32[B,1,1]", "f32[B,P,8]", "", False),
        ({"B": 2, "P": 7, "S": 7}, "f32[S,8]", "f32[B,P,8]", "PS", True),
    ],
)
def test_broadcasting(sizes: dict[str, int], other: str, result: str, pins: str, mixes: bool) -> None:
    for args in ((T("f32[B,P,8]"), T(other)), (T(other), T("f32[B,P,8]"))):
        inferred = call("torch.add", *args, sizes=sizes)
        assert texts(inferred) == [result]
        assert inferred.pins == frozenset(pins)
        assert inferred.mixes is mixes


def test_a_number_for_a_symbol_needs_the_prompt() -> None:
    with pytest.raises(ShapeError, match=r"add\(f32\[B,P,8\], f32\[7,8\]\).*the size P.*symbol"):
        call("torch.add", T("f32[B,P,8]"), T("f32[7,8]"))
    with pytest.raises(ShapeError, match=r"where B = 2, P = 6"):
        call("torch.add", T("f32[B,P,8]"), T("f32[7,8]"), sizes={"B": 2, "P": 6})
    # What has been inferred for one prompt does not stand for another.
    assert call("torch.add", T("f32[B,P,8]"), T("f32[7,8]"), sizes={"B": 2, "P": 7}).pins == {"P"}
    with pytest.raises(ShapeError):
        call("torch.add", T("f32[B,P,8]"), T("f32[7,8]"), sizes={"B": 2, "P": 6})


@pytest.mark.parametrize(
    ("shape", "result", "pins", "mixes"),
    [
        ((B, P, 9, 64), "f32[B,P,9,64]", "", False),
        ((B, P, -1, 64), "f32[B,P,9,64]", "", False),
        ((-1, 576), "f32[B*P,576]", "", True),
        ((dims.multiply(B, P), 9, 64), "f32[B*P,9,64]", "", True),
        ((B, -1), "f32[B,576*P]", "", True),
        ((2, 7, 9, 64), "f32[B,P,9,64]", "BP", False),
        ((2, 7, -1), "f32[B,P,576]", "BP", False),
        ((14, 576), "f32[14,576]", "BP", True),
        ((B, 1, P, 576), "f32[B,1,P,576]", "", False),
        ((P, B, 576), "f32[P,B,576]", "", True),
    ],
)
def test_reshape(shape: tuple[AbstractArg, ...], result: str, pins: str, mixes: bool) -> None:
    inferred = call("torch.reshape", T("f32[B,P,576]"), shape, sizes=SIZES)
    assert texts(inferred) == [result]
    assert inferred.pins == frozenset(pins)
    assert inferred.mixes is mixes
    if not pins:
        assert call("torch.reshape", T("f32[B,P,576]"), shape) == inferred


def test_a_batch_of_one_is_still_the_batch() -> None:
    inferred = call("torch.reshape", T("f32[B,P,576]"), (1, 7, 9, 64), sizes={"B": 1, "P": 7})
    assert texts(inferred) == ["f32[B,P,9,64]"]
    assert not inferred.mixes


def test_shapes_with_symbols() -> None:
    assert texts(call("torch.Tensor.expand", T("f32[1,P,8]"), (B, -1, -1))) == ["f32[B,P,8]"]
    assert texts(call("torch.Tensor.expand", T("f32[8]"), (B, P, 8))) == ["f32[B,P,8]"]
    assert texts(call("torch.Tensor.new_zeros", T("f32[B,P,8]"), (P, 3))) == ["f32[P,3]"]
    assert texts(call("torch.unflatten", T("f32[B,P,576]"), 2, (9, -1))) == ["f32[B,P,9,64]"]


@pytest.mark.parametrize(
    ("name", "args", "results", "mixes"),
    [
        ("torch.fft.rfft", ("f32[B,P,8]",), ["c64[B,P,5]"], False),
        ("torch.linalg.inv", ("f32[B,P,5,5]",), ["f32[B,P,5,5]"], False),
        ("torch.linalg.eigh", ("f32[B,P,5,5]",), ["f32[B,P,5]", "f32[B,P,5,5]"], False),
        ("torch.cdist", ("f32[B,P,8]", "f32[B,P,8]"), ["f32[B,P,P]"], True),
        ("torch.diff", ("f32[B,P,8]",), ["f32[B,P,7]"], False),
        ("torch.diff", ("f32[B,P,8]", 1, 1), ["f32[B,P-1,8]"], True),
        ("torch.nn.functional.pad", ("f32[B,P,8]", (1, 1)), ["f32[B,P,10]"], False),
        ("torch.nn.functional.pad", ("f32[B,P,8]", (0, 0, 1, 0)), ["f32[B,P+1,8]"], True),
        ("torch.tril", ("f32[B,P,P]",), ["f32[B,P,P]"], True),
        ("torch.nn.functional.conv1d", ("f32[B,8,P]", "f32[4,8,3]"), ["f32[B,4,P-2]"], True),
        ("torch.nn.functional.scaled_dot_product_attention", ("f32[B,9,P,8]",) * 3, ["f32[B,9,P,8]"], True),
        ("torch.scatter", ("f32[B,P,8]", -1, "i64[B,P,3]", 0.0), ["f32[B,P,8]"], False),
        ("torch.scatter", ("f32[B,P,8]", 1, "i64[B,3,8]", 0.0), ["f32[B,P,8]"], True),
        ("torch.gather", ("f32[B,P,8]", -1, "i64[B,P,1]"), ["f32[B,P,1]"], False),
        ("torch.nn.functional.one_hot", ("i64[B,P]", 10), ["i64[B,P,10]"], False),
        ("torch.nn.functional.cross_entropy", ("f32[4,8]", "i64[4]"), ["f32[]"], False),
        ("torch.nn.functional.mse_loss", ("f32[B,P,8]", "f32[B,P,8]"), ["f32[]"], True),
        ("torch.Tensor.unfold", ("f32[B,P,8]", 2, 4, 2), ["f32[B,P,3,4]"], False),
        ("torch.outer", ("f32[P]", "f32[P]"), ["f32[P,P]"], False),
        ("torch.kron", ("f32[P,2]", "f32[3,4]"), ["f32[3*P,8]"], True),
    ],
)
def test_functions_by_meta_tensors(
    name: str, args: tuple[object, ...], results: list[str], mixes: bool
) -> None:
    typed = tuple(T(arg) if isinstance(arg, str) else arg for arg in args)
    for sizes in (None, {"B": 2, "P": 7}):
        inferred = infer_call(name, typed, (), sizes)
        assert texts(inferred) == results
        assert inferred.mixes is mixes
        assert not inferred.pins


def test_functions_whose_sizes_have_no_name_are_pinned() -> None:
    inferred = call("torch.linalg.svd", T("f32[B,P,8]"), sizes=SIZES)
    assert texts(inferred) == ["f32[B,7,7]", "f32[B,7]", "f32[B,8,8]"]
    assert inferred.fields == ("U", "S", "Vh")
    assert inferred.pins == {"P"}
    assert inferred.mixes
    with pytest.raises(ShapeError):
        call("torch.linalg.svd", T("f32[B,P,8]"))


def test_sizes_that_do_not_fit_are_found_where_they_are_known() -> None:
    for name, args in [
        ("torch.topk", (T("f32[B,P,8]"), 5, 1)),
        ("torch.narrow", (T("f32[B,P,8]"), 1, 0, 5)),
        ("torch.kthvalue", (T("f32[B,P,8]"), 5, 1)),
        ("torch.Tensor.unfold", (T("f32[B,P,8]"), 1, 5, 1)),
    ]:
        memo_clear()
        infer_call(name, args, (), {"B": 2, "P": 7})
        infer_call(name, args, (), {"B": 2, "P": 5})
        with pytest.raises(ShapeError):
            infer_call(name, args, (), {"B": 2, "P": 4})
    assert texts(call("torch.topk", T("f32[B,P,8]"), 5, 1)) == ["f32[B,5,8]", "i64[B,5,8]"]


def test_fields() -> None:
    value = T("f32[B,P,8]")
    assert call("torch.add", value, 1).fields is None
    assert call("torch.topk", value, 2).fields == ("values", "indices")
    assert call("torch.max", value, -1).fields == ("values", "indices")
    assert call("torch.max", value).fields is None
    assert call("torch.max", value, value).fields is None
    assert call("torch.split", value, 3, -1).fields == ()
    assert texts(call("torch.split", value, 3, -1)) == ["f32[B,P,3]", "f32[B,P,3]", "f32[B,P,2]"]
    assert call("torch.split", value, 8, -1).fields == ()
    assert call("torch.std_mean", value, -1).fields == ()
    assert call("torch.aminmax", value, dim=-1).fields == ("min", "max")
    assert call("torch.frexp", value).fields == ("mantissa", "exponent")
    assert call("torch.linalg.slogdet", T("f32[B,3,3]")).fields == ("sign", "logabsdet")


@pytest.mark.parametrize(
    ("name", "args", "error"),
    [
        ("torch.mean", ("i64[B,P]",), DtypeError),
        ("torch.bitwise_and", ("f32[B,P]", "f32[B,P]"), DtypeError),
        ("torch.neg", ("bool[B,P]",), DtypeError),
        ("torch.matmul", ("f32[B,P,8]", "bf16[8,4]"), DtypeError),
        ("torch.nn.functional.linear", ("f32[B,P,8]", "f64[4,8]"), DtypeError),
        ("torch.matmul", ("f32[B,P,8]", "f32[9,4]"), ShapeError),
        ("torch.add", ("f32[B,P,8]", "f32[9]"), ShapeError),
        ("torch.reshape", ("f32[B,P,8]", (-1, 9)), ShapeError),
        ("torch.cat", (("f32[B,P,8]", "f32[B,P]"),), ShapeError),
        ("torch.softmax", ("f32[B,P,8]", 3), ShapeError),
        ("torch.einsum", ("bpd,dk->bpk", "f32[B,P,8]", "f32[9,4]"), ShapeError),
        ("einops.rearrange", ("f32[B,P,8]", "b p (h d) -> b h p d"), ShapeError),
        ("torch.repeat_interleave", ("f32[B,P]", "i64[P]", 1), DynamicShapeError),
        ("torch.mean", ("f32[B,P]", "no"), UnsupportedFunctionError),
        ("torch.linalg.vector_norm", ("i64[B,P]",), DtypeError),
    ],
)
def test_errors_carry_the_call_and_torchs_words(
    name: str, args: tuple[object, ...], error: type[TracelensError]
) -> None:
    def typed(arg: object) -> object:
        if isinstance(arg, tuple):
            return tuple(typed(part) for part in arg)
        return T(arg) if isinstance(arg, str) and "[" in arg else arg

    for sizes in ({"B": 2, "P": 7}, None):
        with pytest.raises(error) as caught:
            infer_call(name, typed(args), (), sizes)
        assert type(caught.value) is error
        assert name.rpartition(".")[2] in caught.value.problem
        assert caught.value.at is None


# --- the memo ----------------------------------------------------------------------------------------------------


def test_what_python_takes_for_equal_is_kept_apart() -> None:
    memo_clear()
    whole = T("i64[B,P]")
    for _ in range(2):
        assert texts(call("torch.mul", whole, 1)) == ["i64[B,P]"]
        assert texts(call("torch.mul", whole, 1.0)) == ["f32[B,P]"]
        assert texts(call("torch.mul", whole, True)) == ["i64[B,P]"]
        assert texts(call("torch.mul", T("bool[B,P]"), True)) == ["bool[B,P]"]
        assert texts(call("torch.mul", T("bool[B,P]"), 1)) == ["i64[B,P]"]
        assert texts(call("torch.mul", T("bool[B,P]"), 1j)) == ["c64[B,P]"]
        assert texts(call("torch.sum", T("f32[B,1]"), 1)) == ["f32[B]"]
        assert texts(call("torch.sum", T("f32[B,1]"), 1, True)) == ["f32[B,1]"]


def test_keys_do_not_confuse_nested_arguments() -> None:
    memo_clear()
    a, b = T("f32[2]"), T("f32[3]")
    assert texts(call("torch.cat", (a, b))) == ["f32[5]"]
    assert texts(call("torch.cat", (b, b))) == ["f32[6]"]
    assert texts(call("torch.cat", (a, a, b))) == ["f32[7]"]
    assert texts(call("torch.reshape", T("f32[4,6]"), (6, 4))) == ["f32[6,4]"]
    assert texts(call("torch.reshape", T("f32[4,6]"), (4, 6))) == ["f32[4,6]"]


def test_a_float_that_is_new_every_time_does_not_fill_the_memo() -> None:
    from tracelens.ir.infer import _typing

    memo_clear()
    value = T("f32[B,P]")
    for step in range(50):
        call("torch.mul", value, step / 7)
        call("torch.masked_fill", value, T("bool[B,P]"), float("nan"))
    assert len(_typing._memo) <= 3


def test_answers_without_sizes_serve_every_prompt() -> None:
    from tracelens.ir.infer import _typing

    memo_clear()
    value = T("f32[B,P,8]")
    first = call("torch.mul", value, value, sizes={"B": 1, "P": 3})
    assert call("torch.mul", value, value, sizes={"B": 2, "P": 9}) is first
    assert call("torch.mul", value, value) is first
    assert not _typing._sized


def test_an_error_is_not_remembered_as_an_answer() -> None:
    memo_clear()
    for _ in range(2):
        with pytest.raises(ShapeError):
            call("torch.add", T("f32[B,4]"), T("f32[B,5]"), sizes=SIZES)
        with pytest.raises(ShapeError):
            call("torch.add", T("f32[B,4]"), T("f32[B,5]"))


def test_the_default_dtype_counts() -> None:
    whole = T("i64[B,P]")
    assert texts(call("torch.div", whole, 2)) == ["f32[B,P]"]
    torch.set_default_dtype(torch.float64)
    try:
        assert texts(call("torch.div", whole, 2)) == ["f64[B,P]"]
        assert texts(call("torch.exp", whole)) == ["f64[B,P]"]
    finally:
        torch.set_default_dtype(torch.float32)
    assert texts(call("torch.div", whole, 2)) == ["f32[B,P]"]


def test_trials_warn_nobody() -> None:
    memo_clear()
    value = T("f32[4,5]")
    with pytest.warns(UserWarning, match="batchmean"):
        F.kl_div(torch.rand(4, 5), torch.rand(4, 5))
    assert texts(call("torch.nn.functional.kl_div", value, value)) == ["f32[]"]
