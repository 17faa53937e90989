"""What a function makes of the parts that ranks have of its operands is what it makes of the whole tensors.

Every function that may run on parts has calls here, and each is made with every operand, and every pair of operands,
in parts along every axis, on two, three and four ranks. Sizes do not divide evenly throughout, and with four ranks one
has nothing.
"""

from __future__ import annotations

import itertools
import re
import warnings
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import pytest
import torch

from tracelens.errors import ForbiddenFunctionError, TracelensError
from tracelens.ir.functions import FUNCTIONS, Kind
from tracelens.ir.infer import infer_call, resolve, torch_dtype
from tracelens.ir.layout import WHOLE_EVERYWHERE, Joined, Layout, Partial, Shard, owned
from tracelens.ir.ops import Call, Ref
from tracelens.ir.types import DType, TensorType, parse_type
from tracelens.sharding_rules import RULED, Choice, on_parts
from tracelens.simulate import join, split

RANKS = (2, 3, 4)
POINTWISE = sorted(
    name for name, entry in FUNCTIONS.items() if entry.kind is Kind.POINTWISE and name not in RULED
)

# --- calls -------------------------------------------------------------------------------------------------------

# A tensor is written as its type, and "=0" is the first one again; a trailing dict holds keyword arguments.
X, Y, Z = "f32[4,6,5]", "f32[4,6,5]", "f32[4,6,5]"
ROW, COLUMN, NONE = "f32[5]", "f32[6,1]", "f32[]"
N, M, BITS = "i64[4,6,5]", "i64[6,1]", "bool[4,6,5]"
C = "c64[4,6,5]"
Sample = tuple[Any, ...]

# Each function that works element by element makes those of these calls that torch knows.
FORMS: tuple[Sample, ...] = (
    (X,),
    ("bf16[4,6,5]",),
    ("f32[4,1,5]",),
    (N,),
    (BITS,),
    (C,),
    (X, Y),
    (X, "=0"),
    (X, COLUMN),
    (ROW, X),
    (COLUMN, ROW),
    (X, NONE),
    (X, N),
    (N, N),
    (N, M),
    (BITS, BITS),
    (N, BITS),
    (C, C),
    (X, 2),
    (X, 0.5),
    (N, 2),
    (2, X),
    (1, X),
    (X, Y, Z),
    (X, COLUMN, ROW),
    (BITS, X, ROW),
    ("bool[6,1]", X, 0.25),
    (X, BITS, 0.5),
    (X, "bool[5]", 0.5),
    (X, Y, 0.25),
    (X, -0.5, 0.5),
    (X, DType.FLOAT64),
    (N, DType.FLOAT32),
    (X, {"other": COLUMN}),
)
_MORE: dict[str, tuple[Sample, ...]] = {
    "torch.add": ((X, COLUMN, {"alpha": 2}),),
    "torch.sub": ((ROW, X, {"alpha": -3}),),
    "torch.div": ((X, COLUMN, {"rounding_mode": "floor"}),),
    "torch.clamp": ((X, {"min": COLUMN}), (X, {"max": 0.5}), (X, None, ROW)),
    "torch.addcmul": ((X, COLUMN, ROW, {"value": 0.5}),),
    "torch.addcdiv": ((X, COLUMN, ROW, {"value": 0.5}),),
    "torch.lerp": ((X, COLUMN, {"weight": 0.3}),),
    "torch.round": ((X, {"decimals": 1}),),
    "torch.nan_to_num": ((X, {"nan": 1.0}),),
    "torch.nn.functional.gelu": ((X, {"approximate": "tanh"}),),
    "torch.isclose": ((X, COLUMN, {"atol": 0.5}),),
    "torch.mvlgamma": (("f32[4,6,5]+9", 2),),
    "torch.special.multigammaln": (("f32[4,6,5]+9", 2),),
    "torch.zeros_like": ((X, {"dtype": DType.INT64}),),
}

_EACH_AXIS = (0, 1, 2, -1, -2, -3)


def _along(*rest: Any, of: str = X, **named: Any) -> tuple[Sample, ...]:
    """The call for every axis, given by position; ``rest`` comes before the axis."""
    more = (named,) if named else ()
    return tuple((of, *rest, dim, *more) for dim in _EACH_AXIS)


