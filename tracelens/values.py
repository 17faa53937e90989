"""Values: what a block holds in its hands instead of tensors."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import EllipsisType
from typing import Any, cast

import numpy as np
import torch

from tracelens.errors import (
    DynamicShapeError,
    FailedRunError,
    NotRunYetError,
    PositionAxisError,
    StaleValueError,
    SymbolicSizeError,
    TracelensError,
    UnsavedValueError,
    ValueAttributeError,
    WriteTargetError,
)
from tracelens.ir import dims
from tracelens.ir.infer import dtype_of, torch_dtype
from tracelens.ir.ops import (
    WHOLE,
    IndexItem,
    Keep,
    Ref,
    Slice,
    TokenAt,
    TokenList,
    TokenSelector,
    TokenSlice,
    TokenText,
)
from tracelens.ir.sites import Site
from tracelens.ir.types import DType, TensorType
from tracelens.location import here
from tracelens.operand import Operand, apply_torch
from tracelens.recorder import PADS, Recorder


class Shape(tuple[Any, ...]):
    """A value's shape. Taking the number of a prompt's size out of it ties the graph to that size."""

    __slots__ = ()
    _recorder: Recorder

    def __new__(cls, recorder: Recorder, type_: TensorType) -> Shape:
        sizes = recorder.sizes
        return super().__new__(
            cls, (_Size(recorder, dim, sizes) if not isinstance(dim, int) else dim for dim in type_.shape)
        )

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        if isinstance(found, tuple):
            return tuple(_number(size) for size in cast("tuple[Any, ...]", found))
        return _number(found)

    def __iter__(self) -> Any:
        return (_number(size) for size in super().__iter__())

    def numel(self) -> int:
        total = 1
        for size in self:
            total *= size
        return total


class _Size(int):
    """A number that comes from the prompt, and remembers which of its sizes it is."""

    _recorder: Recorder
    _dim: dims.Sym

    def __new__(cls, recorder: Recorder, dim: dims.Sym, sizes: dims.Sizes | None) -> Any:
        if sizes is None:
            return Symbol(dim)
        self = super().__new__(cls, dims.evaluate(dim, sizes))
        self._recorder = recorder
        self._dim = dim
        return self


class Symbol:
    """A size in a recording without a prompt: it has a name but no number."""

    __slots__ = ("dim",)

    def __init__(self, dim: dims.Sym) -> None:
        self.dim = dim

    def _refuse(self, *_: object) -> Any:
        raise SymbolicSizeError(
            f"the size {self.dim} is not a number: this recording is for prompts of any size",
            at=here(),
            instead="-1 in reshape and view, einops patterns, or model.record(prompt) to record for one size",
        )

    __int__ = __index__ = __float__ = __bool__ = __add__ = __radd__ = __mul__ = __rmul__ = __sub__ = (
        __rsub__
    ) = _refuse
    __floordiv__ = __rfloordiv__ = __truediv__ = __rtruediv__ = __lt__ = __gt__ = __le__ = __ge__ = _refuse

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Symbol) and other.dim == self.dim

    def __hash__(self) -> int:
        return hash(self.dim)

    def __repr__(self) -> str:
        return str(self.dim)


def _number(size: Any) -> Any:
    if isinstance(size, _Size):
        for name in dims.symbols(size._dim):
            size._recorder.pin(name)
        return int(size)
    return size


@lru_cache(maxsize=256)
def _result_class(name: str, fields: tuple[str, ...]) -> Any:
    return namedtuple(name, fields)


class Value(Operand):
    """What a site, or something computed from it, will be when the model runs.

    A value knows its ``shape`` and ``dtype`` now; its numbers exist after the block, if it was saved. Arithmetic,
    indexing and any pure torch function give new values.
    """

    __slots__ = ("_id", "_index", "_parent", "_recorder", "_saved_as", "_site", "_stale", "_version")

    def __init__(self, recorder: Recorder, id: int) -> None:
        self._recorder = recorder
        self._id = id
        self._site: Site | None = None
        self._version = 0
        self._parent: Value | None = None
        self._index: tuple[IndexItem, ...] | None = None
        self._stale: Any = None
        self._saved_as: str | None = None

    @classmethod
    def of_site(cls, recorder: Recorder, site: Site) -> Value:
        value = cls(recorder, recorder.read(site))
        value._site = site
        value._version = recorder.version(site)
        return value

    # --- what is known now ---------------------------------------------------------------------------------------

    @property
    def _type(self) -> TensorType:
        return self._recorder.types[self._id]

    def _require_fresh(self) -> None:
        if self._stale is not None:
            raise StaleValueError(
                "this value was written through, so it no longer says what the site holds",
                at=here(),
                also=(("it was written through at", self._stale),),
                instead="read the site again: " + (f"model.{self._site}" if self._site else "its name"),
            )

    def _is_recording(self) -> bool:
        return self._recorder.is_open

    @property
    def shape(self) -> Any:
        """The global shape: numbers inside ``trace``, symbols for the prompt's sizes in ``record`` without a prompt."""
        if not self._is_recording() and self._has_result():
            return self._result().shape
        return Shape(self._recorder, self._type)

    @property
    def dtype(self) -> torch.dtype:
        if not self._is_recording() and self._has_result():
            return self._result().dtype
        return torch_dtype(self._type.dtype)

    @property
    def ndim(self) -> int:
        return self._type.ndim

    def dim(self) -> int:
        return self._type.ndim

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return self.shape.numel()

    def is_floating_point(self) -> bool:
        return self._type.dtype.is_floating

    @property
    def T(self) -> Any:  # torch's name
        return apply_torch(torch.t, (self,), {}) if self.ndim <= 2 else self.mT

    @property
    def mT(self) -> Any:  # torch's name
        return apply_torch(torch.transpose, (self, -2, -1), {})

    @property
    def tok(self) -> Tokens:
        """Addresses real tokens: ``.tok[3]``, ``.tok[-1]``, ``.tok["Paris"]``, ``.tok[1:4]``, ``.tok[mask]``."""
        return Tokens(self)

    # --- operations ----------------------------------------------------------------------------------------------

    def _apply(self, name: str, args: Sequence[object], kwargs: Mapping[str, object] | None) -> Any:
        for arg in args:
            if isinstance(arg, PerLayerOperand):
                return arg._apply(name, args, kwargs)
        if any(isinstance(arg, list | tuple) for arg in args) or kwargs:
            from tracelens.mapped import mapped_among

            mapped = mapped_among(args, kwargs or {})
            if mapped is not None:
                return mapped._apply(name, args, kwargs)
        recorder = self._recorder
        outs, fields = recorder.call(name, args, kwargs)
        if fields is None and len(outs) == 1:
            return Value(recorder, outs[0])
        values = [Value(recorder, out) for out in outs]
        return _result_class(name.rpartition(".")[2], fields)(*values) if fields else tuple(values)

    def _updated(self, result: Any) -> Any:
        root = self._root()
        site = root._site
        awaited = self._recorder.awaited(self._id)
        if awaited is not None:
            self._recorder.expect_return(result._id, awaited, self._id)
        elif site is not None and isinstance(result, Value):
            self._recorder.expect_return(result._id, site, None)
        return result

    def _root(self) -> Value:
        value = self
        while value._parent is not None:
            value = value._parent
        return value

    def __getitem__(self, key: Any) -> Any:
        if not self._is_recording():
            return self._result()[key]
        self._require_fresh()
        return self._indexed(self._index_of(key))

    def _indexed(self, index: tuple[IndexItem, ...], *, by_token: bool = False) -> Value:
        value = Value(self._recorder, self._recorder.index(self._id, index, by_token=by_token))
        if (self._site is not None or self._parent is not None) and not any(
            isinstance(item, Ref) for item in index
        ):
            value._parent, value._index = self, index
        return value

    def __setitem__(self, key: Any, new: Any) -> None:
        if not self._is_recording():
            raise WriteTargetError(
                "a saved result cannot be changed through its handle",
                at=here(),
                instead="result = handle.value.clone()",
            )
        self._require_fresh()
        self._assign(self._index_of(key), new)

    def _assign(self, index: tuple[IndexItem, ...], new: Any, *, by_token: bool = False) -> None:
        recorder = self._recorder
        root = self._root()
        site = root._site
        if site is None:
            raise WriteTargetError(
                "indexed assignment changes a site; this value was computed, so nothing in the model would change",
                at=here(),
                instead="torch.where(mask, new, value), or assign to the site: model.layers[i].resid_post[...] = new",
            )
        if recorder.version(site) != root._version:
            raise StaleValueError(
                f"{site} was written after this value was read, so assigning through it would undo that write",
                at=here(),
                instead="read the site again before assigning into it",
            )
        value = recorder.put(self._id, index, new, by_token=by_token)
        step: Value = self
        while step._parent is not None:
            assert step._index is not None
            value = recorder.put(step._parent._id, step._index, Value(recorder, value), by_token=True)
            step = step._parent
        recorder.write(site, Value(recorder, value))
        if isinstance(new, Value):
            recorder.returned(new._id, site)
        at = here()
        step = self
        while True:
            step._stale = at
            if step._parent is None:
                break
            step = step._parent

    def _index_of(self, key: Any) -> tuple[IndexItem, ...]:
        """A Python index as the graph holds it: ellipses written out, masks and lists as index tensors."""
        keys = list(key) if isinstance(key, tuple) else [key]
        items: list[IndexItem] = []
        used = sum(_axes_used(item) for item in keys)
        for item in keys:
            if isinstance(item, EllipsisType):
                items += [WHOLE] * (self.ndim - used)
            else:
                items += self._index_item(item)
        while items and items[-1] == WHOLE:
            items.pop()
        return tuple(items)

    def _index_item(self, item: Any) -> list[IndexItem]:
        if item is None:
            return [None]
        if isinstance(item, bool | np.bool_):
            raise DynamicShapeError(
                "True and False cannot index a value", at=here(), instead="value[None] adds an axis"
            )
        if isinstance(item, slice):
            return [Slice(*(_bound(part) for part in (item.start, item.stop, item.step)))]
        if isinstance(item, int | np.integer):
            return [int(item)]
        if isinstance(item, Value) and item._is_recording():
            if item._type.dtype is DType.BOOL:
                raise DynamicShapeError(
                    "indexing with a mask that is computed in the trace gives a shape that depends on the data",
                    at=here(),
                    instead="tl.where(mask, value, 0), or a concrete mask",
                )
            return [Ref(self._recorder.own(item))]
        if isinstance(item, list | range):
            item = torch.tensor(list(cast("Sequence[Any]", item)))
        if isinstance(item, Operand):
            item = item._result()
        if isinstance(item, np.ndarray):
            item = torch.from_numpy(item)
        if isinstance(item, torch.Tensor):
            if item.dtype in (torch.bool, torch.uint8):
                return [Ref(self._recorder.constant(part)) for part in item.nonzero(as_tuple=True)]
            return [Ref(self._recorder.constant(item))]
        raise TypeError(f"a value cannot be indexed with a {type(item).__name__}")

    # --- leaving the run -----------------------------------------------------------------------------------------

    def save(
        self,
        name: str | None = None,
        *,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        to: str | None = None,
    ) -> Saved:
        """Lets this value leave the run: its numbers are there after the block.

        ``name`` makes it available as ``t[name]`` too. ``device="keep"`` leaves it where it was computed. ``dtype``
        casts it there before it moves. ``to="file.safetensors"`` writes it to that file and reads it back on demand.
        """
        self._require_fresh()
        saved = self._recorder.save(
            (self._id,),
            name=name,
            stacked=False,
            keep=keep_of(device),
            dtype=dtype_of(dtype) if dtype else None,
            to=to,
        )
        handle = Saved(self._recorder, self._id)
        handle._site, handle._version, handle._parent, handle._index = (
            self._site,
            self._version,
            self._parent,
            self._index,
        )
        handle._saved_as = saved
        self._saved_as = self._saved_as or saved
        return handle

    @property
    def value(self) -> Any:
        """The saved tensor (for prompts of different lengths, one per prompt)."""
        return self._result()

    def _has_result(self) -> bool:
        return self._saved_as is not None and self._saved_as in self._recorder.saved_tensors

    def _result(self) -> Any:
        recorder = self._recorder
        if self._saved_as is not None and self._saved_as in recorder.saved_tensors:
            return recorder.saved_tensors[self._saved_as]()
        if recorder.is_open:
            raise NotRunYetError(
                "the model has not run yet: values have numbers only after the block",
                at=here(),
                instead="read it after the block",
            )
        if recorder.failure is not None:
            raise FailedRunError(
                f"the run failed, so there is no value: {recorder.failure}", at=here()
            ) from recorder.failure
        raise UnsavedValueError(
            "this value was not saved, so nothing of it was kept",
            at=here(),
            also=(("it was recorded at", recorder.locations[self._defined_by()]),),
            instead="add .save() to that line",
        )

    def _defined_by(self) -> int:
        from tracelens.ir.ops import results

        return next(
            number
            for number, op in enumerate(self._recorder.ops)
            if any(out == self._id for out, _ in results(op))
        )

    def __repr__(self) -> str:
        if not self._is_recording() and self._has_result():
            return repr(self._result())
        what = f" of {self._site}" if self._site else ""
        return f"<value %{self._id}{what}: {self._type}>"

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *(key for key in dir(torch.Tensor) if not key.startswith("_"))})


