"""What one run holds, and the parts of its steps that are more than a torch call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from tracelens.errors import ApplyResultError, MutatedActivationError, SiteMismatchError, VerificationError
from tracelens.ir.infer import torch_dtype
from tracelens.ir.ops import (
    WHOLE,
    Apply,
    IndexItem,
    Read,
    Scalar,
    Slice,
    Special,
    TokenAt,
    TokenList,
    TokenSelector,
    TokenSlice,
    TokenText,
)

_SELECTORS = (TokenAt, TokenSlice, TokenList, TokenText)


class State:
    """What one run holds: the values so far and the saves."""

    __slots__ = (
        "constants",
        "foreign",
        "functions",
        "parameter",
        "saved",
        "select",
        "shapes",
        "sizes",
        "values",
    )

    def __init__(
        self,
        count: int,
        constants: Sequence[torch.Tensor | None],
        functions: Sequence[Any],
        parameter: Callable[[str], torch.Tensor],
        select: Callable[[TokenSelector], Any],
    ) -> None:
        self.values: list[Any] = [None] * count
        # Tensors in memory of the user's or the model's: a save that lies in it is copied.
        self.foreign: list[torch.Tensor] = []
        self.constants = constants
        self.functions = functions
        self.parameter = parameter
        self.select = select
        self.sizes: Mapping[str, int] = {}
        self.shapes: Sequence[tuple[int, ...]] = ()
        # By name: the tensors, each with the version that was saved.
        self.saved: dict[str, tuple[tuple[torch.Tensor, int], ...]] = {}

    def constant(self, index: int) -> torch.Tensor:
        tensor = self.constants[index]
        assert tensor is not None
        self.foreign.append(tensor)
        return tensor


def read_parameter(state: State, path: str) -> torch.Tensor:
    """A parameter or buffer of the model."""
    tensor = state.parameter(path)
    state.foreign.append(tensor)
    return tensor


def mismatch(state: State, tensor: Any, read: Read) -> SiteMismatchError:
    """The error for a site that does not hold what the recording was told it would."""
    dtype, shape = torch_dtype(read.type.dtype), read.type.sizes(state.sizes)
    return SiteMismatchError(
        f"the model produced {tensor.dtype} {tuple(tensor.shape)} at {read.site}; {dtype} {shape} was expected",
        instead="a model whose sublayers compute in one dtype, outside torch.autocast",
    )


def full(site: torch.Tensor, number: Any) -> torch.Tensor:
    """What a number written to a site makes of it."""
    return torch.full_like(site, number)


def fitted(new: torch.Tensor, site: torch.Tensor) -> torch.Tensor:
    """A written value in the site's dtype and shape, in memory of its own, whatever the model does with it."""
    if new.dtype is not site.dtype:
        new = new.to(site.dtype)
        return new if new.shape == site.shape else new.expand(site.shape).contiguous()
    return new.clone() if new.shape == site.shape else new.expand(site.shape).contiguous()


def applied(op: Apply) -> Callable[[State, tuple[Any, ...]], tuple[torch.Tensor, ...]]:
    """The user's own Python, held to what it promised."""
    types, index = op.types, op.index
    dtypes = [torch_dtype(type_.dtype) for type_ in types]

    def apply(state: State, given: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
        before = [arg._version for arg in given if isinstance(arg, torch.Tensor)]
        result = state.functions[index](*given)
        if before != [arg._version for arg in given if isinstance(arg, torch.Tensor)]:
            raise MutatedActivationError(
                "the applied function changed one of its arguments in place",
                instead="a function that returns new tensors",
            )
        parts: tuple[Any, ...] = tuple(result) if isinstance(result, tuple | list) else (result,)
        if len(parts) != len(types):
            raise ApplyResultError(
                f"the applied function gave {_counted(len(parts))}, where like= declares {len(types)}",
                instead="like=(a, b) with one value or tensor for each result",
            )
        for part, type_, dtype in zip(parts, types, dtypes, strict=True):
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
            state.foreign.append(part)
        return parts

    return apply


def _counted(results: int) -> str:
    return "1 result" if results == 1 else f"{results} results"


def plain_number(value: Scalar) -> Any:
    """A number as torch takes it."""
    return value.number if isinstance(value, Special) else value


def plain_item(item: IndexItem) -> Any:
    """An entry of an index that is no value, as Python writes it."""
    return slice(item.start, item.stop, item.step) if isinstance(item, Slice) else item


def selector_place(index: tuple[IndexItem, ...]) -> int | None:
    """The axis that a token selector stands at, if there is one; it stands alone, as ``.tok[...]`` makes it."""
    place = next((place for place, item in enumerate(index) if isinstance(item, _SELECTORS)), None)
    if place is not None and index != (*([WHOLE] * place), index[place]):
        raise VerificationError(
            "a token selector cannot be mixed with other indices", instead="index in two steps"
        )
    return place