_REDUCED: tuple[Sample, ...] = (
    (X,),
    *_along(),
    *((X, dim, True) for dim in _EACH_AXIS),
    (X, {"dim": 1, "keepdim": True}),
    (X, {"axis": -1}),
)
_SEVERAL: tuple[Sample, ...] = ((X, (0, 2)), (X, (-1, 1), True), (X, {"dim": (1, 2)}), (X, (0, 1, 2)))
_SCANNED = (*_along(), (X, {"dim": -2}), (X, {"axis": 1}))
_SORTED = (*_along(), (X,), (X, {"dim": 1, "descending": True}), (N, {"dim": 1, "stable": True}))

RULES: dict[str, tuple[Sample, ...]] = {
    **dict.fromkeys(
        ("torch.sum", "torch.nansum"),
        (*_REDUCED, *_SEVERAL, (N,), (N, 1), (BITS, 1), (X, 1, {"dtype": DType.FLOAT64}), (NONE,)),
    ),
    "torch.mean": (*_REDUCED, *_SEVERAL, (N, 1, {"dtype": DType.FLOAT32})),
    "torch.nanmean": (*_REDUCED, *_SEVERAL, (X, 1, {"dtype": DType.FLOAT64})),
    "torch.prod": (*_REDUCED, (N, 1)),
    "torch.count_nonzero": ((X,), *_along(), (N, 1), (BITS, {"dim": (0, 1)})),
    **dict.fromkeys(("torch.amax", "torch.amin"), (*_REDUCED, *_SEVERAL, (N, 1), (BITS, 1))),
    **dict.fromkeys(("torch.max", "torch.min"), (*_REDUCED, (N,), (BITS,), (N, 1), (X, COLUMN), (ROW, X))),
    "torch.norm": (
        (X,),
        *((X, 2, dim) for dim in _EACH_AXIS),
        (X, "fro", (0, 2)),
        (X, 2.0, 1, True),
        (X, {"dim": 1}),
        (X, {"p": 1, "dim": 1}),
        (X, 3, 1),
        (X, 2, 1, {"dtype": DType.FLOAT64}),
        (C,),
    ),
    "torch.linalg.vector_norm": (
        (X,),
        *((X, 2, dim) for dim in _EACH_AXIS),
        (X, 2, (0, 2), True),
        (X, {"dim": 1}),
        (X, 1, 1),
        (X, 0.5, 1),
        (X, {"ord": float("inf"), "dim": 1}),
    ),
    **dict.fromkeys(("torch.all", "torch.any"), (*_REDUCED, (BITS, 1), (BITS,))),
    **dict.fromkeys(("torch.argmax", "torch.argmin"), (*_REDUCED, (N, 1))),
    **dict.fromkeys(("torch.logsumexp", "torch.special.logsumexp"), (*_REDUCED[1:], *_SEVERAL)),
    **dict.fromkeys(("torch.median", "torch.nanmedian"), _REDUCED),
    **dict.fromkeys(
        ("torch.std", "torch.var", "torch.std_mean", "torch.var_mean"),
        ((X,), *_along(), (X, (0, 2)), (X, 1, True, True), (X, {"dim": 1, "correction": 0, "keepdim": True})),
    ),
    **dict.fromkeys(
        ("torch.softmax", "torch.log_softmax", "torch.special.softmax", "torch.special.log_softmax"),
        (*_along(), (X, {"dim": 1}), (X, 1, {"dtype": DType.FLOAT64})),
    ),
    **dict.fromkeys(("torch.cumsum", "torch.cumprod"), (*_SCANNED, (N, 1), (X, 1, {"dtype": DType.FLOAT64}))),
    **dict.fromkeys(("torch.cummax", "torch.cummin", "torch.logcumsumexp"), _SCANNED),
    **dict.fromkeys(("torch.sort", "torch.argsort"), _SORTED),
    "torch.topk": (*_along(3), (X, 2), (X, 2, {"dim": 1, "largest": False}), (X, {"k": 3, "dim": -2})),
    "torch.flip": (*((X, (dim,)) for dim in _EACH_AXIS), (X, (0, 2)), (X, {"dims": (1,)}), (N, (-1, 1))),
    "torch.nn.functional.normalize": ((X,), (X, 2.0, 2), (X, 1.0, -3), (X, {"dim": -1, "eps": 1e-3})),
    "torch.nn.functional.glu": (("f32[4,6,8]",), ("f32[4,6,5]", 1), ("f32[4,6,5]", {"dim": 0})),
    "torch.diff": ((X,), (X, 1, 1), (X, 2, 0), (X, {"dim": -2}), (BITS, 1, 1)),
    "torch.roll": ((X, 2), *_along(2), (X, (1, -1), (0, 2)), (X, {"shifts": 1, "dims": 1})),
    "torch.narrow": ((X, 0, 1, 2), (X, 1, 2, 3), (X, -1, 0, 4), (X, {"dim": 1, "start": 1, "length": 4})),
    "torch.split": ((X, 2), (X, 2, 1), (X, (1, 4), -1), (X, 3, {"dim": 2})),
    "torch.split_with_sizes": ((X, (1, 3)), (X, (2, 4), 1), (X, (1, 4), {"dim": -1})),
    "torch.chunk": ((X, 2), (X, 4, 1), (X, 3, -1), (X, 2, {"dim": 2})),
    "torch.select": ((X, 0, 1), (X, 1, -1), (X, -1, 2), (X, {"dim": 1, "index": 3})),
    "torch.unbind": ((X,), (X, 1), (X, -1), (X, {"dim": 2})),
    "torch.kthvalue": (
        (X, 2),
        (X, 2, 0),
        (X, 2, 1, True),
        (X, 1, -1),
        (X, {"k": 2, "dim": 1, "keepdim": True}),
    ),
    "torch.mode": ((N,), (N, 0), (N, 1, True), (N, -1), (N, {"dim": 1, "keepdim": True})),
    "torch.cat": (
        ((X, Y),),
        ((X, Y), 1),
        ((X, "f32[4,6,2]"), -1),
        ((X, "=0", Z), 2),
        ((X, N), {"dim": 1}),
        ((X, Y), {"axis": 1}),
    ),
    "torch.stack": (
        ((X, Y),),
        ((X, Y), 1),
        ((X, Y), 2),
        ((X, Y, "=0"), 3),
        ((X, Y), -1),
        ((X, Y), {"dim": -2}),
    ),
    "torch.nn.functional.layer_norm": (
        (X, (5,)),
        (X, (6, 5)),
        (X, (5,), "f32[5]", "f32[5]"),
        (X, (5,), {"weight": "f32[5]", "eps": 1e-3}),
    ),
    "torch.nn.functional.rms_norm": (
        (X, (5,)),
        (X, (6, 5)),
        (X, (5,), "f32[5]", 1e-3),
        (X, {"normalized_shape": (5,)}),
    ),
    "torch.permute": ((X, (2, 0, 1)), (X, (-1, -3, -2)), (X, {"dims": (1, 0, 2)})),
    "torch.transpose": ((X, 0, 1), (X, 1, -1), (X, -1, -2), (X, {"dim0": 0, "dim1": 2}), (X, 1, 1)),
    "torch.t": (("f32[4,6]",), ("f32[5]",)),
    "torch.unflatten": (
        ("f32[4,12,5]", 1, (-1, 3)),
        ("f32[4,12,5]", 1, (-1, 4)),
        ("f32[4,12,5]", 1, (4, 3)),
        ("f32[4,12,5]", -2, (2, 3, 2)),
        ("f32[4,12,5]", 0, (-1, 2)),
        ("f32[4,12,5]", {"dim": 1, "sizes": (-1, 2, 3)}),
    ),
    "torch.unsqueeze": ((X, 0), (X, 1), (X, 3), (X, -1), (X, -4), (X, {"dim": 2})),
    "torch.squeeze": (
        ("f32[4,1,5]",),
        ("f32[4,1,5]", 1),
        ("f32[4,1,5]", (0, 1)),
        ("f32[1,6,1]", (0, -1)),
        ("f32[4,1,5]", {"dim": -2}),
    ),
    "torch.flatten": (
        (X,),
        (X, 1),
        (X, 0, 1),
        (X, -2),
        (X, {"start_dim": 1, "end_dim": 2}),
        (X, 1, 1),
        ("f32[2,12,3,2]", 1, 2),
        ("f32[2,12,3,2]", -3),
    ),
    **dict.fromkeys(
        ("torch.matmul", "torch.linalg.matmul"),
        (
            (X, "f32[5,3]"),
            (X, "f32[4,5,3]"),
            (X, "f32[5]"),
            ("f32[6]", X),
            ("f32[6]", "f32[6,3]"),
            ("f32[6]", "f32[6]"),
            ("f32[3,4,6,5]", "f32[4,5,2]"),
            ("f32[3,1,6,5]", "f32[4,5,2]"),
            ("f32[6,6]", "=0"),
            ("i64[4,6]", "i64[6,3]"),
            (X, {"other": "f32[5,3]"}),
            ("f32[4,1]", "f32[1,5]"),
        ),
    ),
    "torch.bmm": ((X, "f32[4,5,3]"), (X, {"mat2": "f32[4,5,3]"})),
    "torch.mm": (("f32[4,6]", "f32[6,5]"), ("i64[4,6]", "i64[6,5]")),
    "torch.mv": (("f32[4,6]", "f32[6]"), ("f32[4,6]", {"vec": "f32[6]"})),
    "torch.dot": (("f32[6]", "f32[6]"), ("i64[5]", "i64[5]"), ("f32[6]", "=0")),
    "torch.outer": (("f32[6]", "f32[5]"), ("f32[6]", {"vec2": "f32[5]"})),
    "torch.nn.functional.linear": (
        (X, "f32[3,5]"),
        (X, "f32[7,5]", "f32[7]"),
        (ROW, "f32[7,5]"),
        (X, "f32[5]"),
        (X, {"weight": "f32[7,5]", "bias": "f32[7]"}),
    ),
    "torch.einsum": (
        ("bij,bjk->bik", X, "f32[4,5,3]"),
        ("bij,cj->bic", X, "f32[3,5]"),
        ("b i j, k j -> k b", X, "f32[3,5]"),
        ("bij->ji", X),
        ("bij->", X),
        ("bij,bij->b", X, Y),
        ("bij,bij->b", X, "=0"),
        ("bij,j,i->b", X, "f32[5]", "f32[6]"),
        ("ij,kl->k", "f32[4,6]", "f32[5,3]"),
        ("ij,kj->i", "f32[4,6]", "f32[5,1]"),
        ("ii->i", "f32[6,6]"),
        ("bii,bk->bk", "f32[4,6,6]", "f32[4,5]"),
        ("...i,i->...", X, "f32[5]"),
    ),
    "torch.Tensor.to": ((X, DType.FLOAT64), (N, DType.FLOAT32), (X, {"dtype": DType.INT64})),
    "torch.Tensor.type_as": ((X, N), (ROW, "f64[4,6,5]"), (N, ROW), (X, "=0")),
    "tracelens.leaf": ((X,),),
    "tracelens.masked_mean": (("f32[B,P,5]", "bool[B,P]"), ("f32[B,P,5,3]", "bool[B,P]")),
}
# These move elements, and change none.
EXACT = re.compile(
    r"torch\.(sort|argsort|topk|flip|roll|narrow|split|chunk|select|unbind|cat|stack|permute|transpose)"
)


