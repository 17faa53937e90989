"""Values: what a block holds in its hands instead of tensors."""

from __future__ import annotations

import os
from collections import namedtuple
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, cast

import torch

from tracelens.draft import Delivery
from tracelens.errors import (
    BlockEndedError,
    NotRunYetError,
    StaleValueError,
    UnsavedValueError,
    UnsupportedFunctionError,
    ValueAttributeError,
    WriteTargetError,
)
from tracelens.indexing import index_of
from tracelens.ir.dims import with_lengths
from tracelens.ir.infer import torch_dtype
from tracelens.ir.ops import (
    IndexItem,
    Param,
    Ref,
    Selector,
    Write,
)
from tracelens.ir.sites import Site
from tracelens.ir.types import TensorType
from tracelens.ir.windows import PREFILL
from tracelens.location import Location, here
from tracelens.operand import Operand, apply_torch
from tracelens.per_prompt import not_one_tensor
from tracelens.recorder import Recorder
from tracelens.refusing import failed_block, parameter_target
from tracelens.saving import keep_of, save_dtype
from tracelens.shapes import Shape
from tracelens.subject import spelling
from tracelens.tokens import Tokens


@lru_cache(maxsize=256)
def _result_class(name: str, fields: tuple[str, ...]) -> Any:
    """A tuple with named fields, which says so where it is taken for a value."""

    def missing(self: Any, wanted: str) -> Any:
        if wanted.startswith("_"):
            raise AttributeError(wanted)
        raise ValueAttributeError(
            f"{name} gives several values, {' and '.join(fields)}, and together they have no {wanted!r}",
            at=here(),
            instead=" or ".join(f".{field}.{wanted}" + "(...)" * (wanted == "save") for field in fields),
        )

    return type(name, (namedtuple(name, fields),), {"__slots__": (), "__getattr__": missing})


