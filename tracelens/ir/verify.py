"""The law: what makes a graph valid, as a list of small named rules.

The recorder never produces a graph that breaks one (a property test), passes are checked against them after each
step in the tests, and graphs from files are checked before anything else is done with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tracelens.errors import TracelensError, VerificationError
from tracelens.ir.gradients import is_computed, is_one_number, site_read, sources
from tracelens.ir.graph import Graph
from tracelens.ir.module_sites import INPUT, ModuleSite, can_travel
from tracelens.ir.ops import Const, Grad, Read, Save, Write, moment, operands, results
from tracelens.ir.retype import retype, site_types, sizes_of
from tracelens.ir.sites import AFTER_ALL, KIND, Effect, Order, Scope, Site
from tracelens.ir.step_flow import complaints_about_steps, made_in, names_steps
from tracelens.ir.types import TensorType
from tracelens.ir.windows import ApartError, StepWindow, is_earlier

Complaint = tuple[int, str]
Rule = Callable[[Graph], Iterator[Complaint]]


def values_are_assigned_once(graph: Graph) -> Iterator[Complaint]:
    seen: set[int] = set()
    for number, op in enumerate(graph.ops):
        for value, _ in results(op):
            if value in seen:
                yield number, f"%{value} is assigned twice"
            seen.add(value)


def values_are_defined_before_use(graph: Graph) -> Iterator[Complaint]:
    seen: set[int] = set()
    for number, op in enumerate(graph.ops):
        for value in operands(op):
            if value not in seen:
                yield number, f"%{value} is used before it is assigned"
        seen.update(value for value, _ in results(op))


def sites_exist(graph: Graph) -> Iterator[Complaint]:
    for number, op in enumerate(graph.ops):
        if isinstance(op, Read | Write):
            kind = KIND.get(op.site.name)
            if isinstance(op.site, ModuleSite):
                if problem := op.site.problem:
                    yield number, f"{op.site} {problem}"
            elif kind is None:
                yield number, f"{op.site.name!r} is not a site"
            elif (kind.scope is Scope.LAYER) != (op.site.layer is not None):
                yield number, f"{op.site} has {'no' if op.site.layer is None else 'a'} layer"
            elif op.site.layer is not None and op.site.layer < 0:
                yield number, f"{op.site} counts its layer from the end"
            elif isinstance(op, Write) and kind.effect is Effect.NONE:
                yield number, f"{op.site} is read-only"


def versions_count_the_writes(graph: Graph) -> Iterator[Complaint]:
    """A read sees exactly the writes to its site that stand before it; writes are numbered as they stand."""
    written: dict[Site, int] = {}
    for number, op in enumerate(graph.ops):
        if isinstance(op, Write):
            site = op.site.always
            written[site] = written.get(site, 0) + 1
            if op.version != written[site]:
                yield number, f"this is write {written[site]} to {site}, not {op.version}"
        elif isinstance(op, Read) and op.version != (before := written.get(op.site.always, 0)):
            yield number, f"{op.site.always} has {before} writes before this read of version {op.version}"


def nothing_travels_backwards(graph: Graph) -> Iterator[Complaint]:
    latest: dict[int, tuple[Order, frozenset[Site]]] = {}
    windows: dict[int, StepWindow | None] = {}
    stepped = names_steps(graph)
    for number, op in enumerate(graph.ops):
        origin: tuple[Order, frozenset[Site]] | None = None
        if isinstance(op, Read):
            origin = (op.site.order, frozenset((op.site.always,)))
        elif isinstance(op, Grad):
            origin = (AFTER_ALL, frozenset())
        window = None
        if stepped:
            try:
                window = made_in(op, windows.__getitem__, graph.types)
            except ApartError as error:
                yield number, str(error)
                return
            windows.update(dict.fromkeys((value for value, _ in results(op)), window))
        for value in operands(op):
            other = latest.get(value)
            if other is None or is_earlier(windows.get(value), window):
                continue
            if origin is None or other[0] > origin[0]:
                origin = other
            elif other[0] == origin[0]:
                origin = (origin[0], origin[1] | other[1])
        if isinstance(op, Write) and origin is not None:
            order, sites = origin
            target = moment(op)
            reached = order < target.order or (order == target.order and can_travel(sites, target))
            if not reached and (op.instead is not None or sites != frozenset((op.site.always,))):
                late = ", ".join(sorted(map(str, sites))) or "a gradient"
                yield number, f"{op.site} is written from {late}, which is not reached before it"
        if origin is not None:
            latest.update(dict.fromkeys((value for value, _ in results(op)), origin))


def modules_that_are_not_run_are_left_alone(graph: Graph) -> Iterator[Complaint]:
    """What would have been made inside of one, or by it, does not exist."""
    stood_in = [op for op in graph.writes if op.instead is not None]
    for number, op in enumerate(graph.ops):
        if not isinstance(op, Read | Write):
            continue
        if isinstance(op, Write) and op.instead is not None:
            begins = op.instead
            if begins.side != INPUT or begins.key or begins.number < 1:
                yield number, f"{begins.text} is not the moment before a module"
            elif not begins.sequence < op.site.sequence:
                yield number, f"{op.site} does not come after {begins}"
            if op.site.steps is not None:
                yield number, f"{begins.module} is replaced in some steps only"
            if op.version != 1:
                yield number, f"{op.site} is written before the module that makes it is replaced"
        for write in stood_in:
            assert write.instead is not None
            if write.instead.sequence < op.site.sequence < write.site.sequence:
                yield number, f"{op.site} lies inside of {write.instead.module}, which is not run"
            elif isinstance(op, Read) and op.site.always == write.site and op.version == 0:
                yield number, f"{op.site}@0 does not exist: {write.instead.module} is not run"


def types_are_what_the_functions_give(graph: Graph) -> Iterator[Complaint]:
    sizes, sites = sizes_of(graph), site_types(graph)
    pinned = {pin.symbol for pin in graph.pins}
    for number, op in enumerate(graph.ops):
        try:
            inferred = retype(op, graph.types, sizes, sites)
        except TracelensError as error:
            yield number, error.problem
            continue
        if inferred is None:
            continue
        declared = tuple(type_ for _, type_ in results(op))
        if not isinstance(op, Write) and inferred.types != declared:
            yield number, f"it gives {_shown(inferred.types)}, not {_shown(declared)}"
        if missing := inferred.pins - pinned:
            yield (
                number,
                f"it fits one size of {', '.join(sorted(missing))} only, and the graph is not pinned to it",
            )


def saves_are_named_apart(graph: Graph) -> Iterator[Complaint]:
    seen: set[str] = set()
    for number, op in enumerate(graph.ops):
        if isinstance(op, Save):
            if op.name in seen:
                yield number, f"two saves are named {op.name!r}"
            seen.add(op.name)
            if not op.values or (len(op.values) > 1 and not op.stacked):
                yield number, "a save that is not stacked holds one value"
            elif len({graph.types[value] for value in op.values}) > 1:
                yield number, "values of different types cannot be stacked"


def constants_are_there(graph: Graph) -> Iterator[Complaint]:
    for number, op in enumerate(graph.ops):
        if not isinstance(op, Const):
            continue
        if op.index < 0 or (graph.constants and op.index >= len(graph.constants)):
            yield number, f"there is no constant #{op.index}"
        elif graph.constants and graph.constants[op.index].type != op.type:
            yield number, f"constant #{op.index} is {graph.constants[op.index].type}, not {op.type}"


def constants_have_one_name(graph: Graph) -> Iterator[Complaint]:
    """A name stands for one constant, and a constant has one name: else replacing it would replace half of it."""
    names: dict[int, str | None] = {}
    indices: dict[str, int] = {}
    for number, op in enumerate(graph.ops):
        if not isinstance(op, Const):
            continue
        if names.setdefault(op.index, op.name) != op.name:
            yield number, f"constant #{op.index} has two names, {names[op.index]!r} and {op.name!r}"
        if op.name is not None and indices.setdefault(op.name, op.index) != op.index:
            yield number, f"{op.name!r} names constant #{indices[op.name]} and constant #{op.index}"


def one_site_has_one_type(graph: Graph) -> Iterator[Complaint]:
    types: dict[Site, TensorType] = {}
    for number, op in enumerate(graph.ops):
        if isinstance(op, Read) and types.setdefault(op.site.always, op.type) != op.type:
            yield number, f"{op.site} is read as {op.type} and as {types[op.site.always]}"


def gradients_are_of_sites(graph: Graph) -> Iterator[Complaint]:
    """Of one number that is made of the sites, and that is no gradient itself."""
    for number, op in enumerate(graph.ops):
        if not isinstance(op, Grad):
            continue
        if not is_one_number(graph.types[op.loss]):
            yield number, f"%{op.loss} is {graph.types[op.loss]}, not one floating number"
        if not op.wrt or op.types != tuple(graph.types[value] for value in op.wrt):
            yield number, "it has the types of the sites that it is with respect to, and at least one"
        made_of = sources(graph.ops, op.loss)
        if made_of.gradient:
            yield number, f"%{op.loss} is made of a gradient"
        for value in op.wrt:
            maker = graph.ops[graph.producer[value]]
            read = site_read(maker, graph.ops)
            if read is None and is_computed(maker):
                # Whether the model leads from it to the loss, the run finds out.
                if not graph.types[value].dtype.is_floating:
                    yield number, f"%{value} is {graph.types[value]}, which is not floating"
                elif not sources(graph.ops, value).reads:
                    yield number, f"%{value} is not made of sites"
            elif read is None:
                yield number, f"%{value} is neither a site that can be written nor computed from sites"
            elif not read.type.dtype.is_floating:
                yield number, f"{read.site} is {read.type}, which is not floating"
            elif not made_of.may_use(value, read):
                yield number, f"%{op.loss} is not made of {read.site}"


_STRUCTURE: tuple[Rule, ...] = (values_are_assigned_once, values_are_defined_before_use, sites_exist)
_MEANING: tuple[Rule, ...] = (
    versions_count_the_writes,
    nothing_travels_backwards,
    modules_that_are_not_run_are_left_alone,
    one_site_has_one_type,
    types_are_what_the_functions_give,
    gradients_are_of_sites,
    saves_are_named_apart,
    constants_are_there,
    constants_have_one_name,
)
RULES: tuple[Rule, ...] = _STRUCTURE + _MEANING


def complaints(graph: Graph) -> list[tuple[str, int, str]]:
    """All that is wrong with ``graph``: (rule, operation, problem). The rules on meaning presume a sound structure."""
    found = [(rule.__name__, number, problem) for rule in _STRUCTURE for number, problem in rule(graph)]
    if not found:
        found = [(rule.__name__, number, problem) for rule in _MEANING for number, problem in rule(graph)]
    return found


def verify(graph: Graph) -> None:
    """Raises :class:`VerificationError` for the first operation that breaks a rule."""
    for rule, number, problem in complaints(graph):
        error = VerificationError(f"the graph is not valid ({rule.replace('_', ' ')}): {problem}")
        raise graph.blame(error, number)


def verify_steps(graph: Graph) -> None:
    """Raises :class:`VerificationError` for the first operation that is not right in a generation."""
    for number, problem in complaints_about_steps(graph):
        error = VerificationError(f"the graph is not right for a generation: {problem}")
        raise graph.blame(error, number)


def _shown(types: tuple[TensorType, ...]) -> str:
    return ", ".join(map(str, types))