# --- the check ---------------------------------------------------------------------------------------------------


class Made(NamedTuple):
    op: Call
    tensors: Mapping[int, torch.Tensor]
    types: Mapping[int, TensorType]


_TYPE = re.compile(r"(\w+\[.*\])(?:\+(\d+))?")
SIZES = {"B": 4, "P": 6}


def made(name: str, sample: Sample) -> Made | None:
    """The call with tensors in it; ``None`` where torch knows no such call."""
    tensors: list[torch.Tensor] = []
    types: list[TensorType] = []
    random = torch.Generator().manual_seed(zlib.crc32(repr((name, sample)).encode()))

    def placed(arg: Any, symbolic: bool) -> Any:
        if isinstance(arg, tuple):
            return tuple(placed(part, symbolic) for part in arg)
        if not isinstance(arg, str):
            return arg
        if arg.startswith("="):
            number = int(arg[1:])
            return types[number] if symbolic else Ref(number)
        if (found := _TYPE.fullmatch(arg)) is None:
            return arg
        type_ = parse_type(found[1])
        types.append(type_)
        tensors.append(_filled(type_, random, int(found[2] or 0)))
        return type_ if symbolic else Ref(len(types) - 1)

    *args, last = sample
    named = last if isinstance(last, dict) else {}
    args = args if isinstance(last, dict) else [*args, last]
    given = tuple(placed(arg, True) for arg in args)
    with_names = tuple((key, placed(named[key], True)) for key in sorted(named))
    types.clear()
    tensors.clear()
    refs = tuple(placed(arg, False) for arg in args)
    named_refs = tuple((key, placed(named[key], False)) for key in sorted(named))
    try:
        inferred = infer_call(name, given, with_names, SIZES)
    except (TracelensError, TypeError):
        return None
    outs = tuple(range(len(types), len(types) + len(inferred.types)))
    call = Call(outs, inferred.types, name, refs, named_refs)
    return Made(call, dict(enumerate(tensors)), dict(enumerate(types)))


