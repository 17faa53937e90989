"""What a graph means, said as plainly as possible: the yardstick for passes, plans, programs and backends.

Nothing here is clever. Given any forward pass that calls ``intercept(site, tensor)`` at every site in order, each
operation is done by torch when its result is first needed, and remembered. No pass, plan, program or hook takes part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from tracelens.errors import CausalityError, UnusedGradientError
from tracelens.ir import dims
from tracelens.ir.gradients import LEAF, differentiated, differentiated_values
from tracelens.ir.graph import Graph
from tracelens.ir.infer import resolve, torch_dtype
from tracelens.ir.module_sites import ModuleSite
from tracelens.ir.ops import (
    WHOLE,
    Apply,
    Arg,
    Call,
    Const,
    Grad,
    Hold,
    Index,
    IndexItem,
    IndexPut,
    Op,
    OwnTokens,
    Param,
    PromptRow,
    PromptTokens,
    Read,
    Redistribute,
    Ref,
    Save,
    Selector,
    Slice,
    Special,
    TokenSelector,
    Transfer,
    Write,
    operands,
    results,
)
from tracelens.ir.sites import Site
from tracelens.ir.types import DType

Intercept = Callable[[Site, Tensor], Tensor]
Forward = Callable[[Intercept], object]


class Selected(Protocol):
    """Where a token selector points: for each row the padded positions, and whether the position axis goes."""

    @property
    def columns(self) -> Sequence[Sequence[int]]: ...

    @property
    def drops(self) -> bool: ...


def evaluate(
    graph: Graph,
    forward: Forward,
    *,
    constants: Sequence[Tensor] = (),
    parameters: Callable[[str], Tensor] | None = None,
    select: Callable[[Selector], Selected] | None = None,
    functions: Sequence[Callable[..., Any]] = (),
    sizes: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """The saved tensors of a graph by name, in the order of the saves; batches stay padded.

    ``forward(intercept)`` is one forward pass: it calls ``intercept(site, tensor)`` at every site in order and goes on
    with the tensor that comes back. ``constants`` are the graph's captured tensors, ``parameters`` finds the model's by
    their paths, ``select`` says where token selectors point, ``functions`` are those of ``tl.apply``. ``sizes`` are
    the prompt's, where the sites do not tell them. A value that is needed before its site was reached raises
    :class:`CausalityError`.
    """
    evaluator = Evaluator(graph, constants, parameters, select, functions)
    evaluator.sizes.update(sizes or {})
    with torch.set_grad_enabled(any(isinstance(op, Grad) for op in graph.ops)):
        forward(evaluator.intercept)
        return evaluator.saved()


class Evaluator:
    """The values of a graph, and what they are computed with."""

    def __init__(self, graph: Graph, constants: Any, parameters: Any, select: Any, functions: Any) -> None:
        self.graph = graph
        self.constants, self.parameters = constants, parameters
        self.select, self.functions = select, functions
        self.sizes: dict[str, int] = {}
        self.versions: dict[tuple[Site, int], Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.differentiated = differentiated(graph)
        self.leaves = differentiated_values(graph)

    def intercept(self, site: Site, tensor: Tensor) -> Tensor:
        """One site: its versions are made one after the other, and the last goes on."""
        self.reached(site, tensor)
        self.versions[site, 0] = tensor = self.apart(site, 0, tensor)
        writes = sorted((op for op in self.graph.writes if op.site == site), key=lambda write: write.version)
        for write in writes:
            if isinstance(write.value, Ref):
                self.value(write.value.id)
            tensor = self.apart(site, write.version, self.written(write, tensor))
            self.versions[site, write.version] = tensor
        return tensor

    def reached(self, site: Site, tensor: Tensor) -> None:
        """Learns the sizes of the prompt at a site."""
        # A module's tensor has axes of its own, which say nothing about them.
        if not isinstance(site, ModuleSite):
            for dim, size in zip(site.kind.shape, tensor.shape, strict=True):
                if isinstance(dim, dims.Sym):
                    self.sizes[str(dim)] = size

    def written(self, write: Write, tensor: Tensor) -> Tensor:
        """What a write makes of a site: cast once, to its dtype; broadcast to its shape."""
        if isinstance(write.value, Ref):
            return self.values[write.value.id].to(tensor.dtype).broadcast_to(tensor.shape).clone()
        return torch.full_like(tensor, self.plain(write.value))

    def apart(self, site: Site, version: int, tensor: Tensor) -> Tensor:
        """A version that a gradient is taken with respect to is a tensor of its own, of which all else is made."""
        return resolve(LEAF)(tensor) if (site, version) in self.differentiated else tensor

    def saved(self) -> dict[str, Tensor]:
        for op in self.graph.applies:
            self.value(op.outs[0])  # an apply always runs
        found: dict[str, Tensor] = {}
        for save in self.graph.saves:
            members = [self.value(value) for value in save.values]
            tensor = torch.stack(members) if save.stacked else members[0]
            found[save.name] = (tensor.to(torch_dtype(save.dtype)) if save.dtype else tensor).detach()
        return found

    def value(self, wanted: int) -> Tensor:
        """A value, computed on demand: everything that it needs comes first, in the order of the graph."""
        if wanted not in self.values:
            for number in sorted(self._needed(wanted)):
                self.compute(self.graph.ops[number])
        return self.values[wanted]

    def _needed(self, wanted: int) -> set[int]:
        found: set[int] = set()
        waiting = [wanted]
        while waiting:
            value = waiting.pop()
            number = self.graph.producer[value]
            if value not in self.values and number not in found:
                found.add(number)
                waiting += operands(self.graph.ops[number])
        return found

    def compute(self, op: Op) -> None:
        """One operation, whose operands are there."""
        match op:
            case Const():
                self.values[op.out] = self.constants[op.index].detach()
            case Param():
                self.values[op.out] = self.parameters(op.path).detach()
            case Read():
                if (op.site, op.version) not in self.versions:
                    raise CausalityError(f"{op.site}@{op.version} is needed before the forward pass makes it")
                self.values[op.out] = self.versions[op.site, op.version]
            case Call():
                named = {name: self.plain(arg) for name, arg in op.kwargs}
                self.keep(op.outs, resolve(op.function)(*map(self.plain, op.args), **named))
            case Apply():
                self.keep(op.outs, self.functions[op.index](*map(self.plain, op.args)))
            case Index():
                self.values[op.out] = self._index(op)
            case IndexPut():
                self.values[op.out] = self._put(op)
            case Grad():
                loss, wrt = self.values[op.loss], [self.values[value] for value in op.wrt]
                if not loss.requires_grad:
                    raise UnusedGradientError(f"%{op.loss} does not depend on any site by a derivative")
                found = torch.autograd.grad(loss, wrt, retain_graph=True, allow_unused=True)
                for out, value, part in zip(op.outs, op.wrt, found, strict=True):
                    if part is None:
                        raise UnusedGradientError(f"%{op.loss} does not depend on %{value} by a derivative")
                    self.values[out] = part
            case Transfer() | Redistribute():
                self.values[op.out] = self.values[op.value]
            case Write() | Save() | Hold():
                pass  # these make no values
        for out, _ in results(op) if self.leaves else ():
            if out in self.leaves:
                self.values[out] = resolve(LEAF)(self.values[out])

    def keep(self, outs: tuple[int, ...], result: Any) -> None:
        parts = (result,) if isinstance(result, Tensor) else cast("tuple[Tensor, ...]", tuple(result))
        self.values.update(zip(outs, parts, strict=True))

    def plain(self, arg: Arg) -> Any:
        """An argument as torch takes it."""
        match arg:
            case Ref():
                return self.values[arg.id]
            case tuple():
                return tuple(self.plain(part) for part in arg)
            case dims.Sym():
                return dims.evaluate(arg, self.sizes)
            case DType():
                return torch_dtype(arg)
            case Slice():
                return slice(arg.start, arg.stop, arg.step)
            case Special():
                return arg.number
            case _:
                return arg

    def _index(self, op: Index) -> Tensor:
        base = self.values[op.base]
        if (own := _own_tokens(op.index)) is not None:
            place, item = own
            return base[(*[slice(None)] * place, self.columns_of(item))]
        if not _selects(op.index):
            return base[tuple(self.item(item) for item in op.index)]
        chosen = _Chosen(self, op)
        return chosen.joined([row[columns] for row, columns in chosen.rows(base)])

    def _put(self, op: IndexPut) -> Tensor:
        result = self.values[op.base].clone()
        value = self.plain(op.value)
        if isinstance(value, Tensor):
            value = value.to(result.dtype)  # torch casts for slices alone
        if (own := _own_tokens(op.index)) is not None:
            place, item = own
            result[(*[slice(None)] * place, self.columns_of(item))] = value
            return result
        if not _selects(op.index):
            result[tuple(self.item(item) for item in op.index)] = value
            return result
        chosen = _Chosen(self, op)
        rows = chosen.rows(result)
        if isinstance(value, Tensor):
            shape = chosen.joined([row[columns] for row, columns in rows]).shape
            for (row, columns), new in zip(rows, chosen.split(value.broadcast_to(shape)), strict=True):
                row[columns] = new
        else:
            for row, columns in rows:
                row[columns] = value
        return result

    def columns_of(self, item: OwnTokens) -> Any:
        """The places of some of a prompt's own tokens."""
        selected: Selected = self.select(item)
        (columns,) = selected.columns
        return columns[0] if selected.drops else list(columns)

    def item(self, item: IndexItem) -> Any:
        """An entry of an index as torch takes it."""
        if isinstance(item, PromptRow):
            return slice(item.row, item.row + 1)
        if isinstance(item, PromptTokens):
            return slice(-item.length, None)
        return item if item is None or isinstance(item, int) else self.plain(cast(Arg, item))


