"""Hypothesis strategies for the language: graphs that obey the law (forms alone: :mod:`tests.ir.forms`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.support.batches import Batch
from tests.support.families import (
    CHOSEN,
    D_MODEL,
    EXPERTS,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LAYERS,
    NEURONS,
    VOCABULARY,
)
from tracelens.constants import Captured, capture
from tracelens.errors import TracelensError
from tracelens.ir.dims import B, P
from tracelens.ir.gradients import sources
from tracelens.ir.graph import Graph, Pin
from tracelens.ir.infer import AbstractArg, infer_call, infer_index, infer_index_put
from tracelens.ir.ops import (
    WHOLE,
    Arg,
    Call,
    Const,
    Grad,
    Index,
    IndexItem,
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
    Selector,
    Slice,
    Special,
    TokenAt,
    TokenList,
    TokenSlice,
    Write,
    operands,
    results,
)
from tracelens.ir.sites import AFTER_ALL, KINDS, Effect, Order, Scope, Site
from tracelens.ir.types import DType, TensorType
from tracelens.location import Location


def as_held(number: float) -> float | Special:
    """A float as a graph holds it: minus zero and nan are special."""
    if math.isnan(number):
        return Special.NAN
    return Special.NEGATIVE_ZERO if number == 0.0 and math.copysign(1, number) < 0 else number


# --- graphs that obey the law ------------------------------------------------------------------------------------

WIDTHS = {
    "D": D_MODEL,
    "M": NEURONS,
    "V": VOCABULARY,
    "H": HEADS,
    "K": KV_HEADS,
    "c": HEAD_DIM,
    "d": HEAD_DIM,
    "E": EXPERTS,
    "k": CHOSEN,
}
_ABSENT = ("pos_embed", "q_normed", "k_normed", "attn_post_norm", "mlp_post_norm")
_ABSENT += ("router_logits", "expert_index", "expert_weights", "expert_act", "expert_out")
_ABSENT += ("next_tokens",)  # tokens, which hardly any function takes for numbers
READABLE = tuple(
    Site(kind.name, layer)
    for kind in KINDS
    if kind.name not in _ABSENT
    for layer in (range(LAYERS) if kind.scope is Scope.LAYER else (None,))
)
"""The sites of a tiny model of the Llama kind."""
WRITABLE = tuple(site for site in READABLE if site.kind.effect is not Effect.NONE and site.kind.dtype is None)


def type_of(site: Site) -> TensorType:
    """The site's type in a tiny model, in float32."""
    shape = tuple(WIDTHS[dim] if isinstance(dim, str) else dim for dim in site.kind.shape)
    return TensorType(DType.BOOL if site.kind.scope is Scope.INPUT else DType.FLOAT32, shape)


