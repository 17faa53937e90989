"""The types of calls: rules first, then torch's own answer, both remembered.  torch itself is given from outside."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from tracelens.errors import ShapeError, UnsupportedFunctionError
from tracelens.ir import calls, dims, memo, rules
from tracelens.ir.abstract import (
    AbstractArg,
    AbstractKwargs,
    Defer,
    Inferred,
    Misfit,
    Sizing,
    Unsettled,
    tensors_in,
)
from tracelens.ir.dims import Sizes, Sym
from tracelens.ir.functions import FUNCTIONS, Kind
from tracelens.ir.misfit import Refused, call_text, lacks_halves, named_error, of_no_size
from tracelens.ir.probe import probed
from tracelens.ir.types import DType, TensorType

Args = tuple[AbstractArg, ...]


class Stuff(Enum):
    """What the tensors of a trial call are made of."""

    META = "no numbers"
    ONES = "ones"
    ZEROS = "zeros"


class Run(Protocol):
    """Runs a call at numbers for sizes: the results' types, and whether it is one tensor. Raises :class:`Refused`."""

    def __call__(
        self, name: str, args: Args, kwargs: AbstractKwargs, sizes: Sizes, stuff: Stuff
    ) -> tuple[tuple[TensorType, ...], bool]: ...


@dataclass(frozen=True, slots=True)
class _Entry:
    """An answer in the memo.  With ``least`` or ``limited`` the real sizes, once known, must be looked at too."""

    inferred: Inferred
    least: tuple[tuple[Sym, int], ...]
    limited: bool


# What numbers these are given has no say in the type. (The others refuse numbers that an integer cannot hold.)
_NUMBERS_COUNT = ("torch.masked_fill", "torch.full_like", "torch.threshold", "torch.nn.functional.threshold")
_ANY_NUMBER = frozenset(
    function.name
    for function in FUNCTIONS.values()
    if function.kind is Kind.POINTWISE and function.name not in _NUMBERS_COUNT
)
_FULL = 100_000
_SMALL = {dims.BATCH: 2, dims.POSITION: 3, dims.KEY: 3}
# Sizes to try where none are known: a call that fits none of them does not fit.
_TRIALS = (
    _SMALL,
    {dims.BATCH: 1, dims.POSITION: 1, dims.KEY: 1},
    {dims.BATCH: 6, dims.POSITION: 12, dims.KEY: 12},
    {dims.BATCH: 2, dims.POSITION: 64, dims.KEY: 64},
)
_FEW = 1 << 18