class Value(Operand):
    """What a site, or something computed from it, will be when the model runs.

    A value knows its ``shape`` and ``dtype`` now; its numbers exist after the block, if it was saved. Arithmetic,
    indexing and any pure torch function give new values.
    """

    __slots__ = (
        "_delivery",
        "_id",
        "_index",
        "_parent",
        "_recorder",
        "_site",
        "_stale",
    )

    is_value = True

    def __init__(self, recorder: Recorder, id: int) -> None:
        self._recorder = recorder
        self._id = id
        self._site: Site | None = None
        self._parent: Value | None = None
        self._index: tuple[IndexItem, ...] | None = None
        self._stale: Any = None
        self._delivery: Delivery | None = None

    @classmethod
    def of_site(cls, recorder: Recorder, site: Site) -> Value:
        value = cls(recorder, recorder.read(site))
        value._site = site
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
                instead="read the site again: " + (spelling(self._site) if self._site else "its name"),
            )

    def _is_recording(self) -> bool:
        return self._recorder.is_open

    @property
    def shape(self) -> Any:
        """The global shape: numbers inside ``trace``, symbols for the prompt's sizes in ``record`` without a prompt."""
        if not self._is_recording() and self._has_result():
            return self._tensor(".shape").shape
        return Shape(self._recorder, self._type)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the numbers have in the run."""
        if not self._is_recording() and self._has_result():
            return self._tensor(".dtype").dtype
        return torch_dtype(self._type.dtype)

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return self._type.ndim

    def dim(self) -> int:
        """The number of axes; the same as :attr:`ndim`."""
        return self._type.ndim

    def size(self, dim: int | None = None) -> Any:
        """The global shape, or the size of the axis ``dim``."""
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        """The number of elements; asking for it ties the recording to the prompt's sizes that are in the shape."""
        return self.shape.numel()

    def is_floating_point(self) -> bool:
        """Whether the dtype is one of the floating-point dtypes."""
        return self._type.dtype.is_floating

    @property
    def T(self) -> Any:  # torch's name
        """The value with its two axes exchanged; with more than two, :class:`UnsupportedFunctionError`: see ``mT``."""
        if self.ndim > 2:
            raise UnsupportedFunctionError(
                f".T would turn round all {self.ndim} axes, which hardly anybody means",
                at=here(),
                instead="value.mT exchanges the last two",
            )
        return apply_torch(torch.t, (self,), {})

    @property
    def mT(self) -> Any:  # torch's name
        """The value with its last two axes exchanged; :class:`ShapeError` for fewer than two."""
        return apply_torch(torch.transpose, (self, -2, -1), {})

    @property
    def tok(self) -> Tokens:
        """Addresses real tokens: ``.tok[3]``, ``.tok[-1]``, ``.tok["Paris"]``, ``.tok[1:4]``, ``.tok[mask]``."""
        return Tokens(self)

    # --- operations ----------------------------------------------------------------------------------------------

    def _apply(self, name: str, args: Sequence[object], kwargs: Mapping[str, object] | None) -> Any:
        nested = bool(kwargs)
        for arg in args:
            kind = type(arg)
            if kind is Value or kind is torch.Tensor:
                continue
            if isinstance(arg, PerLayerOperand) and arg._is_recording():
                return arg._apply(name, args, kwargs)
            nested = nested or isinstance(arg, list | tuple)
        if nested:
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
        recorder = self._recorder
        awaited = recorder.awaited(self._id)
        if awaited is not None:
            recorder.expect_return(result._id, awaited, self._id)
        elif (site := self._root()._site) is not None and isinstance(result, Value):
            recorder.expect_return(result._id, site, None)
        return result

    def _root(self) -> Value:
        value = self
        while value._parent is not None:
            value = value._parent
        return value

    def __getitem__(self, key: Any) -> Any:
        if not self._is_recording():
            result = self._result()
            if isinstance(result, list) and not isinstance(key, int | slice):
                raise not_one_tensor(
                    cast("list[torch.Tensor]", result), "an index of several axes is of one tensor"
                )
            return result[key]
        self._require_fresh()
        return self._indexed(index_of(self, key))

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
        self._assign(index_of(self, key), new)

    def _assign(self, index: tuple[IndexItem, ...], new: Any, *, by_token: bool = False) -> None:
        recorder = self._recorder
        root = self._root()
        site = root._site
        if site is None:
            made = recorder.ops[root._defined_by()]
            if isinstance(made, Param):
                raise parameter_target(repr(made.path))
            raise WriteTargetError(
                "indexed assignment changes a site; this value was computed, so nothing in the model would change",
                at=here(),
                instead="torch.where(mask, new, value), or assign to the site: model.layers[i].resid_post[...] = new",
            )
        root._require_current(site, "[...]")
        value = recorder.put(self._id, index, new, by_token=by_token)
        step: Value = self
        while step._parent is not None:
            assert step._index is not None
            value = recorder.put(step._parent._id, step._index, Value(recorder, value), by_token=True)
            step = step._parent
        root_site = site
        if recorder.generating and self._chooses_tokens(index) and recorder.steps_of(value) == PREFILL:
            site = site.during(PREFILL)  # tokens of the prompt are there in the step that is over it
        recorder.write(site, Value(recorder, value))
        if isinstance(new, Value):
            recorder.returned(new._id, root_site)
        at = here()
        step = self
        while True:
            step._stale = at
            if step._parent is None:
                break
            step = step._parent

    def _require_current(self, site: Site, part: str) -> None:
        """Refuses to assign to ``part`` of a site through its value from before the last write."""
        recorder = self._recorder
        if not recorder.is_current(site, self._id):
            raise StaleValueError(
                f"{site} was written after this value was read, so assigning through it would undo that write",
                at=here(),
                also=(("the site was written at", last_write(recorder, site)),),
                instead=f"read the site again before assigning into it: {spelling(site)}{part} = new",
            )

    def _chooses_tokens(self, index: tuple[IndexItem, ...]) -> bool:
        """Are tokens of the prompt chosen, by an index or on the way to what it is applied to?"""
        here_, before = any(isinstance(item, Selector) for item in index), self._parent
        return here_ or (before is not None and before._chooses_tokens(self._index or ()))

    # --- leaving the run -----------------------------------------------------------------------------------------

    def save(
        self,
        name: str | None = None,
        *,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        to: str | os.PathLike[str] | None = None,
    ) -> Saved:
        """Lets this value leave the run: its numbers are there after the block.

        ``name`` makes it available as ``t[name]`` too. ``dtype`` casts it where it was computed, before it moves.
        ``to="file.safetensors"`` writes it to that file and reads it back on demand.

        ``device="keep"`` leaves it on the device on which it was computed, and nothing is sent for it: a site as the
        model made it lies with its layer; what is made of values of several devices lies, as a rule, with the latest of
        these; a parameter lies with its module. What was written to a site of another device lies where it was
        computed, also when the site is read again, because that read is the written value itself; the layer gets a copy
        of its own. ``handle.device`` says where it is after the block.

        Raises :class:`~tracelens.errors.OptionError` for another ``device``, for ``device="keep"`` together with
        ``to=`` (what is in a file is on no device), and for a file that cannot be written.
        """
        self._require_fresh()
        if not self._is_recording():
            raise self._too_late()
        delivery = self._recorder.save(
            (self._id,), name=name, stacked=False, keep=keep_of(device), dtype=save_dtype(dtype), to=to
        )
        handle = Saved(self._recorder, self._id)
        handle._site, handle._parent, handle._index = self._site, self._parent, self._index
        handle._delivery = delivery
        if self._delivery is None:
            self._delivery = delivery
        return handle

    @property
    def value(self) -> Any:
        """The saved tensor (for prompts of different lengths, one per prompt)."""
        return self._result()

    def _too_late(self) -> BlockEndedError:
        """The error for saving after the block; values that were not saved in it say so themselves."""
        self._result()
        return BlockEndedError(
            "the block has ended, so nothing more can be saved from it",
            at=here(),
            instead="handle.value is there already; a second save of it stands inside the block",
        )

    def _has_result(self) -> bool:
        return self._delivery is not None and self._delivery.fetch is not None

    def _result(self) -> Any:
        recorder = self._recorder
        if self._delivery is not None and self._delivery.fetch is not None:
            return self._delivery.fetch()
        if recorder.is_open:
            raise NotRunYetError(
                "the model has not run yet: values have numbers only after the block",
                at=here(),
                instead="read it after the block",
            )
        if recorder.failure is not None:
            raise failed_block(recorder.failure, "value")
        if self._delivery is not None:
            raise NotRunYetError(
                "model.record only writes down what to do, so there are no numbers",
                at=here(),
                instead="results = model.compile(r)(prompt), and then results[name]",
            )
        raise UnsavedValueError(
            "this value was not saved, so nothing of it was kept",
            at=here(),
            also=(("it was recorded at", recorder.locations[self._defined_by()]),),
            instead=(
                "trace the whole text afterwards and save it there: with model.trace(prompt + t.text) as t2: ..."
                if recorder.generating
                else "add .save() to that line"
            ),
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
            return shown(self._result())
        what = f" of {self._site}" if self._site else ""
        return f"<value %{self._id}{what}: {with_lengths(str(self._type), self._recorder.sizes)}>"

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *(key for key in dir(torch.Tensor) if not key.startswith("_"))})


class Saved(Value):
    """A value that leaves the run; after the block it behaves as its tensor."""

    __slots__ = ()


class PerLayerOperand(Operand):
    """The base of what stands for one thing per layer (:mod:`tracelens.mapped`)."""

    __slots__ = ()


def shown(result: Any) -> str:
    """A saved result for looking at; for prompts of different lengths first the shapes, then the first of them."""
    if not isinstance(result, list):
        return repr(result)
    parts = cast("list[torch.Tensor]", result)
    shapes = ", ".join(str(tuple(part.shape)) for part in parts[:_SHAPES]) + ", ..." * (len(parts) > _SHAPES)
    return f"{len(parts)} prompts: {shapes}\n[0]: {parts[0]!r}"


_SHAPES = 8


def last_write(recorder: Recorder, site: Site) -> Location:
    return next(
        location
        for op, location in zip(reversed(recorder.ops), reversed(recorder.locations), strict=True)
        if isinstance(op, Write) and op.site.always == site.always
    )
