"""A plan: an improved graph with a place for each operation, and what is known of the run before it starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType

from tracelens import collectives
from tracelens.ir.dims import Sizes
from tracelens.ir.gradients import LEAF, differentiated
from tracelens.ir.graph import Graph
from tracelens.ir.layout import Layout
from tracelens.ir.module_sites import ModuleSite
from tracelens.ir.ops import (
    Call,
    Grad,
    Index,
    IndexPut,
    Op,
    Param,
    Read,
    Ref,
    Transfer,
    Write,
    moment,
    operands,
    results,
)
from tracelens.ir.passes.as_reached import as_reached
from tracelens.ir.passes.forward_order import moments_of
from tracelens.ir.passes.mark_leaves import mark_leaves
from tracelens.ir.passes.pipeline import improve
from tracelens.ir.sites import BEFORE_ALL, TEXT, Scope, Sequence, Site
from tracelens.ir.types import TensorType, bytes_text
from tracelens.placement import Placement
from tracelens.placing import place
from tracelens.pushing import push_indices
from tracelens.reach import reach
from tracelens.returning import returning
from tracelens.sharding import lay_out


@dataclass(frozen=True, slots=True)
class Carry:
    """How a write to a stream site inside a block reaches the block's output: ``target = site + contribution``.

    The block computes its own sum from tensors that a hook cannot replace (:doc:`sites`), so the plan does the sum
    again from the written value.
    """

    site: str
    contribution: str
    target: str


@dataclass(frozen=True)
class Plan:
    """What will run, where, and up to which site.

    ``stop`` is the last site that anything needs: the forward pass is left right after it. ``None`` with
    ``whole=True`` means that the pass runs to its end, ``None`` with ``whole=False`` that no layer runs at all.
    """

    graph: Graph
    placement: Placement
    stop: Site | None
    whole: bool
    carried: frozenset[Site] = frozenset()
    """The block outputs whose first write is the plan's own, carrying a write from inside the block."""
    at: tuple[int, ...] = ()
    """For every operation, the number of its place; several members of a save leave from where they are."""
    home: Mapping[int, int] = field(default_factory=dict[int, int], compare=False)
    """For every value, the number of the place that holds it."""
    layouts: Mapping[int, Layout] = field(default_factory=dict[int, Layout], compare=False)
    """For every value, how it lies on the ranks of its place."""
    gathers: bool = False
    """Is it one of the plans of a generation, which are carried out again and again?"""

    @cached_property
    def sites(self) -> frozenset[Site]:
        """The sites that are read or written."""
        return frozenset(op.site for op in self.graph.ops if isinstance(op, Read | Write))

    @cached_property
    def moments(self) -> tuple[Sequence, ...]:
        """For every operation, the moment of the forward pass at which it can be done."""
        return moments_of(self.graph)

    @cached_property
    def done(self) -> tuple[Sequence, ...]:
        """For every operation, the moment of the forward pass at which it is done.

        That is the earliest one (:attr:`moments`), but offloaded parameters are loaded, and what is made of them alone
        is computed, where it is first needed: a weight of each layer is there layer by layer. Transfers are not put
        off, so that values are sent and received in the order of the operations.
        """
        if not self.placement.brought:
            return self.moments
        late: set[int] = set()
        for op, known in zip(self.graph.ops, self.moments, strict=True):
            match op:
                case Param() if op.path in self.placement.brought:
                    late.add(op.out)
                case Call() | Index() | IndexPut() if known == BEFORE_ALL:
                    used = operands(op)
                    if any(value in late for value in used) and not any(map(self._sent, used)):
                        late.update(value for value, _ in results(op))
                case _:
                    pass
        done = list(self.moments)
        for number in reversed(range(len(done))):
            made = [value for value, _ in results(self.graph.ops[number]) if value in late]
            users = [user for value in made for user in self.graph.uses[value]]
            done[number] = min((done[user] for user in users), default=done[number])
        return tuple(done)

    def _sent(self, value: int) -> bool:
        return isinstance(self.graph.ops[self.graph.producer[value]], Transfer)

    @cached_property
    def transfers(self) -> tuple[Transfer, ...]:
        """What goes from one place to another, in order."""
        return tuple(op for op in self.graph.ops if isinstance(op, Transfer))

    @cached_property
    def returning(self) -> Mapping[int, int]:
        """For transfers whose gradients autograd sends back, by the values that arrive: in how many backward passes."""
        return returning(self.graph)

    @cached_property
    def differentiated(self) -> frozenset[Site]:
        """The sites that gradients are taken with respect to: a backend has to compute these in the open.

        Unless the block writes such a site later, the plan writes it (with the very value that was read), so that a
        backend that serves writes serves them as well.
        """
        return frozenset(site for site, _ in differentiated(self.graph))

    def layers_run(self, n_layers: int) -> int:
        """How many layers the forward pass enters."""
        if self.whole:
            return n_layers
        if self.stop is None:
            return 0
        last = self.stop.after if isinstance(self.stop, ModuleSite) else self.stop
        if last is None:
            return 0
        match last.kind.scope:
            case Scope.LAYER:
                assert last.layer is not None
                return last.layer + 1
            case Scope.AFTER | Scope.END:
                return n_layers
            case Scope.BEFORE | Scope.INPUT:
                return 0

    def saved_types(self) -> Mapping[str, TensorType]:
        """The type of each saved tensor, stacking and casting included."""
        found: dict[str, TensorType] = {}
        for save in self.graph.saves:
            type_ = self.graph.types[save.values[0]]
            shape = (len(save.values), *type_.shape) if save.stacked else type_.shape
            found[save.name] = TensorType(save.dtype or type_.dtype, shape)
        return found

    def bytes_saved(self, sizes: Sizes) -> int:
        """The size of all saves together."""
        return sum(type_.nbytes(sizes) for type_ in self.saved_types().values())

    def text(self, sizes: Sizes | None = None) -> str:
        """What runs where and how far, what is written, and what is saved, one line for each.

        With the ``sizes`` of a prompt, shapes are numbers and the bytes are counted.
        """
        n_layers = len(self.placement.layers)
        lines = ["plan"]
        lines += [f"  {place}{self._owned(place.index)}" for place in self.placement.places]
        lines.append("  " + self._extent(n_layers))
        leaves = {
            out for op in self.graph.ops if isinstance(op, Call) and op.function == LEAF for out in op.outs
        }
        own = [
            op
            for op in self.graph.writes
            if not (op.site in self.carried and op.version == 1)
            and not (isinstance(op.value, Ref) and op.value.id in leaves)
        ]
        lines += [
            f"  writes {op.site} ({reach(self.graph, op)})"
            if op.instead is None
            else f"  does not run {op.instead.module}, in whose place {op.site} is written"
            for op in own
        ]
        lines += [
            f"  {site}: the block's own sum is replaced by one with the value written in the block"
            for site in sorted(self.carried, key=lambda site: site.order)
        ]
        if replaced := sorted(replaced_layers(self.graph)):
            lines.append(
                f"  layer{'s' if len(replaced) > 1 else ''} {', '.join(map(str, replaced))}: the model's attention "
                "kernel is replaced by plain products and a softmax, as what is done to scores or pattern needs"
            )
        if experts := sorted(replaced_experts(self.graph)):
            lines.append(
                f"  layer{'s' if len(experts) > 1 else ''} {', '.join(map(str, experts))}: what experts make is "
                "computed and summed anew beside the model's own; tokens at which nothing is changed keep that"
            )
        lines += self._backward()
        lines += self._transfers(sizes)
        lines += collectives.lines(self, sizes)
        lines += self._loads(sizes)
        for name, type_ in self.saved_types().items():
            if sizes is None:
                lines.append(f"  saves {name!r}: {type_}")
            else:
                shape = f"{type_.dtype.value} {list(type_.sizes(sizes))}"
                lines.append(f"  saves {name!r}: {shape}, {bytes_text(type_.nbytes(sizes))}")
        if sizes is not None and self.graph.saves:
            between = sum(op.type.nbytes(sizes) for op in self.transfers)
            leaving = bytes_text(self.bytes_saved(sizes))
            back = sum(op.type.nbytes(sizes) * self.returning.get(op.out, 0) for op in self.transfers)
            gradients = f"; of gradients, back: {bytes_text(back)}" if back else ""
            among = ""
            if any(place.ranks > 1 for place in self.placement.places):
                crossing = sum(one.nbytes(sizes) for one in collectives.collectives(self))
                among = f"; between the ranks of a place: {bytes_text(crossing)}"
            lines.append(
                f"  bytes that leave the run: {leaving}; between places: {bytes_text(between)}{gradients}{among}"
            )
        return "\n".join(lines)

    def _owned(self, index: int) -> str:
        owned = [layer for layer, place in enumerate(self.placement.layers) if place == index]
        ends = [name for name, place in self.placement.ends.items() if place == index]
        parts = [f"layers {collectives.ranges(owned)}"] if owned else []
        return f": {', '.join(parts + ends)}" if parts or ends else ""

    def _loads(self, sizes: Sizes | None) -> list[str]:
        """The offloaded weights that are loaded as values."""
        lines: list[str] = []
        for op, known in zip(self.graph.ops, self.done, strict=True):
            if isinstance(op, Param) and op.path in self.placement.brought:
                when = next(
                    (f"at {site}" for site in self.sites if site.sequence == known), "before the pass"
                )
                size = f", {bytes_text(op.type.nbytes(sizes))}" if sizes is not None else ""
                place = self.home.get(op.out, 0)
                lines.append(f"  loads {op.path} {op.type} for place {place} {when}{size}")
        return lines

    def _transfers(self, sizes: Sizes | None) -> list[str]:
        lines: list[str] = []
        for op, known in zip(self.graph.ops, self.moments, strict=True):
            if isinstance(op, Transfer):
                when = next(
                    (f"after {site}" for site in self.sites if site.sequence == known), "before the pass"
                )
                size = f", {bytes_text(op.type.nbytes(sizes))}" if sizes is not None else ""
                times = self.returning.get(op.out, 0)
                back = "" if not times else f"; its gradient comes back{size}"
                often = f", in each of {times} backward passes" if times > 1 else ""
                lines.append(
                    f"  sends %{op.value} {op.type} from place {op.source} to place {op.target} {when}{size}"
                    f"{back}{often}"
                )
        return lines

    def _backward(self) -> list[str]:
        lines: list[str] = []
        for op, known in zip(self.graph.ops, self.moments, strict=True):
            if isinstance(op, Grad):
                at = next(site for site in self.sites if site.sequence == known)
                first = self._first_leaf()
                lines.append(
                    f"  one backward pass from %{op.loss}, at {at}, to {_counted(op.wrt)}; autograd starts at {first}"
                )
        return lines

    def _first_leaf(self) -> Site:
        """The site at which the first leaf is made, of that site or of something that is computed there."""
        leaves = min(
            known
            for op, known in zip(self.graph.ops, self.moments, strict=True)
            if isinstance(op, Call) and op.function == LEAF
        )
        return next(site for site in self.sites if site.sequence == leaves)

    def _extent(self, n_layers: int) -> str:
        if self.whole:
            return f"every forward pass runs whole: {n_layers} layers and the head"
        if not self.graph.ops:
            return "nothing runs: the block saves nothing"
        if self.stop is None:
            return "no layer runs: what is saved needs no site of the model"
        entered = self.layers_run(n_layers)
        left_out = sum(self._replaces_layer(op, entered) for op in self.graph.writes)
        without = f" but for {left_out} that {'is' if left_out == 1 else 'are'} not run" if left_out else ""
        if not n_layers:  # a model without named layers
            return f"the forward pass stops after {self.stop}"
        return f"the forward pass enters {entered} of {n_layers} layers{without} and stops after {self.stop}"

    @staticmethod
    def _replaces_layer(op: Write, entered: int) -> bool:
        """Does a write take the place of a whole layer that the pass comes to?"""
        layer = op.site.layer
        return (
            op.instead is not None and op.site.name == "resid_post" and layer is not None and layer < entered
        )

    def __str__(self) -> str:
        return self.text()