class Saved(Value):
    """A value that leaves the run; after the block it behaves as its tensor."""

    __slots__ = ()


class PerLayerOperand(Operand):
    """The base of what stands for one thing per layer (:mod:`tracelens.mapped`)."""

    __slots__ = ()


def keep_of(device: str) -> Keep:
    try:
        return Keep(device)
    except ValueError:
        raise ValueAttributeError(
            f"device={device!r} is not a place for a saved value",
            at=here(),
            instead='device="cpu" or device="keep"',
        ) from None


def _bound(part: Any) -> int | None:
    if part is None:
        return None
    if isinstance(part, Operand):
        raise DynamicShapeError(
            "a slice bound cannot be a value", at=here(), instead="torch.gather with an index value"
        )
    return int(part)


def _axes_used(item: Any) -> int:
    if item is None or isinstance(item, EllipsisType):
        return 0
    if isinstance(item, torch.Tensor | np.ndarray) and str(item.dtype).rpartition(".")[2] in (
        "bool",
        "uint8",
    ):
        return item.ndim
    return 1


class Tokens:
    """``value.tok``: addresses real tokens of every row, whatever the padding."""

    __slots__ = ("_value",)

    def __init__(self, value: Value) -> None:
        self._value = value

    def __getitem__(self, key: Any) -> Any:
        if not self._value._is_recording():
            raise NotRunYetError(
                "tokens are addressed inside the block", at=here(), instead="value.tok[...].save()"
            )
        self._value._require_fresh()
        return self._value._indexed(self._index(key), by_token=True)

    def __setitem__(self, key: Any, new: Any) -> None:
        self._value._require_fresh()
        self._value._assign(self._index(key), new, by_token=True)

    def _index(self, key: Any) -> tuple[IndexItem, ...]:
        value = self._value
        axes = value._type.position_axes
        recorder = value._recorder
        if len(axes) != 1:
            raise _no_token_axis(value)
        if isinstance(key, Operand) and not key._is_recording():
            key = key._result()
        if isinstance(key, torch.Tensor | np.ndarray) and str(key.dtype).rpartition(".")[2] == "bool":
            return self._mask(torch.as_tensor(key))
        selector = _selector(key)
        if recorder.prompt is not None and not recorder.generating:
            try:
                width = recorder.prompt.width(selector)
            except TracelensError as error:
                error.at = error.at or here()
                raise
            if isinstance(selector, TokenSlice):
                selector = TokenSlice(selector.start, selector.stop, selector.step, width)
            elif isinstance(selector, TokenText) and selector.pick is None:
                selector = TokenText(selector.text, None, width)
        return (*([WHOLE] * axes[0]), selector)

    def _mask(self, mask: torch.Tensor) -> tuple[IndexItem, ...]:
        value = self._value
        recorder = value._recorder
        if recorder.prompt is None or value._type.shape[:2] != (dims.B, dims.P):
            raise _no_token_axis(value)
        try:
            rows, columns = recorder.prompt.mask_indices(mask)
        except TracelensError as error:
            error.at = error.at or here()
            raise
        recorder.pin(PADS)
        return (Ref(recorder.constant(rows)), Ref(recorder.constant(columns)))


def _no_token_axis(value: Value) -> PositionAxisError:
    return PositionAxisError(
        f".tok addresses the position axis, but {value._type} does not carry exactly one in the expected place",
        at=here(),
        instead="use .tok on a value with axes [B, P, ...]",
    )


def _selector(key: Any) -> TokenSelector:
    match key:
        case bool():
            pass
        case int() | np.integer():
            return TokenAt(int(key))
        case str():
            return TokenText(key, None, None)
        case (str() as text, int() as pick):
            return TokenText(text, pick, 1)
        case slice():
            return TokenSlice(_bound(key.start), _bound(key.stop), _bound(key.step), None)
        case list() | range() if all(isinstance(part, int | np.integer) for part in key):
            return TokenList(tuple(int(part) for part in cast("Sequence[int]", key)))
        case torch.Tensor() if key.ndim == 1 and not key.dtype.is_floating_point:
            return TokenList(tuple(int(part) for part in key.tolist()))
        case _:
            pass
    raise WriteTargetError(
        f"tokens cannot be addressed with {key!r}",
        at=here(),
        instead='.tok[3], .tok[-1], .tok[1:4], .tok[[0, 2]], .tok["Paris"], .tok["Paris", -1] or .tok[mask]',
    )
