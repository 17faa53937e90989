"""Constants with names: what a program can be given other values for, call by call."""

from __future__ import annotations

import keyword
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from tracelens.constants import Captured, capture
from tracelens.errors import (
    Blaming,
    DtypeError,
    NestedTraceError,
    NoTraceError,
    OptionError,
    ShapeError,
    UnknownConstantError,
)
from tracelens.ir.graph import Graph
from tracelens.ir.infer import torch_dtype
from tracelens.ir.ops import Const
from tracelens.ir.sites import near
from tracelens.ir.types import TensorType
from tracelens.location import here
from tracelens.open_recordings import open_recorder, open_recorders
from tracelens.operand import Operand
from tracelens.recorder import Recorder
from tracelens.values import Value
from tracelens.view import Shown, Table, View

RESERVED = ("batch_size", "product", "program", "progress", "prompt", "prompts", "self")
"""The other arguments of a program and of ``tl.sweep``, whose names no constant can have."""

_NUMBER = "a number, a tensor or an array"


def constant(value: Any, *, name: str, model: Any = None) -> Value:
    """A constant of the graph under a name, which a program can be given another value for, call by call.

    ``value`` is a tensor or array of any shape, or a number, which becomes a float32 tensor without axes. Such a tensor
    takes part in arithmetic as torch's own do: it does not widen the floats that it meets, so a bfloat16 site times it
    stays bfloat16. ``model`` is needed only where blocks of several models are open. Plain tensors of a block are
    constants without a name: nobody can replace them.

    Raises :class:`~tracelens.errors.OptionError` for a name that is reserved or is no Python name,
    :class:`~tracelens.errors.DuplicateNameError` for two constants of one name that are not the same tensor,
    :class:`~tracelens.errors.DtypeError` for what no graph can hold, and :class:`~tracelens.errors.NoTraceError`
    outside a block.

    >>> with model.record() as r:                                                    # doctest: +SKIP
    ...     strength = tl.constant(1.0, name="strength")
    ...     model.layers[5].resid_post += strength * tl.constant(v, name="v")
    ...     model.logits[:, -1].save("logits")
    >>> program = model.compile(r)                                                   # doctest: +SKIP
    >>> program("The capital of France is", strength=2.0)["logits"].shape            # doctest: +SKIP
    torch.Size([1, 49152])
    """
    recorder = _recorder(model)
    with Blaming(here()):
        _check_name(name)
        given = _plain(value)
        if isinstance(given, bool | complex):
            raise DtypeError(
                f"a constant cannot be made of {given!r}, whose dtype in the graph would be a guess",
                instead=f'tl.constant(torch.tensor({given!r}), name="{name}")',
            )
        captured = capture(
            _number(float(given), "float32") if isinstance(given, int | float) else given, name
        )
        identity = float(given) if isinstance(given, int | float) else given
    return Value(recorder, recorder.named_constant(name, captured, identity))


def _recorder(model: Any) -> Recorder:
    found = open_recorders()
    if model is not None:
        own = open_recorder(model.anatomy)
        found = tuple(recorder for recorder in found if recorder is own)
    if not found:
        raise NoTraceError(
            "tl.constant was used outside a block, where there is no graph to hold it",
            at=here(),
            instead="with model.record() as r: v = tl.constant(tensor, name=...)",
        )
    recorder, *others = found
    if others:
        raise NestedTraceError(
            "blocks of several models are open here, and tl.constant does not say which graph holds it",
            at=here(),
            instead="tl.constant(value, name=..., model=model)",
        )
    return recorder


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        raise OptionError(
            f"{name!r} is not a name for a constant: program(prompt, {name}=...) could not be written",
            instead='a Python name, such as name="v"',
        )
    if name in RESERVED:
        raise OptionError(
            f"{name!r} is not a name for a constant: programs and sweeps have an argument of that name",
            instead=f'another name, such as "{name}_value"',
        )


def _plain(value: Any) -> Any:
    """A number, tensor or array, out of whatever holds one."""
    if isinstance(value, Operand):
        if value._is_recording():
            raise OptionError(
                "a constant is known before the run, and this value is computed in it",
                instead="the value itself; or save it, and use what was saved in a second block",
            )
        value = value._result()
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
        value = value.item()
    if not isinstance(value, bool | int | float | complex | torch.Tensor | np.ndarray):
        raise OptionError(f"a constant cannot be made of a {type(value).__name__}", instead=_NUMBER)
    if isinstance(value, torch.Tensor) and value.is_meta:
        raise OptionError("a constant cannot be made of a tensor without data (on the meta device)")
    return value


def _number(number: float, dtype: str) -> torch.Tensor:
    tensor = torch.tensor(number, dtype=getattr(torch, dtype))
    if math.isfinite(number) and not torch.isfinite(tensor):
        raise DtypeError(
            f"{number!r} is too large for {dtype}", instead="torch.tensor(number, dtype=torch.float64)"
        )
    return tensor


