"""What one run holds, and the parts of its steps that are more than a torch call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from tracelens.backends.departing import Departures
from tracelens.backends.enduring import Failure
from tracelens.backends.transfer import moved
from tracelens.errors import (
    ApplyResultError,
    MetaTensorError,
    MutatedActivationError,
    PositionAxisError,
    SiteMismatchError,
    VerificationError,
)
from tracelens.ir.infer import torch_dtype
from tracelens.ir.ops import (
    WHOLE,
    Apply,
    IndexItem,
    OwnTokens,
    PromptRow,
    PromptTokens,
    Read,
    Save,
    Scalar,
    Selector,
    Slice,
    Special,
    TokenSelector,
    as_slice,
)
from tracelens.ir.types import TensorType

Journey = tuple[str, str, str, int]


class State:
    """What one run holds: the values so far and the saves."""

    __slots__ = (
        "_foreign",
        "constants",
        "deferred",
        "departures",
        "failure",
        "functions",
        "inputs",
        "into",
        "pads",
        "parameter",
        "saved",
        "select",
        "shapes",
        "sizes",
        "stacks",
        "traffic",
        "values",
    )

    def __init__(
        self,
        count: int,
        constants: dict[tuple[int, int], torch.Tensor],
        functions: Sequence[Any],
        parameter: Callable[[str, list[Journey], Callable[[torch.Tensor], None]], torch.Tensor],
        select: Callable[[Selector], Any],
        pads: Sequence[int] | None = None,
        departures: Departures | None = None,
    ) -> None:
        self.departures = departures
        # How much padding stands before each row, where rows differ in length.
        self.pads = pads
        self.values: list[Any] = [None] * count
        # Where memory begins that may be the user's or the model's. The tensors themselves are not held on to.
        self._foreign: set[int] = set()
        self.constants = constants
        self.functions = functions
        self.parameter = parameter
        self.select = select
        self.sizes: Mapping[str, int] = {}
        # The sites that are no part of the model: what the pass is over.
        self.inputs: Mapping[str, torch.Tensor] = {}
        # In a generation, by name, where each member of a save goes.
        self.into: Mapping[str, Sequence[Any]] = {}
        # By constant and place, where members of it go that are kept for several steps together.
        self.deferred: Mapping[tuple[int, int], Sequence[Any]] = {}
        self.shapes: Sequence[tuple[int, ...]] = ()
        # By name: the tensors, each with the version that was saved. Those of later layers come later.
        self.saved: dict[str, list[Any]] = {}
        # Stacks that stay on their device, each with the members that are still to come.
        self.stacks: dict[str, tuple[torch.Tensor, set[int]]] = {}
        # What went from device to device: source, target, why, bytes.
        self.traffic: list[Journey] = []
        self.failure: Failure | None = None

    def depart(self, device: torch.device, parts: Sequence[tuple[Save, int]]) -> None:
        """Sends what was saved on a device, which has nothing to add."""
        if self.departures is not None:
            self.departures.depart(device, parts, self.saved)
            for save, part in parts:
                self.traffic.append((str(device), "cpu", "results", self.saved[save.name][part][0].nbytes))

    def put(self, save: Save, part: int, tensor: torch.Tensor) -> None:
        """A member of a stack that stays on its device: copied to its place there, never held beside it."""
        found = self.stacks.get(save.name)
        if found is None:
            dtype = tensor.dtype if save.dtype is None else torch_dtype(save.dtype)
            stack = tensor.new_empty((len(save.values), *tensor.shape), dtype=dtype, requires_grad=False)
            found = self.stacks[save.name] = (stack, set(range(len(save.values))))
        stack, missing = found
        stack[part].copy_(tensor.detach())
        missing.discard(part)

    def lends(self, tensor: torch.Tensor) -> None:
        """A tensor that may lie in memory of the user's or the model's: a save that lies there too is copied."""
        self._foreign.add(_address(tensor))

    @property
    def foreign(self) -> set[int]:
        """Where memory begins that no result may lie in."""
        return self._foreign | {_address(tensor) for tensor in self.constants.values()}


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def kept(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """A tensor to be saved, in the dtype that it is saved in; a part of a larger one does not keep that one alive."""
    tensor = tensor.detach()
    if dtype is not None:
        tensor = tensor.to(dtype)
    if tensor.untyped_storage().nbytes() > tensor.nbytes:
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor


def sent(state: State, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A value on its way to another place. Where autograd sends a gradient back, that is written down when it does."""
    source, target = str(tensor.device), str(device)
    state.traffic.append((source, target, "transfers", tensor.nbytes))
    found = moved(tensor, device)
    if found.requires_grad:
        traffic = state.traffic

        def returned(gradient: torch.Tensor | None) -> None:
            if gradient is not None:
                traffic.append((target, source, "gradients", gradient.nbytes))

        found.register_hook(returned)
    return found


def read_parameter(state: State, path: str) -> torch.Tensor:
    """A parameter or buffer of the model; one that is loaded for the run is let go of with its last use."""
    return state.parameter(path, state.traffic, state.lends)


