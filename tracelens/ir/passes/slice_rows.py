"""Makes of a graph for a whole batch one for slices of its rows, which gives every row what it gave in the batch.

Every operation has to keep rows apart (:mod:`tracelens.ir.passes.rows_apart`). What has a row for each row of the batch
and is made of no site (``strength[:, None, None] * v``) is a constant of the sliced graph, of which each slice gets its
own rows. Which of its axes has the rows is what the types say: that one which meets them without knowing how many there
are. So the sliced graph fits any number of rows, and is compiled once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from tracelens.errors import RowsMeetError, TracelensError
from tracelens.ir import dims
from tracelens.ir.dims import Sizes, Sym
from tracelens.ir.functions import FUNCTIONS, Kind
from tracelens.ir.graph import Graph
from tracelens.ir.ops import (
    Apply,
    Arg,
    Call,
    Const,
    Grad,
    Index,
    IndexPut,
    Op,
    OwnTokens,
    Param,
    PromptRow,
    PromptTokens,
    Read,
    Save,
    Write,
    operands,
    results,
)
from tracelens.ir.passes.rebuild import rebuild, substitute
from tracelens.ir.passes.rows_apart import NUMBERS, RowsMeet, addresses_rows, require_rows_apart
from tracelens.ir.retype import retype, site_types
from tracelens.ir.sites import Site
from tracelens.ir.types import TensorType

_TO_A_SHAPE = frozenset(
    {"torch.reshape", "torch.broadcast_to", "torch.unflatten", "torch.Tensor.expand", "torch.Tensor.view"}
)
_MANY = 64
"""So many ways to read the axes of constants are tried."""


@dataclass(frozen=True, slots=True)
class RowConstant:
    """A value with a row for each row of the batch: constant ``index`` of the sliced graph, its rows on ``axis``.

    ``source``: the constant of the recorded graph that it is; ``None`` for what is computed, which the graph
    ``before`` saves as ``name``.
    """

    index: int
    axis: int
    type: TensorType
    source: int | None
    name: str


@dataclass(frozen=True, slots=True)
class Sliced:
    """A graph for slices of a batch.

    ``before``: computes what row constants are made of, if any is computed; it reads no site. ``axes``: for each save
    the axis that has the rows, ``None`` for what is made of no site and so the same in every slice.
    """

    graph: Graph
    before: Graph | None
    rows: tuple[RowConstant, ...]
    axes: Mapping[str, int | None]


def slice_rows(
    graph: Graph, sizes: Sizes, *, ragged: bool, type_of: Callable[[Site], TensorType] | None = None
) -> Sliced:
    """``graph``, which is right for a batch of these sizes, for slices of it.

    ``ragged``: do rows differ in length?  ``type_of``: of sites that are written and not read. Raises
    :class:`~tracelens.errors.RowsMeetError` for a graph in which rows do not stay apart.
    """
    slicing = _Slicing(graph, sizes, ragged, type_of)
    for number, op in enumerate(graph.ops):
        try:
            slicing.add(number, op)
        except (RowsMeet, TracelensError) as error:
            problem = error.problem if isinstance(error, TracelensError) else str(error)
            raise graph.blame(_meet(problem), number) from None
    return slicing.done()


def _meet(problem: str) -> RowsMeetError:
    return RowsMeetError(
        f"with batch_size= the rows of a batch run in slices, and this does not keep them apart: {problem}",
        instead='save what each row has, and compute with what comes back: t["h"].mean(0); or no batch_size=, so that '
        "all rows are there at once",
    )


class _Slicing:
    def __init__(
        self, graph: Graph, sizes: Sizes, ragged: bool, type_of: Callable[[Site], TensorType] | None
    ) -> None:
        self.graph = graph
        self.sizes = sizes
        self.count = sizes[dims.BATCH]
        self.ragged = ragged
        self.type_of = type_of
        # Sizes that the graph is tied to. The number of rows is none of them any more.
        self.tied = {pin.symbol: pin.size for pin in graph.pins if pin.symbol in (dims.POSITION, dims.KEY)}
        self.sites: dict[Site, TensorType] = site_types(graph)
        self.types: dict[int, TensorType] = {}
        self.rows: set[int] = set()
        self.totals: set[int] = set()
        """Sums over all that the rows have: losses."""
        self.ops: list[tuple[int, Op]] = []
        self.before: list[tuple[int, Op]] = []
        self.constants: dict[tuple[int, int], tuple[Const, int]] = {}
        """By the recorded value and the axis: the constant with rows, and who first used it."""
        self.axes: dict[str, int | None] = {}
        self.next = graph.next_value
        self.first = (
            max((len(graph.constants) - 1, *(op.index for op in graph.ops if isinstance(op, Const)))) + 1
        )
        for pin in graph.pins:
            if pin.symbol not in (dims.BATCH, dims.POSITION, dims.KEY):
                raise graph.blame(_meet("tokens are addressed by a mask of all rows at once"), max(pin.op, 0))

    def add(self, number: int, op: Op) -> None:
        """One operation of the recorded graph."""
        match op:
            case Const() | Param():
                self._whole(number, op)
            case Read():
                self._require_rows(op.type)
                self._row(number, op)
            case Save():
                self._save(number, op)
            case Write():
                self._row(number, self._fitted(number, op))
            case Grad():
                if op.loss not in self.totals:
                    raise RowsMeet(
                        "the loss is not a sum over rows, so a row's gradient depends on the others"
                    )
                self._row(number, op)
            case Call() | Index() | IndexPut():
                self._computed(number, op)
            case Apply():
                raise RowsMeet("Python of yours may let rows meet")
            case _:
                raise RowsMeet("it may let rows meet")

    # --- what is made of no site -------------------------------------------------------------------------------------

    def _whole(self, number: int, op: Op) -> None:
        """It is the same in every slice, and may not depend on what differs between them."""
        found = _sizes_in(op).union(*(type_.symbols for _, type_ in results(op)))
        if dims.BATCH in found:
            raise RowsMeet("it depends on how many rows there are")
        if found and self.ragged:
            raise RowsMeet("it depends on how many positions the longest of the rows has")
        self.types |= dict(results(op))
        self.before.append((number, op))
        self.ops.append((number, op))

    # --- what is made of sites ---------------------------------------------------------------------------------------

    def _row(self, number: int, op: Op) -> None:
        self.types |= dict(results(op))
        self.rows |= {value for value, _ in results(op)}
        self.ops.append((number, op))

    def _require_rows(self, type_: TensorType) -> None:
        carrying = [dim for dim in type_.shape if dims.BATCH in dims.symbols(dim)]
        if carrying != [dims.B]:
            raise RowsMeet(f"what it gives, {type_}, has no axis that is the rows of the batch")

    def _computed(self, number: int, op: Call | Index | IndexPut) -> None:
        if isinstance(op, Index | IndexPut) and any(
            isinstance(item, PromptRow | PromptTokens | OwnTokens) for item in op.index
        ):
            raise RowsMeet("t.prompts names one of all rows")
        if not any(value in self.rows or value in self.totals for value in operands(op)):
            self._whole(number, op)
            return
        if self._is_loss(op):
            self.types |= dict(results(op))
            self.totals |= {value for value, _ in results(op)}
            self.ops.append((number, op))
            return
        if any(value in self.totals for value in operands(op)):
            raise RowsMeet("it has what all rows together have")
        if isinstance(op, Index | IndexPut) and addresses_rows(op.index, self.types[op.base]):
            raise RowsMeet("it addresses rows of the batch")
        named = _sizes_in(op)
        if (dims.BATCH in named or (named and self.ragged)) and not _gives_shapes(op):
            raise RowsMeet("it computes with a size of the whole batch")
        fitted = self._fitted(number, op)
        assert isinstance(fitted, Call | Index | IndexPut)
        for _, type_ in results(fitted):
            self._require_rows(type_)
        require_rows_apart(fitted, {**self.types, **dict(results(fitted))}, {**NUMBERS, **self.tied})
        self._row(number, fitted)

    def _is_loss(self, op: Op) -> bool:
        """Is it a sum of all that the rows have, used for its gradient alone? Each row has a part of its own in it."""
        if not isinstance(op, Call) or op.function != "torch.sum" or op.types[0].shape:
            return False
        users = [self.graph.ops[number] for number in self.graph.uses[op.outs[0]]]
        return bool(users) and all(isinstance(user, Grad) and op.outs[0] not in user.wrt for user in users)

    def _save(self, number: int, op: Save) -> None:
        with_rows = [value in self.rows for value in op.values]
        if any(value in self.totals for value in op.values) or len(set(with_rows)) > 1:
            raise RowsMeet("it stacks values with rows and values without")
        axis = self.types[op.values[0]].batch_axis if with_rows[0] else None
        self.axes[op.name] = None if axis is None else axis + op.stacked
        # What slices save is put together before it goes to a file.
        self.ops.append((number, replace(op, to=None)))

    # --- constants with rows -----------------------------------------------------------------------------------------

    def _fitted(self, number: int, op: Op) -> Op:
        """The operation as it is for any number of rows: where constants have one for each row, with their slices."""
        if isinstance(op, Write) and op.site.always not in self.sites:
            if self.type_of is None:
                raise RowsMeet("the graph does not say which axes the written site has")
            self.sites[op.site.always] = self.type_of(op.site.always)
        alone = self._retyped(op, {})
        if alone is not None and _has_rows(alone):
            return alone
        ways = [(choice, self._retyped(op, choice)) for choice in self._choices(op) if choice]
        found = [(choice, way) for choice, way in ways if way is not None and _has_rows(way)]
        if len(found) > 1:
            raise RowsMeet("more than one axis of a constant may stand for the rows")
        if found:
            choice, way = found[0]
            return substitute(
                way, {value: self._constant(number, value, axis) for value, axis in choice.items()}
            )
        if alone is None:
            raise RowsMeet("it fits only this number of rows")
        return alone

    def _choices(self, op: Op) -> Iterator[Mapping[int, int]]:
        """Which axes of which constants may have the rows."""
        used = [value for value in dict.fromkeys(operands(op)) if value not in self.rows]
        axes = [
            [None, *(axis for axis, dim in enumerate(self.types[value].shape) if dim == self.count)]
            for value in used
        ]
        for chosen in itertools.islice(itertools.product(*axes), _MANY):
            yield {value: axis for value, axis in zip(used, chosen, strict=True) if axis is not None}

    def _retyped(self, op: Op, choice: Mapping[int, int]) -> Op | None:
        """The operation for any number of rows, if it fits them with these constants that have a row for each."""
        types = {**self.types, **{value: self._with_rows(value, axis) for value, axis in choice.items()}}
        try:
            inferred = retype(op, types, self.tied or None, self.sites)
        except TracelensError:
            return None
        if inferred is None:
            return op
        if not inferred.pins <= self.tied.keys():
            return None
        match op:
            case Call():
                made = replace(op, types=inferred.types)
            case Index() | IndexPut():
                made = replace(op, type=inferred.types[0])
            case _:
                return op
        # What had as many rows as the batch by its number alone has them by name now, and is the same otherwise.
        pairs = zip(results(made), results(op), strict=True)
        same = all(
            new.dtype == old.dtype and new.sizes(self.sizes) == old.sizes(self.sizes)
            for (_, new), (_, old) in pairs
        )
        return made if same else None

    def _with_rows(self, value: int, axis: int) -> TensorType:
        type_ = self.types[value]
        return TensorType(type_.dtype, (*type_.shape[:axis], dims.B, *type_.shape[axis + 1 :]))

    def _constant(self, number: int, value: int, axis: int) -> int:
        known = self.constants.get((value, axis))
        if known is None:
            type_ = self._with_rows(value, axis)
            constant = Const(self.next, type_, self.first + len(self.constants))
            known = self.constants[value, axis] = constant, number
            self.next += 1
            self._row(number, constant)
        return known[0].out

    # --- the end -----------------------------------------------------------------------------------------------------

    def done(self) -> Sliced:
        """The graphs."""
        rows: list[RowConstant] = []
        computed: list[tuple[int, Op]] = []
        for (value, axis), (constant, number) in self.constants.items():
            maker = self.graph.ops[self.graph.producer[value]]
            source = maker.index if isinstance(maker, Const) else None
            # No recording gives such names.
            name = f"##{value}"
            rows.append(RowConstant(constant.index, axis, constant.type, source, name))
            if source is None and not any(op.name == name for _, op in computed if isinstance(op, Save)):
                computed.append((number, Save(name, (value,))))
        return Sliced(
            self._graph(self.ops),
            self._graph([*self.before, *computed]) if computed else None,
            tuple(rows),
            self.axes,
        )

    def _graph(self, ops: list[tuple[int, Op]]) -> Graph:
        made = rebuild(self.graph, ops)
        return replace(made, constants=(), pins=tuple(pin for pin in made.pins if pin.symbol != dims.BATCH))


def _has_rows(op: Op) -> bool:
    """Has all that an operation makes an axis of rows? What makes nothing needs none."""
    return all(type_.batch_axis is not None for _, type_ in results(op))


def _sizes_in(op: Op) -> frozenset[str]:
    """The sizes that a call is given as arguments."""
    arguments = (*op.args, *(arg for _, arg in op.kwargs)) if isinstance(op, Call) else ()
    return frozenset[str]().union(*(dims.symbols(dim) for arg in arguments for dim in _symbols(arg)))


def _gives_shapes(op: Op) -> bool:
    """Are the sizes among the arguments those of axes, which the types tell of?"""
    return isinstance(op, Call) and (
        op.function in _TO_A_SHAPE or FUNCTIONS[op.function].kind is Kind.PATTERN
    )


def _symbols(arg: Arg) -> Iterator[Sym]:
    if isinstance(arg, Sym):
        yield arg
    elif isinstance(arg, tuple):
        for part in arg:
            yield from _symbols(part)
