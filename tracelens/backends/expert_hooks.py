"""The hooks at modules of experts: what each expert made of a token, computed beside the module.

The module's own function computes as it does without us, whichever implementation it is, and what it returns goes on.
Only where what an expert made was written (or differentiated) does a sum of ours take its place; tokens at which
nothing was changed keep the model's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from threading import get_ident
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tracelens.backends.execute import State, read_parameter
from tracelens.backends.experts import Routes, Weight, neurons, returned, summed
from tracelens.backends.hooks import Seat
from tracelens.backends.transfer import moved
from tracelens.errors import SiteMismatchError

if TYPE_CHECKING:
    from tracelens.backends.local import Run
    from tracelens.backends.side_hooks import HookCode


class ExpertsHook:
    """One hook of a program among experts; ``beside``: the computation, which one hook of each module holds."""

    __slots__ = ("beside", "code", "fired", "seat")

    def __init__(self, code: HookCode, seat: Seat) -> None:
        self.code = code
        self.seat = seat
        self.beside: Beside | None = None
        self.fired = 0

    def register(self) -> None:
        """Looks at what the module returns, if this is the hook that does it for all."""
        if self.beside is not None:
            self.seat.after(self.code.module, self.beside)

    def __call__(self, tensor: Tensor) -> Tensor:
        run: Run = self.seat.run
        if self.fired == run.forward_number:
            error = SiteMismatchError(
                f"module {self.code.path!r} was called twice in one forward pass, so its sites are not unique"
            )
            return self.code.failed(run.state, tensor, error, again=True)
        self.fired = run.forward_number
        return self.code.steps(run.state, tensor)


class Beside:
    """What the experts of one module make, one by one, with the steps of the sites there."""

    __slots__ = ("_checked", "_code", "_seat", "_steps", "_writes")

    def __init__(self, hooks: Mapping[str, ExpertsHook], seat: Seat) -> None:
        self._steps = hooks
        self._seat = seat
        self._code = next(iter(hooks.values())).code
        self._writes = any(hook.code.writes for hook in hooks.values())
        self._checked = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        run: Run = self._seat.run
        if run is None or get_ident() != run.thread:
            return None
        device = self._code.device
        rows, index, weights = (
            given if device is None or given.device == device else moved(given, device) for given in args[:3]
        )
        weight = self._weight(run.state)
        routes = Routes.of(index, module.num_experts)  # pyright: ignore[reportArgumentType]  # a number, and modules have anything
        act = neurons(module, weight, rows, routes)
        plain = (
            returned(module, weight, act, routes)
            if self._writes or "expert_out" in self._steps or not self._checked
            else None
        )
        if plain is not None and not self._checked:
            self._require_same(run.state, summed(plain, weights), output)
        act, written = self._step("expert_act", act)
        if plain is None:
            return None
        out = plain if written is None else returned(module, weight, act, routes)
        out, changed = self._step("expert_out", out)
        if not self._writes:
            return None
        found = summed(out, weights)
        if torch.is_grad_enabled():
            return found
        if written is None and changed is None:
            return None
        # Tokens that nothing was done to are the model's own, to the last bit.
        touched = (out != plain).flatten(1).any(1)
        if written is not None:
            touched |= written
        return torch.where(touched[:, None], found, output)

    def _step(self, site: str, tensor: Tensor) -> tuple[Tensor, Tensor | None]:
        """A site's tensor after its steps, and which tokens they changed, if they wrote."""
        hook = self._steps.get(site)
        if hook is None:
            return tensor, None
        found = hook(tensor)
        if not hook.code.writes:
            return tensor, None
        return found, (found != tensor).flatten(1).any(1)

    def _weight(self, state: State) -> Weight:
        return lambda name: read_parameter(state, f"{self._code.path}.{name}")

    def _require_same(self, state: State, ours: Tensor, output: Tensor) -> None:
        """Holds what is computed here to what the module returned, once for each program."""
        output = output if output.device == ours.device else moved(output, ours.device)
        gap, size = (ours - output).abs().max(), output.abs().max()
        if gap <= max(_SAME, 8 * torch.finfo(ours.dtype).eps) * size or not size.isfinite():
            self._checked = True
            return
        error = SiteMismatchError(
            f"module {self._code.path!r} returns something else than the weighted sum of what its experts make, so "
            "that what each of them makes is not known",
            instead="mlp_out, which is what they make together; or expert_weights",
        )
        self._code.failed(state, output, error)


_SAME = 1e-3
"""So much of the largest number may be rounding."""


def join_experts(hooks: Sequence[ExpertsHook], seat: Seat) -> None:
    """Makes one computation for each module of the hooks of a program."""
    modules: dict[nn.Module, dict[str, ExpertsHook]] = {}
    for hook in hooks:
        modules.setdefault(hook.code.module, {})[hook.code.site.name] = hook
    for of_module in modules.values():
        next(iter(of_module.values())).beside = Beside(of_module, seat)
