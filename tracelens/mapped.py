"""Values that are mapped over several layers: one expression, recorded once per layer."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, cast

import numpy as np
import torch

from tracelens.errors import LayerMappingError, ShapeError, WriteTargetError
from tracelens.ir.dims import with_lengths
from tracelens.location import here
from tracelens.operand import apply_torch
from tracelens.recorder import Recorder
from tracelens.saving import keep_of, save_dtype
from tracelens.tokens import Tokens
from tracelens.values import PerLayerOperand, Saved, Value, shown


class MappedValue(PerLayerOperand):
    """One value per layer, written as one.

    Shapes are those of a single layer: on ``model.layers[2:10].resid_post`` the index ``[:, -1]`` is the last token of
    each layer. Two mapped values over the same layers pair up; anything else is used in every layer; ``.save()`` stacks
    on a new first axis; ``.stack()`` gives that tensor as an ordinary value.
    """

    __slots__ = ("_layers", "_members", "_saved_handle")
    is_per_layer = True

    def __init__(self, layers: tuple[int, ...], members: tuple[Any, ...]) -> None:
        self._layers = layers
        self._members = members
        self._saved_handle: Saved | None = None

    @property
    def _recorder(self) -> Recorder:
        return self._members[0]._recorder

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers, in the order of the members."""
        return self._layers

    @property
    def shape(self) -> Any:
        """The shape in one layer."""
        if self._has_result():
            return self._tensor(".shape").shape
        return self._members[0].shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the numbers have in the run."""
        return self._spokesman.dtype

    @property
    def ndim(self) -> int:
        """The number of axes in one layer."""
        return self._tensor(".ndim").ndim if self._has_result() else self._members[0].ndim

    def dim(self) -> int:
        """The number of axes in one layer; the same as :attr:`ndim`."""
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        """The shape in one layer, or the size of its axis ``dim``."""
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        """The number of elements in one layer; asking for it ties the recording to the prompt's sizes in the shape."""
        return self.shape.numel()

    def is_floating_point(self) -> bool:
        """Whether the dtype is one of the floating-point dtypes."""
        return self._spokesman.is_floating_point()

    @property
    def T(self) -> Any:  # torch's name
        """The value with its two axes exchanged, in each layer; ``mT`` for more than two."""
        return self._tensor(".T").T if self._has_result() else self._each(lambda member: member.T)

    @property
    def mT(self) -> Any:  # torch's name
        """The value with its last two axes exchanged, in each layer; :class:`ShapeError` for fewer than two."""
        return self._tensor(".mT").mT if self._has_result() else self._each(lambda member: member.mT)

    @property
    def tok(self) -> MappedTokens:
        """Addresses real tokens in every layer."""
        return MappedTokens(self)

    def __getitem__(self, key: Any) -> Any:
        if self._has_result():
            return self._result()[key]
        return self._each_with(lambda member, part: member[part], key)

    def __setitem__(self, key: Any, new: Any) -> None:
        for position, member in enumerate(self._members):
            member[_pick(key, self._layers, position)] = _pick(new, self._layers, position)

    def stack(self) -> Value:
        """All layers as one ordinary value with a new first axis: [L, ...]. It can be read, not written."""
        return apply_torch(torch.stack, (list(self._members),), {})

    def save(
        self,
        name: str | None = None,
        *,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        to: str | os.PathLike[str] | None = None,
    ) -> MappedValue:
        """Lets the values leave the run, stacked on a new first axis in the order of the layers.

        The options are those of :meth:`tracelens.values.Value.save`. With ``device="keep"`` the stack is on one device,
        that of its last member.
        """
        recorder = self._recorder
        if not self._is_recording():
            raise self._spokesman._too_late()
        members = tuple(recorder.own(member) for member in self._members)
        kinds = {recorder.types[member] for member in members}
        if len(kinds) > 1:
            shown = ", ".join(map(str, sorted(kinds, key=str)))
            raise ShapeError(f"layers of different types cannot be stacked: {shown}", at=here())
        saved = recorder.save(
            members,
            name=name,
            stacked=True,
            keep=keep_of(device),
            dtype=save_dtype(dtype),
            to=to,
        )
        handle = Saved(recorder, members[0])
        handle._delivery = saved
        self._saved_handle = handle if self._saved_handle is None else self._saved_handle
        # In the block the handle is still one value per layer; afterwards it is the stacked tensor.
        mapped = MappedValue(self._layers, self._members)
        mapped._saved_handle = handle
        return mapped

    @property
    def value(self) -> Any:
        """The saved tensor, stacked."""
        return self._result()

    @property
    def _spokesman(self) -> Value:
        """The handle of the stack, if it was saved, else the value of the first layer."""
        return self._members[0] if self._saved_handle is None else self._saved_handle

    def __iter__(self) -> Any:
        if not self._is_recording():
            return iter(self._result())
        site = self._members[0]._root()._site
        name = "<site>" if site is None else site.name
        return self._branch(
            "iterating over",
            f"for layer in {slice_text(self._layers)}: layer.{name}; .stack() for one value over the layers",
        )

    # --- the two kinds of operands -------------------------------------------------------------------------------

    def _is_recording(self) -> bool:
        return self._recorder.is_open

    def _has_result(self) -> bool:
        return (
            not self._is_recording() and self._saved_handle is not None and self._saved_handle._has_result()
        )

    def _result(self) -> Any:
        return self._spokesman._result()

    def _apply(self, name: str, args: Sequence[object], kwargs: Mapping[str, object] | None) -> Any:
        layers = _common_layers([*args, *(kwargs or {}).values()])
        results: list[Any] = []
        for position in range(len(layers)):
            plain = tuple(_pick(arg, layers, position) for arg in args)
            named = {key: _pick(arg, layers, position) for key, arg in (kwargs or {}).items()}
            results.append(self._members[0]._apply(name, plain, named))
        return _collect(layers, results)

    def _updated(self, result: Any) -> Any:
        for member, new in zip(self._members, result._members, strict=True):
            member._updated(new)
        return result

    def _each(self, function: Callable[[Any], Any]) -> Any:
        return _collect(self._layers, [function(member) for member in self._members])

    def _each_with(self, function: Callable[[Any, Any], Any], other: Any) -> Any:
        return _collect(
            self._layers,
            [function(member, _pick(other, self._layers, i)) for i, member in enumerate(self._members)],
        )

    def __repr__(self) -> str:
        if self._has_result():
            return shown(self._result())
        first = self._members[0]
        kind = with_lengths(str(first._type), self._recorder.sizes)
        return f"<mapped value over layers {_span(self._layers)}: {kind} in each>"


