"""Turns the steps of a program into Python functions on tensors.

What can be decided before the run (which function, where its operands lie, what is plain data) is decided here, once;
a step in a hook is then a dictionary look-up or two and the torch call itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from tracelens.backends.selecting import put_tokens, take_tokens
from tracelens.errors import ApplyResultError, MutatedActivationError, SiteMismatchError, VerificationError
from tracelens.ir import dims
from tracelens.ir.infer import resolve, torch_dtype
from tracelens.ir.ops import (
    WHOLE,
    Apply,
    Arg,
    Call,
    Const,
    Index,
    IndexItem,
    IndexPut,
    Op,
    Param,
    Read,
    Ref,
    Save,
    Slice,
    Special,
    TokenAt,
    TokenList,
    TokenSelector,
    TokenSlice,
    TokenText,
    Write,
)
from tracelens.ir.types import DType, TensorType
from tracelens.program import Step

_SELECTORS = (TokenAt, TokenSlice, TokenList, TokenText)


class State:
    """What one run holds: the values so far, the tensor at the current site, the saves."""

    __slots__ = (
        "constants",
        "current",
        "foreign",
        "functions",
        "parameter",
        "saved",
        "select",
        "shapes",
        "sizes",
        "values",
        "versions",
    )

    def __init__(
        self,
        count: int,
        constants: tuple[torch.Tensor, ...],
        functions: tuple[Any, ...],
        parameter: Callable[[str], torch.Tensor],
        select: Callable[[TokenSelector], Any],
    ) -> None:
        self.values: list[Any] = [None] * count
        self.current: Any = None
        # Memory that belongs to the user or to the model: a save that lies in it is copied.
        self.foreign: set[int] = set()
        self.constants = constants
        self.functions = functions
        self.parameter = parameter
        self.select = select
        self.sizes: Mapping[str, int] = {}
        self.shapes: dict[TensorType, tuple[int, ...]] = {}
        self.saved: dict[str, list[torch.Tensor]] = {}
        self.versions: dict[str, list[int]] = {}

    def begin(self, sizes: Mapping[str, int]) -> None:
        """Starts a forward pass of these sizes."""
        if sizes != self.sizes:
            self.sizes = sizes
            self.shapes.clear()


Action = Callable[[State], None]


def action(step: Step, types: Mapping[int, TensorType], fresh: frozenset[int]) -> Action:
    """What a step does. ``fresh``: the values that no one else holds, so that a write need not copy them."""
    done = _action(step.op, types, fresh)
    if not step.frees:
        return done
    frees = step.frees

    def and_free(state: State) -> None:
        done(state)
        values = state.values
        for value in frees:
            values[value] = None

    return and_free


def _action(op: Op, types: Mapping[int, TensorType], fresh: frozenset[int]) -> Action:
    match op:
        case Const():
            out, index = op.out, op.index

            def constant(state: State) -> None:
                tensor = state.constants[index]
                state.foreign.add(tensor.untyped_storage().data_ptr())
                state.values[out] = tensor

            return constant
        case Param():
            out, path = op.out, op.path

            def parameter(state: State) -> None:
                tensor = state.parameter(path)
                state.foreign.add(tensor.untyped_storage().data_ptr())
                state.values[out] = tensor

            return parameter
        case Read():
            return _read(op)
        case Call():
            return _call(op)
        case Index():
            return _index(op, types)
        case IndexPut():
            return _put(op, types)
        case Write():
            return _write(op, fresh)
        case Save():
            name, members = op.name, op.values

            def save(state: State) -> None:
                saved = [state.values[member] for member in members]
                state.saved[name] = saved
                state.versions[name] = [tensor._version for tensor in saved]

            return save
        case Apply():
            return _apply(op)


def _read(op: Read) -> Action:
    out, type_, dtype, site = op.out, op.type, torch_dtype(op.type.dtype), op.site

    def read(state: State) -> None:
        tensor = state.current
        shape = state.shapes.get(type_)
        if shape is None:
            shape = state.shapes[type_] = type_.sizes(state.sizes)
        if tensor.shape != shape or tensor.dtype is not dtype:
            raise SiteMismatchError(
                f"the model produced {tensor.dtype} {tuple(tensor.shape)} at {site}; {dtype} {shape} was expected",
                instead="a model whose sublayers compute in one dtype, outside torch.autocast",
            )
        state.values[out] = tensor

    return read


def _call(op: Call) -> Action:
    function = resolve(op.function)
    if not op.kwargs and len(op.outs) == 1:
        (out,) = op.outs
        match op.args:
            case (Ref(id=left), Ref(id=right)):

                def binary(state: State) -> None:
                    values = state.values
                    values[out] = function(values[left], values[right])

                return binary
            case (Ref(id=left), (int() | float()) as number):

                def with_number(state: State) -> None:
                    state.values[out] = function(state.values[left], number)

                return with_number
            case _:
                pass
    args = [_getter(arg) for arg in op.args]
    kwargs = [(name, _getter(arg)) for name, arg in op.kwargs]
    outs = op.outs

    def call(state: State) -> None:
        result = function(*(get(state) for get in args), **{name: get(state) for name, get in kwargs})
        if isinstance(result, torch.Tensor):
            state.values[outs[0]] = result
        else:
            for out, part in zip(outs, result, strict=True):
                state.values[out] = part

    return call


def _apply(op: Apply) -> Action:
    args = [_getter(arg) for arg in op.args]
    outs, types, index = op.outs, op.types, op.index
    dtypes = [torch_dtype(type_.dtype) for type_ in types]

    def apply(state: State) -> None:
        given = [get(state) for get in args]
        before = [arg._version for arg in given if isinstance(arg, torch.Tensor)]
        result = state.functions[index](*given)
        if before != [arg._version for arg in given if isinstance(arg, torch.Tensor)]:
            raise MutatedActivationError(
                "the applied function changed one of its arguments in place",
                instead="a function that returns new tensors",
            )
        parts: tuple[Any, ...] = tuple(result) if isinstance(result, tuple | list) else (result,)
        if len(parts) != len(outs):
            raise ApplyResultError(
                f"the applied function gave {_counted(len(parts))}, where like= declares {len(outs)}",
                instead="like=(a, b) with one value or tensor for each result",
            )
        for out, part, type_, dtype in zip(outs, parts, types, dtypes, strict=True):
            if not isinstance(part, torch.Tensor):
                raise ApplyResultError(
                    f"the applied function gave {part!r}, where like= declares a tensor",
                    instead="a function that returns tensors",
                )
            if part.shape != type_.sizes(state.sizes) or part.dtype is not dtype:
                raise ApplyResultError(
                    f"the applied function gave {part.dtype} {tuple(part.shape)}, "
                    f"where like= declares {dtype} {type_.sizes(state.sizes)}",
                    instead="like= a value or tensor of the shape and dtype that the function returns",
                )
            state.foreign.add(part.untyped_storage().data_ptr())
            state.values[out] = part

    return apply


def _counted(results: int) -> str:
    return "1 result" if results == 1 else f"{results} results"


def _getter(arg: Arg) -> Callable[[State], Any]:
    match arg:
        case Ref():
            value = arg.id
            return lambda state: state.values[value]
        case tuple():
            parts = [_getter(part) for part in arg]
            return lambda state: tuple(get(state) for get in parts)
        case dims.Sym():
            return lambda state: dims.evaluate(arg, state.sizes)
        case DType():
            dtype = torch_dtype(arg)
            return lambda state: dtype
        case Special():
            number = arg.number
            return lambda state: number
        case Slice():
            plain = slice(arg.start, arg.stop, arg.step)
            return lambda state: plain
        case _:
            return lambda state: arg


def _item_getter(item: IndexItem) -> Callable[[State], Any]:
    match item:
        case Ref():
            value = item.id
            return lambda state: state.values[value]
        case Slice():
            plain = slice(item.start, item.stop, item.step)
            return lambda state: plain
        case _:
            return lambda state: item


def _index(op: Index, types: Mapping[int, TensorType]) -> Action:
    out, base = op.out, op.base
    place = _selector_place(op.index)
    if place is not None:
        selector: Any = op.index[place]
        batch = types[base].batch_axis

        def take(state: State) -> None:
            state.values[out] = take_tokens(state.values[base], state.select(selector), batch, place)

        return take
    if all(not isinstance(item, Ref) for item in op.index):
        plain = tuple(_item_getter(item)(None) for item in op.index)  # pyright: ignore[reportArgumentType]  # plain items need no state

        def index_plain(state: State) -> None:
            state.values[out] = state.values[base][plain]

        return index_plain
    items = [_item_getter(item) for item in op.index]

    def index(state: State) -> None:
        state.values[out] = state.values[base][tuple(get(state) for get in items)]

    return index


def _put(op: IndexPut, types: Mapping[int, TensorType]) -> Action:
    out, base = op.out, op.base
    value = _getter(op.value)
    place = _selector_place(op.index)
    if place is not None:
        selector: Any = op.index[place]
        batch = types[base].batch_axis

        def put_selected(state: State) -> None:
            new = state.values[base].clone()
            put_tokens(new, state.select(selector), batch, place, value(state))
            state.values[out] = new

        return put_selected
    items = [_item_getter(item) for item in op.index]

    def put(state: State) -> None:
        new = state.values[base].clone()
        new[tuple(get(state) for get in items)] = value(state)
        state.values[out] = new

    return put


def _selector_place(index: tuple[IndexItem, ...]) -> int | None:
    """The axis that a token selector stands at, if there is one; it stands alone, as ``.tok[...]`` makes it."""
    place = next((place for place, item in enumerate(index) if isinstance(item, _SELECTORS)), None)
    if place is not None and index != (*([WHOLE] * place), index[place]):
        raise VerificationError(
            "a token selector cannot be mixed with other indices", instead="index in two steps"
        )
    return place


def _write(op: Write, fresh: frozenset[int]) -> Action:
    if not isinstance(op.value, Ref):
        number: Any = _getter(op.value)(None)  # pyright: ignore[reportArgumentType]  # a number needs no state

        def write_number(state: State) -> None:
            state.current = torch.full_like(state.current, number)

        return write_number
    value, own = op.value.id, op.value.id in fresh

    def write(state: State) -> None:
        new, site = state.values[value], state.current
        if new.dtype is not site.dtype:
            new = new.to(site.dtype)
            if new.shape != site.shape:
                new = new.expand(site.shape).contiguous()
        elif new.shape != site.shape:
            new = new.expand(site.shape).contiguous()
        elif not own:
            # A constant, a parameter or a view: the model gets tensors of its own, whatever it does with them.
            new = new.clone()
        state.current = new

    return write