# --- the constants of a program --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class NamedConstant:
    """One constant that a program can be given another value for: its name, its type, and what it is by default."""

    name: str
    index: int
    type: TensorType
    captured: Captured

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape, which every value given for it must have."""
        return tuple(dim for dim in self.type.shape if isinstance(dim, int))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in the graph; other floating dtypes are cast to it."""
        return torch_dtype(self.type.dtype)

    @property
    def default(self) -> torch.Tensor:
        """A copy of what it is where a call gives nothing else."""
        return self.captured.tensor.detach().clone()

    def __repr__(self) -> str:
        return f"<constant {self.name!r}: {self.type}>"

    def _cells(self) -> tuple[str, ...]:
        tensor = self.captured.tensor.detach()
        if not tensor.ndim:
            default = f"{tensor.item():g}" if self.type.dtype.is_floating else str(tensor.item())
        elif tensor.numel() and self.type.dtype.is_floating:
            default = f"norm {tensor.double().norm().item():.4g}"
        else:
            default = "-"
        return (self.name, str(self.shape), self.type.dtype.value, default)


class NamedConstants(Mapping[str, NamedConstant], Shown):
    """The named constants of a program, in the order in which they were first used; a table where it is shown."""

    def __init__(self, graph: Graph) -> None:
        found: dict[str, NamedConstant] = {}
        for op in graph.ops:
            if isinstance(op, Const) and op.name is not None:
                held = graph.constants[op.index]
                assert isinstance(held, Captured)
                found.setdefault(op.name, NamedConstant(op.name, op.index, op.type, held))
        self._found = found

    def __getitem__(self, name: str) -> NamedConstant:
        """One of them; :class:`~tracelens.errors.UnknownConstantError` for a name that there is not."""
        if name not in self._found:
            raise self.unknown(name)
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def unknown(self, name: str) -> UnknownConstantError:
        """The error for a name that no constant has."""
        known = ", ".join(map(repr, self._found))
        likely = near(name, tuple(self._found))
        return UnknownConstantError(
            f"this program has no constant {name!r}; "
            + (f"its named constants are: {known}" if known else "none of its constants has a name"),
            at=here(),
            instead=f"did you mean {', '.join(likely)}?"
            if likely
            else f"program(prompt, {next(iter(self._found))}=value)"
            if known
            else f'{name} = tl.constant(tensor, name="{name}") in the recording',
        )

    def _view(self) -> View:
        heads = ("name", "shape", "dtype", "default")
        rows = tuple(entry._cells() for entry in self._found.values())
        return Table(heads, rows, empty="no named constants")


def fitted(entry: NamedConstant, value: Any) -> Captured:
    """``value`` in the place of a constant: of its shape, and in its dtype.

    Floating numbers of any width are cast to the constant's; all other dtypes have to be the constant's own, because
    casting them would change numbers. Raises :class:`ShapeError` and :class:`DtypeError`.
    """
    given, own = _plain(value), entry.type.dtype
    if isinstance(given, bool | int | float | complex):
        if entry.shape:
            raise ShapeError(
                f"the constant {entry.name!r} is {entry.type}, and it was given the number {given!r}",
                instead=f"a tensor of shape {entry.shape}: torch.full({entry.shape}, {given!r})",
            )
        fits = (
            isinstance(given, bool)
            if own.value == "bool"
            else not isinstance(given, bool)
            and (own.is_complex or not isinstance(given, complex))
            and (own.is_floating or own.is_complex or isinstance(given, int))
        )
        if not fits:
            raise DtypeError(
                f"the constant {entry.name!r} is {entry.type}, and it was given {given!r}",
                instead=f"a number that is a {own.value}",
            )
        return capture(_scalar(given, entry), entry.name)
    captured = capture(given, entry.name)
    tensor = captured.tensor.detach()
    if tuple(tensor.shape) != entry.shape:
        raise ShapeError(
            f"the constant {entry.name!r} is {entry.type}, and it was given a tensor of shape {tuple(tensor.shape)}",
            instead=f"a tensor of shape {entry.shape}; tl.sweep runs a program for each of several values",
        )
    theirs = captured.type.dtype
    alike = (own.is_floating and theirs.is_floating) or (own.is_complex and theirs.is_complex)
    if theirs is not own and not alike:
        raise DtypeError(
            f"the constant {entry.name!r} is {entry.type}, and it was given {theirs.value}",
            instead=f"tensor.to(torch.{own.value})",
        )
    return captured if theirs is own else capture(tensor.to(entry.dtype), entry.name)


def _scalar(number: Any, entry: NamedConstant) -> torch.Tensor:
    own = entry.type.dtype
    if own.is_floating:
        return _number(float(number), own.value)
    try:
        return torch.tensor(number, dtype=entry.dtype)
    except (RuntimeError, OverflowError):
        raise DtypeError(
            f"the constant {entry.name!r} is {entry.type}, and {number!r} is too large for it"
        ) from None


def with_values(graph: Graph, known: NamedConstants, values: Mapping[str, Any]) -> Graph:
    """The graph with other values for some of its named constants; nothing else changes, so its programs serve it."""
    tensors = list(graph.constants)
    for name, value in values.items():
        entry = known[name]
        tensors[entry.index] = fitted(entry, value)
    return replace(graph, constants=tuple(tensors))