class MappedTokens:
    """``mapped.tok``: addresses real tokens in every layer."""

    __slots__ = ("_value",)

    def __init__(self, value: MappedValue) -> None:
        self._value = value

    def __getitem__(self, key: Any) -> Any:
        return self._value._each(lambda member: Tokens(member)[key])

    def __setitem__(self, key: Any, new: Any) -> None:
        value = self._value
        for position, member in enumerate(value._members):
            Tokens(member)[key] = _pick(new, value._layers, position)


class PerLayer:
    """``tl.per_layer(V)``: row i of ``V`` belongs to the i-th of the mapped layers."""

    __slots__ = ("rows",)
    is_per_layer = True

    def __init__(self, rows: Any) -> None:
        self.rows = torch.from_numpy(rows) if isinstance(rows, np.ndarray) else rows

    def _refuse(self, *_: Any) -> NoReturn:
        raise LayerMappingError(
            "tl.per_layer(V) holds one row per layer, so it goes together with a value mapped over layers only",
            at=here(),
            instead="model.layers[2:10].resid_post + tl.per_layer(V)",
        )

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, MappedValue) for kind in types):
            return NotImplemented  # the mapped value knows what to do
        return next(arg for arg in (*args, *(kwargs or {}).values()) if isinstance(arg, cls))._refuse()

    def _scaled(self, function: Callable[[Any], Any]) -> PerLayer:
        return PerLayer(function(self.rows))

    def __mul__(self, other: Any) -> Any:
        return (
            other.__rmul__(self)
            if isinstance(other, MappedValue)
            else self._scaled(lambda rows: rows * other)
        )

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        return (
            other.__rtruediv__(self)
            if isinstance(other, MappedValue)
            else self._scaled(lambda rows: rows / other)
        )

    def __add__(self, other: Any) -> Any:
        return other.__radd__(self) if isinstance(other, MappedValue) else self._refuse()

    def __sub__(self, other: Any) -> Any:
        return other.__rsub__(self) if isinstance(other, MappedValue) else self._refuse()

    def __neg__(self) -> PerLayer:
        return self._scaled(lambda rows: -rows)

    def __repr__(self) -> str:
        return f"per_layer({self.rows!r})"


