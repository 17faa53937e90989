"""What each module of a model receives and returns, learned by forward passes on tensors without data.

One pass gives numbers; two passes over prompts of other sizes tell which of these numbers are the rows and positions of
the prompt. The passes also say in which order modules are called, and between which named sites.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

from tracelens.backends.hooks import watch
from tracelens.backends.meta_copy import aside
from tracelens.errors import DtypeError, MetaForwardError
from tracelens.ir import dims
from tracelens.ir.dims import Dim
from tracelens.ir.infer import dtype_of
from tracelens.ir.module_sites import INPUT, OUTPUT, Key, ModuleSite, module_site
from tracelens.ir.sites import Site
from tracelens.ir.types import TensorType

SIZES = ({"B": 3, "P": 11}, {"B": 7, "P": 17})
"""Primes, none of whose differences is a multiple of another: no two sizes below can be taken for each other."""

HookPoints = Mapping[tuple[str, str], Sequence[Site]]
"""The named sites at a side of a module."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """One tensor on one side of a module.

    ``type`` is ``None`` where a graph cannot hold it, for the reason ``problem``; ``instead``: what to use. ``lent``:
    the tensor is changed in place later on, or lies in memory of the model's parameters or the user's inputs; who reads
    it has to copy it.
    """

    site: ModuleSite
    type: TensorType | None
    problem: str | None = None
    lent: bool = False
    instead: str | None = None


@dataclass(frozen=True, slots=True)
class Hole:
    """Where a tensor stands in what a module returns."""

    key: Key


@dataclass(frozen=True, slots=True)
class Opaque:
    """Something in what a module returns that is neither a tensor nor plain data."""

    kind: str


@dataclass(frozen=True, slots=True)
class ModuleCall:
    """One call of a module: the tensors that it received and returned, by the way to each.

    ``begins``: the moment after its inputs are there. ``returns``: what came back, with holes for tensors.
    ``names``: of the parameters of its forward. ``fields``: the names in named tuples, by side and the way to each.
    """

    path: str
    inputs: Mapping[Key, Leaf]
    outputs: Mapping[Key, Leaf]
    begins: ModuleSite
    returns: Any
    names: tuple[str, ...]
    fields: Mapping[tuple[str, Key], tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Survey:
    """All calls of modules in a forward pass. ``own_path`` finds the path of modules that have several."""

    calls: Mapping[str, tuple[ModuleCall, ...]]
    own_path: Mapping[str, str]

    def leaf(self, site: ModuleSite) -> Leaf | None:
        """What the survey knows of a site."""
        calls = self.calls.get(site.path, ())
        number = site.call or 0
        if number >= len(calls) or (site.call is None) != (len(calls) == 1):
            return None
        sides = calls[number].inputs if site.side == INPUT else calls[number].outputs
        return sides.get(site.key)


@dataclass(slots=True)
class _Event:
    """A side of a module as a pass reaches it."""

    path: str
    call: int
    side: str
    tensors: dict[Key, torch.Tensor]
    returned: Any = None
    fields: Mapping[Key, tuple[str, ...]] = field(default_factory=dict[Key, tuple[str, ...]])
    versions: dict[Key, int] = field(default_factory=dict[Key, int])

    @property
    def what(self) -> tuple[object, ...]:
        """What must be the same in passes of all sizes."""
        shapes = tuple((key, tensor.dtype, tensor.ndim) for key, tensor in self.tensors.items())
        return (self.path, self.call, self.side, shapes)


def survey(
    model: nn.Module,
    passes: Sequence[Callable[[nn.Module], object]],
    hook_points: HookPoints,
    *,
    pretended: str | None = None,
    instead: str,
) -> Survey:
    """Runs ``passes`` on ``model``, a copy without data: one with the very sizes, or one for each of :data:`SIZES`.

    ``pretended``: the argument, a mask, that runs give in another form, so that nothing is learned of it.
    ``instead``: what to use where nothing can be learned. Raises :class:`MetaForwardError` where that is impossible.
    """
    own_path: dict[str, str] = {}
    first: dict[int, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        own_path[path] = first.setdefault(id(module), path)
    watcher = Watcher({id(module): path for path, module in model.named_modules()})
    watch(model.modules(), watcher.before, watcher.after)
    runs: list[list[_Event]] = []
    for run in passes:
        watcher.start()
        try:
            with aside():
                run(model)
        except Exception as error:
            raise MetaForwardError(
                "what this model's modules receive and return cannot be learned: a forward pass on tensors without "
                f"data fails with {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                instead=instead,
            ) from error
        runs.append(watcher.events)
    if any([event.what for event in events] != [event.what for event in runs[0]] for events in runs[1:]):
        raise MetaForwardError(
            "the modules of this model are called differently for prompts of different sizes",
            instead=instead,
        )
    names = {path: _parameter_names(module) for path, module in model.named_modules()}
    kept = [tensor for module in model.modules() for _, tensor in tensors_in(vars(module))]
    kept += [tensor for events in runs for tensor in events[0].tensors.values()]  # the inputs of the whole
    held = frozenset(map(_memory, [*kept, *model.parameters(), *model.buffers()]))
    masked = frozenset(
        _memory(tensor)
        for events in runs
        for key, tensor in events[0].tensors.items()
        if pretended is not None and key[0] == pretended
    )

    def unknown(event: _Event, key: Key) -> bool:
        """Is a tensor the mask, or made of it under its name?"""
        if _memory(event.tensors[key]) in masked:
            return True
        if pretended is None or event.side != INPUT:
            return False
        taken, first = names[event.path], key[0]
        return pretended == (taken[first] if isinstance(first, int) and first < len(taken) else first)

    return Survey(_calls(runs, _places(runs[0], hook_points), names, held, unknown), own_path)


class Watcher:
    """Writes down what passes the modules."""

    def __init__(self, paths: Mapping[int, str]) -> None:
        self.paths = paths
        self.events: list[_Event] = []
        self.counts: dict[str, int] = {}
        self._open: list[tuple[str, int]] = []

    def start(self) -> None:
        """A new pass."""
        self.events, self.counts, self._open = [], {}, []

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        path = self.paths[id(module)]
        if any(path == other for other, _ in self._open):
            raise RecursionError(f"module {path!r} is called inside a call of itself")
        number = self.counts.get(path, 0)
        self.counts[path] = number + 1
        self._open.append((path, number))
        given = {**dict(enumerate(args)), **kwargs}
        self._note(_Event(path, number, INPUT, dict(tensors_in(given)), fields=dict(_fields_in(given))))

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        path, number = self._open.pop()
        self._note(
            _Event(
                path,
                number,
                OUTPUT,
                dict(tensors_in(output)),
                _template(output, ()),
                dict(_fields_in(output)),
            )
        )

    def _note(self, event: _Event) -> None:
        event.versions = {key: tensor._version for key, tensor in event.tensors.items()}
        self.events.append(event)


def tensors_in(value: Any, way: Key = ()) -> Iterator[tuple[Key, torch.Tensor]]:
    """The tensors in nested containers, each with the way to it."""
    if isinstance(value, torch.Tensor):
        yield way, value
    elif isinstance(value, Mapping):
        for name, part in cast("Mapping[Any, Any]", value).items():
            if isinstance(name, int | str):
                yield from tensors_in(part, (*way, name))
    elif isinstance(value, list | tuple):
        for number, part in enumerate(cast("list[Any]", value)):
            yield from tensors_in(part, (*way, number))


def _fields_in(value: Any, way: Key = ()) -> Iterator[tuple[Key, tuple[str, ...]]]:
    """The names of the fields of named tuples in nested containers, each with the way to it."""
    parts: Any = value.items() if isinstance(value, Mapping) else ()
    if isinstance(value, list | tuple):
        names = getattr(cast(Any, value), "_fields", None)
        if names:
            yield way, tuple(names)
        parts = enumerate(cast("list[Any]", value))
    for name, part in parts:
        if isinstance(part, list | tuple | Mapping) and isinstance(name, int | str):
            yield from _fields_in(part, (*way, name))


def _template(value: Any, way: Key) -> Any:
    """What a module returned, with holes in place of tensors."""
    if isinstance(value, torch.Tensor):
        return Hole(way)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if type(value) is dict:
        return {name: _template(part, (*way, name)) for name, part in cast("dict[Any, Any]", value).items()}
    if type(value) in (list, tuple):
        parts = [_template(part, (*way, number)) for number, part in enumerate(cast("list[Any]", value))]
        return tuple(parts) if isinstance(value, tuple) else parts
    return Opaque(type(value).__name__)


def _parameter_names(module: nn.Module) -> tuple[str, ...]:
    """The names of what the module's forward takes by position."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return ()
    return tuple(
        parameter.name
        for parameter in parameters
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    )


