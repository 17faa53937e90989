"""Which calls mix positions: a table, and brute force (what does not mix commutes with reordering and padding)."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tracelens.errors import TracelensError
from tracelens.ir import dims
from tracelens.ir.abstract import AbstractArg, AbstractKwargs, tensors_in
from tracelens.ir.dims import Dim, Sym
from tracelens.ir.infer import infer_call, resolve, torch_dtype
from tracelens.ir.types import DType, TensorType, parse_type

B, P = dims.B, dims.P
CALL = tuple[str, tuple[AbstractArg, ...], AbstractKwargs]


def typed(arg: object) -> AbstractArg:
    """``"f32[B,P]"`` as a type, also inside tuples; everything else as it is."""
    if isinstance(arg, tuple):
        return tuple(typed(part) for part in arg)
    return parse_type(arg) if isinstance(arg, str) and "[" in arg else arg


H = "f32[B,P,8]"
MASK = "bool[B,P]"
PATTERN = "f32[B,9,P,S]"

KEEPS: list[tuple[str, tuple[object, ...]]] = [
    ("torch.add", (H, H)),
    ("torch.mul", (H, "f32[8]")),
    ("torch.mul", (H, "f32[B,1,8]")),
    ("torch.where", ("bool[B,P,1]", H, 0.0)),
    ("torch.sub", ("f32[B,P,1]", "f32[B,1,P]")),
    ("torch.add", (H, "f32[1,P,8]")),  # a table of positions, the same for every row
    ("torch.nn.functional.gelu", (H,)),
    ("torch.softmax", (H, -1)),
    ("torch.mean", (H, -1)),
    ("torch.mean", ("f32[B,8]", 0)),
    ("torch.mean", ("f32[B,8]",)),
    ("torch.topk", (H, 3)),
    ("torch.sort", (H, -1)),
    ("torch.cumsum", (H, 2)),
    ("torch.flip", (H, (2,))),
    ("torch.cat", ((H, H), -1)),
    ("torch.stack", ((H, H), 0)),
    ("torch.nn.functional.linear", (H, "f32[4,8]", "f32[4]")),
    ("torch.nn.functional.layer_norm", (H, (8,))),
    ("torch.matmul", (H, "f32[8,4]")),
    ("torch.matmul", (H, "f32[B,8,P]")),
    ("torch.einsum", ("bpd,dk->bpk", H, "f32[8,4]")),
    ("torch.einsum", ("bpd,bqd->bpq", H, H)),
    ("torch.einsum", ("bpd,bpd->bp", H, H)),
    ("torch.transpose", (H, 1, 2)),
    ("torch.transpose", (H, 0, 1)),
    ("torch.permute", (H, (2, 0, 1))),
    ("torch.unsqueeze", (H, 1)),
    ("torch.reshape", (H, (B, P, 2, 4))),
    ("torch.flatten", ("f32[B,P,2,4]", 2)),
    ("torch.unbind", (H, -1)),
    ("torch.split", (H, 4, -1)),
    ("torch.select", (H, -1, 0)),
    ("torch.select", (H, 1, -1)),
    ("torch.narrow", (H, 1, -1, 1)),
    ("torch.Tensor.repeat", (H, (1, 1, 2))),
    ("torch.Tensor.expand", ("f32[B,1,8]", (B, P, 8))),
    ("torch.gather", (H, -1, "i64[B,P,3]")),
    ("torch.nn.functional.embedding", ("i64[B,P]", "f32[50,8]")),
    ("torch.index_select", (H, -1, "i64[3]")),
    ("torch.isin", ("i64[B,P]", "i64[3]")),
    ("torch.nn.functional.cosine_similarity", (H, "f32[8]", -1)),
    ("torch.nn.functional.pad", (H, (1, 1))),
    ("einops.rearrange", (H, "b p d -> b d p")),
    ("einops.reduce", (H, "b p d -> b p", "mean")),
    ("einops.repeat", (H, "b p d -> b h p d", {"h": 3})),
    ("tracelens.masked_mean", (H, MASK)),
    ("torch.softmax", (PATTERN, -1)),  # keys that are padding have no weight
    ("torch.sum", (PATTERN, -1)),
    ("torch.amax", (PATTERN, -1)),
    ("torch.matmul", (PATTERN, "f32[B,9,S,4]")),
]  # fmt: skip

MIXES: list[tuple[str, tuple[object, ...]]] = [
    ("torch.mean", (H, 1)),
    ("torch.mean", (H,)),
    ("torch.mean", (H, (0, 1))),
    ("torch.mean", (H, 0)),  # positions of different rows
    ("torch.max", (H,)),
    ("torch.argmax", (MASK.replace("bool", "f32"), -1)),
    ("torch.softmax", (H, 1)),
    ("torch.cumsum", (H, 1)),
    ("torch.sort", (H, 1)),
    ("torch.topk", (H, 3, 1)),
    ("torch.flip", (H, (1,))),
    ("torch.flip", (H, (0,))),
    ("torch.roll", (H, 1, 1)),
    ("torch.roll", (H, 1)),
    ("torch.cat", ((H, H), 1)),
    ("torch.cat", ((H, H), 0)),
    ("torch.matmul", ("f32[B,8,P]", H)),
    ("torch.einsum", ("bpd,bpd->bd", H, H)),
    ("torch.einsum", ("bpd->pd", H)),
    ("torch.einsum", ("bpp->bp", "f32[B,P,P]")),
    ("torch.einsum", ("bpd,cpd->bcp", H, H)),  # rows meet rows
    ("torch.sub", ("f32[1,B,P]", "f32[B,1,P]")),
    ("torch.flatten", (H,)),
    ("torch.flatten", (H, 0, 1)),
    ("torch.reshape", (H, (-1, 8))),
    ("torch.unbind", (H, 1)),
    ("torch.unbind", (H, 0)),
    ("torch.split", (H, 4, 1)),
    ("torch.select", (H, 1, 0)),
    ("torch.select", (H, 0, -1)),
    ("torch.narrow", (H, 1, 0, 1)),
    ("torch.Tensor.repeat", (H, (1, 2, 1))),
    ("torch.Tensor.repeat", (H, (2, 1, 1))),
    ("torch.gather", (H, 1, "i64[B,3,8]")),
    ("torch.index_select", (H, 1, "i64[3]")),
    ("torch.nn.functional.layer_norm", (H, (7, 8))),
    ("torch.nn.functional.pad", (H, (0, 0, 1, 0))),
    ("torch.tril", (H,)),
    ("torch.cdist", (H, H)),
    ("torch.diff", (H, 1, 1)),
    ("torch.nn.functional.conv1d", (H.replace("P,8", "8,P"), "f32[4,8,3]")),
    ("torch.isin", ("i64[B,P]", "i64[B,P]")),
    ("einops.rearrange", (H, "b p d -> (b p) d")),
    ("einops.reduce", (H, "b p d -> b d", "mean")),
    ("einops.repeat", (H, "b p d -> (b h) p d", {"h": 3})),
    ("tracelens.masked_mean", (H, "bool[2,7]")),
    ("torch.mean", (PATTERN, -1)),
    ("torch.argmax", (PATTERN, -1)),
    ("torch.topk", (PATTERN, 2)),
    ("torch.flip", (PATTERN, (-1,))),
]  # fmt: skip


def split_named(args: tuple[object, ...]) -> tuple[tuple[AbstractArg, ...], AbstractKwargs]:
    named = args[-1] if args and isinstance(args[-1], dict) else {}
    plain = args[:-1] if named else args
    return tuple(typed(arg) for arg in plain), tuple(named.items())


@pytest.mark.parametrize(
    ("name", "args", "mixes"), [(*row, False) for row in KEEPS] + [(*row, True) for row in MIXES], ids=str
)
def test_table(name: str, args: tuple[object, ...], mixes: bool) -> None:
    plain, named = split_named(args)
    assert infer_call(name, plain, named, {"B": 2, "P": 7, "S": 7}).mixes is mixes


# --- brute force -------------------------------------------------------------------------------------------------


def fill(type_: TensorType, sizes: dict[str, int], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = type_.sizes(sizes)
    if type_.dtype.is_floating:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(torch_dtype(type_.dtype))
    return torch.randint(0, 2, shape, generator=generator).to(torch_dtype(type_.dtype))


def reorder(value: torch.Tensor, shape: tuple[Dim, ...], orders: torch.Tensor) -> torch.Tensor:
    """Positions in another order, row by row where there are rows: ``orders`` is [B, P]."""
    rows = [axis for axis, dim in enumerate(shape) if dim == B]
    for axis, dim in enumerate(shape):
        if dim != P:
            continue
        index_shape = [1] * value.ndim
        index_shape[axis] = value.shape[axis]
        if rows:
            index_shape[rows[0]] = value.shape[rows[0]]
            index = (orders if rows[0] < axis else orders.T).reshape(index_shape)
        else:
            index = orders[0].reshape(index_shape)
        value = torch.take_along_dim(
            value, index.expand([*value.shape[:axis], index.shape[axis], *value.shape[axis + 1 :]]), axis
        )
    return value


def run(call: CALL, sizes: dict[str, int], tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    queue = list(tensors)

    def concrete(arg: AbstractArg) -> object:
        if isinstance(arg, TensorType):
            return queue.pop(0)
        if isinstance(arg, Sym):
            return dims.evaluate(arg, sizes)
        if isinstance(arg, DType):
            return torch_dtype(arg)
        return tuple(concrete(part) for part in arg) if isinstance(arg, tuple) else arg

    name, args, kwargs = call
    plain = [concrete(arg) for arg in args]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = resolve(name)(*plain, **{key: concrete(value) for key, value in kwargs})
    return [result] if isinstance(result, torch.Tensor) else list(result)


def check_by_force(call: CALL, sizes: dict[str, int]) -> bool:
    """True if the call does not mix and has been seen not to."""
    name, args, kwargs = call
    try:
        inferred = infer_call(name, args, kwargs, sizes)
    except TracelensError:
        return False
    types = tensors_in((*args, *(value for _, value in kwargs)))
    if inferred.mixes or not any(P in type_.shape for type_ in types):
        return False
    values = [fill(type_, sizes, seed) for seed, type_ in enumerate(types)]
    try:
        before = run(call, sizes, values)
    except (RuntimeError, IndexError):  # an index that is too large for its axis
        return False
    # Every row in an order of its own, unless a table of positions is the same for all rows.
    shared = any(P in type_.shape and B not in type_.shape for type_ in types)
    generator = torch.Generator().manual_seed(7)
    orders = torch.stack([torch.randperm(sizes["P"], generator=generator) for _ in range(sizes["B"])])
    orders = orders[:1].expand_as(orders) if shared else orders
    after = run(
        call, sizes, [reorder(value, type_.shape, orders) for value, type_ in zip(values, types, strict=True)]
    )
    for one, other, type_ in zip(before, after, inferred.types, strict=True):
        torch.testing.assert_close(
            reorder(one, type_.shape, orders), other, rtol=1e-6, atol=1e-9, equal_nan=True, msg=str(call)
        )
    return True


sizes_strategy = st.fixed_dictionaries({"B": st.integers(1, 3), "P": st.sampled_from([2, 3, 4])})
one_dim: st.SearchStrategy[Dim] = st.sampled_from([P, P, B, 1, 2, 3, 4])
shapes = st.one_of(
    st.sampled_from([(B, P, 4), (B, P), (B, P, 2, 2), (B, 2, P, P), (B, 2, P, 3), (P, B, 4)]),
    st.lists(one_dim, min_size=1, max_size=4).map(tuple),
)
values = st.builds(TensorType, st.just(DType.FLOAT64), shapes)
axis = st.integers(-4, 3)


@st.composite
def calls(draw: st.DrawFn) -> CALL:
    value = draw(values)
    dim = draw(axis)
    other_shape = [draw(st.sampled_from([size, size, 1])) for size in value.shape]
    other = TensorType(DType.FLOAT64, tuple(other_shape[draw(st.integers(0, len(other_shape))) :]))
    order = tuple(draw(st.permutations(range(value.ndim))))
    second = draw(values)
    index = list(value.shape)
    if index:
        index[dim % len(index)] = draw(st.sampled_from([P, 1, 3]))
    merged: list[Dim] = []
    for size in value.shape:
        if merged and draw(st.booleans()):
            merged[-1] = dims.multiply(merged[-1], size)
        else:
            merged.append(size)
    letters = draw(st.permutations("abcde"))
    left = "".join(letters[: value.ndim])
    right = "".join(draw(st.lists(st.sampled_from(letters), min_size=second.ndim, max_size=second.ndim)))
    out = "".join(letter for letter in sorted({*left, *right}) if draw(st.booleans()))
    name, args = draw(
        st.sampled_from(
            [
                *((f"torch.{name}", (value, dim)) for name in
                  ("sum", "mean", "amax", "argmax", "max", "softmax", "cumsum", "sort", "argsort", "unbind", "squeeze",
                   "unsqueeze", "logsumexp", "std", "median", "cummax", "norm", "diff", "select")),
                ("torch.add", (value, other)),
                ("torch.add", (value, second)),
                ("torch.where", (TensorType(DType.BOOL, other.shape), value, second)),
                ("torch.topk", (value, 1, dim)),
                ("torch.flip", (value, (dim,))),
                ("torch.roll", (value, 1, dim)),
                ("torch.cat", ((value, value), dim)),
                ("torch.stack", ((value, second), dim)),
                ("torch.permute", (value, order)),
                ("torch.reshape", (value, tuple(merged))),
                ("torch.reshape", (value, (*merged[:1], -1))),
                ("torch.reshape", (value, tuple(value.shape[place] for place in order))),
                ("torch.flatten", (value, dim, -1)),
                ("torch.matmul", (value, second)),
                ("torch.matmul", (value, TensorType(DType.FLOAT64, (*value.shape[:-2], *value.shape[-2:][::-1])))),
                ("torch.einsum", (f"{left},{right}->{out}", value, second)),
                ("torch.inner", (value, second)),
                ("torch.tensordot", (value, second, 1)),
                ("torch.gather", (value, dim, TensorType(DType.INT64, tuple(index)))),
                ("torch.index_select", (value, dim, TensorType(DType.INT64, (draw(st.sampled_from([2, P])),)))),
                ("torch.scatter_add", (value, dim, TensorType(DType.INT64, tuple(index)), value)),
                ("torch.split", (value, 2, dim)),
                ("torch.Tensor.repeat", (value, tuple(draw(st.sampled_from([1, 1, 2])) for _ in value.shape))),
                ("torch.tril", (value,)),
                ("torch.cdist", (value, second)),
                ("torch.nn.functional.layer_norm", (value, (4,))),
                ("torch.nn.functional.normalize", (value, 2.0, dim)),
                ("torch.nn.functional.cosine_similarity", (value, other, dim)),
                ("torch.nn.functional.pad", (value, (1, 0))),
                ("torch.linalg.vecdot", (value, second)),
                ("torch.take_along_dim", (value, TensorType(DType.INT64, tuple(index)), dim)),
                ("torch.fft.rfft", (value,)),
                ("torch.quantile", (value, 0.5, dim)),
                ("torch.kron", (value, second)),
                ("torch.outer", (value, second)),
                ("torch.diag_embed", (value,)),
            ]
        )
    )  # fmt: skip
    return name, args, ()


@settings(
    max_examples=1500,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
@given(calls(), sizes_strategy)
def test_what_does_not_mix_commutes_with_reordering(call: CALL, sizes: dict[str, int]) -> None:
    # The last position is the last one whatever stands before it, but not in another order.
    assume(not (call[0] == "torch.select" and call[1][1:2] != ()))
    check_by_force(call, sizes)


def test_the_table_commutes_with_reordering() -> None:
    seen = 0
    for name, args in KEEPS:
        if name in ("torch.select", "torch.narrow") or "S]" in str(args) or "S," in str(args):
            continue
        plain, named = split_named(args)
        seen += check_by_force((name, plain, named), {"B": 3, "P": 4})
    assert seen > 35


@pytest.mark.parametrize(("name", "args"), [row for row in KEEPS if "S" not in str(row[1])], ids=str)
def test_the_table_is_blind_to_padding(name: str, args: tuple[object, ...]) -> None:
    """More positions on the left, with anything in them, change nothing for those that were there."""
    plain, named = split_named(args)
    inferred = infer_call(name, plain, named, None)
    assert not inferred.pins
    few, many = {"B": 2, "P": 3}, {"B": 2, "P": 5}
    types = tensors_in((*plain, *(value for _, value in named)))
    padded = [fill(type_, many, seed) for seed, type_ in enumerate(types)]
    if name == "tracelens.masked_mean":
        padded[1][:, :2] = False
        padded[1][:, -1] = True
    cut = [without_padding(value, type_, 2) for value, type_ in zip(padded, types, strict=True)]
    for one, other, type_ in zip(
        run((name, plain, named), many, padded),
        run((name, plain, named), few, cut),
        inferred.types,
        strict=True,
    ):
        torch.testing.assert_close(without_padding(one, type_, 2), other, rtol=1e-5, atol=1e-6)


def without_padding(value: torch.Tensor, type_: TensorType, count: int) -> torch.Tensor:
    for place, dim in enumerate(type_.shape):
        if dim == P:
            value = value.narrow(place, count, value.shape[place] - count)
    return value
