"""The inside of attention in modules that compute it themselves, and look it up in no table of transformers'.

While such a module runs, two functions of torch go through us: the softmax, whose argument are the scores and whose
result is the pattern, and the fused attention, which has neither and is asked to do its work as any implementation is
(:mod:`tracelens.backends.attention`). The module's own code computes all the rest.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from functools import lru_cache
from types import CodeType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from tracelens.errors import AttentionImplementationError

if TYPE_CHECKING:
    from tracelens.backends.attention import Visit
    from tracelens.backends.hooks import Seat

KNOWN = ("sdpa", "eager")
"""The implementations whose functions are those two."""

_FUSED = functional.scaled_dot_product_attention
_SOFTMAX = (functional.softmax, torch.softmax, torch.Tensor.softmax)


class SelfAttending:
    """The inside of attention for one run, like :class:`~tracelens.backends.attention.Session`."""

    def __init__(self, seat: Seat, visits: Mapping[nn.Module, Visit]) -> None:
        self._seat = seat
        self._visits = visits

    def start(self) -> None:
        """Has each module run under our eyes until the seat is cleared; refuses implementations that are not known."""
        for module in self._visits:
            # Bloom's modules have no choice, and no configuration to look it up in.
            name = getattr(getattr(module, "config", None), "_attn_implementation", "eager")
            if name not in KNOWN:
                raise AttentionImplementationError(
                    f"this model computes attention by {name!r}, and scores and pattern can be reached with "
                    f"{', '.join(map(repr, KNOWN))} only",
                    instead='model.hf.set_attn_implementation("sdpa"), or the sites q, k, v and z',
                )
        for module, visit in self._visits.items():
            self._seat.stand_in(module, _watched(module, visit))

    def remove(self) -> None:
        """Nothing: the seat takes back what stands in."""


def _watched(module: nn.Module, visit: Visit) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def standing_in(own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            states = args[0] if args else kwargs["hidden_states"]
            with _Watch(module, visit, states.dtype):
                return own(*args, **kwargs)

        return forward

    return standing_in


class _Watch(TorchFunctionMode):
    """Sees what one module calls while it runs; ``dtype``: that of the model, in which a site is seen."""

    def __init__(self, module: nn.Module, visit: Visit, dtype: torch.dtype) -> None:
        super().__init__()
        self._module = module
        self._visit = visit
        self._dtype = dtype

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        # A hook of a module in this one may compute these too, and that is none of our business.
        if func is _FUSED and self._asks():
            return self._fused(*args, **given)
        if func in _SOFTMAX and self._asks():
            return self._softmax(func, *args, **given)
        return func(*args, **given)

    def _asks(self) -> bool:
        """Does the module itself ask, and not something that it calls?"""
        frame = sys._getframe(2)
        while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "torch":
            frame = frame.f_back
        return (
            frame is not None
            and frame.f_code is _code(type(self._module))
            and frame.f_locals.get("self") is self._module
        )

    def _softmax(self, func: Any, scores: torch.Tensor, *args: Any, **given: Any) -> torch.Tensor:
        visit = self._visit
        if "scores" in visit.steps:
            scores = self._seen("scores", scores)
        weights = func(scores, *args, **given)
        return self._seen("pattern", weights) if "pattern" in visit.steps else weights

    def _seen(self, site: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor after the step of its site, which sees it in the model's dtype; the same one if nothing changed."""
        seen = tensor.to(self._dtype)
        found = self._visit.written(site, seen)
        return tensor if found is seen else found.to(tensor.dtype)

    def _fused(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **given: Any,
    ) -> torch.Tensor:
        def own(
            _module: nn.Module,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            mask: Any,
            **_options: Any,
        ) -> tuple[torch.Tensor, None]:
            found = _FUSED(query, key, value, mask, dropout_p, is_causal, **given)
            return found.transpose(1, 2), None

        options = {"is_causal": is_causal, "dropout": dropout_p, "scaling": given.get("scale")}
        found, _ = self._visit.attend(own, "sdpa", self._module, query, key, value, attn_mask, options)
        return found.transpose(1, 2)


@lru_cache(maxsize=256)
def _code(kind: type[nn.Module]) -> CodeType:
    """The code of a module's own forward."""
    return inspect.unwrap(kind.forward).__code__