def replaced_layers(graph: Graph) -> frozenset[int]:
    """The layers whose values are mixed with a pattern of ours: the model's own function has no place for another."""
    return frozenset(
        op.site.layer for op in graph.writes if op.site.name in _MADE_BY_KERNELS and op.site.layer is not None
    )


def replaced_experts(graph: Graph) -> frozenset[int]:
    """The layers that go on with a sum of experts of ours, where what one of them makes is written."""
    return frozenset(
        op.site.layer for op in graph.writes if op.site.name in _MADE_BY_EXPERTS and op.site.layer is not None
    )


_MADE_BY_EXPERTS = ("expert_act", "expert_out")
# Tensors that a fused attention kernel never holds.
_MADE_BY_KERNELS = ("scores", "pattern")

TypeOf = Callable[[Site], TensorType]


def make_plan(
    graph: Graph,
    placement: Placement,
    *,
    carries: tuple[Carry, ...],
    type_of: TypeOf,
    generating: bool,
    afterwards: bool = False,
    reached: tuple[str, ...] = (),
    settled: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
    verify_each: bool = False,
) -> Plan:
    """Improves ``graph`` and decides where it runs and how far the forward pass has to go.

    ``afterwards``: it is about passes of a generation that are over. ``reached``: sites of one level that the model
    reaches in another order than the vocabulary has them. ``settled``: by name, the places from which the members of
    some saves leave, whole; others leave as they lie.
    """
    marked = mark_leaves(improve(graph, verify_each=verify_each, keep_writes=generating))
    if reached:
        marked = as_reached(marked, reached)
    improved = carry_stream_writes(marked, carries, type_of=type_of, to_the_end=generating)
    stop = _last_site(improved)
    targets = {
        Site(carry.target, op.site.layer)
        for carry in carries
        for op in improved.writes
        if op.site.name == carry.site
    }
    carried = targets & {op.site for op in improved.writes}
    laid = lay_out(place(push_indices(improved, placement), placement, settled), placement, settled)
    placed = laid.placed
    return Plan(
        placed.graph,
        placement,
        None if generating else stop,
        generating and not afterwards,
        frozenset(carried),
        placed.at,
        placed.home,
        laid.layouts,
        generating,
    )