def _filled(type_: TensorType, random: torch.Generator, more: int) -> torch.Tensor:
    shape, dtype = type_.sizes(SIZES), torch_dtype(type_.dtype)
    if type_.dtype is DType.BOOL:
        return torch.rand(shape, generator=random) > 0.4
    if not dtype.is_floating_point and not dtype.is_complex:
        return torch.randint(-3, 6, shape, generator=random)
    return (
        torch.randn(shape, dtype=torch.complex64 if dtype.is_complex else torch.float32, generator=random).to(
            dtype
        )
        + more
    )


def called(op: Call, tensors: Mapping[int, torch.Tensor]) -> list[torch.Tensor]:
    def plain(arg: Any) -> Any:
        if isinstance(arg, Ref):
            return tensors[arg.id]
        if isinstance(arg, tuple):
            return tuple(map(plain, arg))
        return torch_dtype(arg) if isinstance(arg, DType) else arg

    result = resolve(op.function)(*map(plain, op.args), **{key: plain(arg) for key, arg in op.kwargs})
    return [result] if isinstance(result, torch.Tensor) else list(result)


def spread(one: Made) -> Iterator[dict[int, Layout]]:
    """Every operand, and every pair of them, in parts along every axis."""
    axes = {number: range(type_.ndim) for number, type_ in one.types.items()}
    for count in (1, 2):
        for chosen in itertools.combinations(axes, count):
            for dims in itertools.product(*(axes[number] for number in chosen)):
                parts = dict(zip(chosen, map(Shard, dims), strict=True))
                yield {number: parts.get(number, WHOLE_EVERYWHERE) for number in axes}