@dataclass
class _Builder:
    """Writes a graph down operation by operation, as strict as the recorder and in fewer words."""

    draw: Callable[[st.SearchStrategy], object]
    sizes: dict[str, int] | None
    aligned: bool
    ops: list[Op] = field(default_factory=list)
    types: list[TensorType] = field(default_factory=list)
    origins: list[tuple[Order, frozenset[Site]] | None] = field(default_factory=list)
    constants: list[Captured] = field(default_factory=list)
    versions: dict[Site, int] = field(default_factory=dict)
    pins: dict[str, Pin] = field(default_factory=dict)
    saves: int = 0
    # Gradients round differently where sums are taken in another order, so what is made of them is kept linear, and
    # nothing is cast to a dtype in which rounding would show.
    gradients: bool = False
    # Where sums are taken in another order too, but by ranks: nothing is cast to such a dtype.
    narrow: bool = True
    # A few sites only, so that reads and writes meet at the same ones.
    sites: tuple[Site, ...] = READABLE
    # The numbers of tokens of the prompts, where the graph may single one out; and where values have a prompt's own.
    lengths: tuple[int, ...] = ()
    own: dict[int, tuple[int, tuple[int, int]]] = field(default_factory=dict)

    def one(self, *choices: object) -> object:
        return self.draw(st.sampled_from(choices))

    def _origin(self, values: Sequence[int]) -> tuple[Order, frozenset[Site]] | None:
        known = [self.origins[value] for value in values if self.origins[value] is not None]
        if not known:
            return None
        order = max(origin[0] for origin in known)
        return order, frozenset().union(*(sites for own, sites in known if own == order))

    def define(self, types: Sequence[TensorType], uses: Sequence[int]) -> tuple[int, ...]:
        first = len(self.types)
        self.types += types
        self.origins += [self._origin(uses)] * len(types)
        return tuple(range(first, len(self.types)))

    def allows(self, inferred: object) -> bool:
        return self.aligned or not inferred.mixes

    def pin(self, inferred: object) -> None:
        for symbol in sorted(inferred.pins):
            self.pins.setdefault(symbol, Pin(symbol, self.sizes[symbol], len(self.ops)))

    # --- the operations ------------------------------------------------------------------------------------------

    def read(self, site: Site | None = None) -> int:
        site = site or self.one(*self.sites)
        (value,) = self.define([type_of(site)], ())
        self.origins[value] = (site.order, frozenset((site,)))
        self.ops.append(Read(value, type_of(site), site, self.versions.get(site, 0)))
        return value

    def const(self, tensor: Tensor) -> int:
        captured = capture(tensor)
        (value,) = self.define([captured.type], ())
        name = self.one(None, None, f"c{len(self.constants)}")
        self.ops.append(Const(value, captured.type, len(self.constants), name))
        self.constants.append(captured)
        return value

    def param(self) -> int:
        path, kind = self.one(
            ("lm_head.weight", TensorType(DType.FLOAT32, (VOCABULARY, D_MODEL))),
            ("model.norm.weight", TensorType(DType.FLOAT32, (D_MODEL,))),
        )
        (value,) = self.define([kind], ())
        self.ops.append(Param(value, kind, path))
        return value

    def call(self, function: str, *args: Arg, **kwargs: Arg) -> tuple[int, ...] | None:
        def abstract(arg: Arg) -> AbstractArg:
            if isinstance(arg, tuple):
                return tuple(map(abstract, arg))
            return self.types[arg.id] if isinstance(arg, Ref) else arg

        named = tuple(kwargs.items())
        try:
            inferred = infer_call(
                function, tuple(map(abstract, args)), tuple((k, abstract(v)) for k, v in named), self.sizes
            )
        except TracelensError:
            return None
        if not self.allows(inferred):
            return None
        op = Call((), inferred.types, function, args, named)
        self.pin(inferred)
        outs = self.define(inferred.types, [ref.id for ref in _flat((args, tuple(v for _, v in named)))])
        self.ops.append(replace(op, outs=outs))
        return outs

    def compute(self) -> None:
        value = self.some(lambda type_: type_.dtype.is_floating)
        if value is None:
            return
        ref, kind = Ref(value), self.types[value]
        width = kind.shape[-1] if kind.shape else None
        match self.draw(st.integers(0, 14)):
            case 0:
                self.call(self.one("torch.tanh", "torch.neg", "torch.nn.functional.gelu", "torch.abs"), ref)
            case 1:
                self.call(
                    self.one("torch.mul", "torch.add", "torch.sub"),
                    ref,
                    self.one(2, 0.5, True, -3, as_held(-0.0)),
                )
            case 2:
                self.call("torch.sub", self.one(1, 0.25), ref)
            case 3:
                other = self.some(lambda type_: type_.dtype.is_floating and type_.shape == kind.shape)
                self.call(self.one("torch.add", "torch.mul", "torch.maximum"), ref, Ref(other))
            case 4:
                other = self.some(lambda type_: type_.dtype.is_floating)
                self.call(self.one("torch.add", "torch.sub"), ref, Ref(other))
            case 5 if kind.shape:
                self.call(self.one("torch.mean", "torch.sum", "torch.amax"), ref, -1, self.one(True, False))
            case 6 if kind.shape:
                self.call("torch.softmax", ref, dim=-1)
            case 7 if isinstance(width, int) and width > 2:
                self.call("torch.topk", ref, 2)
            case 8 if kind.shape:
                self.call("torch.cat", (ref, ref), -1)
            case 9:
                (mask,) = self.call("torch.gt", ref, 0.1)
                self.call("torch.where", Ref(mask), ref, self.one(0.0, -1.5))
            case 10 if isinstance(width, int):
                matrix = self.const(_numbers(width, 5))
                self.call("torch.matmul", ref, Ref(matrix))
            case 11:
                halves = () if self.gradients or not self.narrow else (DType.BFLOAT16, DType.FLOAT16)
                self.call("torch.Tensor.to", ref, self.one(DType.FLOAT64, *halves))
            case 12 if kind.shape[:2] == (B, P):
                self.call("tracelens.masked_mean", ref, Ref(self.read(Site("token_mask"))))
            case 13 if self.sizes is not None and len(kind.shape) > 1:
                self.call(self.one("torch.mean", "torch.cumsum"), ref, len(kind.shape) - 2)
            case 14 if self.sizes is not None and kind.shape[:2] == (B, P):
                self.by_number(value)
            case _:
                self.call("torch.mul", ref, Ref(self.const(_numbers())))

    def by_number(self, value: int) -> None:
        """A tensor with the prompt's sizes as numbers, beside a value: right for this prompt only."""
        rows, width = self.sizes["B"], self.sizes["P"]
        shape = (rows, width, *(1 for _ in self.types[value].shape[2:]))
        self.call("torch.mul", Ref(value), Ref(self.const(_numbers(*shape))))

    def index(self) -> tuple[int, tuple[IndexItem, ...]] | None:
        """A value and an index that fits it."""
        value = self.some(lambda type_: bool(type_.shape))
        if value is None:
            return None
        kind = self.types[value]
        last, whole = len(kind.shape) - 1, (WHOLE,) * (len(kind.shape) - 1)
        choices: list[tuple[IndexItem, ...]] = [()]
        if isinstance(kind.shape[last], int) and kind.shape[last] > 4:
            choices += [
                (*whole, Slice(None, 3)),
                (*whole, -1),
                (*whole, Slice(1, None, 2)),
                (*whole, None, 2),
            ]
            choices += [(*whole, Ref(-1))]  # an index tensor, made if this one is drawn
        if kind.shape[:2] == (B, P):
            selectors = (TokenAt(-1), TokenAt(0), TokenSlice(-2, None, None, 2), TokenList((1, 0, -1)))
            choices += [(WHOLE, selector) for selector in selectors]
            choices += [(WHOLE, -1), (WHOLE, Slice(-1)), (WHOLE, Slice(1)), (0,)]
        if kind.shape[:1] == (B,) and self.lengths and P in kind.shape:
            row = self.one(*range(len(self.lengths)))
            tokens = PromptTokens(row, self.lengths[row])
            choices += 4 * [(PromptRow(row), *(tokens if dim == P else WHOLE for dim in kind.shape[1:]))]
        if value in self.own:
            place, (row, length) = self.own[value]
            selectors = (TokenAt(-1), TokenAt(0), TokenSlice(-1, None, None, 1), TokenList((0, -1)))
            before = (WHOLE,) * place
            choices += [(*before, OwnTokens(row, length, selector)) for selector in selectors]
        index = self.one(*choices)
        if index and index[-1] == Ref(-1):
            index = (*whole, Ref(self.const(torch.tensor([3, 0, 3]))))
        return value, index

    def take(self) -> None:
        found = self.index()
        if found is None:
            return
        base, index = found
        try:
            inferred = infer_index(self.types[base], self._abstract(index), self.sizes)
        except TracelensError:
            return
        if self.allows(inferred):
            self.pin(inferred)
            (out,) = self.define(
                inferred.types, [base, *(item.id for item in index if isinstance(item, Ref))]
            )
            self.ops.append(Index(out, inferred.types[0], base, index))
            if index and isinstance(index[0], PromptRow) and P in self.types[base].shape:
                place = self.types[base].shape.index(P)
                self.own[out] = place, (index[0].row, index[place].length)

    def put(self) -> None:
        found = self.index()
        if found is None or not self.types[found[0]].dtype.is_floating:
            return
        base, index = found
        value = self.one(0.0, 3, Ref(self.some(lambda type_: type_.dtype.is_floating)))
        given = self.types[value.id] if isinstance(value, Ref) else value
        try:
            inferred = infer_index_put(self.types[base], self._abstract(index), given, self.sizes)
        except TracelensError:
            return
        if self.allows(inferred):
            self.pin(inferred)
            uses = [base, *(ref.id for ref in (*index, value) if isinstance(ref, Ref))]
            (out,) = self.define([self.types[base]], uses)
            self.ops.append(IndexPut(out, self.types[base], base, index, value))

    def write(self) -> None:
        site = self.one(
            *(site for site in self.sites if site.kind.effect is not Effect.NONE and site.kind.dtype is None)
        )
        fitting: list[Ref | Scalar] = [0.5, 2, True, as_held(-0.0)]
        for value, kind in enumerate(self.types):
            origin = self.origins[value]
            if origin is not None and not (origin[0] < site.order or origin[1] == frozenset((site,))):
                continue
            try:
                inferred = infer_index_put(type_of(site), (), kind, self.sizes)
            except TracelensError:
                continue
            if not inferred.pins and self.allows(inferred):
                fitting += [Ref(value)] * 3
                # Handing back what was just read, often: it is what passes like to drop.
                same = origin is not None and origin[1] == frozenset((site,))
                fitting += [Ref(value)] * 6 * same
        self.versions[site] = self.versions.get(site, 0) + 1
        self.ops.append(Write(site, self.versions[site], self.one(*fitting)))

    def save(self, *, stacked: bool | None = None, of: int | None = None) -> None:
        value = self.one(*range(len(self.types))) if of is None else of
        kind = self.types[value]
        members: tuple[int, ...] = (value,)
        if stacked if stacked is not None else self.one(True, False, False):
            same = [other for other, type_ in enumerate(self.types) if type_ == kind]
            members = tuple(self.draw(st.lists(st.sampled_from(same), min_size=1, max_size=3)))
        dtype = self.one(None, None, DType.FLOAT64) if kind.dtype.is_floating else None
        keep = self.one(*Keep)
        is_stacked = len(members) > 1 or bool(stacked)
        self.ops.append(Save(f"s{self.saves}", members, is_stacked, keep, dtype))
        self.saves += 1

    def is_gradient(self, value: int) -> bool:
        """Is this a gradient, or made of one?"""
        origin = self.origins[value]
        return origin is not None and origin[0] == AFTER_ALL

    def differentiate(self) -> None:
        """Takes gradients with respect to a few sites that were read, and computes a little with them."""
        reads = {
            op.out: op for op in self.ops
            if isinstance(op, Read) and op.type.dtype.is_floating and op.site.kind.effect is not Effect.NONE
        }  # fmt: skip
        fitting: list[tuple[int, list[int]]] = []
        for value, kind in enumerate(self.types):
            if kind.dtype.is_floating and not self.is_gradient(value):
                made_of = sources(self.ops, value)
                if found := [out for out, read in reads.items() if made_of.may_use(out, read)]:
                    fitting.append((value, found))
        if not fitting:
            return
        value, found = self.one(*fitting)
        if any(dim != 1 for dim in self.types[value].shape):
            if not self.aligned and self.types[value].shape[:2] == (B, P):
                mean = self.call("tracelens.masked_mean", Ref(value), Ref(self.read(Site("token_mask"))))
                value = value if mean is None else mean[0]
            sum_of = self.call("torch.sum", Ref(value))
            if sum_of is None:
                return
            (value,) = sum_of
        wrt = tuple(self.draw(st.lists(st.sampled_from(found), min_size=1, max_size=3)))
        types = tuple(self.types[out] for out in wrt)
        outs = self.define(types, ())
        for out in outs:
            self.origins[out] = (AFTER_ALL, frozenset())
        self.ops.append(Grad(outs, types, value, wrt))
        gradient = self.one(*outs)
        if self.one(True, False):
            self.call("torch.mul", Ref(gradient), Ref(wrt[outs.index(gradient)]))
        self.save(of=gradient)

    def some(self, wanted: Callable[[TensorType], bool]) -> int | None:
        fitting = [
            value for value, kind in enumerate(self.types) if wanted(kind) and not self.is_gradient(value)
        ]
        return self.one(*fitting) if fitting else None

    def _abstract(self, index: tuple[IndexItem, ...]) -> tuple[object, ...]:
        return tuple(self.types[item.id] if isinstance(item, Ref) else item for item in index)

    def graph(self) -> Graph:
        ops = tuple(self.ops)
        lines = tuple(Location("graph.py", number + 1) for number in range(len(ops)))
        return Graph(ops, tuple(self.pins.values()), tuple(self.constants), (), lines)


