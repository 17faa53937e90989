"""What one can write with a value: Python's operators, torch's functions and methods.

:class:`Operand` is the common surface of a single value and of values mapped over layers; both say in ``_apply`` what
an application of a function means for them.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, cast

import numpy as np
import torch

from tracelens.advice import instead_of_branching, instead_of_len, instead_of_number
from tracelens.errors import (
    Blaming,
    GenerationStepError,
    InPlaceError,
    PositionAxisError,
    TracelensError,
    UnsupportedFunctionError,
    ValueAttributeError,
    ValueBranchError,
)
from tracelens.ir.infer import canonical_call, name_of
from tracelens.ir.sites import near
from tracelens.location import here
from tracelens.per_prompt import not_one_tensor
from tracelens.refusing import module_called, refuse, sent_by_accelerate


def _binary(name: str, plain: Callable[[Any, Any], Any]) -> Callable[[Any, object], Any]:
    def method(self: Operand, other: object) -> Any:
        if self._is_recording():
            return self._apply(name, (self, other), None)
        if isinstance(other, Operand) and other._is_recording():
            # What is left of a finished trace is a constant of the open one, if it was saved.
            return other._apply(name, (self, other), None)
        return plain(self._tensor(), other)

    return method


def _reflected(name: str, plain: Callable[[Any, Any], Any]) -> Callable[[Any, object], Any]:
    def method(self: Operand, other: object) -> Any:
        if self._is_recording():
            return self._apply(name, (other, self), None)
        return plain(other, self._tensor())

    return method


def _in_place(name: str, plain: Callable[[Any, Any], Any]) -> Callable[[Any, object], Any]:
    def method(self: Operand, other: object) -> Any:
        if self._is_recording():
            try:
                return self._updated(self._apply(name, (self, other), None))
            except (GenerationStepError, PositionAxisError):
                _refuse_earlier(self, other)
                raise
        return plain(self._tensor(), other)

    return method


def _refuse_earlier(site: Any, new: object) -> None:
    """Says of ``site += new`` that ``new`` comes later, where that is what is wrong with it."""
    first, other = (cast(Any, getattr(one, "_members", (one,))[0]) for one in (site, new))
    if isinstance(new, Operand) and first._root()._site is not None:
        with Blaming(here()):
            first._recorder.refuse_earlier(first._id, other._id)


def _unary(name: str, plain: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def method(self: Operand) -> Any:
        if self._is_recording():
            return self._apply(name, (self,), None)
        return plain(self._tensor())

    return method


class Operand:
    """Something that operators and torch functions can be applied to while recording."""

    __slots__ = ("__weakref__",)

    # Each of these is said by the two kinds of operands.

    def _is_recording(self) -> bool:
        raise TypeError("Operand is abstract")

    def _result(self) -> Any:
        """The tensor that came out of the run; raises a named error where there is none."""
        raise TypeError("Operand is abstract")

    def _tensor(self, what: str = "this") -> Any:
        """What :meth:`_result` gives, where it is one tensor; ``what`` was asked of it, if it is none."""
        result = self._result()
        if isinstance(result, list):
            words = f"{what} is of one tensor" if what != "this" else "this takes one tensor"
            raise not_one_tensor(cast("list[torch.Tensor]", result), words)
        return result

    def _apply(self, name: str, args: Sequence[object], kwargs: Mapping[str, object] | None) -> Any:
        """Records a function of the catalogue."""
        raise TypeError("Operand is abstract")

    def _updated(self, result: Any) -> Any:
        """``result`` came from an in-place operator on this operand."""
        raise TypeError("Operand is abstract")

    __add__ = _binary("torch.add", operator.add)
    __sub__ = _binary("torch.sub", operator.sub)
    __mul__ = _binary("torch.mul", operator.mul)
    __truediv__ = _binary("torch.div", operator.truediv)
    __floordiv__ = _binary("torch.floor_divide", operator.floordiv)
    __mod__ = _binary("torch.remainder", operator.mod)
    __pow__ = _binary("torch.pow", operator.pow)
    __matmul__ = _binary("torch.matmul", operator.matmul)
    __and__ = _binary("torch.bitwise_and", operator.and_)
    __or__ = _binary("torch.bitwise_or", operator.or_)
    __xor__ = _binary("torch.bitwise_xor", operator.xor)
    __lshift__ = _binary("torch.bitwise_left_shift", operator.lshift)
    __rshift__ = _binary("torch.bitwise_right_shift", operator.rshift)

    __radd__ = _reflected("torch.add", operator.add)
    __rmul__ = _reflected("torch.mul", operator.mul)
    __rsub__ = _reflected("torch.sub", operator.sub)
    __rtruediv__ = _reflected("torch.div", operator.truediv)
    __rfloordiv__ = _reflected("torch.floor_divide", operator.floordiv)
    __rmod__ = _reflected("torch.remainder", operator.mod)
    __rpow__ = _reflected("torch.pow", operator.pow)
    __rmatmul__ = _reflected("torch.matmul", operator.matmul)
    __rand__ = _reflected("torch.bitwise_and", operator.and_)
    __ror__ = _reflected("torch.bitwise_or", operator.or_)
    __rxor__ = _reflected("torch.bitwise_xor", operator.xor)

    __iadd__ = _in_place("torch.add", operator.add)
    __isub__ = _in_place("torch.sub", operator.sub)
    __imul__ = _in_place("torch.mul", operator.mul)
    __itruediv__ = _in_place("torch.div", operator.truediv)
    __ifloordiv__ = _in_place("torch.floor_divide", operator.floordiv)
    __imod__ = _in_place("torch.remainder", operator.mod)
    __ipow__ = _in_place("torch.pow", operator.pow)
    __imatmul__ = _in_place("torch.matmul", operator.matmul)
    __iand__ = _in_place("torch.bitwise_and", operator.and_)
    __ior__ = _in_place("torch.bitwise_or", operator.or_)
    __ixor__ = _in_place("torch.bitwise_xor", operator.xor)

    __neg__ = _unary("torch.neg", operator.neg)
    __pos__ = _unary("torch.positive", operator.pos)
    __abs__ = _unary("torch.abs", operator.abs)
    __invert__ = _unary("torch.bitwise_not", operator.invert)

    # Comparisons of values are values; identity hashes keep operands usable in sets and as dict keys.
    __eq__ = _binary("torch.eq", operator.eq)  # pyright: ignore[reportAssignmentType]  # torch's own meaning of ==
    __ne__ = _binary("torch.ne", operator.ne)  # pyright: ignore[reportAssignmentType]  # torch's own meaning of !=
    __lt__ = _binary("torch.lt", operator.lt)
    __le__ = _binary("torch.le", operator.le)
    __gt__ = _binary("torch.gt", operator.gt)
    __ge__ = _binary("torch.ge", operator.ge)

    def __hash__(self) -> int:
        return id(self)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        """``array + value``, ``array += value`` and ``np.exp(value)`` arrive here, the arrays in one piece."""
        recording = any(operand._is_recording() for operand in operands_in(inputs, options))
        word = _UFUNCS.get(ufunc.__name__)
        if word is not None and method == "__call__" and not options and (recording or _has_number(inputs)):
            left, right = (
                part.item() if isinstance(part, np.generic) and not recording else part for part in inputs
            )
            if isinstance(left, Operand):
                return getattr(left, f"__{word}__")(right)
            return getattr(right, f"__{_MIRRORED.get(word, 'r' + word)}__")(left)
        if not recording:
            arrays = (np.asarray(part) if isinstance(part, Operand) else part for part in inputs)
            return getattr(ufunc, method)(*arrays, **options)
        name = f"numpy.{ufunc.__name__}"
        if options.get("out") is not None:
            raise InPlaceError(
                f"{name} would change an array of yours by a value, whose numbers do not exist before the run",
                at=here(),
                instead="array = array + value, which makes a new value",
            )
        namesake = getattr(torch, ufunc.__name__, None)
        raise UnsupportedFunctionError(
            f"{name} cannot be recorded in a graph",
            at=here(),
            instead=f"torch.{ufunc.__name__}" if namesake is not None else "a function of torch",
        )

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: object,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Any torch function with an operand among its arguments arrives here."""
        return apply_torch(func, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("__", "_repr_", "_ipython_")):
            raise AttributeError(name)
        if not self._is_recording():
            found = getattr(self._tensor(f".{name}"), name)
            if name == "grad" and found is None:
                raise ValueAttributeError(
                    "what leaves a block has no gradient: it is a tensor without a history",
                    at=here(),
                    instead="in the block: tl.grad(loss, h).save(), with h a site as it was read",
                )
            return found
        method = getattr(torch.Tensor, name, None)
        if name == "device" and (module := module_called()) is not None:
            raise UnsupportedFunctionError(
                f"{module} cannot be recorded in a graph: it asks for a device",
                at=here(),
                instead="tl.apply(module, value, like=value) runs the module on the real tensors",
            )
        if name == "device":
            raise ValueAttributeError(
                "a value has no device: the plan decides where it lives",
                at=here(),
                instead="leave devices out: tensors that you use are moved to the value's device by the plan",
            )
        if method is not None and not callable(method):
            getter = method.__get__  # a property of tensors: .real, .mH, .data
            if name_of(getter) is None:
                refuse(getter, f"Tensor.{name}")
            return apply_torch(getter, (self,), {})
        if method is None or name_of(method) is None:
            if method is not None:
                refuse(method, f"Tensor.{name}", (self,))
            candidates = near(name, _attributes())
            raise ValueAttributeError(
                f"a value has no attribute {name!r}",
                at=here(),
                instead="did you mean " + ", ".join(candidates) + "?" if candidates else None,
            )
        return _Method(self, method)

    # --- what Python would need to know now ---------------------------------------------------------------------

    def _branch(self, what: str, instead: str) -> NoReturn:
        raise ValueBranchError(f"{what} a value is not possible before the run", at=here(), instead=instead)

    def __bool__(self) -> bool:
        if not self._is_recording():
            return bool(self._tensor())
        return self._branch("branching on", instead_of_branching(here()))

    def __float__(self) -> float:
        if not self._is_recording():
            return float(self._tensor())
        return self._branch("float() of", instead_of_number(here(), _ITSELF))

    def __int__(self) -> int:
        if not self._is_recording():
            return int(self._tensor())
        return self._branch("int() of", instead_of_number(here(), _ITSELF))

    def __complex__(self) -> complex:
        if not self._is_recording():
            return complex(self._tensor())
        return self._branch("complex() of", instead_of_number(here(), _ITSELF))

    def __round__(self, digits: int = 0) -> Any:
        if not self._is_recording():
            return round(self._tensor(), digits)
        return self._branch("round() of", "torch.round(value)")

    def __floor__(self) -> Any:
        if not self._is_recording():
            return torch.floor(self._tensor())
        return self._branch("math.floor() of", "torch.floor(value)")

    def __ceil__(self) -> Any:
        if not self._is_recording():
            return torch.ceil(self._tensor())
        return self._branch("math.ceil() of", "torch.ceil(value)")

    def __trunc__(self) -> Any:
        if not self._is_recording():
            return torch.trunc(self._tensor())
        return self._branch("math.trunc() of", "torch.trunc(value)")

    def __index__(self) -> int:
        if not self._is_recording():
            return operator.index(self._tensor())
        return self._branch(
            "indexing or counting with", "torch.gather or torch.index_select with the value as the index"
        )

    def __len__(self) -> int:
        if not self._is_recording():
            return len(self._result())
        return self._branch("len() of", instead_of_len(here()))

    def __iter__(self) -> Any:
        if not self._is_recording():
            return iter(self._result())
        return self._branch("iterating over", "value.unbind(0), or an index: value[0], value[1]")

    def __contains__(self, item: object) -> bool:
        if not self._is_recording():
            return item in self._result()
        return self._branch("`in` on", "(value == item).any()")

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        if self._is_recording():
            self._branch("numpy() of", "a torch function; .save() the value to use numpy after the block")
        array = self._tensor().numpy()
        return array if dtype is None else array.astype(dtype)

    def __format__(self, spec: str) -> str:
        if not self._is_recording() and self._has_result():
            return format(self._result(), spec)
        if spec and self._is_recording():
            return self._branch(
                f"formatting with {spec!r} of", ".save() it, and print the number after the block"
            )
        return repr(self)

    # A value never changes, so a copy of it is itself; a result is copied as a tensor is.

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: Any) -> Any:
        return self if self._is_recording() else copy.deepcopy(self._result(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if not self._is_recording():
            return self._result().__reduce_ex__(protocol)
        return self._branch("pickling", ".save() it, and pickle the tensor after the block")

    def _has_result(self) -> bool:
        raise TypeError("Operand is abstract")


_ITSELF = "compute with the value itself; .save() it to see the number after the block"

# The functions of numpy behind Python's operators.
_UFUNCS = {
    "add": "add",
    "subtract": "sub",
    "multiply": "mul",
    "divide": "truediv",
    "floor_divide": "floordiv",
    "remainder": "mod",
    "power": "pow",
    "matmul": "matmul",
    "bitwise_and": "and",
    "bitwise_or": "or",
    "bitwise_xor": "xor",
    "equal": "eq",
    "not_equal": "ne",
    "less": "lt",
    "less_equal": "le",
    "greater": "gt",
    "greater_equal": "ge",
}
_MIRRORED = {"eq": "eq", "ne": "ne", "lt": "gt", "gt": "lt", "le": "ge", "ge": "le"}


def _attributes() -> tuple[str, ...]:
    """What one can write after a value's dot."""
    methods = (key for key in dir(torch.Tensor) if not key.startswith("_") and not key.endswith("_"))
    known = (key for key in methods if callable(found := getattr(torch.Tensor, key)) and name_of(found))
    return (*known, "shape", "dtype", "ndim", "save", "tok", "value")


def _has_number(inputs: Sequence[object]) -> bool:
    return any(isinstance(part, np.generic) for part in inputs)


class _Method:
    """A tensor method bound to an operand."""

    __slots__ = ("method", "operand")

    def __init__(self, operand: Operand, method: Callable[..., Any]) -> None:
        self.operand = operand
        self.method = method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return apply_torch(self.method, (self.operand, *args), kwargs)


def operands_in(args: Sequence[object], kwargs: Mapping[str, object]) -> list[Operand]:
    """All operands among the arguments, nested ones too."""
    found: list[Operand] = []
    stack: list[object] = [*reversed(args), *kwargs.values()]
    while stack:
        arg = stack.pop()
        if isinstance(arg, Operand):
            found.append(arg)
        elif isinstance(arg, list | tuple):
            stack.extend(cast("Sequence[object]", arg))
    return found


def apply_torch(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Records a torch function, or runs it at once if its operands are results of finished traces."""
    operands = operands_in(args, kwargs)
    recording = next((operand for operand in operands if operand._is_recording()), None)
    if recording is None:
        plain, named = [*map(_finished, args)], {key: _finished(arg) for key, arg in kwargs.items()}
        parts = next((found for each in operands if isinstance(found := each._result(), list)), None)
        try:
            return function(*plain, **named)
        except (AttributeError, RuntimeError, TypeError):
            if parts is None:
                raise
            words = f"{_display_name(function)} takes one tensor"
            raise not_one_tensor(cast("list[torch.Tensor]", parts), words) from None
    if name_of(function) is None:
        refuse(function, _display_name(function), args)
    try:
        name, plain, named = canonical_call(function, tuple(args), dict(kwargs))
    except TracelensError as error:
        if isinstance(error, UnsupportedFunctionError) and sent_by_accelerate():
            return recording  # the hook of a module of the model's own, called on a value: the plan moves it
        error.at = error.at or here()
        raise
    return recording._apply(name, plain, named)


def _display_name(function: Callable[..., Any]) -> str:
    name = torch.overrides.resolve_name(function)
    return name or getattr(function, "__qualname__", repr(function))


def _finished(arg: Any) -> Any:
    if isinstance(arg, Operand):
        return arg._result()
    if isinstance(arg, list | tuple) and operands_in(arg, {}):
        return type(arg)(_finished(part) for part in cast("Sequence[object]", arg))
    return arg