def check_on_parts(one: Made, choice: Choice, ranks: int, wanted: list[torch.Tensor]) -> None:
    """The choice is kept: every rank's results have the shapes of their layouts, and together they are the whole."""
    op = one.op
    assert choice.needs.keys() == one.types.keys()
    assert any(isinstance(layout, Shard) for layout in choice.needs.values())
    assert len(choice.gives) == len(wanted)
    given = {number: split(one.tensors[number], layout, ranks) for number, layout in choice.needs.items()}
    on_ranks = [called(op, {number: parts[rank] for number, parts in given.items()}) for rank in range(ranks)]
    for number, (whole, layout) in enumerate(zip(wanted, choice.gives, strict=True)):
        parts = [results[number] for results in on_ranks]
        for rank, part in enumerate(parts):
            shape = list(whole.shape)
            if isinstance(layout, Shard):
                start, end = owned(shape[layout.dim], ranks, rank)
                shape[layout.dim] = end - start
            assert list(part.shape) == shape, f"rank {rank} has {list(part.shape)} of {layout}"
            assert part.dtype is whole.dtype
        together = join(parts, layout)
        if EXACT.match(op.function) or not (whole.is_floating_point() or whole.is_complex()):
            torch.testing.assert_close(together, whole, rtol=0, atol=0, equal_nan=True)
        else:
            rtol = 2e-2 if whole.dtype is torch.bfloat16 else 1e-5
            torch.testing.assert_close(together, whole, rtol=rtol, atol=1e-5, equal_nan=True)