def _flat(arg: Arg) -> list[Ref]:
    if isinstance(arg, tuple):
        return [ref for part in arg for ref in _flat(part)]
    return [arg] if isinstance(arg, Ref) else []


def _numbers(*shape: int) -> Tensor:
    """Numbers of moderate size, the same each time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(7)) / max(1, math.prod(shape)) ** 0.25


@st.composite
def graphs(
    draw: Callable[[st.SearchStrategy], object],
    *,
    sizes: dict[str, int] | None = None,
    aligned: bool = True,
    steps: tuple[int, int] = (3, 16),
    pinned: bool = False,
    gradients: bool = False,
    narrow: bool = True,
    lengths: Sequence[int] = (),
) -> Graph:
    """Graphs that verify, over the sites of a tiny model of the Llama kind, with at least one save.

    ``sizes``: those of the prompt that the graph is recorded for (else its sizes stay symbols); ``aligned=False``: no
    operation mixes positions, so that rows may differ in length; ``pinned``: some operation fits these sizes only;
    ``gradients``: with gradients among the operations, and no float narrower than float32; ``narrow=False``: no such
    float either, and no gradients; ``lengths``: those of the prompts, which the graph may single out then.
    """
    builder = _Builder(draw, sizes, aligned, gradients=gradients, narrow=narrow, lengths=tuple(lengths))
    chosen = draw(st.lists(st.sampled_from(WRITABLE), min_size=1, max_size=4, unique=True))
    builder.sites = (*chosen, *chosen, *chosen, Site("token_mask"))
    first = builder.read(chosen[0])
    if pinned:
        builder.by_number(first)
    choices = (
        [builder.read] * 4
        + [builder.compute] * 6
        + [builder.write] * 5
        + [builder.take, builder.put, builder.take, builder.put]
        + [builder.param, lambda: builder.const(_numbers(D_MODEL)), builder.save]
    )
    choices += [builder.differentiate] * 5 if gradients else []
    least, most = steps
    for choice in draw(st.lists(st.sampled_from(choices), min_size=least, max_size=most)):
        choice()
    if gradients:
        builder.differentiate()
    builder.save()
    return builder.graph()


def made_of_gradients(graph: Graph) -> frozenset[str]:
    """The saves that hold gradients, or something computed from them."""
    values: set[int] = set()
    for op in graph.ops:
        if isinstance(op, Grad) or values.intersection(operands(op)):
            values.update(value for value, _ in results(op))
    return frozenset(save.name for save in graph.saves if values.intersection(save.values))


def assert_same(graph: Graph, actual: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """The same bits; gradients may differ in the order in which their parts were added up."""
    assert actual.keys() == wanted.keys()
    rounded = made_of_gradients(graph)
    for name, tensor in wanted.items():
        finite = tensor[tensor.isfinite()].abs() if name in rounded else tensor
        most = finite.max().item() if name in rounded and finite.numel() else 1.0
        rtol, atol = (1e-4, 2e-6 * max(most, 1.0)) if name in rounded else (0, 0)
        torch.testing.assert_close(actual[name], tensor, rtol=rtol, atol=atol, equal_nan=True)


# --- where token selectors point, counted plainly ----------------------------------------------------------------


@dataclass(frozen=True)
class Chosen:
    """For each row the padded positions that a selector means."""

    columns: tuple[tuple[int, ...], ...]
    drops: bool


def plain_select(batch: Batch) -> Callable[[Selector], Chosen]:
    """Resolves selectors by number against the mask of a batch."""
    real = [torch.nonzero(row).flatten().tolist() for row in batch.mask]

    def select(selector: Selector) -> Chosen:
        match selector:
            case TokenAt():
                return Chosen(tuple((row[selector.index],) for row in real), True)
            case TokenSlice():
                cut = slice(selector.start, selector.stop, selector.step)
                return Chosen(tuple(tuple(row[cut]) for row in real), False)
            case TokenList():
                return Chosen(tuple(tuple(row[i] for i in selector.indices) for row in real), False)
            case PromptTokens():
                return Chosen((tuple(real[selector.row]),), False)
            case OwnTokens():
                inner, of = select(selector.selector), real[selector.row]
                return Chosen(
                    (tuple(of.index(column) for column in inner.columns[selector.row]),), inner.drops
                )
            case _:
                raise ValueError("texts need a tokenizer, and ids the tokens")

    return select