# --- places in the order of the pass ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an event lies among the named sites: after which, and whether amid others of its level."""

    after: Site | None
    amid: bool
    tangle: tuple[Site, Site] | None


def _places(events: Sequence[_Event], hook_points: HookPoints) -> list[_Place]:
    """For every event its place; the named sites of the same side come before it."""
    named = [hook_points.get((event.path, event.side), ()) if event.call == 0 else () for event in events]
    following: list[Site | None] = [None] * len(events)
    first: Site | None = None
    for number in reversed(range(len(events))):
        following[number] = first
        for site in named[number]:
            if first is None or site.sequence < first.sequence:
                first = site
    found: list[_Place] = []
    last: Site | None = None
    for sites, coming in zip(named, following, strict=True):
        for site in sites:
            if last is None or site.sequence > last.sequence:
                last = site
        amid, tangle = False, None
        if last is not None and coming is not None:
            amid = last.order == coming.order
            tangle = (last, coming) if last.sequence > coming.sequence else None
        found.append(_Place(last, amid, tangle))
    return found


def _calls(
    runs: Sequence[Sequence[_Event]],
    places: Sequence[_Place],
    names: Mapping[str, tuple[str, ...]],
    held: frozenset[int],
    unknown: Callable[[_Event, Key], bool],
) -> dict[str, tuple[ModuleCall, ...]]:
    count: dict[str, int] = {}
    for event in runs[0]:
        count[event.path] = max(count.get(event.path, 0), event.call + 1)
    found: dict[str, list[ModuleCall]] = {path: [] for path in count}
    begun: dict[tuple[str, int], tuple[dict[Key, Leaf], ModuleSite, _Event]] = {}
    after, number = None, 0
    for events, place in zip(zip(*runs, strict=True), places, strict=True):
        event = events[0]
        if place.after != after:
            after, number = place.after, 0
        call = event.call if count[event.path] > 1 else None
        leaves: dict[Key, Leaf] = {}
        for key in event.tensors:
            number += 1
            site = module_site(event.path, event.side, key, call, after=after, number=number, amid=place.amid)
            leaves[key] = (
                Leaf(site, None, _OF_MASK, instead=_FOR_MASK)
                if unknown(event, key)
                else _leaf(site, events, key, place, held)
            )
        if event.side == INPUT:
            number += 1
            begins = module_site(event.path, INPUT, (), call, after=after, number=number, amid=place.amid)
            begun[event.path, event.call] = leaves, begins, event
        else:
            inputs, begins, start = begun[event.path, event.call]
            fields = {
                (side.side, way): fields for side in (start, event) for way, fields in side.fields.items()
            }
            found[event.path].append(
                ModuleCall(event.path, inputs, leaves, begins, event.returned, names[event.path], fields)
            )
    return {path: tuple(calls) for path, calls in found.items()}


