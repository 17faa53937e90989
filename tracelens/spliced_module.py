"""The module of a splice: what its ``encode`` and ``decode`` make of values."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tracelens.errors import InPlaceError, SpliceError, UnsupportedFunctionError, ValueAttributeError
from tracelens.language import apply
from tracelens.recorder import Recorder
from tracelens.values import Value

_NOT_RECORDED = (InPlaceError, UnsupportedFunctionError, ValueAttributeError)
"""What code meets that changes tensors of its own in place, as top-k SAEs do, or asks for what no value has."""


class _Function(nn.Module):
    """A function of a module as a module of its own, so that its weights can be given with each call."""

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__()
        self.module = module
        self._name = name

    def forward(self, value: Tensor) -> Tensor:
        return cast("Callable[[Tensor], Tensor]", getattr(self.module, self._name))(value)


class Coder:
    """Encodes and decodes values: written down where the module's code can be, else run on the real tensors."""

    def __init__(self, module: Any, recorder: Recorder) -> None:
        self.module = module
        self._recorder = recorder
        self._source: Value | None = None
        self._kept: dict[str, Value] = {}

    def encode(self, value: Value) -> Value:
        """The features of a value, which goes in in the module's dtype where that is the wider one."""
        self._source = value = self._widened(value)
        try:
            found = self._one_value("encode", self.module.encode(value))
        except _NOT_RECORDED:
            width, dtype = self._features(value)
            like = value.flatten(2)[..., :1].expand(*value.shape[:2], width).to(dtype)
            return self._called("encode", value, like=like)
        # Modules that norm their input keep its scale here, and take it away once they have decoded.
        self._kept = {name: each for name, each in vars(self.module).items() if isinstance(each, Value)}
        self._let_go()
        return found

    def decode(self, features: Value) -> Value:
        """What the module makes of features, as often as one likes."""
        vars(self.module).update(self._kept)
        try:
            # Without the features' class: what a module does with them in place is none of ours.
            value = Value(self._recorder, features._id)
            try:
                return self._one_value("decode", self.module.decode(value))
            except _NOT_RECORDED:
                return self._called("decode", value, like=self._source)
        finally:
            self._let_go()

    def _let_go(self) -> None:
        """Leaves nothing of the block on the module."""
        for name in self._kept:
            vars(self.module).pop(name, None)

    @property
    def _parameters(self) -> Iterable[nn.Parameter]:
        """A module may be none of torch's, and keep tensors of which nothing is known."""
        return self.module.parameters() if isinstance(self.module, nn.Module) else ()

    def _widened(self, value: Value) -> Value:
        wide = next((each.dtype for each in self._parameters if each.is_floating_point()), value.dtype)
        widens = wide != value.dtype and torch.promote_types(wide, value.dtype) == wide
        return value.to(wide) if widens else value

    def _features(self, value: Value) -> tuple[int, torch.dtype]:
        """How wide the features are, and of which dtype: the module tells it of one row of zeros."""
        sizes = [size for size in value.shape[2:] if isinstance(size, int)]
        home = next((each.device for each in self._parameters), None)
        with torch.no_grad():
            row: Tensor = cast("Any", self.module).encode(
                torch.zeros(1, 1, *sizes, dtype=value.dtype, device=home)
            )
        return row.shape[-1], row.dtype

    def _called(self, name: str, value: Value, *, like: Value | None) -> Value:
        """What a function of the module gives for the real tensors, with its weights where the value is."""
        if not isinstance(self.module, nn.Module):
            return apply(getattr(self.module, name), value, like=like)
        function = _Function(self.module, name)
        tensors = {**dict(function.named_parameters()), **dict(function.named_buffers())}

        def run(given: Tensor, *weights: Tensor) -> Tensor:
            return functional_call(function, dict(zip(tensors, weights, strict=True)), (given,))

        return apply(run, value, *(tensor.detach() for tensor in tensors.values()), like=like)

    def _one_value(self, what: str, given: Any) -> Value:
        if not isinstance(given, Value) or given._recorder is not self._recorder:
            raise SpliceError(
                f"the module's {what} gave a {type(given).__name__}, where one value belongs",
                instead=f"a module whose {what}(x) returns one tensor made of x",
            )
        return given
