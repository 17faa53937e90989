"""What a configuration says of the functions between the sites."""

from __future__ import annotations

from typing import Any

from tracelens.backends.base import Family
from tracelens.identities import Facts


def facts_of(config: Any, family: Family, *, scale: float | None, softcap: float | None) -> Facts:
    """The functions, and the numbers that they take; some are facts of the family."""
    from transformers.activations import ACT2FN  # heavy

    words = ("hidden_activation", "hidden_act", "activation_function", "activation")
    name = next((found for word in words if isinstance(found := getattr(config, word, None), str)), None)
    return Facts(
        activation=ACT2FN[name] if name is not None and name in ACT2FN else None,
        scale=scale,
        softcap=softcap,
        sinks=family.sinks,
        biased=family.attends_itself,
        gated=family.gated,
        shared=family.shared,
        sigmoid=family.sigmoid,
        resized=family.resized,
        epsilon=next((found for word in _EPSILON if (found := getattr(config, word, None))), 0.0),
        score_cap=getattr(config, "attn_logit_softcapping", None),
    )


_EPSILON = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")