def ran_on_parts(name: str, samples: tuple[Sample, ...], *, all_known: bool) -> int:
    """How many times a function ran on parts; each was right."""
    count = 0
    for sample in samples:
        one = made(name, sample)
        if one is None:
            assert not all_known, f"{name} is not called so: {sample}"
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                wanted = called(one.op, one.tensors)
            except (RuntimeError, TypeError):  # of dtypes that the CPU lacks
                assert not all_known
                continue
            for layouts, ranks in itertools.product(spread(one), RANKS):
                choice = on_parts(one.op, layouts, one.types, ranks)
                if choice is None:
                    continue
                try:
                    check_on_parts(one, choice, ranks, wanted)
                except Exception as error:
                    raise AssertionError(
                        f"{name}{sample} with {layouts} on {ranks} ranks: {error}"
                    ) from error
                count += 1
    return count


def _here(name: str) -> bool:
    try:
        resolve(name)
    except ForbiddenFunctionError:
        return False
    return True


@pytest.mark.parametrize("name", [name for name in POINTWISE if _here(name)])
def test_a_function_of_elements_works_on_parts(name: str) -> None:
    assert ran_on_parts(name, FORMS, all_known=False) >= 9
    if name in _MORE:
        assert ran_on_parts(name, _MORE[name], all_known=True)


@pytest.mark.parametrize("name", sorted(RULED))
def test_a_function_with_a_rule_works_on_parts(name: str) -> None:
    assert ran_on_parts(name, RULES[name], all_known=True)


MUST_GATHER: tuple[tuple[str, Sample, int], ...] = (
    # On axis 1 each rank knows a stretch alone; what comes before or after it decides.
    ("torch.cumsum", (X, 1), 1),
    ("torch.cumsum", (X, -2), 1),
    ("torch.cumsum", (X, {"dim": 1}), 1),
    *((name, (X, 1), 1) for name in ("torch.cumprod", "torch.cummax", "torch.cummin", "torch.logcumsumexp")),
    *(
        (name, (X, 1), 1)
        for name in ("torch.sort", "torch.argsort", "torch.median", "torch.std", "torch.prod")
    ),
    ("torch.flip", (X, (0, 1)), 1),
    ("torch.roll", (X, 1, 1), 1),
    ("torch.roll", (X, 1), 1),
    ("torch.diff", (X, 1, 1), 1),
    ("torch.narrow", (X, 1, 2, 3), 1),
    ("torch.cat", ((X, Y), 1), 1),
    ("torch.squeeze", ("f32[4,2,5]",), 1),
    ("torch.flatten", (X, 0, 1), 1),
    ("torch.nn.functional.layer_norm", (X, (6, 5)), 1),
    ("torch.norm", (X, 1, 1), 1),
    ("torch.mean", (X, 2), 2),  # five do not divide evenly: stretches of two lengths have no mean of means
    ("torch.max", (X, 1), 1),
    ("torch.cumulative_trapezoid", (X,), 2),
    ("torch.gather", (X, 1, "i64[4,2,5]"), 1),
)


@pytest.mark.parametrize(("name", "sample", "axis"), MUST_GATHER)
def test_what_needs_the_whole_axis_is_given_the_whole(name: str, sample: Sample, axis: int) -> None:
    one = made(name, sample)
    assert one is not None
    layouts: dict[int, Layout] = {**dict.fromkeys(one.types, WHOLE_EVERYWHERE), 0: Shard(axis)}
    assert on_parts(one.op, layouts, one.types, 2) is None


def test_a_sum_of_parts_is_joined_and_a_rank_without_elements_is_not_asked_for_its_largest() -> None:
    for name, joined in (("torch.sum", Joined.SUM), ("torch.amax", Joined.MAX), ("torch.amin", Joined.MIN)):
        one = made(name, (X, 2))
        assert one is not None
        for ranks in RANKS:
            choice = on_parts(one.op, {0: Shard(2)}, one.types, ranks)
            assert (choice is None) == (ranks == 4)
            assert choice is None or choice.gives == (Partial(joined),)