class _Chosen:
    """The tokens that an index chooses, row by row, with the position axis in front."""

    def __init__(self, evaluator: Evaluator, op: Index | IndexPut) -> None:
        *before, selector = op.index
        batch = evaluator.graph.types[op.base].batch_axis
        if batch is None or any(item != WHOLE for item in before):
            raise ValueError("a token selector stands after whole axes, one of them the batch's")
        selected: Selected = evaluator.select(selector)
        self.batch, self.drops = batch, selected.drops
        self.columns = [row[0] if self.drops else list(row) for row in selected.columns]
        self.position = len(before) - (batch < len(before))

    def rows(self, tensor: Tensor) -> list[tuple[Tensor, Any]]:
        """For every row a view of it, positions in front, and the places in that."""
        # One by one: autograd lets nobody write through the views that unbind gives.
        rows = [tensor.select(self.batch, row) for row in range(tensor.shape[self.batch])]
        views = (row.movedim(self.position, 0) for row in rows)
        return list(zip(views, self.columns, strict=True))

    def joined(self, rows: list[Tensor]) -> Tensor:
        """Rows in one tensor: the batch axis is where it was, less one if a dropped axis stood before it."""
        if self.drops:
            return torch.stack(rows, dim=self.batch - (self.position < self.batch))
        return torch.stack([row.movedim(0, self.position) for row in rows], dim=self.batch)

    def split(self, tensor: Tensor) -> list[Tensor]:
        """The inverse of :meth:`joined`."""
        if self.drops:
            return list(tensor.unbind(self.batch - (self.position < self.batch)))
        return [row.movedim(self.position, 0) for row in tensor.unbind(self.batch)]


def _own_tokens(index: tuple[IndexItem, ...]) -> tuple[int, OwnTokens] | None:
    return next(((place, item) for place, item in enumerate(index) if isinstance(item, OwnTokens)), None)


def _selects(index: tuple[IndexItem, ...]) -> bool:
    return any(isinstance(item, TokenSelector) for item in index)
