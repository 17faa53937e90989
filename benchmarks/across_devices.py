"""Typical analyses of a model that is spread over devices, as each contestant writes them.

Each answer puts its results on the CPU. ``v`` is on the CPU too, where a steering vector comes from a file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import tracelens as tl

CASES = {
    "one": "one layer's stream",
    "norms": "a norm in every layer",
    "patch": "an early layer's last position into a late layer",
    "lens last": "lens: top 5 of every layer, last position",
    "lens all": "lens: top 5 of every layer, all positions",
    "steer": "a vector added in every layer",
}
TOP = 5

Answer = Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Spread:
    """A dispatched model of the Llama family and what the cases need of it."""

    hf: Any
    ids: Tensor
    v: Tensor

    @property
    def n_layers(self) -> int:
        """How many layers."""
        return len(self.hf.model.layers)

    @property
    def early(self) -> int:
        """A layer on the first device."""
        return self.n_layers // 6

    @property
    def late(self) -> int:
        """A layer on the last device."""
        return self.n_layers - 1 - self.n_layers // 6


def bare(spread: Spread) -> Answer:
    """The model alone, on tokens that are on its device; it returns its logits there."""
    ids = spread.ids.to(spread.hf.device)

    def answer() -> list[Tensor]:
        with torch.no_grad():
            return [spread.hf(ids, use_cache=False).logits]

    return answer


# --- hooks -----------------------------------------------------------------------------------------------------------


def hooks(spread: Spread) -> dict[str, Answer]:
    """Torch hooks with ``.to`` and ``.cpu()`` where one finds that they are needed."""
    hf, blocks = spread.hf, spread.hf.model.layers
    found: list[Tensor] = []

    def running(on: dict[int, Callable[[Tensor], Tensor | None]], logits: bool) -> Answer:
        def hook(make: Callable[[Tensor], Tensor | None]) -> Callable[..., Any]:
            return lambda _module, _args, output: make(output)

        def answer() -> list[Tensor]:
            found.clear()
            handles = [blocks[layer].register_forward_hook(hook(make)) for layer, make in on.items()]
            try:
                with torch.no_grad():
                    out = hf(spread.ids.to(hf.device), use_cache=False).logits
                    return [*found, *([out[:, -1].cpu()] if logits else [])]
            finally:
                for handle in handles:
                    handle.remove()

        return answer

    def keep(make: Callable[[Tensor], Tensor]) -> Callable[[Tensor], None]:
        return lambda h: found.append(make(h).cpu())

    early: list[Tensor] = []

    def patch(h: Tensor) -> Tensor:
        h = h.clone()
        h[:, -1:] += early.pop().to(h.device)
        return h

    def lens(h: Tensor) -> Tensor:
        return hf.lm_head(hf.model.norm(h)).topk(TOP).indices  # accelerate's hooks on both bring h there

    everywhere = range(spread.n_layers)
    return {
        "one": running({spread.late: keep(lambda h: h)}, False),
        "norms": running(dict.fromkeys(everywhere, keep(lambda h: h.norm(dim=-1))), False),
        "patch": running({spread.early: lambda h: early.append(h[:, -1:]), spread.late: patch}, True),
        "lens last": running(dict.fromkeys(everywhere, keep(lambda h: lens(h[:, -1]))), False),
        "lens all": running(dict.fromkeys(everywhere, keep(lens)), False),
        "steer": running(dict.fromkeys(everywhere, lambda h: h + spread.v.to(h.device)), True),
    }


# --- tracelens -------------------------------------------------------------------------------------------------------


def tracelens(spread: Spread) -> dict[str, Answer]:
    """One block for each case, without a word about devices."""
    model, ids = tl.wrap(spread.hf), spread.ids.tolist()

    def tracing(block: Callable[[], Any]) -> Answer:
        def answer() -> list[Tensor]:
            with model.trace(ids) as t:
                block()
            return [part for name in t.results for part in parts(t[name])]

        return answer

    def parts(value: Tensor) -> list[Tensor]:
        return list(value) if len(value) == spread.n_layers else [value]

    def lens(h: Any) -> Any:
        return model.hf.lm_head(model.hf.model.norm(h)).topk(TOP).indices.save("top")

    def patch() -> None:
        model.layers[spread.late].resid_post[:, -1:] += model.layers[spread.early].resid_post[:, -1:]
        model.logits[:, -1].save("logits")

    def steer() -> None:
        model.layers[:].resid_post += spread.v
        model.logits[:, -1].save("logits")

    return {
        "one": tracing(lambda: model.layers[spread.late].resid_post.save("h")),
        "norms": tracing(lambda: model.layers[:].resid_post.norm(dim=-1).save("norms")),
        "patch": tracing(patch),
        "lens last": tracing(lambda: lens(model.layers[:].resid_post[:, -1])),
        "lens all": tracing(lambda: lens(model.layers[:].resid_post)),
        "steer": tracing(steer),
    }


# --- nnsight ---------------------------------------------------------------------------------------------------------


def nnsight(spread: Spread) -> dict[str, Answer]:
    """nnsight with ``.to`` and ``.cpu()`` by hand; :func:`nnsight_without_moves` is what it says without."""
    from nnsight import NNsight, save  # the method of the same name, which it gives all objects, may be gone

    model, v, layers = NNsight(spread.hf), spread.v, spread.n_layers
    early, late, first = spread.early, spread.late, spread.hf.device
    device = spread.hf.model.layers[late].mlp.down_proj.weight.device
    places = [block.mlp.down_proj.weight.device for block in spread.hf.model.layers]

    def one() -> list[Tensor]:
        with torch.no_grad(), model.trace(spread.ids.to(first), use_cache=False):
            h = save(model.model.layers[late].output.cpu())
        return [h]

    def norms() -> list[Tensor]:
        with torch.no_grad(), model.trace(spread.ids.to(first), use_cache=False):
            found = save([model.model.layers[layer].output.norm(dim=-1).cpu() for layer in range(layers)])
        return list(found)

    def patch() -> list[Tensor]:
        with torch.no_grad(), model.trace(spread.ids.to(first), use_cache=False):
            h = model.model.layers[early].output[:, -1:]
            model.model.layers[late].output[:, -1:] += h.to(device)
            logits = save(model.lm_head.output[:, -1].cpu())
        return [logits]

    def lens_last() -> list[Tensor]:
        with torch.no_grad(), model.trace(spread.ids.to(first), use_cache=False):
            found = save([])
            for layer in range(layers):
                h = model.model.layers[layer].output[:, -1]
                found.append(model.lm_head(model.model.norm(h)).topk(TOP).indices.cpu())
        return found

    def lens_all() -> list[Tensor]:
        with torch.no_grad(), model.trace(spread.ids.to(first), use_cache=False):
            found = save([])
            for layer in range(layers):
                h = model.model.layers[layer].output
                found.append(model.lm_head(model.model.norm(h)).topk(TOP).indices.cpu())
        return found

    def steer() -> list[Tensor]:
        with torch.no_grad(), model.trace(spread.ids.to(first), use_cache=False):
            for layer in range(layers):
                model.model.layers[layer].output = model.model.layers[layer].output + v.to(places[layer])
            logits = save(model.lm_head.output[:, -1].cpu())
        return [logits]

    return {
        "one": one,
        "norms": norms,
        "patch": patch,
        "lens last": lens_last,
        "lens all": lens_all,
        "steer": steer,
    }


def nnsight_without_moves(spread: Spread) -> dict[str, Answer]:
    """The two cases whose operands are on two devices, written as on one device."""
    from nnsight import NNsight, save  # the method of the same name, which it gives all objects, may be gone

    model, v = NNsight(spread.hf), spread.v
    early, late, layers, first = spread.early, spread.late, spread.n_layers, spread.hf.device

    def patch() -> list[Tensor]:
        with torch.no_grad(), model.trace(spread.ids.to(first), use_cache=False):
            h = model.model.layers[early].output[:, -1:]
            model.model.layers[late].output[:, -1:] += h
            logits = save(model.lm_head.output[:, -1].cpu())
        return [logits]

    def steer() -> list[Tensor]:
        with torch.no_grad(), model.trace(spread.ids.to(first), use_cache=False):
            for layer in range(layers):
                model.model.layers[layer].output = model.model.layers[layer].output + v
            logits = save(model.lm_head.output[:, -1].cpu())
        return [logits]

    return {"patch": patch, "steer": steer}


CONTESTANTS: dict[str, Callable[[Spread], dict[str, Answer]]] = {
    "tracelens": tracelens,
    "hooks by hand": hooks,
    "nnsight": nnsight,
    "nnsight, as on one device": nnsight_without_moves,
}
