"""What a recording has written down so far: its operations, as steps, and what they are applied to."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any, cast

import numpy as np
import torch

from tracelens.constants import Captured, capture
from tracelens.errors import (
    Blaming,
    BlockEndedError,
    DuplicateNameError,
    ForeignValueError,
    SymbolicSizeError,
    TracelensError,
    WriteTargetError,
)
from tracelens.ir.dims import KEY, POSITION, Sizes
from tracelens.ir.graph import Pin
from tracelens.ir.infer import (
    AbstractArg,
    Inferred,
    static_argument,
)
from tracelens.ir.keys import Keys
from tracelens.ir.ops import (
    Arg,
    Const,
    IndexItem,
    Op,
    Param,
    Ref,
    Scalar,
    Special,
)
from tracelens.ir.retype import ANY_SIZES
from tracelens.ir.sites import Site
from tracelens.ir.types import TensorType
from tracelens.location import Location, here
from tracelens.misaligned import PaddedSize, padded_size
from tracelens.operand import Operand
from tracelens.origins import Origin
from tracelens.refusing import one_layer_only
from tracelens.skipping import Skipped
from tracelens.steps import Step, Steps
from tracelens.subject import PADS, Anatomy, Prompted


class Delivery:
    """Where the handles of one save find its tensor after the run; with the last of them it is let go."""

    __slots__ = ("__weakref__", "fetch", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.fetch: Callable[[], Any] | None = None


class Draft:
    """The operations, types and constants of a recording that is being made, and the arguments that they take."""

    def __init__(
        self,
        anatomy: Anatomy,
        prompt: Prompted | None,
        *,
        generating: bool,
        opened: Location,
        known: Steps | None = None,
    ) -> None:
        self.anatomy = anatomy
        self.prompt = prompt
        self.generating = generating
        self.opened = opened
        self.is_open = True
        self.failure: BaseException | None = None
        self.sizes: Sizes | None = None if prompt is None or generating else prompt.sizes
        # Of a generation the rows are known, and each step has positions of its own.
        self._inferring: Sizes | None = (
            {**ANY_SIZES, "B": prompt.sizes["B"]} if prompt is not None and generating else self.sizes
        )
        self._aligned = not generating and (prompt is None or not prompt.ragged)
        # What values hold at keys that are padding: followed where there are any.
        self._keys = Keys() if prompt is not None and prompt.ragged else None
        self._followed = 0
        self.ops: list[Op] = []
        self.locations: list[Location] = []
        self.types: list[TensorType] = []
        self.pins: list[Pin] = []
        self.constants: list[Captured] = []
        self.functions: list[object] = []
        self.saves: dict[str, Location] = {}
        self.awaiting: list[weakref.ref[Delivery]] = []
        self._known = known or Steps()
        self._at = self._start()
        self._versions: dict[Site, int] = {}
        self._current: dict[Site, int] = {}
        self._site_types: dict[str, TensorType] = {}
        self._origins: list[Origin | None] = []
        self._constant_values: dict[int, tuple[object, int]] = {}
        # What was begun and has to be ended, with the error for leaving it open.
        self.unfinished: dict[object, TracelensError] = {}
        # The constants that have names: what was given, its value, and where.
        self.named: dict[str, tuple[object, int, Location]] = {}
        self._parameter_values: dict[str, int] = {}
        self.skipped: list[Skipped] = []
        self._pending: dict[int, tuple[Site, Location]] = {}

    def _start(self) -> Step:
        if self.prompt is not None and self.prompt.ragged:
            return Step()  # what a token selector names depends on more than the sizes
        kind = (
            None if self.prompt is None else tuple(self.prompt.sizes.items()),
            self.generating,
            self.anatomy.dtype,
            self.anatomy.vocabulary,
            torch.get_default_dtype(),
        )
        return self._known.start(kind)

    # --- steps -----------------------------------------------------------------------------------------------

    def _take(self, step: Step, location: Location) -> int:
        """Records what a step says; returns the first new value."""
        first = len(self.types)
        self._at = step
        assert step.op is not None
        self.ops.append(step.op)
        self.locations.append(location)
        types = step.types
        if types:
            self.types.extend(types)
            self._origins.extend([step.origin] * len(types))
        if step.pins:
            self.pins.extend(step.pins)
        return first

    def _add(
        self,
        key: Hashable,
        op: Op,
        types: tuple[TensorType, ...] = (),
        origin: Origin | None = None,
        inferred: Inferred | None = None,
        fields: tuple[str, ...] | None = None,
    ) -> Step:
        """A step that was not known here yet."""
        pins: tuple[Pin, ...] = ()
        if inferred is not None and inferred.pins:
            pins = tuple(pin for symbol in inferred.pins if (pin := self._new_pin(symbol)) is not None)
        return self._known.add(self._at, key, Step(op, types, origin, pins, fields))

    def _step(
        self, op: Op, types: tuple[TensorType, ...], origin: Origin | None, inferred: Inferred | None = None
    ) -> Step:
        """The step for an operation that has no cheaper key than itself."""
        return self._at.next.get(op) or self._add(op, op, types, origin, inferred)

    def _cheap(self, arg: object) -> Hashable:
        """What stands for an argument in the key of a step, if that is quickly found: a value's number, or a number."""
        kind = type(arg)
        if getattr(kind, "is_value", False):
            value: Any = arg
            return value._id if value._recorder is self and value._stale is None else None
        if kind is torch.Tensor:
            known = self._constant_values.get(id(arg))
            return known[1] if known is not None else self.constant(cast("torch.Tensor", arg))
        if kind is int or (kind is float and arg):  # minus zero equals zero
            return (kind, arg)
        return None

    # --- the user's own tensors ---------------------------------------------------------------------------

    def parameter(self, path: str) -> int:
        """A parameter or buffer of the model."""
        self.require_open()
        known = self._parameter_values.get(path)
        if known is not None:
            return known
        location = here()
        with Blaming(location):
            type_ = self.anatomy.parameter_type(path)
        step = self._step(Param(len(self.types), type_, path), (type_,), None)
        value = self._parameter_values[path] = self._take(step, location)
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
        op = Const(len(self.types), captured.type, len(self.constants))
        value = self._take(self._step(op, (captured.type,), None), location)
        self.constants.append(captured)
        # Holding the object keeps its id from being used again while the recording is open.
        self._constant_values[id(tensor)] = (tensor, value)
        return value

    def named_constant(self, name: str, captured: Captured, given: object) -> int:
        """A constant under a name. The same thing may be given the same name again; ``given`` is what the user gave."""
        self.require_open()
        location = here()
        known = self.named.get(name)
        if known is not None:
            other, value, first = known
            if given is other or (type(given) is type(other) is float and given == other):
                return value
            raise DuplicateNameError(
                f"the name {name!r} is used by two constants of this recording, which are not the same tensor",
                at=location,
                also=(("first used at", first),),
                instead=f'another name, such as "{name}_2"; or the first constant again: {name} = tl.constant(...)',
            )
        op = Const(len(self.types), captured.type, len(self.constants), name)
        value = self._take(self._step(op, (captured.type,), None), location)
        self.constants.append(captured)
        self.named[name] = (given, value, location)
        return value

    # --- arguments ---------------------------------------------------------------------------------------------

    def require_open(self) -> None:
        if not self.is_open:
            raise BlockEndedError(
                "nothing can be recorded any more: this block has ended",
                at=here(),
                also=(("it was opened at", self.opened),),
                instead="write it inside the block, or use a saved value in a block of its own",
            )

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
        recorder: Draft = value._recorder
        if recorder is self:
            value._require_fresh()
            return value._id
        if not recorder.is_open and value._has_result():
            result = value._result()
            if isinstance(result, list):
                return self._per_prompt(value, cast("list[torch.Tensor]", result))
            return self.constant(result)
        raise ForeignValueError(
            "a value of another trace, which was not saved there, was used in this one",
            at=here(),
            also=(("it belongs to the trace opened at", recorder.opened),),
            instead="call .save() on it in its own block, and use it after that block has ended",
        )

    def _per_prompt(self, value: Any, parts: list[torch.Tensor]) -> int:
        """What was saved for prompts of different lengths, as one value for the same lengths."""
        known = self._constant_values.get(id(parts))
        if known is None:
            from tracelens.per_prompt import padded_again  # it records as a block does

            known = self._constant_values[id(parts)] = (parts, padded_again(cast(Any, self), value, parts))
        return known[1]

    def _ref_or_scalar(self, new: object) -> Ref | Scalar:
        arg = self.argument(new)
        if isinstance(new, PaddedSize):
            raise padded_size(new)
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
        pin = self._new_pin(symbol)
        if pin is None:
            return
        self.pins.append(pin)
        key = ("pin", symbol)
        self._at = self._at.next.get(key) or self._known.add(self._at, key, Step())

    def _new_pin(self, symbol: str) -> Pin | None:
        if self.prompt is None or any(pin.symbol == symbol for pin in self.pins):
            return None
        if self.generating and symbol in (POSITION, KEY):
            raise SymbolicSizeError(
                "this is right for one number of positions, and the steps of a generation have different ones",
                instead="a tensor without positions, such as [D] or [B, 1, D]; or p.layers[i]... for p in t.prompts, "
                "whose positions are those of each prompt",
            )
        size = self.prompt.lengths_digest if symbol == PADS else self.prompt.sizes[symbol]
        return Pin(symbol, size, len(self.ops))
