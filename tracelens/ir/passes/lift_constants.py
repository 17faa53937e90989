"""Turns a graph that runs at one point of a sweep into one that runs at several, which stand in the batch as rows.

A point gives values to some named constants. What follows from those values alone, before any site is read, is taken
out into a graph of its own (``before``), which is run once for each point by the very operations that were recorded.
Its results come back as constants with a row for each row of the batch: ``f32[576]`` becomes ``f32[B,576]``. Where one
of them meets a value of the forward pass, it is aligned so that its rows meet the rows, which has a meaning for
functions that work element by element, and for writes.

All this is right only where no operation lets the rows of the batch meet (:mod:`tracelens.ir.passes.rows_apart`). What
is not known to keep them apart is refused, and then a sweep runs point by point.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tracelens.errors import TracelensError
from tracelens.ir import dims
from tracelens.ir.functions import FUNCTIONS, Kind
from tracelens.ir.graph import Graph
from tracelens.ir.infer import AbstractArg, AbstractIndex, infer_call, infer_index
from tracelens.ir.ops import (
    WHOLE,
    Arg,
    Call,
    Const,
    Index,
    IndexItem,
    IndexPut,
    Keep,
    Op,
    Param,
    Read,
    Ref,
    Save,
    Write,
    operands,
    results,
)
from tracelens.ir.passes.rebuild import rebuild, substitute
from tracelens.ir.passes.rows_apart import RowsMeet, require_rows_apart
from tracelens.ir.retype import site_types
from tracelens.ir.sites import Site
from tracelens.ir.text import op_text
from tracelens.ir.types import TensorType

# A number without axes does not widen the floats that it meets; one with a row for each point does. For these
# functions, computing in the wider dtype and casting once is what torch itself does for the number.
_CAST_BACK = frozenset(f"torch.{name}" for name in ("add", "sub", "rsub", "mul", "div", "where"))


@dataclass(frozen=True, slots=True)
class Unliftable:
    """Why a graph cannot run at several points at once, and the operation that says so."""

    reason: str
    op: int | None = None


@dataclass(frozen=True, slots=True)
class Lifted:
    """A graph for several points at once.

    ``before`` is run for each point and saves, under the names in ``rows``, what the points differ in; ``graph`` takes
    those, with a row for each row of the batch, as its constants from number ``first`` on. ``own`` are the names of the
    saves of the recorded graph that ``before`` makes itself, because no site has a part in them.
    """

    before: Graph
    graph: Graph
    rows: Mapping[str, TensorType]
    first: int
    own: frozenset[str]


def lift_constants(graph: Graph, names: frozenset[str]) -> Lifted | Unliftable:
    """``graph`` for several values of the constants ``names`` at once, or the reason why there is no such graph."""
    if graph.pins:
        return Unliftable("the graph is tied to prompts of one size", max(graph.pins[0].op, 0))
    lifting = _Lifting(graph, names)
    for number, op in enumerate(graph.ops):
        try:
            lifting.add(number, op)
        except (RowsMeet, TracelensError) as error:
            problem = error.problem if isinstance(error, TracelensError) else str(error)
            return Unliftable(f"{op_text(op)}: {problem}", number)
    return lifting.done()


class _Lifting:
    def __init__(self, graph: Graph, names: frozenset[str]) -> None:
        self.graph = graph
        self.names = names
        self.next = graph.next_value
        self.first = max((op.index + 1 for op in graph.ops if isinstance(op, Const)), default=0)
        self.sites = site_types(graph)
        self.types: dict[int, TensorType] = {}
        self.points: set[int] = set()  # what the points differ in, before any site
        self.rows: set[int] = set()  # what has a row for each row of the batch
        self.before: list[tuple[int, Op]] = []
        self.ops: list[tuple[int, Op]] = []
        self.own: set[str] = set()
        self.constants: dict[int, Const] = {}  # by the value of the recorded graph
        self.aligned: dict[tuple[int, int], int] = {}

    def add(self, number: int, op: Op) -> None:
        """One operation of the recorded graph."""
        used = operands(op)
        if not isinstance(op, Const | Param | Read | Call | Index | IndexPut | Write | Save):
            raise RowsMeet("it may let the rows of a batch meet")
        if isinstance(op, Save) and not any(value in self.rows for value in op.values):
            self.own.add(op.name)
            self.before.append((number, op))
            return
        if isinstance(op, Read | Write | Save) or any(value in self.rows for value in used):
            self._row(number, op)
            return
        varies = isinstance(op, Const) and op.name in self.names
        self.before.append((number, op))
        self.types |= dict(results(op))
        if varies or any(value in self.points for value in used):
            self.points |= {value for value, _ in results(op)}
        else:
            self.ops.append((number, op))

    # --- operations of the forward pass --------------------------------------------------------------------------

    def _row(self, number: int, op: Op) -> None:
        made = results(op)
        for _, type_ in made:
            if not _has_rows(type_):
                raise RowsMeet(f"its result, {type_}, does not have the rows of the batch as its first axis")
        self.types |= dict(made)
        self.rows |= {value for value, _ in made}
        varying = [value for value in operands(op) if value in self.points]
        if varying:
            op = self._aligned(number, op, varying)
        self._require_rows_apart(op)
        if not isinstance(op, Call) or op.types == tuple(type_ for _, type_ in made):
            self.ops.append((number, op))
            return
        # Computed in a wider dtype than the number without axes would have been: cast once, as torch does inside.
        (out,), (narrow,) = op.outs, tuple(type_ for _, type_ in made)
        wide = self._new(op.types[0])
        self.ops.append((number, replace(op, outs=(wide,))))
        self.ops.append((number, Call((out,), (narrow,), "torch.Tensor.to", (Ref(wide), narrow.dtype))))

    def _aligned(self, number: int, op: Op, varying: list[int]) -> Op:
        """The operation with constants of several rows in the place of what the points differ in."""
        match op:
            case Call() if FUNCTIONS[op.function].kind is Kind.POINTWISE and len(op.outs) == 1:
                ndim = op.types[0].ndim
            case Write() if isinstance(op.value, Ref):
                ndim = self._site_ndim(op.site)
            case IndexPut() if isinstance(op.value, Ref) and varying == [op.value.id]:
                ndim = infer_index(self.types[op.base], self._index(op.index)).types[0].ndim
            case _:
                raise RowsMeet("a swept constant can only take part element by element")
        op = substitute(op, {value: self._constant(number, value, ndim) for value in varying})
        if not isinstance(op, Call):
            return op
        inferred = infer_call(
            op.function,
            tuple(self._abstract(arg) for arg in op.args),
            tuple((name, self._abstract(arg)) for name, arg in op.kwargs),
        )
        (found,), (recorded,) = inferred.types, op.types
        if found == recorded:
            return op
        may_cast = found.dtype.is_floating and recorded.dtype.is_floating and op.function in _CAST_BACK
        if found.shape != recorded.shape or not may_cast:
            raise RowsMeet(f"with a value for each row it gives {found}, not {recorded}")
        return replace(op, types=(found,))

    def _constant(self, number: int, value: int, ndim: int) -> int:
        """What the points differ in, as a constant with rows, aligned with a value of ``ndim`` axes."""
        known = self.aligned.get((value, ndim))
        if known is not None:
            return known
        own = self.types[value]
        constant = self.constants.get(value)
        if constant is None:
            type_ = TensorType(own.dtype, (dims.B, *own.shape))
            constant = Const(self._new(type_), type_, self.first + len(self.constants))
            self.constants[value] = constant
            self.ops.append((number, constant))
        missing = ndim - 1 - own.ndim
        index: tuple[IndexItem, ...] = (WHOLE, *[None] * missing)
        if missing < 0:
            if missing < -1 or own.shape[:1] != (1,):
                raise RowsMeet(f"a swept value of type {own} leaves no axis for the rows of the batch")
            index = (WHOLE, 0)
        aligned = constant.out
        if missing:
            (type_,) = infer_index(constant.type, index).types
            aligned = self._new(type_)
            self.ops.append((number, Index(aligned, type_, constant.out, index)))
        self.aligned[value, ndim] = aligned
        return aligned

    def _site_ndim(self, site: Site) -> int:
        """How many axes a written site has: from the vocabulary, or for a module's side from its reads."""
        known = self.sites.get(site)
        ndim = len(site.kind.shape) if known is None else known.ndim
        if not ndim:
            raise RowsMeet("the graph does not say which axes the written side of the module has")
        return ndim

    def _new(self, type_: TensorType) -> int:
        value, self.next = self.next, self.next + 1
        self.types[value] = type_
        self.rows.add(value)
        return value

    def _abstract(self, arg: Arg) -> AbstractArg:
        if isinstance(arg, Ref):
            return self.types[arg.id]
        return tuple(self._abstract(part) for part in arg) if isinstance(arg, tuple) else arg

    def _index(self, items: tuple[IndexItem, ...]) -> AbstractIndex:
        return tuple(self.types[item.id] if isinstance(item, Ref) else item for item in items)

    # --- do rows stay apart? -------------------------------------------------------------------------------------

    def _require_rows_apart(self, op: Op) -> None:
        if isinstance(op, Read | Save):
            if isinstance(op, Save) and not all(value in self.rows for value in op.values):
                raise RowsMeet("it stacks values with rows and values without")
            return
        if isinstance(op, Write):
            value = op.value.id if isinstance(op.value, Ref) else None
            if value in self.rows and self.types[value].ndim != self._site_ndim(op.site):
                raise RowsMeet("the value's rows do not stand where the site's do")
            return
        assert isinstance(op, Call | Index | IndexPut)
        # Its results may be of a wider dtype by now.
        require_rows_apart(op, {**self.types, **dict(results(op))})

    # --- the end -------------------------------------------------------------------------------------------------

    def done(self) -> Lifted:
        """The two graphs."""
        # No recording gives such names.
        rows = {f"##{value}": constant.type for value, constant in self.constants.items()}
        last = len(self.graph.ops) - 1
        handed = [
            (last, Save(name, (value,), keep=Keep.DEVICE))
            for name, value in zip(rows, self.constants, strict=True)
        ]
        before = [*self.before, *handed]
        return Lifted(
            rebuild(self.graph, before),
            replace(rebuild(self.graph, self.ops), constants=()),
            rows,
            self.first,
            frozenset(self.own),
        )


def _has_rows(type_: TensorType) -> bool:
    """Is the batch the first axis, and nowhere else?"""
    return type_.shape[:1] == (dims.B,) and not any(
        dims.BATCH in dims.symbols(dim) for dim in type_.shape[1:]
    )
