"""A norm with its scale frozen: the linear map that it is at one place of one forward pass.

``norm(x) = scale(x) * gain * (x - centring * mean(x)) + bias``: RMSNorm (``centring`` 0), in whichever way a family
keeps its gain, and LayerNorm (``centring`` 1). With ``scale`` held at what it was, this is linear in x up to the bias,
so that each part of a sum x has its part of the result (Elhage et al. 2021, "A Mathematical Framework for Transformer
Circuits").

What a weight means differs between families: Gemma multiplies by ``1 + weight``. So the norm's own code is asked, with
weights of zeros and of ones, and with numbers of which a norm that centres leaves nothing. What was learned that way is
then held to the run itself: :meth:`FrozenNorm.scale` also says how far the map is from what the norm really returned,
so that a norm of another kind cannot go unseen.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tracelens.errors import DecompositionError
from tracelens.language import where

if TYPE_CHECKING:
    from tracelens.model import Model


@dataclass(frozen=True, slots=True)
class FrozenNorm:
    """The linear part of a norm, up to its scale: values ``gain`` [D] and ``bias`` [D] (or None), and ``centring``."""

    gain: Any
    bias: Any | None
    centring: float

    @classmethod
    def of(cls, model: Model, path: str, work: torch.dtype) -> FrozenNorm:
        """The norm of that path, in an open block of the model; ``work``: the dtype to compute in."""
        own, slope, centring = asked(model.hf.get_submodule(path), model.anatomy.widths["D"])
        names = dict(model.hf.get_submodule(path).named_parameters())
        gain: Any = torch.full((model.anatomy.widths["D"],), own, dtype=work)
        if "weight" in names:
            gain = own + slope * model.param(f"{path}.weight").to(work)
        return cls(gain, model.param(f"{path}.bias").to(work) if "bias" in names else None, centring)

    def pulled_back(self, direction: Any) -> Any:
        """For a direction [.., D] behind the norm the one in front of it, up to the scale."""
        return self._centred(self.gain * direction)

    def scale(self, received: Any, returned: Any) -> tuple[Any, Any]:
        """The scale in this run, [..], and how far the map is from what the norm returned, relative to that: [..].

        By least squares, because any single number of a row may be near zero.
        """
        moved = returned if self.bias is None else returned - self.bias
        unscaled = self.gain * self._centred(received)
        squares = (unscaled * unscaled).sum(-1)
        length = moved.norm(dim=-1)
        # Nothing received and nothing returned: any scale is right.
        scale = (moved * unscaled).sum(-1) / where(squares > 0, squares, 1.0)
        misfit = (moved - scale[..., None] * unscaled).norm(dim=-1) / where(length > 0, length, 1.0)
        return scale, misfit

    def _centred(self, value: Any) -> Any:
        return value - self.centring * value.mean(-1, keepdim=True) if self.centring else value


def asked(norm: nn.Module, width: int) -> tuple[float, float, float]:
    """What the code of a norm does, up to a factor: its gain is ``own + slope * weight``; and does it centre (1 or 0)?

    Raises :class:`DecompositionError` for norms with parameters of other names.
    """
    names = {name for name, _ in norm.named_parameters()}
    if not names <= {"weight", "bias"}:
        raise DecompositionError(
            f"a norm with the parameters {', '.join(sorted(names))} is of no known kind (weight, bias), so it is "
            "not known what its scale is",
            instead="tl.grad(logit, site), whose products with the site are a first-order estimate",
        )

    def answer(question: Tensor, weight: float) -> Tensor:
        # Its code alone: without its numbers, which ranks or other devices have, and without hooks.
        bare = copy.copy(norm)
        values = {"weight": weight, "bias": 0.0}
        held = {name: nn.Parameter(torch.full((width,), values[name]), requires_grad=False) for name in names}
        bare.__dict__["_parameters"] = held
        return type(norm).forward(bare, question)

    signs = balanced_signs(width)
    own, at_one = ((answer(signs, weight) / signs).mean().item() for weight in (0.0, 1.0))
    # Ones are all mean.
    left = (answer(torch.ones(width), 1.0).mean() / at_one).item()
    return own, at_one - own, float(round(1 - left))


def balanced_signs(width: int) -> Tensor:
    """Ones and minus ones that sum to zero; of an odd number the last three are 1, 1 and -2."""
    signs = torch.ones(width)
    signs[1::2] = -1
    if width % 2:
        signs[-3:] = torch.tensor([1.0, 1.0, -2.0])
    return signs