def per_layer(rows: Any) -> PerLayer:
    """Gives each of several layers its own row: ``model.layers[2:10].resid_post += tl.per_layer(V)``.

    ``rows`` is a tensor, array or value whose first axis has one entry per layer, or a list of such entries.
    """
    if not isinstance(rows, list | tuple) and not getattr(rows, "ndim", 0):
        raise LayerMappingError(
            f"tl.per_layer takes one row per layer, not {rows!r}",
            at=here(),
            instead="a tensor, array or value whose first axis has one entry per layer, or a list of such entries",
        )
    return PerLayer(rows)


def mapped_among(args: Sequence[object], kwargs: Mapping[str, object]) -> MappedValue | None:
    """A mapped value among nested arguments."""
    for arg in [*args, *kwargs.values()]:
        if isinstance(arg, MappedValue) and arg._is_recording():
            return arg
        if isinstance(arg, list | tuple):
            found = mapped_among(cast("Sequence[object]", arg), {})
            if found is not None:
                return found
    return None


def _common_layers(args: Sequence[object]) -> tuple[int, ...]:
    found: tuple[int, ...] | None = None
    for arg in args:
        if isinstance(arg, list | tuple):
            parts = cast("Sequence[object]", arg)
            layers = _common_layers(parts) if mapped_among(parts, {}) is not None else None
        else:
            layers = arg._layers if isinstance(arg, MappedValue) and arg._is_recording() else None
        if layers is None:
            continue
        if found is not None:
            _same_layers(found, layers)
        found = layers
    assert found is not None
    return found


def _same_layers(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    if left != right:
        raise LayerMappingError(
            f"values mapped over layers {_span(left)} and {_span(right)} cannot be combined layer by layer",
            at=here(),
            instead="map both over the same layers, or use .stack() for one value over all layers",
        )


def _pick(arg: Any, layers: tuple[int, ...], position: int) -> Any:
    """What ``arg`` is in the layer at ``position``."""
    if isinstance(arg, MappedValue):
        if arg._has_result():
            raise LayerMappingError(
                f"what was saved over layers {_span(arg._layers)} is one tensor, [L, ...], and this is once per layer",
                at=here(),
                instead="tl.per_layer(saved) for row i in the i-th layer, or saved[i] for the same row in each",
            )
        _same_layers(layers, arg._layers)
        return arg._members[position]
    if isinstance(arg, PerLayer):
        count = len(arg.rows) if isinstance(arg.rows, list | tuple) else arg.rows.shape[0]
        if count != len(layers):
            raise LayerMappingError(
                f"tl.per_layer was given {count} rows for {len(layers)} layers ({_span(layers)})",
                at=here(),
                instead=f"{len(layers)} rows, one for each of the layers",
            )
        return arg.rows[position]
    if isinstance(arg, tuple):
        return tuple(_pick(part, layers, position) for part in cast("tuple[Any, ...]", arg))
    if isinstance(arg, list):
        return [_pick(part, layers, position) for part in cast("list[Any]", arg)]
    return arg


def _collect(layers: tuple[int, ...], results: list[Any]) -> Any:
    """One mapped value from the results per layer; results that are tuples give a tuple of mapped values."""
    first = results[0]
    if isinstance(first, Value):
        return MappedValue(layers, tuple(results))
    if isinstance(first, tuple):
        columns = [MappedValue(layers, tuple(column)) for column in zip(*results, strict=True)]
        kind: Any = type(cast(object, first))
        return kind(*columns) if hasattr(kind, "_fields") else tuple(columns)
    if any(result != first for result in results):
        raise WriteTargetError("the layers disagree", at=here())
    return first


def _span(layers: tuple[int, ...]) -> str:
    if len(layers) > 2 and layers == tuple(range(layers[0], layers[0] + len(layers))):
        return f"{layers[0]}..{layers[-1]}"
    return "[" + ", ".join(map(str, layers)) + "]"


def slice_text(layers: tuple[int, ...]) -> str:
    """Several layers as one writes them: ``model.layers[2:5]``, ``model.layers[[0, 4]]``."""
    if layers == tuple(range(layers[0], layers[0] + len(layers))):
        return f"model.layers[{layers[0]}:{layers[-1] + 1}]"
    return f"model.layers[{list(layers)}]"


def each_layer(new: Any, layers: tuple[int, ...]) -> list[Any]:
    """What a mapped write of ``new`` writes in each of ``layers``."""
    return [_pick(new, layers, position) for position in range(len(layers))]
