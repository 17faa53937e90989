"""Functions along the axis that is in parts, as several steps of which only small ones need all ranks.

A soft-max needs the largest element and a sum of each row; the largest elements of all are among the largest of each
part. So of a row over a whole vocabulary only a few numbers travel. The steps are plain functions of the catalogue,
and the layouts of each are decided as those of any other call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tracelens.ir.abstract import Defer, bind
from tracelens.ir.dims import Dim
from tracelens.ir.layout import Shard, owned
from tracelens.ir.ops import Arg, Call, Ref
from tracelens.ir.rules_lens import LENS
from tracelens.ir.types import DType, TensorType
from tracelens.sharding_lens import lens_in_steps

_SOFT = {"torch.softmax": False, "torch.special.softmax": False}
_SOFT |= {"torch.log_softmax": True, "torch.special.log_softmax": True}
_LOG_SUM = ("torch.logsumexp", "torch.special.logsumexp")
_LARGEST = {"torch.max": "torch.max", "torch.min": "torch.min"}
_LARGEST |= {"torch.argmax": "torch.max", "torch.argmin": "torch.min"}
IN_STEPS = frozenset((*_SOFT, *_LOG_SUM, *_LARGEST, "torch.topk"))
"""The functions that are done in steps where their axis is in parts."""


def in_steps(
    op: Call,
    layouts: Mapping[int, object],
    types: Mapping[int, TensorType],
    ranks: int,
    new: Callable[[], int],
) -> list[Call] | None:
    """The steps that make what a call makes; ``None`` for a call that is no such.

    ``new`` gives numbers for values. Partial results are taken to have been joined.
    """
    if op.function == LENS:
        return lens_in_steps(op, layouts, types, ranks, new)
    if op.function not in IN_STEPS:
        return None
    try:
        return _Steps(op, layouts, types, ranks, new).steps()
    except Defer:
        return None


class _Steps:
    def __init__(
        self,
        op: Call,
        layouts: Mapping[int, object],
        types: Mapping[int, TensorType],
        ranks: int,
        new: Callable[[], int],
    ) -> None:
        self.op, self.ranks, self.new = op, ranks, new
        self.types = dict(types)
        self.made: list[Call] = []
        given = op.args[0] if op.args else None
        if not isinstance(given, Ref) or not isinstance(layout := layouts[given.id], Shard):
            raise Defer
        self.value, self.axis = given, layout.dim
        self.type = types[given.id]

    def steps(self) -> list[Call]:
        name = self.op.function
        if name in _SOFT:
            bound = self._bound("input dim * dtype", None)
            self._soft_max(bound.get("dtype"), logarithm=_SOFT[name])
        elif name in _LOG_SUM:
            self._log_sum(self._bound("input dim keepdim", None).get("keepdim", False) is True)
        elif name == "torch.topk":
            bound = self._bound("input k dim largest sorted", -1)
            self._top(bound.get("k"), bound.get("largest", True), bound.get("sorted", True))
        else:
            bound = self._bound("input dim keepdim", None)
            self._largest(_LARGEST[name], bound.get("keepdim", False) is True)
        return self.made

    def _bound(self, signature: str, default: int | None) -> dict[str, Arg]:
        """The arguments, where the function works along the very axis that is in parts."""
        bound = bind(signature, self.op.args, self.op.kwargs)
        dim = bound.get("dim", default)
        dim = dim[0] if isinstance(dim, tuple) and len(dim) == 1 else dim
        if not isinstance(dim, int) or isinstance(dim, bool) or dim % self.type.ndim != self.axis:
            raise Defer
        first, last = owned(self._size, self.ranks, self.ranks - 1)
        if first == last:
            raise Defer  # a rank has nothing
        return bound

    @property
    def _size(self) -> int:
        size = self.type.shape[self.axis]
        assert isinstance(size, int)  # a width of the model's
        return size

    # --- one step --------------------------------------------------------------------------------------------

    def _call(self, name: str, *args: Arg, type_: TensorType, out: int | None = None) -> Ref:
        found = self.new() if out is None else out
        self.types[found] = type_
        self.made.append(Call((found,), (type_,), name, args))
        return Ref(found)

    def _pair(self, name: str, *args: Arg, shape: tuple[Dim, ...]) -> tuple[Ref, Ref]:
        one, other = self.new(), self.new()
        types = (TensorType(self.type.dtype, shape), TensorType(DType.INT64, shape))
        self.types[one], self.types[other] = types
        self.made.append(Call((one, other), types, name, args))
        return Ref(one), Ref(other)

    def _sized(self, dtype: DType, *sizes: int) -> TensorType:
        """A type in which other axes stand for the one in parts."""
        shape = self.type.shape
        return TensorType(dtype, (*shape[: self.axis], *sizes, *shape[self.axis + 1 :]))

    def _wide(self, dtype: DType) -> Ref:
        """The operand in the dtype that is computed in."""
        if self.type.dtype is dtype:
            return self.value
        return self._call("torch.Tensor.to", self.value, dtype, type_=TensorType(dtype, self.type.shape))

    # --- functions -------------------------------------------------------------------------------------------

    def _computing(self, asked: Arg = None) -> DType:
        dtype = asked if isinstance(asked, DType) else self.type.dtype
        if not dtype.is_floating:
            raise Defer
        return DType.FLOAT32 if dtype in (DType.BFLOAT16, DType.FLOAT16) else dtype

    def _soft_max(self, asked: Arg, *, logarithm: bool) -> None:
        result, out = self.op.types[0], self.op.outs[0]
        dtype = self._computing(asked)
        full, one = TensorType(dtype, self.type.shape), self._sized(dtype, 1)
        wide = self._wide(dtype)
        most = self._call("torch.amax", wide, self.axis, True, type_=one)
        below = self._call("torch.sub", wide, most, type_=full)
        powers = self._call("torch.exp", below, type_=full)
        total = self._call("torch.sum", powers, self.axis, True, type_=one)
        last = out if result.dtype is dtype else None
        if logarithm:
            total = self._call("torch.log", total, type_=one)
            found = self._call("torch.sub", below, total, type_=full, out=last)
        else:
            found = self._call("torch.div", powers, total, type_=full, out=last)
        if last is None:
            self._call("torch.Tensor.to", found, result.dtype, type_=result, out=out)

    def _log_sum(self, kept: bool) -> None:
        result, out = self.op.types[0], self.op.outs[0]
        dtype = self._computing()
        full, one = TensorType(dtype, self.type.shape), self._sized(dtype, 1)
        wide = self._wide(dtype)
        most = self._call("torch.amax", wide, self.axis, True, type_=one)
        infinite = self._call("torch.isinf", most, type_=self._sized(DType.BOOL, 1))
        most = self._call("torch.masked_fill", most, infinite, 0.0, type_=one)
        below = self._call("torch.sub", wide, most, type_=full)
        powers = self._call("torch.exp", below, type_=full)
        total = self._call("torch.sum", powers, self.axis, True, type_=one)
        total = self._call("torch.log", total, type_=one)
        narrow = result.dtype is not dtype
        found = self._call("torch.add", total, most, type_=one, out=out if kept and not narrow else None)
        if narrow:
            one = self._sized(result.dtype, 1)
            found = self._call("torch.Tensor.to", found, result.dtype, type_=one, out=out if kept else None)
        if not kept:
            self._call("torch.squeeze", found, self.axis, type_=result, out=out)

    def _apart(self) -> tuple[Ref, int]:
        """The operand with an axis of the ranks before the one that each has its own part of, and that one's size."""
        if self._size % self.ranks:
            raise Defer
        each = self._size // self.ranks
        type_ = self._sized(self.type.dtype, self.ranks, each)
        return self._call("torch.unflatten", self.value, self.axis, (-1, each), type_=type_), each

    def _top(self, k: Arg, largest: Arg, in_order: Arg) -> None:
        values, indices = self.op.outs
        apart, each = self._apart()
        if not isinstance(k, int) or isinstance(k, bool) or not 0 < k < each:
            raise Defer  # as much would travel as of the whole
        shape = self._sized(self.type.dtype, self.ranks, k).shape
        of_each, at = self._pair("torch.topk", apart, k, self.axis + 1, largest, in_order, shape=shape)
        flat, whole = self._sized(self.type.dtype, self.ranks * k), self._sized(DType.INT64, k)
        of_all = self._call("torch.flatten", of_each, self.axis, self.axis + 1, type_=flat)
        at_all = self._call(
            "torch.flatten", at, self.axis, self.axis + 1, type_=TensorType(DType.INT64, flat.shape)
        )
        place = self.new()
        self.types[place] = whole
        call = Call(
            (values, place),
            (self.op.types[0], whole),
            "torch.topk",
            (of_all, k, self.axis, largest, in_order),
        )
        self.made.append(call)
        own = self._call("torch.gather", at_all, self.axis, Ref(place), type_=whole)
        rank = self._call("torch.floor_divide", Ref(place), k, type_=whole)
        start = self._call("torch.mul", rank, each, type_=whole)
        self._call("torch.add", own, start, type_=whole, out=indices)

    def _largest(self, name: str, kept: bool) -> None:
        indices = self.op.outs[-1]
        apart, each = self._apart()
        shape = self._sized(self.type.dtype, self.ranks).shape
        of_each, at = self._pair(name, apart, self.axis + 1, shape=shape)
        whole = self._sized(DType.INT64, 1)
        most, rank = self._pair(name, of_each, self.axis, True, shape=whole.shape)
        own = self._call("torch.gather", at, self.axis, rank, type_=whole)
        start = self._call("torch.mul", rank, each, type_=whole)
        found = self._call("torch.add", own, start, type_=whole, out=indices if kept else None)
        if not kept:
            self._call("torch.squeeze", found, self.axis, type_=self.op.types[-1], out=indices)
        if len(self.op.outs) == 2:
            name = "torch.Tensor.contiguous" if kept else "torch.squeeze"
            args: tuple[Arg, ...] = (most,) if kept else (most, self.axis)
            self._call(name, *args, type_=self.op.types[0], out=self.op.outs[0])
