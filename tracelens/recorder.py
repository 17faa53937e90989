"""Writes a graph down while the user's block runs.

The recorder is the one place where the rules of the language are applied as the user speaks: versions, causality,
lost updates, stale values, shapes, dtypes, the position axis. It knows types and sites, neither modules nor devices.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from tracelens.constants import Captured, capture
from tracelens.errors import (
    Blaming,
    BlockEndedError,
    DuplicateNameError,
    ForeignValueError,
    LostUpdateError,
    OptionError,
    PositionAxisError,
    SaveInGenerationError,
    WriteTargetError,
)
from tracelens.ir.dims import Sizes
from tracelens.ir.graph import Graph, Pin
from tracelens.ir.infer import (
    AbstractArg,
    Inferred,
    infer_call,
    infer_index,
    infer_index_put,
    static_argument,
)
from tracelens.ir.ops import (
    Apply,
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
    Scalar,
    Special,
    Write,
)
from tracelens.ir.sites import Effect, Site
from tracelens.ir.types import DType, TensorType
from tracelens.location import Location, here
from tracelens.operand import Operand
from tracelens.origins import Origin, latest_origin, refuse_backwards
from tracelens.refusing import one_layer_only
from tracelens.subject import PADS, Anatomy, Prompted, spelling


class Recorder:
    """One open recording."""

    def __init__(
        self, anatomy: Anatomy, prompt: Prompted | None, *, generating: bool, opened: Location
    ) -> None:
        self.anatomy = anatomy
        self.prompt = prompt
        self.generating = generating
        self.opened = opened
        self.is_open = True
        self.failure: BaseException | None = None
        self.sizes: Sizes | None = None if prompt is None or generating else prompt.sizes
        self._aligned = not generating and (prompt is None or not prompt.ragged)
        self.ops: list[Op] = []
        self.locations: list[Location] = []
        self.types: list[TensorType] = []
        self.pins: list[Pin] = []
        self.constants: list[Captured] = []
        self.functions: list[object] = []
        self.saves: dict[str, Location] = {}
        self.awaiting: list[tuple[str, weakref.ref[Any]]] = []
        self._versions: dict[Site, int] = {}
        self._site_types: dict[str, TensorType] = {}
        self._reads: dict[tuple[Site, int], int] = {}
        self._origins: list[Origin | None] = []
        self._constant_values: dict[int, tuple[object, int]] = {}
        self._parameter_values: dict[str, int] = {}
        self._pending: dict[int, tuple[Site, Location]] = {}

    # --- values ----------------------------------------------------------------------------------------------

    def _append(self, op: Op, location: Location) -> None:
        self.ops.append(op)
        self.locations.append(location)

    def _define(self, type_: TensorType, origin: Origin | None) -> int:
        self.types.append(type_)
        self._origins.append(origin)
        return len(self.types) - 1

    def version(self, site: Site) -> int:
        """How many writes to ``site`` have been recorded so far."""
        return self._versions.get(site, 0)

    def read(self, site: Site) -> int:
        """The site's value after the writes recorded so far."""
        self.require_open()
        version = self._versions.get(site, 0)
        known = self._reads.get((site, version))
        if known is not None:
            return known
        location = here()
        type_ = self._type_of(site, location)
        value = self._define(type_, Origin(site.order, frozenset((site,)), location))
        self._append(Read(value, type_, site, version), location)
        self._reads[site, version] = value
        return value

    def _type_of(self, site: Site, location: Location) -> TensorType:
        known = self._site_types.get(site.name)
        if known is None:
            with Blaming(location):
                known = self._site_types[site.name] = self.anatomy.type_of(site)
        return known

    def parameter(self, path: str) -> int:
        """A parameter or buffer of the model."""
        self.require_open()
        known = self._parameter_values.get(path)
        if known is not None:
            return known
        location = here()
        with Blaming(location):
            type_ = self.anatomy.parameter_type(path)
        value = self._define(type_, None)
        self._append(Param(value, type_, path), location)
        self._parameter_values[path] = value
        return value

    def constant(self, tensor: torch.Tensor | np.ndarray | np.generic) -> int:
        """A tensor of the user's, captured by reference; parameters of the model are recognised as such."""
        known = self._constant_values.get(id(tensor))
        if known is not None:
            return known[1]
        if isinstance(tensor, torch.Tensor):
            path = self.anatomy.parameter_path(tensor)
            if path is not None:
                return self.parameter(path)
        location = here()
        with Blaming(location):
            captured = capture(tensor)
        value = self._define(captured.type, None)
        self._append(Const(value, captured.type, len(self.constants)), location)
        self.constants.append(captured)
        # Holding the object keeps its id from being used again while the recording is open.
        self._constant_values[id(tensor)] = (tensor, value)
        return value

    # --- operations ------------------------------------------------------------------------------------------

    def call(
        self, name: str, args: Sequence[object], kwargs: Mapping[str, object] | None = None
    ) -> tuple[tuple[int, ...], tuple[str, ...] | None]:
        """Applies a function of the catalogue; returns the new values and, for several, their field names."""
        self.require_open()
        location = here()
        with Blaming(location):
            plain = tuple(self.argument(arg) for arg in args)
            named = tuple((key, self.argument(arg)) for key, arg in kwargs.items()) if kwargs else ()
            abstract = tuple(self._abstract(arg) for arg in plain)
            abstract_named = tuple((key, self._abstract(arg)) for key, arg in named)
            inferred = infer_call(name, abstract, abstract_named, self.sizes)
            self._check_positions(name, inferred)
        origin = latest_origin(self._origins, [*plain, *(arg for _, arg in named)])
        outs = tuple(self._define(type_, origin) for type_ in inferred.types)
        self._pin(inferred)
        self._append(Call(outs, inferred.types, name, plain, named), location)
        return outs, inferred.fields

    def index(self, base: int, index: tuple[IndexItem, ...], *, by_token: bool = False) -> int:
        """``base[index]``; ``by_token``: the index was made from real tokens, so it is right in every row."""
        self.require_open()
        location = here()
        with Blaming(location):
            inferred = infer_index(self.types[base], self._abstract_index(index), self.sizes)
            if not by_token:
                self._check_positions("indexing", inferred)
        value = self._define(
            inferred.types[0], latest_origin(self._origins, [Ref(base), *_index_refs(index)])
        )
        self._pin(inferred)
        self._append(Index(value, inferred.types[0], base, index), location)
        return value

    def put(self, base: int, index: tuple[IndexItem, ...], new: object, *, by_token: bool = False) -> int:
        """A copy of ``base`` in which ``base[index]`` is ``new``."""
        self.require_open()
        location = here()
        with Blaming(location):
            arg = self._ref_or_scalar(new)
            abstract = self.types[arg.id] if isinstance(arg, Ref) else arg
            inferred = infer_index_put(self.types[base], self._abstract_index(index), abstract, self.sizes)
            if not by_token:
                self._check_positions("indexed assignment", inferred)
        value = self._define(
            self.types[base], latest_origin(self._origins, [Ref(base), arg, *_index_refs(index)])
        )
        self._pin(inferred)
        self._append(IndexPut(value, self.types[base], base, index, arg), location)
        return value

    def apply(
        self, function: object, args: Sequence[object], types: tuple[TensorType, ...]
    ) -> tuple[int, ...]:
        """The user's own Python on real tensors."""
        self.require_open()
        location = here()
        with Blaming(location):
            plain = tuple(self.argument(arg) for arg in args)
        origin = latest_origin(self._origins, list(plain))
        outs = tuple(self._define(type_, origin) for type_ in types)
        self._append(Apply(outs, types, len(self.functions), plain), location)
        self.functions.append(function)
        return outs

    def write(self, site: Site, new: object) -> None:
        """Replaces the site's value from here on."""
        self.require_open()
        location = here()
        type_ = self._type_of(site, location)
        with Blaming(location):
            if site.kind.effect is Effect.NONE:
                raise WriteTargetError(f"{site} can be read but not written")
            arg = self._ref_or_scalar(new)
            inferred = self._fit(type_, arg)
            self._check_positions("a write", inferred)
        origin = self._origins[arg.id] if isinstance(arg, Ref) else None
        if origin is not None:
            refuse_backwards(site, origin, location)
        version = self._versions.get(site, 0) + 1
        self._pin(inferred)
        self._versions[site] = version
        self._append(Write(site, version, arg), location)
        if isinstance(arg, Ref):
            pending = self._pending.get(arg.id)
            if pending is not None and pending[0] == site:
                del self._pending[arg.id]

    def _fit(self, site: TensorType, arg: Ref | Scalar) -> Inferred:
        """How a written value fits a site; remembered for as long as the answer does not depend on the prompt."""
        if not isinstance(arg, Ref):
            return infer_index_put(site, (), arg, self.sizes)
        key = (site, self.types[arg.id])
        known = _fits.get(key)
        if known is None:
            known = infer_index_put(site, (), key[1], self.sizes)
            if not known.pins:
                _fits[key] = known
        return known

    def save(
        self,
        values: tuple[int, ...],
        *,
        name: str | None,
        stacked: bool,
        keep: Keep,
        dtype: DType | None,
        to: str | None,
    ) -> str:
        """Lets values leave the run; returns the name under which they do."""
        self.require_open()
        location = here()
        if self.generating:
            raise SaveInGenerationError(
                "values cannot be saved inside model.generate yet: only writes, and t.text and t.tokens, are available",
                at=location,
                instead="generate first, then trace the whole text: with model.trace(prompt + t.text) as t2: ...",
            )
        if name is None:
            name = f"#{len(self.saves)}"
        elif not isinstance(name, str) or name.startswith("#"):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise OptionError(
                f"{name!r} is not a name for a saved value: a name is a text that does not begin with #",
                at=location,
                instead='value.save("name")',
            )
        if name in self.saves:
            raise DuplicateNameError(
                f"the name {name!r} is used by two saves of this trace",
                at=location,
                also=(("first used at", self.saves[name]),),
                instead=f'another name, such as "{name}_2"',
            )
        self.saves[name] = location
        self._append(Save(name, values, stacked, keep, dtype, to), location)
        return name

    # --- += ----------------------------------------------------------------------------------------------------

    def expect_return(self, result: int, site: Site, replaces: int | None) -> None:
        """Notes that ``result`` came from ``+=`` on ``site`` (or a view of it) and must be handed back to it."""
        if replaces is not None:
            self._pending.pop(replaces, None)
        # The operator was just recorded, with its line.
        self._pending[result] = (site, self.locations[-1])

    def awaited(self, value: int) -> Site | None:
        """The site that still waits for ``value``, if any."""
        pending = self._pending.get(value)
        return pending[0] if pending else None

    def returned(self, value: int, site: Site) -> None:
        """Notes that ``value`` was handed back to ``site`` by an indexed assignment."""
        pending = self._pending.get(value)
        if pending is not None and pending[0] == site:
            del self._pending[value]

    # --- the end -----------------------------------------------------------------------------------------------

    def deliver(self, tensors: Mapping[str, Callable[[], Any]]) -> None:
        """Gives every handle its tensor. The recording itself keeps none, so that a dropped handle frees its memory."""
        for name, reference in self.awaiting:
            handle = reference()
            if handle is not None:
                handle._fetch = tensors[name]
        self.awaiting.clear()

    def finish(self) -> Graph:
        """Closes the recording; raises :class:`LostUpdateError` if an update was dropped on the way."""
        if self._pending:
            site, location = next(iter(self._pending.values()))
            self.is_open = False
            path = spelling(site)
            raise LostUpdateError(
                f"the result of an in-place operator on {site} was never handed back to the model, so nothing changed",
                at=location,
                instead=f"to change the model:   {path} += v\nto compute a new value: h = h + v",
            )
        self.is_open = False
        return Graph(
            tuple(self.ops),
            tuple(self.pins),
            tuple(self.constants),
            tuple(self.functions),
            tuple(self.locations),
        )

    def require_open(self) -> None:
        if not self.is_open:
            raise BlockEndedError(
                "nothing can be recorded any more: this block has ended",
                at=here(),
                also=(("it was opened at", self.opened),),
                instead="write it inside the block, or use a saved value in a block of its own",
            )

    # --- arguments ---------------------------------------------------------------------------------------------

    def argument(self, arg: object) -> Arg:
        """A Python argument as the graph holds it: values and tensors by reference, everything else as data."""
        if isinstance(arg, Operand) and not getattr(type(arg), "is_per_layer", False):
            return Ref(self.own(arg))
        if isinstance(arg, torch.Tensor | np.ndarray | np.generic):
            if isinstance(arg, np.generic) and arg.dtype.kind in "biuf":
                return static_argument(arg.item())
            return Ref(self.constant(arg))
        if isinstance(arg, list | tuple) and not isinstance(arg, torch.Size):
            return tuple(self.argument(part) for part in arg)
        if getattr(type(arg), "is_per_layer", False):
            if isinstance(arg, Operand) and not arg._is_recording():
                return Ref(self.own(arg))
            raise one_layer_only(arg)
        return static_argument(arg)

    def own(self, value: Any) -> int:
        """The number of a value in this recording; a saved value of a finished trace becomes a constant."""
        recorder: Recorder = value._recorder
        if recorder is self:
            value._require_fresh()
            return value._id
        if not recorder.is_open and value._has_result():
            return self.constant(value._result())
        raise ForeignValueError(
            "a value of another trace, which was not saved there, was used in this one",
            at=here(),
            also=(("it belongs to the trace opened at", recorder.opened),),
            instead="call .save() on it in its own block, and use it after that block has ended",
        )

    def _ref_or_scalar(self, new: object) -> Ref | Scalar:
        arg = self.argument(new)
        if isinstance(arg, Ref | bool | int | float | complex | Special):
            return arg
        raise WriteTargetError(
            f"a {type(new).__name__} cannot be written to a site",
            instead="assign a value, a tensor or a number",
        )

    def _abstract(self, arg: Arg) -> AbstractArg:
        if isinstance(arg, Ref):
            return self.types[arg.id]
        if isinstance(arg, tuple):
            return tuple(self._abstract(part) for part in arg)
        return arg

    def _abstract_index(self, index: tuple[IndexItem, ...]) -> tuple[Any, ...]:
        return tuple(self.types[item.id] if isinstance(item, Ref) else item for item in index)

    def pin(self, symbol: str) -> None:
        """Marks the graph as right only for prompts of this prompt's size."""
        if self.prompt is None or any(pin.symbol == symbol for pin in self.pins):
            return
        size = self.prompt.lengths_digest if symbol == PADS else self.prompt.sizes[symbol]
        self.pins.append(Pin(symbol, size, len(self.ops)))

    def _pin(self, inferred: Inferred) -> None:
        for symbol in inferred.pins:
            self.pin(symbol)

    def _check_positions(self, what: str, inferred: Inferred) -> None:
        if inferred.mixes and not self._aligned:
            why = (
                "in generation a step may hold one position or many"
                if self.generating
                else "the rows of this prompt differ in length"
            )
            raise PositionAxisError(
                f"{what.removeprefix('torch.')} indexes, reduces or mixes the position axis, but {why}",
                instead=(
                    "a write to all positions (site += v) or to the newest one (site[:, -1] += v)"
                    if self.generating
                    else "address tokens with .tok[...], average with tl.masked_mean, or trace one prompt at a time"
                ),
            )


_fits: dict[tuple[TensorType, TensorType], Inferred] = {}


def _index_refs(index: tuple[IndexItem, ...]) -> list[Arg]:
    return [item for item in index if isinstance(item, Ref)]
