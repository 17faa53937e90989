"""Standing in for a module: its forward is another one for the time of a run, and the module's own is not called."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from tracelens.backends.hooks import Seat
from tracelens.backends.module_hooks import Counted
from tracelens.backends.survey import Hole, ModuleCall, Opaque
from tracelens.errors import SiteMismatchError
from tracelens.ir.infer import torch_dtype
from tracelens.ir.layout import OwnType
from tracelens.ir.module_sites import Key
from tracelens.ir.types import TensorType

if TYPE_CHECKING:
    from tracelens.backends.local import Run
    from tracelens.backends.replacing import Replacement
    from tracelens.backends.side_hooks import HookCode


class StandIn:
    """What stands in for one or more calls of a module, each with the steps that make its output.

    ``calls``: by number, the steps, what they make, and the type of what this rank has of it. ``device``: where the
    module would have computed.
    """

    __slots__ = ("calls", "counted", "device", "fired", "module", "path", "seat")

    def __init__(self, module: nn.Module, path: str, seat: Seat, device: torch.device) -> None:
        self.module = module
        self.device = device
        self.path = path
        self.seat = seat
        self.calls: dict[int, tuple[HookCode, Replacement, TensorType | OwnType]] = {}
        self.fired: dict[int, int] = {}
        self.counted = Counted(seat)

    def register(self) -> None:
        """Takes the place of the module's forward."""
        self.seat.stand_in(self.module, self._standing_in)

    def missed(self, run: Run) -> str | None:
        """What a pass that has ended should have come by, and did not."""
        missing = [number for number in self.calls if self.fired.get(number) != run.forward_number]
        return f"call {missing[0]} of module {self.path!r}" if missing else None

    def _standing_in(self, own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            run, number = self.counted.called()
            if run is None or number not in self.calls:
                return own(*args, **kwargs)
            code, new, own_type = self.calls[number]
            self.fired[number] = run.forward_number
            # What a write makes of a value depends on the site's dtype, shape and device alone.
            sizes, dtype = own_type.sizes(run.state.sizes), torch_dtype(own_type.dtype)
            site = torch.empty(sizes, dtype=dtype, device=self.device)
            found = code.steps(run.state, site)
            if found is site:  # a rank on which a step went wrong goes on, with something
                found = torch.zeros_like(site)
            if new.lent:  # the model goes on to change it in place
                found = found.clone()
            return filled(new.returns, new.key, found)

        return forward


def filled(returns: Any, key: Key, tensor: torch.Tensor) -> Any:
    """What the module would have returned, with ``tensor`` at its place and nothing in the place of other tensors."""
    if isinstance(returns, Hole):
        return tensor if returns.key == key else None
    if isinstance(returns, dict):
        return {name: filled(part, key, tensor) for name, part in cast("dict[Any, Any]", returns).items()}
    if isinstance(returns, list | tuple):
        parts = [filled(part, key, tensor) for part in cast("list[Any]", returns)]
        return tuple(parts) if isinstance(returns, tuple) else parts
    return returns


def unfillable(call: ModuleCall, key: Key, *, alone: bool) -> str | None:
    """Why what a call returns cannot be made from one tensor; ``alone``: the others that it returns are not needed."""
    if not alone and len(call.outputs) > 1:
        return f"it returns {len(call.outputs)} tensors"
    kinds = sorted(_opaque(call.returns))
    return f"it returns a {kinds[0]}" if kinds else None


def _opaque(returns: Any) -> set[str]:
    if isinstance(returns, Opaque):
        return {returns.kind}
    if isinstance(returns, dict):
        return set[str]().union(*map(_opaque, cast("dict[Any, Any]", returns).values()))
    if isinstance(returns, list | tuple):
        return set[str]().union(*map(_opaque, cast("list[Any]", returns)))
    return set()


def missed(what: str) -> SiteMismatchError:
    """The error for a pass that did not do what was learned of it."""
    return SiteMismatchError(
        f"the forward pass ended without reaching {what}, although it did when it was learned which modules are called"
    )