class Typing:
    """Infers the types of calls, given torch (``run``) and the dtype that Python floats become.

    That dtype is a setting of torch, so it is part of every key: as ``setting`` gives it, which is cheap. ``default``
    gives it in our words.
    """

    def __init__(self, run: Run, setting: Callable[[], object], default: Callable[[], DType]) -> None:
        self._run = run
        self._setting = setting
        self._default = default
        # First by the abstract call alone; ``None`` where sizes are needed, and then by the sizes too.
        self._memo: dict[object, _Entry | None] = {}
        self._sized: dict[object, Inferred] = {}
        self._asked: dict[object, tuple[TensorType, ...]] = {}

    def forget(self) -> None:
        self._memo.clear()
        self._sized.clear()
        self._asked.clear()
        memo.forget()

    def infer(self, name: str, args: Args, kwargs: AbstractKwargs, sizes: Sizes | None) -> Inferred:
        if name not in FUNCTIONS:
            raise calls.refused(name)
        key = (self._setting(), memo.key_of(name, args, kwargs, name in _ANY_NUMBER))
        entry = self._memo.get(key, ...)
        if isinstance(entry, _Entry) and (sizes is None or not (entry.least or entry.limited)):
            return entry.inferred
        sized = None if sizes is None else (key, *map(sizes.get, dims.SYMBOLS))
        if sized in self._sized:
            return self._sized[sized]
        if len(self._memo) + len(self._sized) > _FULL:
            self.forget()
            return self.infer(name, args, kwargs, sizes)
        calls.refuse_arguments(name, args, dict(kwargs))
        if entry is ...:
            # First without sizes, so that the answer serves every prompt.
            entry = self._memo[key] = self._settled(name, args, kwargs, None, sizes)
            if entry is not None and (sizes is None or not (entry.least or entry.limited)):
                return entry.inferred
        inferred = self._final(name, args, kwargs, sizes)
        if sized is not None:
            self._sized[sized] = inferred
        return inferred

    def _settled(
        self, name: str, args: Args, kwargs: AbstractKwargs, sizes: Sizes | None, real: Sizes | None
    ) -> _Entry | None:
        try:
            return self._by_rule(name, args, kwargs, sizes, real)
        except (Unsettled, Misfit):
            return None

    def _final(self, name: str, args: Args, kwargs: AbstractKwargs, sizes: Sizes | None) -> Inferred:
        try:
            return self._by_rule(name, args, kwargs, sizes, sizes).inferred
        except Unsettled as error:
            raise ShapeError(
                f"{call_text(name, args, kwargs)}: {error}",
                instead="an axis of the same symbol, or of size one; or record with a prompt",
            ) from None
        except Misfit as error:

            def trial(other: Args, named: AbstractKwargs) -> object:
                return self._by_torch(name, other, named, sizes, sizes)

            raise named_error(name, args, kwargs, sizes, error, trial) from None

    def _by_rule(
        self, name: str, args: Args, kwargs: AbstractKwargs, sizes: Sizes | None, real: Sizes | None
    ) -> _Entry:
        rule = rules.rule_for(FUNCTIONS[name])
        if rule is not None:
            sizing = Sizing(sizes, self._default(), self._ask)
            try:
                return _Entry(rule(sizing, name, args, kwargs), tuple(sizing.least), False)
            except (Misfit, Defer) as error:
                if isinstance(error, Refused) and FUNCTIONS[name].kind is Kind.POINTWISE:
                    raise  # what one element cannot do, many cannot
                # Otherwise torch has the last word, and better ones.
        return self._by_torch(name, args, kwargs, sizes, real)

    def _ask(self, name: str, args: Args, kwargs: AbstractKwargs) -> tuple[TensorType, ...]:
        """torch's word on the dtypes of a tiny call.

        Meta tensors let many dtypes pass for which no device has a kernel, so it is real numbers that are tried. Only
        what a CPU lacks for halves is excused: a GPU may have it.
        """
        key = (self._setting(), memo.key_of(name, args, kwargs, name in _ANY_NUMBER))
        found = self._asked.get(key)
        if found is None:
            if len(self._asked) > _FULL:
                self._asked.clear()
            try:
                found = self._run(name, args, kwargs, {}, Stuff.ONES)[0]
            except Refused as error:
                if not lacks_halves(str(error)):
                    raise
                found = self._run(name, args, kwargs, {}, Stuff.META)[0]
            self._asked[key] = found
        return found

    def _by_torch(
        self, name: str, args: Args, kwargs: AbstractKwargs, sizes: Sizes | None, real: Sizes | None
    ) -> _Entry:
        """The answer from meta tensors at telling sizes; ``real`` are the sizes to try it at."""
        function = FUNCTIONS[name]
        everything = (*args, *(value for _, value in kwargs))
        single = True

        def run(at: Sizes) -> tuple[TensorType, ...]:
            nonlocal single
            types, single = self._run(name, args, kwargs, at, Stuff.META)
            return types

        found = probed(run, [value.shape for value in tensors_in(everything)], _symbols_in(everything), sizes)
        self._confirm(name, args, kwargs, found.types, real)
        names = function.results if function.results and len(function.results) == len(found.types) else ()
        mixes = rules.mixes(function, args, kwargs) or bool(found.pins & {dims.POSITION, dims.KEY})
        return _Entry(Inferred(found.types, None if single else names, found.pins, mixes), (), found.limited)

    def _confirm(
        self, name: str, args: Args, kwargs: AbstractKwargs, types: tuple[TensorType, ...], real: Sizes | None
    ) -> None:
        """Tries the call on real numbers where those are few: meta tensors let much pass that no device computes."""
        everything = (*args, *(value for _, value in kwargs))
        values = tensors_in(everything)
        symbols = frozenset[str]().union(
            *(value.symbols for value in values), *(dims.symbols(dim) for dim in _symbols_in(everything))
        )
        known = symbols <= (real or {}).keys()
        refusal: Refused | None = None
        for at in ({**_SMALL, **(real or {})},) if known else _TRIALS:
            if any(math.prod(value.sizes(at)) > _FEW for value in (*values, *types)):
                if refusal is not None and of_no_size(str(refusal)):
                    raise refusal
                return
            try:
                said = self._on_numbers(name, args, kwargs, at)
            except Refused as error:
                if error.of_numbers or lacks_halves(str(error)):
                    return
                refusal = refusal or error
                continue
            if known and said != tuple(TensorType(type_.dtype, type_.sizes(at)) for type_ in types):
                raise UnsupportedFunctionError(
                    f"{call_text(name, args, kwargs)}: torch gives another type for these arguments than it promises"
                )
            return
        if refusal is not None:
            raise refusal

    def _on_numbers(self, name: str, args: Args, kwargs: AbstractKwargs, at: Sizes) -> tuple[TensorType, ...]:
        try:
            return self._run(name, args, kwargs, at, Stuff.ONES)[0]
        except Refused:
            # No index is too large among zeros, and no divisor is zero among ones.
            return self._run(name, args, kwargs, at, Stuff.ZEROS)[0]


def _symbols_in(args: Sequence[AbstractArg]) -> list[Sym]:
    found: list[Sym] = []
    for arg in args:
        if isinstance(arg, Sym):
            found.append(arg)
        elif isinstance(arg, tuple):
            found += _symbols_in(arg)
    return found