def _last_site(graph: Graph) -> Site | None:
    latest: Site | None = None
    reached = BEFORE_ALL
    for op in graph.ops:
        if not isinstance(op, Read | Write):
            continue
        site = moment(op)
        if site.kind.scope not in TEXT and (latest is None or site.sequence > reached):
            latest, reached = site, site.sequence
    return latest


def carry_stream_writes(
    graph: Graph, carries: tuple[Carry, ...], *, type_of: TypeOf, to_the_end: bool
) -> Graph:
    """Adds, for every written stream site that needs it, the sum that carries the write to the block's output."""
    for carry in carries:
        layers = sorted(
            {op.site.layer for op in graph.writes if op.site.name == carry.site and op.site.layer is not None}
        )
        for layer in layers:
            graph = _carried(graph, carry, layer, type_of=type_of, to_the_end=to_the_end)
    return graph


def _carried(graph: Graph, carry: Carry, layer: int, *, type_of: TypeOf, to_the_end: bool) -> Graph:
    site, contribution, target = (
        Site(name, layer) for name in (carry.site, carry.contribution, carry.target)
    )
    moments = moments_of(graph)
    after = [number for number, known in enumerate(moments) if known >= target.sequence]
    if not after and not to_the_end:
        return graph  # nothing looks at the stream after the write
    cut = after[0] if after else len(graph.ops)
    kind = type_of(site)
    first = graph.next_value
    extra: list[Op] = [
        Read(first, kind, site, sum(op.site == site for op in graph.writes)),
        Read(first + 1, kind, contribution, sum(op.site == contribution for op in graph.writes)),
        Call((first + 2,), (kind,), "torch.add", (Ref(first), Ref(first + 1))),
        Write(target, 1, Ref(first + 2)),
    ]
    later = [
        replace(op, version=op.version + 1) if isinstance(op, Read | Write) and op.site == target else op
        for op in graph.ops[cut:]
    ]
    cause = next(number for number, op in enumerate(graph.ops) if isinstance(op, Write) and op.site == site)
    locations = graph.locations
    if locations:
        locations = (*locations[:cut], *[locations[cause]] * len(extra), *locations[cut:])
    pins = tuple(replace(pin, op=pin.op + len(extra)) if pin.op >= cut else pin for pin in graph.pins)
    return replace(graph, ops=(*graph.ops[:cut], *extra, *later), locations=locations, pins=pins)


def _counted(sites: tuple[int, ...]) -> str:
    return "one site" if len(sites) == 1 else f"{len(sites)} sites"
