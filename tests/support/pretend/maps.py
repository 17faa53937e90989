"""Device maps for the tiny models of ``tests/support/families.py``."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel


def device_map(
    model: PreTrainedModel,
    layers: Sequence[str],
    *,
    embedding: str | None = None,
    norm: str | None = None,
    head: str | None = None,
) -> dict[str, str]:
    """A map for ``accelerate.dispatch_model``: one device for each decoder layer, and for the modules around them.

    Unless named, the embeddings and the rotary module are where the first layer is, the final norm where the last one
    is, and the head with the norm, or with the embeddings where they share their weight.
    """
    embedding = embedding or layers[0]
    norm = norm or layers[-1]
    head = head or (embedding if model.config.tie_word_embeddings else norm)
    base = model.base_model
    prefix = model.base_model_prefix
    found: dict[str, str] = {}
    for name, module in base.named_children():
        path = f"{prefix}.{name}"
        if name in ("layers", "h"):
            assert len(module) == len(layers)
            found |= {f"{path}.{index}": device for index, device in enumerate(layers)}
        elif name in ("norm", "ln_f"):
            found[path] = norm
        else:
            found[path] = embedding
    return {**found, "lm_head": head}
