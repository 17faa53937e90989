"""Logit lenses of a generation as one writes them by hand, from the reference loop to the best that we know.

All of them give the same: the five likeliest tokens of every layer's stream, with true log-probabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.peers.laps import Tick
from benchmarks.peers.subject import Results
from benchmarks.peers.text import WRITTEN, Text, processors

TOP = 5
ROWS = 32
"""So many states go through the head together where they are read afterwards."""
COMPONENTS = ("attn_out", "resid_mid", "mlp_out", "resid_post")
"""What the reference loop reads in every block."""


def build(text: Text) -> dict[str, WRITTEN]:
    """A function for each way, each on a model of its own."""
    return {"last-only": last_only(text), "per-step": per_step(text), "afterwards": afterwards(text)}


class Reading:
    """The model's last norm and head, applied to states."""

    def __init__(self, text: Text) -> None:
        self.norm, self.head = text.model.model.norm, text.model.lm_head

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(states))

    def top(
        self, states: torch.Tensor, *, rows: int = ROWS, normed: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and ids [..., 5] of states [..., D], so many ``rows`` at a time."""
        flat = states.reshape(-1, states.shape[-1])
        values: list[torch.Tensor] = []
        ids: list[torch.Tensor] = []
        for some in flat.split(rows):
            logits = self.head(some) if normed else self.logits(some)
            best = logits.topk(TOP, -1)
            values.append(best.values - logits.logsumexp(-1, keepdim=True))
            ids.append(best.indices)
            del logits  # before the next are made
        shape = (*states.shape[:-1], TOP)
        return torch.cat(values).reshape(shape), torch.cat(ids).reshape(shape)


def answer(tokens: torch.Tensor, values: torch.Tensor, ids: torch.Tensor) -> Results:
    """What is compared: [L, T, 5] log-probabilities, and [L, T] the likeliest tokens."""
    return {"tokens": tokens, "top_log_probs": values, "top_1": ids[..., 0].contiguous()}


def generated(text: Text, new: int, tick: Tick, **more: Any) -> Any:
    """transformers' own generation, with a cache."""
    with torch.no_grad():
        return text.model.generate(
            text.ids,
            attention_mask=torch.ones_like(text.ids),
            logits_processor=processors(tick),
            **text.options(new),
            **more,
        )


def per_step(text: Text) -> WRITTEN:
    """B2: with a cache; in each step the states of all layers go through the head at once."""
    text = text.separate()
    reading = Reading(text)

    def write(new: int, tick: Tick) -> Results:
        found: list[tuple[torch.Tensor, torch.Tensor]] = []
        states: list[torch.Tensor] = []

        def hook(module: Any, args: Any, output: torch.Tensor) -> None:
            states.append(output[0])
            if len(states) == text.n_layers:
                found.append(reading.top(torch.stack(states), rows=text.n_layers * text.ids.shape[1]))
                states.clear()

        with hooked([block.register_forward_hook(hook) for block in text.blocks]):
            tokens = generated(text, new, tick)
        values, ids = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
        return answer(tokens[:, text.ids.shape[1] :], values, ids)

    return write


def afterwards(text: Text, *, rows: int = ROWS) -> WRITTEN:
    """B3: with a cache; transformers keeps every state, and they go through the head when the text is there."""
    text = text.separate()
    reading = Reading(text)

    def write(new: int, tick: Tick) -> Results:
        made = generated(text, new, tick, output_hidden_states=True, return_dict_in_generate=True)
        found: list[tuple[torch.Tensor, torch.Tensor]] = []
        for layer in range(1, text.n_layers + 1):
            states = torch.cat([step[layer][0] for step in made.hidden_states])
            # transformers gives the last layer's with the norm applied.
            with torch.no_grad():
                found.append(reading.top(states, rows=rows, normed=layer == text.n_layers))
        values, ids = (torch.stack(parts) for parts in zip(*found, strict=True))
        return answer(made.sequences[:, text.ids.shape[1] :], values, ids)

    return write


# --- without a cache -------------------------------------------------------------------------------------------------


def reference(text: Text) -> WRITTEN:
    """B0: for each token two passes over all of the text, in each of which all logits of every block are made and kept.

    As the loop is described that is very probably the published baseline: four components of every block at all
    positions go through norm and head, and the MLP is run once more to have its output.
    """
    return uncached(text, passes=2, every=True)


def last_only(text: Text) -> WRITTEN:
    """B1: one pass for each token, and of every block the last position only."""
    return uncached(text, passes=1, every=False)


def uncached(text: Text, *, passes: int, every: bool) -> WRITTEN:
    text = text.separate()
    reading = Reading(text)

    def write(new: int, tick: Tick) -> Results:
        ids = text.ids
        found: list[tuple[torch.Tensor, torch.Tensor]] = []
        kept: dict[tuple[str, int], torch.Tensor] = {}

        def keep(name: str, layer: int, state: torch.Tensor) -> None:
            kept[name, layer] = reading.logits(state if every else state[:, -1:])

        handles = [
            handle
            for layer in range(text.n_layers)
            for handle in in_block(text.blocks[layer], layer, keep, every)
        ]
        with hooked(handles), torch.no_grad():
            for _ in range(new):
                for _ in range(passes):
                    logits = text.model(input_ids=ids, use_cache=False).logits
                last = torch.stack([kept["resid_post", layer][0, -1:] for layer in range(text.n_layers)])
                best = last.topk(TOP, -1)
                found.append((best.values - last.logsumexp(-1, keepdim=True), best.indices))
                ids = torch.cat([ids, logits[:, -1].argmax(-1)[:, None]], 1)
                tick()
        values, ids_ = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
        return answer(ids[:, text.ids.shape[1] :], values, ids_)

    return write


def in_block(
    block: Any, layer: int, keep: Callable[[str, int, torch.Tensor], None], again: bool
) -> Iterator[Any]:
    """Hooks that keep the four components of a block; ``again``: the MLP is run once more for its own."""

    def after_attention(module: Any, args: Any, output: Any) -> None:
        keep("attn_out", layer, output[0])

    def before_mlp_norm(module: Any, args: Any) -> None:
        keep("resid_mid", layer, args[0])

    def after_mlp(module: Any, args: Any, output: torch.Tensor) -> None:
        # Its class' forward: through the module it would come here again.
        keep("mlp_out", layer, type(module).forward(module, *args) if again else output)

    def after_block(module: Any, args: Any, output: torch.Tensor) -> None:
        keep("resid_post", layer, output)

    yield block.self_attn.register_forward_hook(after_attention)
    yield block.post_attention_layernorm.register_forward_pre_hook(before_mlp_norm)
    yield block.mlp.register_forward_hook(after_mlp)
    yield block.register_forward_hook(after_block)


@contextmanager
def hooked(handles: list[Any]) -> Iterator[None]:
    """Takes the hooks off in the end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# --- what no lens can do without -------------------------------------------------------------------------------------


def product(text: Text, together: int = 1) -> WRITTEN:
    """Nothing but the product of one state of every layer with the unembedding, for so many steps at once."""
    weight = text.model.lm_head.weight

    def write(new: int, tick: Tick) -> Results:
        generator = torch.Generator().manual_seed(0)
        states = torch.randn(together * text.n_layers, weight.shape[1], generator=generator).to(weight)
        chunks = weight.split(4096)
        with torch.no_grad():
            for step in range(new):
                if (step + 1) % together == 0:
                    for chunk in chunks:
                        torch.nn.functional.linear(states, chunk)
                tick()
        return {}

    return write
