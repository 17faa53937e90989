"""The hand-written rules against torch: same types, same refusals, whatever the sizes."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tracelens.errors import TracelensError
from tracelens.ir import dims
from tracelens.ir.abstract import AbstractArg, AbstractKwargs, Inferred
from tracelens.ir.dims import Dim, Sym
from tracelens.ir.functions import FUNCTIONS, Kind
from tracelens.ir.infer import dtype_of, infer_call, memo_clear, resolve, torch_dtype
from tracelens.ir.ops import Special
from tracelens.ir.rules import rule_for
from tracelens.ir.types import DType, TensorType

B, P = dims.B, dims.P
CALL = tuple[str, tuple[AbstractArg, ...], AbstractKwargs]

FLOATS = [DType.FLOAT32, DType.FLOAT64, DType.BFLOAT16, DType.FLOAT16]
INTEGERS = [DType.INT64, DType.INT32, DType.INT16, DType.INT8, DType.UINT8]
COMPLEX = [DType.COMPLEX64, DType.COMPLEX128]
dtypes = st.sampled_from([*FLOATS, *FLOATS, *INTEGERS, DType.BOOL, *COMPLEX])
floats = st.sampled_from(FLOATS)
sizes_strategy = st.fixed_dictionaries({"B": st.integers(1, 3), "P": st.sampled_from([1, 2, 3, 4, 6])})
one_dim: st.SearchStrategy[Dim] = st.sampled_from([B, P, B, P, 1, 2, 3, 4, 6])


def shapes(least: int = 0, most: int = 4) -> st.SearchStrategy[tuple[Dim, ...]]:
    return st.lists(one_dim, min_size=least, max_size=most).map(tuple)


def tensors(
    least: int = 0, most: int = 4, dtype: st.SearchStrategy[DType] = floats
) -> st.SearchStrategy[TensorType]:
    return st.builds(TensorType, dtype, shapes(least, most))


numbers = st.sampled_from([0, 1, 2, -1, 3, 0.5, 2.0, -0.25, True, False, float("inf"), Special.NEGATIVE_ZERO])
axis = st.integers(-4, 4)


# --- torch's own answer ------------------------------------------------------------------------------------------


def concrete(arg: AbstractArg, sizes: dict[str, int], make: Callable[[TensorType], torch.Tensor]) -> object:
    if isinstance(arg, TensorType):
        return make(arg)
    if isinstance(arg, Sym):
        return dims.evaluate(arg, sizes)
    if isinstance(arg, DType):
        return torch_dtype(arg)
    if isinstance(arg, Special):
        return -0.0
    if isinstance(arg, tuple):
        return tuple(concrete(part, sizes, make) for part in arg)
    return arg


LACKS_HALVES = re.compile(r"not implemented for '(Half|BFloat16)'")
Answer = tuple[list[TensorType], bool]


def torch_says(call: CALL, sizes: dict[str, int]) -> Answer | None:
    """The types with numbers for sizes, and whether it is one tensor; ``None`` if torch refuses.

    Real tensors are asked, of ones and of zeros (no divisor may be zero, no index too large); meta tensors only where a
    CPU has no kernel for halves, since they let much pass that no device can compute.
    """
    found = answer(call, sizes, torch.ones, "cpu")
    if isinstance(found, Exception):
        found = answer(call, sizes, torch.zeros, "cpu")
    if isinstance(found, Exception) and LACKS_HALVES.search(str(found)):
        found = answer(call, sizes, torch.ones, "meta")
    return None if isinstance(found, Exception) else found


def answer(
    call: CALL, sizes: dict[str, int], fill: Callable[..., torch.Tensor], device: str
) -> Answer | Exception:
    name, args, kwargs = call

    def make(type_: TensorType) -> torch.Tensor:
        return fill(type_.sizes(sizes), dtype=torch_dtype(type_.dtype), device=device)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = resolve(name)(
                *(concrete(arg, sizes, make) for arg in args),
                **{key: concrete(value, sizes, make) for key, value in kwargs},
            )
        several = [result] if isinstance(result, torch.Tensor) else list(result)
        types = [TensorType(dtype_of(part.dtype), tuple(part.shape)) for part in several]
    except Exception as error:  # also for a complex half, which no graph can hold
        return error
    return types, isinstance(result, torch.Tensor)


def we_say(call: CALL, sizes: dict[str, int] | None) -> Inferred | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return infer_call(*call, sizes)
    except TracelensError:
        return None


def at(inferred: Inferred, sizes: dict[str, int]) -> list[TensorType]:
    return [TensorType(type_.dtype, type_.sizes(sizes)) for type_ in inferred.types]


def check(call: CALL, sizes: dict[str, int]) -> None:
    inferred = we_say(call, sizes)
    truth = torch_says(call, sizes)
    if inferred is None:
        assert truth is None, f"{call} {sizes}: refused, but torch gives {truth}"
        unsized = we_say(call, None)
        # Without sizes, only an answer that some sizes fit may be given.
        assert unsized is None or any(
            torch_says(call, {"B": b, "P": p}) for b in (1, 2, 3, 6) for p in (1, 2, 3, 4, 6, 12)
        ), f"{call} {sizes}: {unsized}"
        return
    assert truth is not None, f"{call} {sizes}: torch refuses, we say {inferred}"
    types, single = truth
    assert at(inferred, sizes) == types, f"{call} {sizes}: {inferred}"
    assert (inferred.fields is None) == single
    # The answer holds for all sizes but the pinned ones.
    for other in ({"B": 1, "P": 1}, {"B": 2, "P": 6}, {"B": 3, "P": 5}):
        other = {**other, **{symbol: sizes[symbol] for symbol in inferred.pins}}
        elsewhere = torch_says(call, other)
        if elsewhere is not None:
            assert at(inferred, other) == elsewhere[0], f"{call} {sizes}: {inferred} is not right at {other}"
    unsized = we_say(call, None)
    if unsized is not None:
        assert not unsized.pins
        assert at(unsized, sizes) == types, f"{call} {sizes}: {unsized}"


def rule_alone(call: CALL, sizes: dict[str, int]) -> None:
    memo_clear()
    check(call, sizes)


SETTINGS = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)


# --- pointwise ---------------------------------------------------------------------------------------------------


@st.composite
def partner(draw: st.DrawFn, shape: tuple[Dim, ...], sizes: dict[str, int]) -> tuple[Dim, ...]:
    """A shape that often broadcasts with ``shape``."""
    other: list[Dim] = []
    for dim in shape:
        how = draw(st.sampled_from(["same", "same", "one", "number", "any"]))
        number = dim if isinstance(dim, int) else dims.evaluate(dim, sizes)
        other.append({"same": dim, "one": 1, "number": number, "any": draw(one_dim)}[how])
    return tuple(other[draw(st.integers(0, len(other))) :] if draw(st.booleans()) else other)


_BINARY = """
    add sub mul div pow remainder fmod floor_divide maximum minimum fmax fmin atan2 hypot logaddexp eq ne lt le gt ge
    logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_left_shift copysign xlogy gcd heaviside isclose"""
BINARY = _BINARY.split()


@SETTINGS
@given(st.data(), sizes_strategy)
def test_binary(data: st.DataObject, sizes: dict[str, int]) -> None:
    left = data.draw(tensors(dtype=dtypes))
    right: AbstractArg
    if data.draw(st.booleans()):
        right = TensorType(data.draw(dtypes), data.draw(partner(left.shape, sizes)))
    else:
        right = data.draw(numbers)
    args = (left, right) if data.draw(st.integers(0, 3)) else (right, left)
    rule_alone((f"torch.{data.draw(st.sampled_from(BINARY))}", args, ()), sizes)


UNARY = sorted(
    function.name
    for function in FUNCTIONS.values()
    if function.kind is Kind.POINTWISE
    and function.name != "torch.where"  # of a condition alone, its shape depends on the data
    and torch_says((function.name, (TensorType(DType.FLOAT32, (2,)),), ()), {})
)


def test_there_are_many_unary_functions() -> None:
    assert len(UNARY) > 100


@pytest.mark.parametrize("name", UNARY)
def test_unary(name: str) -> None:
    for dtype in DType:
        for shape in ((B, P, 3), ()):
            rule_alone((name, (TensorType(dtype, shape),), ()), {"B": 2, "P": 3})


@SETTINGS
@given(st.data(), sizes_strategy)
def test_three_operands(data: st.DataObject, sizes: dict[str, int]) -> None:
    value = data.draw(tensors(dtype=dtypes))

    def operand(dtype: st.SearchStrategy[DType]) -> AbstractArg:
        if data.draw(st.integers(0, 2)) == 0:
            return data.draw(numbers)
        return TensorType(data.draw(dtype), data.draw(partner(value.shape, sizes)))

    name = data.draw(st.sampled_from(["where", "masked_fill", "clamp", "lerp", "addcmul"]))
    masks = st.sampled_from([DType.BOOL, DType.BOOL, DType.UINT8])
    args: tuple[AbstractArg, ...] = {
        "where": lambda: (TensorType(data.draw(masks), value.shape), operand(dtypes), operand(dtypes)),
        "masked_fill": lambda: (
            value,
            TensorType(data.draw(masks), data.draw(partner(value.shape, sizes))),
            operand(dtypes),
        ),
        "clamp": lambda: (value, operand(dtypes), operand(dtypes)),
        "lerp": lambda: (
            value,
            TensorType(value.dtype, data.draw(partner(value.shape, sizes))),
            operand(floats),
        ),
        "addcmul": lambda: (value, operand(dtypes), operand(dtypes)),
    }[name]()
    rule_alone((f"torch.{name}", args, ()), sizes)


@SETTINGS
@given(tensors(dtype=dtypes), dtypes, sizes_strategy)
def test_conversions(value: TensorType, dtype: DType, sizes: dict[str, int]) -> None:
    rule_alone(("torch.Tensor.to", (value, dtype), ()), sizes)
    rule_alone(("torch.Tensor.type_as", (value, TensorType(dtype, (2,))), ()), sizes)
    rule_alone(("torch.zeros_like", (value,), (("dtype", dtype),)), sizes)


# --- reductions and functions along an axis ----------------------------------------------------------------------

REDUCTIONS = [name for name in FUNCTIONS if FUNCTIONS[name].kind is Kind.REDUCTION and "quantile" not in name]


@pytest.mark.parametrize("name", REDUCTIONS)
@settings(SETTINGS, max_examples=30)
@given(data=st.data(), sizes=sizes_strategy)
def test_reductions(name: str, data: st.DataObject, sizes: dict[str, int]) -> None:
    value = data.draw(tensors(dtype=dtypes))
    kwargs: dict[str, AbstractArg] = {}
    if data.draw(st.integers(0, 3)):
        kwargs["dim"] = data.draw(st.one_of(axis, axis, st.lists(axis, min_size=1, max_size=3).map(tuple)))
    if data.draw(st.booleans()):
        kwargs["keepdim"] = data.draw(st.booleans())
    if data.draw(st.integers(0, 4)) == 0:
        kwargs["dtype"] = data.draw(dtypes)
    args: tuple[AbstractArg, ...] = (value,)
    if name == "torch.kthvalue":
        args = (value, data.draw(st.integers(0, 4)))
    elif "dim" in kwargs and name not in ("torch.norm", "torch.linalg.vector_norm", "torch.aminmax"):
        args = (value, kwargs.pop("dim")) if data.draw(st.booleans()) else args
    rule_alone((name, args, tuple(kwargs.items())), sizes)


@SETTINGS
@given(st.data(), sizes_strategy)
def test_quantiles(data: st.DataObject, sizes: dict[str, int]) -> None:
    value = data.draw(tensors())
    q = data.draw(st.one_of(st.sampled_from([0.0, 0.5, 1.0, 2.0]), tensors(0, 1)))
    name = data.draw(st.sampled_from(["torch.quantile", "torch.nanquantile"]))
    kwargs = data.draw(st.sampled_from([(), (("dim", -1),), (("dim", 1),), (("dim", 0), ("keepdim", True))]))
    rule_alone((name, (value, q), kwargs), sizes)


@SETTINGS
@given(st.data(), sizes_strategy)
def test_along_an_axis(data: st.DataObject, sizes: dict[str, int]) -> None:
    value = data.draw(tensors(dtype=dtypes))
    dim = data.draw(axis)
    parts = tuple(data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=3)))
    name, args, kwargs = data.draw(
        st.sampled_from(
            [
                *((f"torch.{name}", (value, dim), ()) for name in
                  ("softmax", "log_softmax", "cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "argsort", "sort",
                   "unbind", "mode", "flip", "unsqueeze", "squeeze")),
                ("torch.softmax", (value, dim), (("dtype", data.draw(dtypes)),)),
                ("torch.cumsum", (value,), (("dim", dim), ("dtype", data.draw(dtypes)))),
                ("torch.sort", (value,), (("descending", True),)),
                ("torch.topk", (value, data.draw(st.integers(0, 5)), dim), ()),
                ("torch.topk", (value, data.draw(st.integers(0, 5))), (("largest", False),)),
                ("torch.kthvalue", (value, data.draw(st.integers(0, 4)), dim), ()),
                ("torch.flip", (value, tuple(data.draw(st.lists(axis, max_size=3)))), ()),
                ("torch.roll", (value, data.draw(st.integers(-3, 3)), dim), ()),
                ("torch.roll", (value, (1, 2), tuple(data.draw(st.lists(axis, min_size=2, max_size=2)))), ()),
                ("torch.roll", (value, 1), ()),
                ("torch.flipud", (value,), ()),
                ("torch.fliplr", (value,), ()),
                ("torch.msort", (value,), ()),
                ("torch.nn.functional.glu", (value, dim), ()),
                ("torch.nn.functional.normalize", (value,), (("dim", dim),)),
                ("torch.select", (value, dim, data.draw(st.integers(-4, 4))), ()),
                ("torch.narrow", (value, dim, data.draw(st.integers(-4, 4)), data.draw(st.integers(-1, 4))), ()),
                ("torch.split", (value, data.draw(st.integers(0, 4)), dim), ()),
                ("torch.split", (value, parts, dim), ()),
                ("torch.chunk", (value, data.draw(st.integers(0, 4))), (("dim", dim),)),
                ("torch.index_select", (value, dim, data.draw(tensors(0, 2, st.sampled_from(INTEGERS)))), ()),
            ]
        )
    )  # fmt: skip
    rule_alone((name, args, kwargs), sizes)


@SETTINGS
@given(st.data(), sizes_strategy)
def test_joining(data: st.DataObject, sizes: dict[str, int]) -> None:
    first = data.draw(tensors(dtype=dtypes))
    parts = [first]
    for _ in range(data.draw(st.integers(0, 2))):
        shape = list(first.shape)
        if shape and data.draw(st.booleans()):
            place = data.draw(st.integers(0, len(shape) - 1))
            old = shape[place]
            shape[place] = data.draw(
                st.sampled_from([1, 2, old if isinstance(old, int) else dims.evaluate(old, sizes)])
            )
        parts.append(TensorType(data.draw(dtypes), tuple(shape)))
    name = data.draw(st.sampled_from(["torch.cat", "torch.stack"]))
    kwargs = data.draw(st.sampled_from([(), (("dim", data.draw(axis)),)]))
    rule_alone((name, (tuple(parts),), kwargs), sizes)


@SETTINGS
@given(st.data(), sizes_strategy)
def test_gather(data: st.DataObject, sizes: dict[str, int]) -> None:
    value = data.draw(tensors(dtype=dtypes))
    shape = list(value.shape)
    if shape:
        shape[data.draw(st.integers(0, len(shape) - 1))] = data.draw(one_dim)
    index = TensorType(data.draw(st.sampled_from([DType.INT64, DType.INT64, DType.INT32])), tuple(shape))
    rule_alone(("torch.gather", (value, data.draw(axis), index), ()), sizes)


@SETTINGS
@given(st.data(), sizes_strategy)
def test_norms_and_embeddings(data: st.DataObject, sizes: dict[str, int]) -> None:
    value = data.draw(tensors(1))
    count = data.draw(st.integers(1, value.ndim))
    last = tuple(
        dims.evaluate(dim, sizes) if data.draw(st.integers(0, 4)) else 5 for dim in value.shape[-count:]
    )
    weight = data.draw(
        st.sampled_from([None, TensorType(value.dtype, last), TensorType(DType.FLOAT64, last)])
    )
    name = data.draw(st.sampled_from(["layer_norm", "rms_norm"]))
    rule_alone((f"torch.nn.functional.{name}", (value, last, weight), ()), sizes)
    tokens = data.draw(tensors(dtype=st.sampled_from([DType.INT64, DType.INT32, DType.FLOAT32])))
    rule_alone(("torch.nn.functional.embedding", (tokens, data.draw(tensors(1, 3))), ()), sizes)
    other = TensorType(data.draw(floats), data.draw(partner(value.shape, sizes)))
    rule_alone(("torch.nn.functional.cosine_similarity", (value, other), (("dim", data.draw(axis)),)), sizes)


# --- moving elements ---------------------------------------------------------------------------------------------


@st.composite
def targets(draw: st.DrawFn, shape: tuple[Dim, ...], sizes: dict[str, int]) -> tuple[Dim, ...]:
    """A shape of as many elements, most of the time: axes merged, cut, or written as numbers."""
    result: list[Dim] = []
    for dim in shape:
        how = draw(st.sampled_from(["keep", "keep", "merge", "cut", "number", "one"]))
        number = dims.evaluate(dim, sizes)
        if how == "merge" and result:
            result[-1] = dims.multiply(result[-1], dim)
        elif how == "cut" and number % 2 == 0 and isinstance(dim, int):
            result += [2, number // 2]
        elif how == "number":
            result.append(number)
        else:
            result += [dim] if how != "one" else [1, dim]
    if result and draw(st.booleans()):
        result[draw(st.integers(0, len(result) - 1))] = -1
    if draw(st.integers(0, 6)) == 0:
        result.append(draw(st.sampled_from([2, -1, -2, 3])))
    return tuple(result)


@settings(SETTINGS, max_examples=250)
@given(st.data(), sizes_strategy)
def test_reshape(data: st.DataObject, sizes: dict[str, int]) -> None:
    value = data.draw(tensors())
    rule_alone(("torch.reshape", (value, data.draw(targets(value.shape, sizes))), ()), sizes)


@settings(SETTINGS, max_examples=250)
@given(st.data(), sizes_strategy)
def test_moving(data: st.DataObject, sizes: dict[str, int]) -> None:
    value = data.draw(tensors())
    one, two = data.draw(axis), data.draw(axis)
    some = tuple(data.draw(st.lists(axis, max_size=4)))
    order = tuple(data.draw(st.permutations(range(value.ndim))))
    wide: list[Dim] = [*data.draw(shapes(0, 2)), *value.shape]
    for place in range(len(wide)):
        how = data.draw(st.sampled_from(["keep", "keep", "minus", "number", "other"]))
        wide[place] = {
            "keep": wide[place],
            "minus": -1,
            "number": dims.evaluate(wide[place], sizes),
            "other": data.draw(one_dim),
        }[how]
    times = tuple(data.draw(st.lists(st.sampled_from([1, 1, 2, 0, -1, B]), max_size=5)))
    calls: list[CALL] = [
        ("torch.flatten", (value, one, two), ()),
        ("torch.flatten", (value,), ()),
        ("torch.ravel", (value,), ()),
        (
            "torch.unflatten",
            (value, one, data.draw(st.sampled_from([(2, -1), (1, -1), (3, 2), (-1,), (2, 3)]))),
            (),
        ),
        ("torch.transpose", (value, one, two), ()),
        ("torch.permute", (value, order), ()),
        ("torch.permute", (value, some), ()),
        ("torch.movedim", (value, one, two), ()),
        ("torch.movedim", (value, some[:2], some[2:]), ()),
        ("torch.unsqueeze", (value, one), ()),
        ("torch.squeeze", (value, one), ()),
        ("torch.squeeze", (value,), ()),
        ("torch.squeeze", (value, some), ()),
        ("torch.t", (value,), ()),
        ("torch.adjoint", (value,), ()),
        ("torch.atleast_1d", (value,), ()),
        ("torch.atleast_2d", (value,), ()),
        ("torch.atleast_3d", (value,), ()),
        ("torch.Tensor.expand", (value, tuple(wide)), ()),
        ("torch.broadcast_to", (value, tuple(wide)), ()),
        ("torch.Tensor.repeat", (value, times), ()),
        ("torch.tile", (value, times), ()),
        ("torch.Tensor.expand_as", (value, TensorType(DType.BOOL, tuple(d for d in wide if d != -1))), ()),
        (
            "torch.broadcast_tensors",
            (value, TensorType(DType.BOOL, data.draw(partner(value.shape, sizes)))),
            (),
        ),
        ("torch.Tensor.view_as", (value, TensorType(DType.BOOL, tuple(reversed(value.shape)))), ()),
    ]
    rule_alone(data.draw(st.sampled_from(calls)), sizes)


# --- products and patterns ---------------------------------------------------------------------------------------

PRODUCTS = [name for name in FUNCTIONS if FUNCTIONS[name].kind is Kind.PRODUCT and rule_for(FUNCTIONS[name])]


@settings(SETTINGS, max_examples=250)
@given(st.data(), sizes_strategy)
def test_products(data: st.DataObject, sizes: dict[str, int]) -> None:
    dtype = data.draw(dtypes)
    other = dtype if data.draw(st.integers(0, 4)) else data.draw(dtypes)
    i, j, k = (data.draw(one_dim) for _ in range(3))
    j2 = j if data.draw(st.integers(0, 3)) else dims.evaluate(j, sizes)
    batch = data.draw(shapes(0, 2))
    other_batch = data.draw(st.one_of(partner(batch, sizes), st.just(batch)))
    left, right = TensorType(dtype, (*batch, i, j)), TensorType(other, (*other_batch, j2, k))
    added = TensorType(dtype, data.draw(partner((*batch, i, k), sizes)))
    vector = TensorType(other, (j2,))
    calls: list[CALL] = [
        ("torch.matmul", (left, right), ()),
        ("torch.matmul", (left, vector), ()),
        ("torch.matmul", (vector, right), ()),
        ("torch.linalg.matmul", (left, right), ()),
        ("torch.bmm", (left, right), ()),
        ("torch.mm", (left, right), ()),
        ("torch.mv", (left, vector), ()),
        ("torch.dot", (vector, TensorType(dtype, (j,))), ()),
        ("torch.outer", (vector, TensorType(dtype, (i,))), ()),
        ("torch.inner", (left, TensorType(other, (k, j2))), ()),
        ("torch.tensordot", (left, right, data.draw(st.integers(0, 2))), ()),
        ("torch.addmm", (added, left, right), ()),
        ("torch.baddbmm", (added, left, right), ()),
        ("torch.addbmm", (added, left, right), ()),
        ("torch.addmv", (added, left, vector), ()),
        ("torch.addr", (added, vector, TensorType(dtype, (k,))), ()),
        ("torch.nn.functional.linear", (left, TensorType(other, (k, j2))), ()),
        ("torch.nn.functional.linear", (left, TensorType(other, (k, j2)), TensorType(other, (k,))), ()),
    ]
    rule_alone(data.draw(st.sampled_from(calls)), sizes)


@settings(SETTINGS, max_examples=200)
@given(st.data(), sizes_strategy)
def test_einsum(data: st.DataObject, sizes: dict[str, int]) -> None:
    letters = {letter: data.draw(one_dim) for letter in "abcd"}
    dots = data.draw(shapes(0, 2))
    terms: list[str] = []
    values: list[TensorType] = []
    dtype = data.draw(floats)
    for _ in range(data.draw(st.integers(1, 3))):
        term = data.draw(st.lists(st.sampled_from("abcd"), max_size=3).map("".join))
        shape = [letters[letter] for letter in term]
        shape = [
            dim
            if data.draw(st.integers(0, 4))
            else data.draw(st.sampled_from([1, dims.evaluate(dim, sizes), 5]))
            for dim in shape
        ]
        if data.draw(st.integers(0, 3)) == 0:
            term, shape = "..." + term, [*dots, *shape]
        terms.append(term)
        values.append(TensorType(dtype, tuple(shape)))
    used = sorted({letter for term in terms for letter in term if letter.isalpha()})
    equation = ",".join(terms)
    if data.draw(st.booleans()):
        out = data.draw(st.lists(st.sampled_from(used), unique=True)) if used else []
        equation += "->" + ("..." if "..." in equation else "") + "".join(out)
    rule_alone(("torch.einsum", (equation, *values), ()), sizes)


EINOPS: list[CALL] = [
    ("einops.rearrange", (TensorType(DType.FLOAT32, (B, P, 6)), pattern), kwargs)
    for pattern, kwargs in [
        ("b p d -> b d p", ()),
        ("b p (h k) -> b h p k", (("h", 2),)),
        ("b p (h k) -> b h p k", (("h", 4),)),
        ("b p (h k) -> (b h) p k", (("k", 3),)),
        ("b p d -> (b p) d", ()),
        ("b p d -> b p d 1", ()),
        ("b p d -> b p", ()),
        ("b ... -> ... b", ()),
        ("... d -> ... 1 d", ()),
        ("b (p q) d -> b p q d", (("q", 2),)),
        ("b p -> p b", ()),
        ("b p d -> b p d", (("p", 3),)),
        ("b p d -> b p d", (("x", 3),)),
        ("b p d -> b p (d e)", (("e", 3),)),
        ("(b c) p d -> b c p d", (("c", 1),)),
        ("b p d -> d ...", ()),
        ("b p d", ()),
    ]
] + [
    ("einops.reduce", (TensorType(DType.FLOAT32, (B, P, 6)), pattern, how), kwargs)
    for pattern, how, kwargs in [
        ("b p d -> b d", "mean", ()),
        ("b p (h k) -> b p h", "sum", (("h", 2),)),
        ("b p d -> b p 1", "max", ()),
        ("b p d -> b p ()", "max", ()),
        ("b p d -> ", "sum", ()),
        ("... d -> ...", "prod", ()),
        ("b p d -> b x", "sum", ()),
        ("b p d -> b", "median", ()),
    ]
] + [
    ("einops.repeat", (TensorType(DType.FLOAT32, (B, P, 6)), pattern), kwargs)
    for pattern, kwargs in [
        ("b p d -> b p h d", (("h", 4),)),
        ("b p d -> (b h) p d", (("h", 4),)),
        ("b p d -> b p (d h)", (("h", 4),)),
        ("b p d -> b p d h", ()),
        ("b p d -> b p (2 d)", ()),
    ]
] + [
    ("einops.einsum", (TensorType(DType.FLOAT32, (B, P, 6)), TensorType(DType.FLOAT32, shape), pattern), ())
    for shape, pattern in [
        ((6, 4), "b p d, d k -> b p k"),
        ((5, 4), "b p d, d k -> b p k"),
        ((B, P, 6), "b p d, b q d -> b p q"),
        ((B, P, 6), "b p d, b p d -> b"),
        ((B, 6), "b p d, b d -> b p"),
        ((6,), "b p d, b d -> b p"),
        ((6,), "b p d, d -> b p z"),
    ]
]  # fmt: skip


@pytest.mark.parametrize("call", EINOPS, ids=lambda call: str(call[1][-1]))
@pytest.mark.parametrize("sizes", [{"B": 1, "P": 3}, {"B": 2, "P": 4}])
def test_einops(call: CALL, sizes: dict[str, int]) -> None:
    rule_alone(call, sizes)


def test_einops_of_several_tensors() -> None:
    value = TensorType(DType.FLOAT32, (B, P, 6))
    rule_alone(("einops.rearrange", ((value, value, value), "n b p d -> b p n d"), ()), {"B": 2, "P": 3})
    rule_alone(
        ("einops.rearrange", ((value, TensorType(DType.FLOAT32, (2, 3, 6))), "n b p d -> b p (n d)"), ()),
        {"B": 2, "P": 3},
    )
