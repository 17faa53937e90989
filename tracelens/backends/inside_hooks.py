"""The hooks inside attention: steps of the attention function, for the tensors in it that a program names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from tracelens.backends.attention import Session, Visit
from tracelens.backends.hooks import Seat
from tracelens.backends.self_attending import SelfAttending
from tracelens.errors import SiteMismatchError, TracelensError

if TYPE_CHECKING:
    from tracelens.backends.anatomy import ModelAnatomy
    from tracelens.backends.local import Run
    from tracelens.backends.side_hooks import HookCode


class InsideHook:
    """One hook of a program inside attention: called by the attention function, gives the tensor to go on with.

    ``session``: what has to be switched for all of them; one of them holds it.
    """

    __slots__ = ("code", "fired", "seat", "session")

    def __init__(self, code: HookCode, seat: Seat) -> None:
        self.code = code
        self.seat = seat
        self.session: Session | SelfAttending | None = None
        self.fired = 0

    def register(self) -> None:
        """Switches the model's attention function, if this is the hook that does it for all."""
        if self.session is None:
            return
        self.seat.hold(self.session)
        try:
            self.session.start()
        except TracelensError as error:
            raise self.code.blamed(error) from None

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        run: Run = self.seat.run
        if self.fired == run.forward_number:
            error = SiteMismatchError(
                f"module {self.code.path!r} computed attention twice in one forward pass, so its sites are not unique"
            )
            return self.code.failed(run.state, tensor, error, again=True)
        self.fired = run.forward_number
        return self.code.steps(run.state, tensor)


def join(hooks: Sequence[InsideHook], seat: Seat, replaced: frozenset[int], anatomy: ModelAnatomy) -> None:
    """Makes one session of the hooks of a program; ``replaced`` are the layers whose pattern is ours."""

    def real(device: torch.device) -> torch.Tensor | None:
        run: Run = seat.run
        return None if run.real is None else run.real.on(device)

    steps: dict[nn.Module, dict[str, InsideHook]] = {}
    layers: dict[nn.Module, int | None] = {}
    for hook in hooks:
        code = hook.code
        steps.setdefault(code.module, {})[code.site.name] = hook
        layers[code.module] = code.site.layer
    wide = anatomy.family.wide_softmax
    visits = {module: Visit(found, layers[module] in replaced, wide, real) for module, found in steps.items()}
    by_itself = anatomy.family.attends_itself
    hooks[0].session = (
        SelfAttending(seat, visits) if by_itself else Session(anatomy.attention_configs, visits)
    )