_OF_MASK = (
    "is the attention mask, whose shape and dtype depend on the prompt and on the implementation of attention"
)
_FOR_MASK = (
    "model.token_mask for where the real tokens are; model.layers[i].scores for what attention excludes"
)


def _memory(tensor: torch.Tensor) -> int:
    """What tells the memory of a tensor without data from that of others; views share it."""
    return tensor.untyped_storage()._cdata


def _leaf(site: ModuleSite, events: Sequence[_Event], key: Key, place: _Place, held: frozenset[int]) -> Leaf:
    tensors = [event.tensors[key] for event in events]
    lent = any(
        event.tensors[key]._version != event.versions[key] or _memory(event.tensors[key]) in held
        for event in events
    )
    if place.tangle is not None:
        before, coming = place.tangle
        return Leaf(
            site,
            None,
            f"lies between {before} and {coming}, which this model reaches in another order than others",
        )
    try:
        dtype = dtype_of(tensors[0].dtype)
    except DtypeError as error:
        return Leaf(site, None, f"is of a dtype that {error.problem}")
    if len(tensors) == 1:
        return Leaf(site, TensorType(dtype, tuple(tensors[0].shape)), None, lent)
    shape: list[Dim] = []
    for pair in zip(*(tensor.shape for tensor in tensors), strict=True):
        dim = size_of(pair)
        if dim is None:
            shown = " and ".join(f"{size} for {sizes}" for size, sizes in zip(pair, SIZES, strict=True))
            return Leaf(site, None, f"has an axis whose size is no multiple of rows and positions ({shown})")
        shape.append(dim)
    return Leaf(site, TensorType(dtype, tuple(shape)), None, lent)


def size_of(pair: tuple[int, int]) -> Dim | None:
    """The size that is ``pair`` in the prompts of :data:`SIZES`; ``None`` where no simple one is.

    >>> size_of((3, 7)), size_of((66, 238)), size_of((48, 48)), size_of((10, 16)), size_of((5, 8))
    (B, 2*B*P, 48, P-1, None)
    """
    one, two = pair
    if one == two:
        return one
    for size in (dims.B, dims.P, dims.multiply(dims.B, dims.P)):
        first, second = (dims.evaluate(size, sizes) for sizes in SIZES)
        if one * second == two * first and one % first == 0:
            return dims.multiply(one // first, size)
    first, second = (sizes["P"] for sizes in SIZES)
    return dims.add(dims.P, one - first) if one - first == two - second else None
