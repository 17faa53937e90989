"""Hypothesis strategies for what can be written down, sensible or not: dims, types, operations, graphs in form only."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.strategies import as_held
from tracelens.ir import dims
from tracelens.ir.dims import B, P, S
from tracelens.ir.graph import Graph, Pin
from tracelens.ir.ops import (
    Apply,
    Arg,
    Call,
    Const,
    Grad,
    Index,
    IndexPut,
    Keep,
    Op,
    OwnTokens,
    Param,
    PromptRow,
    PromptTokens,
    Read,
    Ref,
    Save,
    Scalar,
    Slice,
    TokenAt,
    TokenChars,
    TokenId,
    TokenList,
    TokenSelector,
    TokenSlice,
    TokenText,
    Write,
)  # fmt: skip
from tracelens.ir.sites import KINDS, Scope, Site
from tracelens.ir.types import DType, TensorType
from tracelens.ir.windows import StepWindow

SMALL = st.integers(-5, 40)
_BOUND = st.none() | SMALL
NAMES = st.text(max_size=8) | st.sampled_from(
    ["h", "", " : ", "a, b", '"', "\\", "\n", "\u2028", "%3", "é漢\U0001f389"]
)


def symbolic() -> st.SearchStrategy[dims.Dim]:
    """Sizes: numbers, symbols, and what arithmetic and slicing make of them."""

    def grown(inner: st.SearchStrategy[dims.Dim]) -> st.SearchStrategy[dims.Dim]:
        return (
            st.builds(dims.add, inner, inner)
            | st.builds(dims.multiply, inner, inner)
            | st.builds(dims.sliced, inner, _BOUND, _BOUND, st.none() | st.integers(1, 3))
        )

    return st.recursive(st.integers(0, 99) | st.sampled_from([B, P, S]), grown, max_leaves=5)


TYPES = st.builds(TensorType, st.sampled_from(DType), st.lists(symbolic(), max_size=4).map(tuple))
WINDOWS = st.builds(
    lambda start, length: StepWindow(start, None if length is None else start + length),
    st.integers(0, 9),
    st.none() | st.integers(1, 9),
).filter(lambda window: not window.every)
SITES = st.sampled_from(KINDS).flatmap(
    lambda kind: st.builds(
        Site,
        st.just(kind.name),
        st.integers(0, 99) if kind.scope is Scope.LAYER else st.none(),
        st.none() | WINDOWS,
    )
)


SCALARS: st.SearchStrategy[Scalar] = (
    st.booleans()
    | st.integers()
    | st.floats().map(as_held)
    | st.complex_numbers(allow_nan=False, allow_infinity=False)
)
REFS = st.builds(Ref, st.integers(0, 30))
_LEAVES = (
    st.none()
    | SCALARS
    | NAMES
    | st.sampled_from(DType)
    | st.just(...)
    | symbolic().filter(lambda dim: not isinstance(dim, int))
    | st.builds(Slice, _BOUND, _BOUND, _BOUND)
    | REFS
)
ARGS: st.SearchStrategy[Arg] = st.recursive(
    _LEAVES, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=6
)
_WIDTH = st.none() | st.integers(0, 9)
SELECTORS: st.SearchStrategy[TokenSelector] = (
    st.builds(TokenAt, SMALL)
    | st.builds(TokenSlice, _BOUND, _BOUND, _BOUND, _WIDTH)
    | st.builds(TokenList, st.lists(SMALL, max_size=4).map(tuple))
    | st.builds(TokenText, NAMES, st.none() | SMALL, _WIDTH)
    | st.builds(TokenId, st.integers(0, 99))
    | st.builds(TokenChars, st.integers(0, 9), st.integers(1, 99), _WIDTH)
)
_COUNT = st.integers(0, 9)
PROMPTS = (
    st.builds(PromptRow, _COUNT)
    | st.builds(PromptTokens, _COUNT, _COUNT)
    | st.builds(OwnTokens, _COUNT, _COUNT, SELECTORS)
)
INDICES = st.lists(
    SMALL | st.builds(Slice, _BOUND, _BOUND, _BOUND) | st.none() | REFS | SELECTORS | PROMPTS, max_size=4
).map(tuple)
_IDS = st.integers(0, 99)
_SEVERAL = st.integers(1, 3).flatmap(
    lambda count: st.tuples(
        st.lists(_IDS, min_size=count, max_size=count).map(tuple),
        st.lists(TYPES, min_size=count, max_size=count).map(tuple),
    )
)
_KEYWORDS = st.dictionaries(st.sampled_from(["dim", "keepdim", "input", "k", "dtype"]), ARGS, max_size=2).map(
    lambda found: tuple(found.items())
)
_FUNCTION = st.sampled_from(
    ["torch.add", "torch.nn.functional.layer_norm", "einops.rearrange", "tracelens.masked_mean"]
)

OPS: st.SearchStrategy[Op] = st.one_of(
    st.builds(Const, _IDS, TYPES, st.integers(0, 9)),
    st.builds(Param, _IDS, TYPES, NAMES),
    st.builds(Read, _IDS, TYPES, SITES, st.integers(0, 9)),
    _SEVERAL.flatmap(
        lambda some: st.builds(
            Call, st.just(some[0]), st.just(some[1]), _FUNCTION, st.lists(ARGS, max_size=4).map(tuple), _KEYWORDS
        )
    ),
    _SEVERAL.flatmap(
        lambda some: st.builds(
            Apply, st.just(some[0]), st.just(some[1]), st.integers(0, 9), st.lists(ARGS, max_size=4).map(tuple)
        )
    ),
    _SEVERAL.flatmap(
        lambda some: st.builds(
            Grad, st.just(some[0]), st.just(some[1]), _IDS,
            st.lists(_IDS, min_size=len(some[0]), max_size=len(some[0])).map(tuple),
        )
    ),
    st.builds(Index, _IDS, TYPES, _IDS, INDICES),
    st.builds(IndexPut, _IDS, TYPES, _IDS, INDICES, REFS | SCALARS),
    st.builds(Write, SITES, st.integers(0, 9), REFS | SCALARS),
    st.builds(
        Save,
        NAMES,
        st.lists(_IDS, min_size=1, max_size=3).map(tuple),
        st.booleans(),
        st.sampled_from(Keep),
        st.none() | st.sampled_from(DType),
        st.none() | NAMES,
    ),
)  # fmt: skip
_PINS = st.lists(
    st.builds(Pin, st.sampled_from(["B", "P", "S", "lengths"]), st.integers(0, 2**40), st.integers(-1, 9)),
    max_size=3,
).map(tuple)

SYNTAX: st.SearchStrategy[Graph] = st.builds(Graph, st.lists(OPS, max_size=6).map(tuple), _PINS)
"""Graphs in form only: what the text form and its parser have to get right."""