def mismatch(state: State, tensor: Any, read: Read) -> SiteMismatchError:
    """The error for a site that does not hold what the recording was told it would."""
    dtype, shape = torch_dtype(read.type.dtype), read.type.sizes(state.sizes)
    return SiteMismatchError(
        f"the model produced {tensor.dtype} {tuple(tensor.shape)} at {read.site}; {dtype} {shape} was expected",
        instead=(
            "a model whose sublayers compute in one dtype, outside torch.autocast"
            if tensor.shape == shape
            else "a trace of the whole text: in generation, the cache of this layer does not hold each key once"
            if "S" in read.type.symbols
            else None
        ),
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


def applied(
    op: Apply, given_types: Sequence[TensorType | None]
) -> Callable[[State, tuple[Any, ...]], tuple[torch.Tensor, ...]]:
    """The user's own Python, held to what it promised.

    ``given_types``: those of the arguments that are values. Where rows differ in length, a function of positions is
    called for each row alone, without its padding: every row gets the numbers that it would get alone.
    """
    by_position = any(type_ is not None and type_.position_axes for type_ in given_types)
    by_key = any(type_ is not None and type_.padded_axes != type_.position_axes for type_ in given_types)

    def apply(state: State, given: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
        before = [arg._version for arg in given if isinstance(arg, torch.Tensor)]
        # A step of a generation with a cache has one position in each row, and padding among the keys alone.
        if state.pads is not None and (by_key or (by_position and state.sizes["P"] > 1)):
            parts = _row_by_row(op, given_types, state, given)
        else:
            parts = _called(op, state, given, state.sizes)
        if before != [arg._version for arg in given if isinstance(arg, torch.Tensor)]:
            raise MutatedActivationError(
                "the applied function changed one of its arguments in place",
                instead="a function that returns new tensors",
            )
        for part in parts:
            state.lends(part)
        return parts

    return apply


def _called(
    op: Apply, state: State, given: tuple[Any, ...], sizes: Mapping[str, int]
) -> tuple[torch.Tensor, ...]:
    """One call, whose results must be what ``like=`` declares for these sizes."""
    result = state.functions[op.index](*given)
    parts: tuple[Any, ...] = tuple(result) if isinstance(result, tuple | list) else (result,)
    if len(parts) != len(op.types):
        raise ApplyResultError(
            f"the applied function gave {_counted(len(parts))}, where like= declares {len(op.types)}",
            instead="like=(a, b) with one value or tensor for each result",
        )
    for part, type_ in zip(parts, op.types, strict=True):
        if not isinstance(part, torch.Tensor):
            raise ApplyResultError(
                f"the applied function gave {part!r}, where like= declares a tensor",
                instead="a function that returns tensors",
            )
        if part.is_meta:
            raise MetaTensorError(
                "the applied function gave a tensor without data (on the meta device)",
                instead="a function that computes with numbers; weights that accelerate offloads are loaded when their "
                "module is called: module(x), not module.weight",
            )
        dtype, shape = torch_dtype(type_.dtype), type_.sizes(sizes)
        if part.shape != shape or part.dtype is not dtype:
            raise ApplyResultError(
                f"the applied function gave {part.dtype} {tuple(part.shape)}, where like= declares {dtype} {shape}",
                instead="like= a value or tensor of the shape and dtype that the function returns",
            )
    return parts


def _row_by_row(
    op: Apply, given_types: Sequence[TensorType | None], state: State, given: tuple[Any, ...]
) -> tuple[torch.Tensor, ...]:
    if any(type_.batch_axis is None for type_ in op.types):
        raise PositionAxisError(
            "rows of different lengths are given to the applied function one by one, and like= declares a result "
            "without a row axis",
            instead="a result with a row axis, or prompts of one length",
        )
    assert state.pads is not None
    longest, keys = state.sizes["P"], state.sizes["S"]
    wholes: list[torch.Tensor] | None = None
    for row, pad in enumerate(state.pads):
        alone = tuple(
            arg if type_ is None else _row(arg, type_, row, pad)
            for arg, type_ in zip(given, given_types, strict=True)
        )
        sizes = {**state.sizes, "B": 1, "P": longest - pad if longest > 1 else 1, "S": keys - pad}
        parts = _called(op, state, alone, sizes)
        if wholes is None:
            # Nobody reads what stands at padding.
            wholes = [
                part.new_zeros(type_.sizes(state.sizes)) for part, type_ in zip(parts, op.types, strict=True)
            ]
        for whole, part, type_ in zip(wholes, parts, op.types, strict=True):
            _row(whole, type_, row, pad).copy_(part)
    assert wholes is not None
    return tuple(wholes)


def _row(tensor: torch.Tensor, type_: TensorType, row: int, pad: int) -> torch.Tensor:
    """A view of one row without its padding; the row axis stays."""
    if type_.batch_axis is not None:
        tensor = tensor.narrow(type_.batch_axis, row, 1)
    for axis in type_.padded_axes:
        if tensor.shape[axis] > 1:
            tensor = tensor.narrow(axis, pad, tensor.shape[axis] - pad)
    return tensor


def _counted(results: int) -> str:
    return "1 result" if results == 1 else f"{results} results"


def plain_number(value: Scalar) -> Any:
    """A number as torch takes it."""
    return value.number if isinstance(value, Special) else value


def plain_item(item: IndexItem) -> Any:
    """An entry of an index that is no value, as Python writes it."""
    if isinstance(item, PromptRow | PromptTokens):
        item = as_slice(item)
    return slice(item.start, item.stop, item.step) if isinstance(item, Slice) else item


def rows_axis(item: IndexItem, base: TensorType) -> int | None:
    """The axis of the rows in which tokens are selected; ``None`` for those of one prompt alone."""
    return None if isinstance(item, OwnTokens) else base.batch_axis


def selector_place(index: tuple[IndexItem, ...]) -> int | None:
    """The axis that a token selector stands at, if there is one; it stands alone, as ``.tok[...]`` makes it."""
    place = next(
        (place for place, item in enumerate(index) if isinstance(item, TokenSelector | OwnTokens)), None
    )
    if place is not None and index != (*([WHOLE] * place), index[place]):
        raise VerificationError(
            "a token selector cannot be mixed with other indices", instead="index in two steps"
        )
    return place
