"""A value's shape while recording: numbers that remember which of the prompt's sizes they are, or symbols."""

from __future__ import annotations

from typing import Any, cast

from tracelens.errors import SymbolicSizeError
from tracelens.ir import dims
from tracelens.ir.types import TensorType
from tracelens.location import here
from tracelens.misaligned import PaddedSize
from tracelens.recorder import Recorder


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

    __int__ = __index__ = __float__ = __complex__ = __bool__ = __round__ = __format__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __pow__ = __rpow__ = _refuse
    __floordiv__ = __rfloordiv__ = __truediv__ = __rtruediv__ = __mod__ = __rmod__ = _refuse
    __divmod__ = __rdivmod__ = __neg__ = __pos__ = __abs__ = _refuse
    __lt__ = __gt__ = __le__ = __ge__ = _refuse

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Symbol) and other.dim == self.dim:
            return True
        # B may be 1 and may be equal to P: no answer would be right for every prompt.
        return self._refuse() if isinstance(other, Symbol | int | float) else False

    def __hash__(self) -> int:
        return hash(self.dim)

    def __repr__(self) -> str:
        return str(self.dim)


def _number(size: Any) -> Any:
    if isinstance(size, _Size):
        names = dims.symbols(size._dim)
        for name in names:
            size._recorder.pin(name)
        prompt = size._recorder.prompt
        padded = prompt is not None and prompt.ragged and bool(names & {dims.POSITION, dims.KEY})
        return PaddedSize(size) if padded else int(size)
    return size
