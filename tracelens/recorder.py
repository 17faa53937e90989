"""Writes a graph down while the user's block runs.

The recorder is the one place where the rules of the language are applied as the user speaks: versions, causality,
lost updates, stale values, shapes, dtypes, the position axis. It knows types and sites, neither modules nor devices.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

from tracelens.errors import (
    Blaming,
    LostUpdateError,
    ReplacementError,
    TracelensError,
    WriteTargetError,
)
from tracelens.ir.abstract import AbstractArg, tensors_in
from tracelens.ir.functions import FUNCTIONS, Kind
from tracelens.ir.graph import Graph
from tracelens.ir.infer import (
    Inferred,
    infer_call,
    infer_index,
    infer_index_put,
)
from tracelens.ir.keys import Keys
from tracelens.ir.module_sites import ModuleSite
from tracelens.ir.ops import (
    Apply,
    Arg,
    Call,
    Grad,
    Index,
    IndexItem,
    IndexPut,
    Read,
    Ref,
    Scalar,
    Selector,
    Write,
)
from tracelens.ir.padding import has_keys
from tracelens.ir.sites import AFTER_ALL, Effect, Site
from tracelens.ir.step_flow import steps_of
from tracelens.ir.types import TensorType
from tracelens.ir.windows import PREFILL
from tracelens.location import Location, here
from tracelens.misaligned import PaddedSize, misaligned, padded_size, padding_counted
from tracelens.origins import (
    Origin,
    latest_origin,
    origin_in_steps,
    refuse_backwards,
    refuse_earlier_steps,
    refuse_other_steps,
)
from tracelens.saving import SavingDraft
from tracelens.skipping import (
    Skipped,
    refuse_inside,
    refuse_late,
    refuse_overlooked,
    refuse_unready,
    refuse_unseen,
)
from tracelens.steps import Step
from tracelens.subject import spelling

_OF_NUMBERS = frozenset({Kind.POINTWISE, Kind.REDUCTION, Kind.PRODUCT})


class Recorder(SavingDraft):
    """One open recording."""

    # --- values ----------------------------------------------------------------------------------------------

    def is_current(self, site: Site, value: int) -> bool:
        """Is ``value`` what the site holds after the writes recorded so far?"""
        return self._current.get(site) == value

    def read(self, site: Site) -> int:
        """The site's value after the writes recorded so far."""
        if not self.is_open:
            self.require_open()
        known = self._current.get(site)
        if known is not None:
            return known
        location = here()
        step = self._at.next.get(site)
        if step is None:
            type_ = self._type_of(site, location)
            op = Read(len(self.types), type_, site, self._versions.get(site.always, 0))
            steps = steps_of(site) if self.generating else None
            origin = Origin(site.order, frozenset((site.always,)), len(self.ops), steps)
            step = self._add(site, op, (type_,), origin)
        value = self._current[site] = self._take(step, location)
        return value

    def _origin(self, args: Sequence[Arg], *, by_token: bool = False) -> Origin | None:
        """Where something comes from that is made of these arguments."""
        if self.generating:
            return origin_in_steps(self._origins, self.types, args, by_token=by_token)
        return latest_origin(self._origins, args)

    def _type_of(self, site: Site, location: Location) -> TensorType:
        if self.skipped:
            with Blaming(location):
                refuse_inside(self.skipped, site)
        known = self._site_types.get(site.name)
        if known is None:
            with Blaming(location):
                known = self.anatomy.type_of(site)
            if self.anatomy.in_all_layers(site.name):
                self._site_types[site.name] = known
        return known

    # --- operations ------------------------------------------------------------------------------------------

    def call(
        self, name: str, args: Sequence[object], kwargs: Mapping[str, object] | None = None
    ) -> tuple[Sequence[int], tuple[str, ...] | None]:
        """Applies a function of the catalogue; returns the new values and, for several, their field names."""
        if not self.is_open:
            self.require_open()
        location = here()
        step = key = None
        try:
            if not kwargs:
                key = (name, *[self._cheap(arg) for arg in args])
                if None in key:
                    key = None
                else:
                    step = self._at.next.get(key)
            if step is None:
                step = self._call(key, name, args, kwargs or {})
        except TracelensError as error:
            error.at = error.at or location
            raise
        first = self._take(step, location)
        return range(first, len(self.types)), step.fields

    def _call(
        self, key: Hashable | None, name: str, args: Sequence[object], kwargs: Mapping[str, object]
    ) -> Step:
        if self._keys is not None and FUNCTIONS[name].kind in _OF_NUMBERS:
            for arg in (*args, *kwargs.values()):
                if isinstance(arg, PaddedSize):
                    raise padded_size(arg)
        plain = tuple(self.argument(arg) for arg in args)
        named = tuple((key, self.argument(arg)) for key, arg in kwargs.items())
        abstract = tuple(self._abstract(arg) for arg in plain)
        abstract_named = tuple((key, self._abstract(arg)) for key, arg in named)
        inferred = infer_call(name, abstract, abstract_named, self._inferring)
        origin = self._origin([*plain, *(arg for _, arg in named)])
        self._check_positions(name, inferred, (*abstract, *abstract_named), origin)
        first = len(self.types)
        outs = tuple(range(first, first + len(inferred.types)))
        op = Call(outs, inferred.types, name, plain, named)
        if self._keys is not None and has_keys(tensors_in((*abstract, *abstract_named))):
            self._check_keys(self._keys, op)
        if key is None:
            known = self._at.next.get(op)
            if known is not None:
                return known
        return self._add(op if key is None else key, op, inferred.types, origin, inferred, inferred.fields)

    def index(self, base: int, index: tuple[IndexItem, ...], *, by_token: bool = False) -> int:
        """``base[index]``; ``by_token``: the index was made from real tokens, so it is right in every row."""
        self.require_open()
        location = here()
        with Blaming(location):
            inferred = infer_index(self.types[base], self._abstract_index(index), self._inferring)
            origin = self._origin([Ref(base), *_index_refs(index)], by_token=_selects(index))
            if not by_token:
                self._check_positions("indexing", inferred, (self.types[base],), origin)
        (type_,) = inferred.types
        op = Index(len(self.types), type_, base, index)
        return self._take(self._step(op, (type_,), origin, inferred), location)

    def put(self, base: int, index: tuple[IndexItem, ...], new: object, *, by_token: bool = False) -> int:
        """A copy of ``base`` in which ``base[index]`` is ``new``."""
        self.require_open()
        location = here()
        with Blaming(location):
            arg = self._ref_or_scalar(new)
            abstract = self.types[arg.id] if isinstance(arg, Ref) else arg
            inferred = infer_index_put(
                self.types[base], self._abstract_index(index), abstract, self._inferring
            )
            if self.generating and isinstance(arg, Ref):
                self.refuse_earlier(base, arg.id)
            origin = self._origin([Ref(base), arg, *_index_refs(index)], by_token=_selects(index))
            if not by_token:
                self._check_positions("indexed assignment", inferred, (self.types[base],), origin)
        type_ = self.types[base]
        op = IndexPut(len(self.types), type_, base, index, arg)
        return self._take(self._step(op, (type_,), origin, inferred), location)

    def refuse_earlier(self, base: int, value: int) -> None:
        """Raises where what is read at a site would become a value of steps that come after all of its own."""
        there, origin = self._origins[base], self._origins[value]
        if there is not None and there.steps is not None and origin is not None:
            refuse_earlier_steps(next(iter(there.sites)), there.steps, origin, self.locations)

    def apply(
        self, function: object, args: Sequence[object], types: tuple[TensorType, ...]
    ) -> tuple[int, ...]:
        """The user's own Python on real tensors."""
        self.require_open()
        location = here()
        with Blaming(location):
            plain = tuple(self.argument(arg) for arg in args)
            origin = self._origin(list(plain))
        first = len(self.types)
        outs = tuple(range(first, first + len(types)))
        self._take(self._step(Apply(outs, types, len(self.functions), plain), types, origin), location)
        self.functions.append(function)
        return outs

    def grad(self, loss: int, wrt: tuple[int, ...]) -> tuple[int, ...]:
        """The derivatives of one number with respect to values of sites, which the caller has looked at."""
        location = here()
        first = len(self.types)
        outs = tuple(range(first, first + len(wrt)))
        types = tuple(self.types[value] for value in wrt)
        origin = Origin(AFTER_ALL, frozenset(), len(self.ops))
        self._take(self._step(Grad(outs, types, loss, wrt), types, origin), location)
        return outs

    def write(self, site: Site, new: object) -> None:
        """Replaces the site's value from here on."""
        if not self.is_open:
            self.require_open()
        location = here()
        try:
            cheap = self._cheap(new)
            key = None if cheap is None else (site, cheap)
            step = None if key is None else self._at.next.get(key)
            if step is None:
                step = self._write(key, site, new, location)
        except TracelensError as error:
            error.at = error.at or location
            raise
        self._take(step, location)
        tensor = site.always
        self._versions[tensor] = self._versions.get(tensor, 0) + 1
        self._current.pop(site, None)
        if self.generating:
            for other in [known for known in self._current if known.always == tensor]:
                if steps_of(other).overlaps(steps_of(site)):
                    del self._current[other]
        if self._pending and isinstance(op := step.op, Write) and isinstance(op.value, Ref):
            self.returned(op.value.id, site)

    def _write(self, key: Hashable | None, site: Site, new: object, location: Location) -> Step:
        type_ = self._type_of(site, location)
        if site.kind.effect is Effect.NONE:
            raise WriteTargetError(f"{site} can be read but not written", instead=site.kind.instead)
        if self.skipped:
            refuse_unseen(self.skipped, site, self.anatomy)
        arg = self._ref_or_scalar(new)
        inferred = self._fit(type_, arg)
        origin = self._origins[arg.id] if isinstance(arg, Ref) else None
        self._check_positions("a write", inferred, (), origin)
        if (
            origin is not None
            and isinstance(arg, Ref)
            and not (self.generating and refuse_other_steps(site, self.types[arg.id], origin, self.locations))
        ):
            refuse_backwards(site, origin, self.locations, location)
        op = Write(site, self._versions.get(site.always, 0) + 1, arg)
        if key is None:
            return self._step(op, (), None, inferred)
        return self._add(key, op, inferred=inferred)

    def is_written(self, site: Site) -> bool:
        """Has the block written to a site so far?"""
        return site.always in self._versions

    def replace(self, site: Site, begins: ModuleSite, new: object) -> None:
        """The module between ``begins`` and ``site`` is not run, and ``new`` is what it would have made."""
        self.require_open()
        location = here()
        with Blaming(location):
            if self.generating and (reason := self.anatomy.needed_in_generation(begins.path)):
                raise ReplacementError(
                    f"{begins.module} cannot be left out in model.generate: {reason}",
                    instead="a later layer, a module that does no attention, or model.trace over the whole text",
                )
            arg = self._ref_or_scalar(new)
            op = Write(site, 1, arg, begins)
            skipped = Skipped(begins, site, location, op)
            refuse_late(skipped, self.ops, self.locations)
            inferred = self._fit(self._type_of(site, location), arg)
            origin = self._origins[arg.id] if isinstance(arg, Ref) else None
            self._check_positions("a write", inferred, (), origin)
            if origin is not None and isinstance(arg, Ref) and self.generating:
                refuse_other_steps(site, self.types[arg.id], origin, self.locations)
            if origin is not None:
                refuse_unready(skipped, origin, self.locations)
            refuse_overlooked(skipped, self.ops, self.locations, self.anatomy)
        self._take(self._step(op, (), None, inferred), location)
        self._versions[site] = 1
        self.skipped.append(skipped)

    def _fit(self, site: TensorType, arg: Ref | Scalar) -> Inferred:
        """How a written value fits a site; remembered for as long as the answer does not depend on the prompt."""
        if not isinstance(arg, Ref):
            return infer_index_put(site, (), arg, self._inferring)
        key = (site, self.types[arg.id])
        known = _fits.get(key)
        if known is None:
            known = infer_index_put(site, (), key[1], self._inferring)
            if not known.pins:
                _fits[key] = known
        return known

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

    def finish(self) -> Graph:
        """Closes the recording; raises :class:`LostUpdateError` if an update was dropped on the way."""
        if self.unfinished:
            self.is_open = False
            raise next(iter(self.unfinished.values()))
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
        ops = self._at.ops
        if ops is None:
            ops = self._at.ops = tuple(self.ops)
        return Graph(
            ops,
            tuple(self.pins),
            tuple(self.constants),
            tuple(self.functions),
            tuple(self.locations),
        )

    def _check_positions(
        self,
        what: str,
        inferred: Inferred,
        of: tuple[AbstractArg, ...] = (),
        origin: Origin | None = None,
    ) -> None:
        if not inferred.mixes or self._aligned:
            return
        # The step over the prompt has all of its positions, as a trace has.
        chunked = self.generating and (origin is None or origin.steps != PREFILL)
        if chunked or (self.prompt is not None and self.prompt.ragged):
            raise misaligned(what, chunked, has_keys(tensors_in(of)))

    def _check_keys(self, keys: Keys, op: Call) -> None:
        """Refuses a function that would count what stands at keys that are padding."""
        for earlier in self.ops[self._followed :]:
            keys.add(earlier)
        self._followed = len(self.ops)
        if keys.counts_padding(op):
            raise padding_counted(op.function)


_fits: dict[tuple[TensorType, TensorType], Inferred] = {}


def _selects(index: tuple[IndexItem, ...]) -> bool:
    """Does an index choose tokens of the prompt?"""
    return any(isinstance(item, Selector) for item in index)


def _index_refs(index: tuple[IndexItem, ...]) -> list[Arg]:
    return [item for item in index if isinstance(item, Ref)]
