"""Generation through the stages of a pipeline: every rank runs transformers' own loop, and its own part of each pass.

All ranks choose the next token, from the same bits: the last stage tells the others the logits that it is chosen from.
Each stage has a cache of its own. In it the layers of other stages hold no keys, but count positions as on their own
stage: transformers asks some of them (the first, the first with a sliding window) how long the text is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from threading import get_ident
from typing import TYPE_CHECKING, Any

import torch

from tracelens.backends.hooks import Seat
from tracelens.backends.pipeline import Pipeline
from tracelens.backends.transfer import moved
from tracelens.errors import PipelineError

if TYPE_CHECKING:
    from tracelens.backends.local import Run

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class StagedGeneration:
    """One rank's part of a generation, on the model from :meth:`begin` until its seat is cleared.

    ``newest``: were the logits of all positions computed for the program alone? Then only the last one's travel.
    ``draws``: are tokens drawn at random? Then all ranks draw from the same numbers, whatever a stage has drawn before.
    """

    def __init__(self, run: Run, pipeline: Pipeline, *, newest: bool, draws: bool) -> None:
        self._pipeline = pipeline
        self._thread = run.thread
        self._newest = newest
        self._draws = draws
        self._model: Any = run.model

    def begin(self, seat: Seat) -> None:
        """Takes the place of the model's forward, under the hooks that are on it."""
        seat.stand_in(self._model, self._standing_in)
        seat.after(self._model, self._share)

    # --- one pass ------------------------------------------------------------------------------------------------

    def _standing_in(self, piped: Callable[..., Any]) -> Callable[..., Any]:
        own: Callable[..., Any] = piped.__wrapped__  # pyright: ignore[reportFunctionMemberAccess]  # transformers' own

        # transformers looks up in the signature what a forward may be given.
        @wraps(piped)
        def forward(**given: Any) -> Any:
            return self._part(own, given) if get_ident() == self._thread else piped(**given)

        return forward

    def _part(self, own: Callable[..., Any], inputs: Mapping[str, Any]) -> Any:
        from transformers.modeling_outputs import CausalLMOutputWithPast

        ids: torch.Tensor = inputs["input_ids"]
        _require_counting(inputs.get("past_key_values"))
        given = self._pipeline.entering(inputs)
        if self._pipeline.is_last:
            found = own(**given)
        else:
            given.pop("logits_to_keep", None)
            base = self._pipeline.base(**given)
            self._pipeline.hand_on(base.last_hidden_state)
            found = CausalLMOutputWithPast(past_key_values=base.past_key_values)
        if found.past_key_values is not None:
            self._count(found.past_key_values, ids)
        return found

    def _count(self, cache: Any, ids: torch.Tensor) -> None:
        """Has the layers of other stages count the positions of this pass."""
        pipeline, dtype = self._pipeline, self._model.dtype
        for layer, stage in enumerate(pipeline.layers):
            if stage == pipeline.stage:
                continue
            known = cache.layers[layer] if layer < len(cache.layers) else None
            cache.update(
                *(_nothing(getattr(known, name, None), ids, dtype) for name in ("keys", "values")), layer
            )

    def _share(self, module: Any, args: tuple[Any, ...], output: Any) -> Any:
        """Gives all ranks what the next token is chosen by; nobody comes here in a pass in which a rank has failed."""
        if get_ident() != self._thread:
            return
        pipeline = self._pipeline
        pipeline.settle()
        device = module.device
        about = torch.zeros(4, dtype=torch.long, device=device)
        logits: Any = None
        if pipeline.speaks:
            logits = (output.logits[:, -1:] if self._newest else output.logits).contiguous()
            about = torch.tensor([*logits.shape, _DTYPES.index(logits.dtype)], device=device)
        *shape, dtype = pipeline.told(about).tolist()
        if logits is None:
            logits = torch.empty(shape, dtype=_DTYPES[dtype], device=device)
        output["logits"] = pipeline.told(logits)
        if self._draws:
            _set_drawn(pipeline.told(moved(_drawn(device), device)), device)


def _nothing(known: torch.Tensor | None, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Keys or values of no meaning for the positions of a pass, beside those that a layer already holds."""
    heads, width = (1, 1) if known is None or known.ndim != 4 else (known.shape[1], known.shape[3])
    return torch.zeros((ids.shape[0], heads, ids.shape[1], width), dtype=dtype, device=ids.device)


def _require_counting(cache: Any) -> None:
    """Refuses caches whose layers do not count positions by their keys, alike on all ranks."""
    for layer in () if cache is None else cache.layers:
        if not hasattr(layer, "keys") or not hasattr(layer, "get_mask_sizes"):
            raise PipelineError(
                f"the cache of this model has layers ({type(layer).__name__}) that do not count positions, so that "
                "the stages of a pipeline would not know how long the text is",
                instead="use_cache=False; or tensor parallelism alone: tl.load(name, tp=...)",
            )


def _drawn(device: torch.device) -> torch.Tensor:
    return torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state(device)


def _set_drawn(state: torch.Tensor, device: torch.device) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.cuda.set_rng_state(moved(state, torch.device("cpu")), device)
