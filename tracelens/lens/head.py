"""What a model does after its last layer (norm, unembedding, factor, soft-cap), as a function to train through."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from tracelens.errors import LensTrainingError

if TYPE_CHECKING:
    from tracelens.model import Model


class Head:
    """The end of a model: from a state of the residual stream [n, D] to logits [n, V], and how they change with it.

    Its weights are read through a trace, whole, from wherever the model has them, and computed with in the model's
    dtype, as the model does. The logits' derivative is written out, so that training through it keeps no more than one
    [n, V] beside the logits themselves.
    """

    def __init__(self, model: Model, device: torch.device | None = None) -> None:
        head = model.anatomy.head
        norm = cast(nn.Module, model.hf.get_submodule(head.norm))
        names = [name for name, _ in norm.named_parameters()]
        kept = "keep" if model.ranks is None else "cpu"
        with model.trace([[0]]) as t:
            for name in names:
                model.param(f"{head.norm}.{name}").save(f"norm {name}", device=kept)
            model.unembed.save("unembedding", device=kept)
            if head.bias is not None:
                model.param(head.bias).save("bias", device=kept)
        self.unembedding: Tensor = t["unembedding"]
        self.device = self.unembedding.device if device is None else device
        self.unembedding = on(self.unembedding, self.device)
        self.bias: Tensor | None = None if head.bias is None else on(t["bias"], self.device)
        self._norm = bare(norm, {name: on(t[f"norm {name}"], self.device) for name in names})
        self.scale = head.scale
        self.cap = head.softcap

    def norm(self, state: Tensor) -> Tensor:
        """The model's last norm, [n, D] to [n, D]; autograd goes through it."""
        return type(self._norm).forward(self._norm, state)

    @torch.no_grad()
    def logits(self, normed: Tensor) -> Tensor:
        """Logits [n, V] in float32 of what the last norm returns."""
        found = nn.functional.linear(normed, self.unembedding, self.bias)
        if self.scale is not None:
            found *= self.scale
        if self.cap is not None:
            found = torch.tanh_(found / self.cap) * self.cap
        return found.float()

    @torch.no_grad()
    def pulled_back(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """A gradient with respect to :meth:`logits`, [n, V], as one with respect to its argument, [n, D].

        It computes in ``gradient``, whose numbers are lost.
        """
        if self.cap is not None:
            gradient *= 1 - (logits / self.cap) ** 2
        if self.scale is not None:
            gradient *= self.scale
        return gradient.to(self.unembedding.dtype) @ self.unembedding

    def require_models_own(self, state: Tensor, logits: Tensor) -> None:
        """Raises :class:`LensTrainingError` unless the model makes these logits [n, V] of that last state [n, D]."""
        wanted = on(logits, self.device).float()
        with torch.no_grad():
            found = self.logits(self.norm(on(state, self.device)))
        error = ((found - wanted).abs().max() / wanted.abs().max()).item()
        if not error <= 1e-4 + 8 * torch.finfo(logits.dtype).eps:
            raise LensTrainingError(
                "the model makes something else of its last layer than its norm, its unembedding, a factor and a "
                f"soft-cap: its logits are off by {error:.2g} of the largest, so a lens would be trained for another "
                "model",
                instead="a model whose head is one of these; or tell us of this one",
            )


def bare(module: nn.Module, parameters: dict[str, Tensor]) -> nn.Module:
    """A module that computes as ``module`` does, with these parameters: without hooks, and whatever device it is on.

    Offloaded or shared modules have wrapped forwards and no numbers of their own; what their class computes is the
    same.
    """
    found = cast(Any, object.__new__(type(module)))
    nn.Module.__init__(found)
    own = {
        name: value
        for name, value in vars(module).items()
        if name not in _WRAPPING and not name.startswith("_")
    }
    found.__dict__.update(own)
    for name, value in parameters.items():
        found._parameters[name] = nn.Parameter(value, requires_grad=False)
    found._buffers.update(module._buffers)
    return found


_WRAPPING = ("forward", "training")


def on(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; the same one where it is there already."""
    from tracelens.backends.transfer import moved

    return tensor if tensor.device == device else moved(tensor, device)
