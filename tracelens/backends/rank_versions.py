"""Which ways of sharing a model by ranks need a newer transformers than the oldest one that is supported."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from tracelens.errors import LayoutError

Version = tuple[int, int]

STAGES_OF_RANKS = "pp with tp"
EXPERTS = "ep"
ODD_VOCABULARY = "tp with a vocabulary that the ranks cannot share evenly"

NEEDS: Mapping[str, Version] = MappingProxyType(
    {
        # Before, 5.18 fails when it loads, and 5.19 to 5.22 leave parameters whole that are told to be in parts.
        STAGES_OF_RANKS: (5, 23),
        # 5.17 and 5.18 do not know ep_size, and 5.19 gives experts that are cut in strides.
        EXPERTS: (5, 20),
        # Before, lm_head is refused when the model is loaded.
        ODD_VOCABULARY: (5, 21),
    }
)
"""The first version in which a way works, by what a user would call it, as seen with tiny models on two and four ranks.
All others work in every supported one."""


def installed() -> str:
    """The version of transformers that runs here."""
    import transformers

    return transformers.__version__


def knows(way: str) -> bool:
    """Does the installed transformers know this way of sharing a model?"""
    return _release(installed()) >= NEEDS[way]


def require_known(way: str, instead: str) -> None:
    """Refuses a way that fails with the installed transformers, and says which one it needs."""
    if not knows(way):
        major, minor = NEEDS[way]
        raise LayoutError(
            f"{way} needs transformers {major}.{minor} or newer; {installed()} is installed",
            instead=f"transformers {major}.{minor}; or {instead}",
        )


def require_known_vocabulary(config: Any, ranks: int) -> None:
    """Refuses a vocabulary without equal parts for the ranks, where transformers would cut its matrix and cannot."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    if size is None or size % ranks == 0 or knows(ODD_VOCABULARY) or not _cuts_vocabulary(config):
        return
    require_known(
        ODD_VOCABULARY,
        f"a number of ranks that divides {size}, like "
        + ", ".join(str(n) for n in range(1, ranks + 1) if size % n == 0),
    )


def _cuts_vocabulary(config: Any) -> bool:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    built: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return "lm_head" in (getattr(built, "_tp_plan", None) or {})


def _release(version: str) -> Version:
    found = re.match(r"(\d+)\.(\d+)", version)
    assert found is not None, version
    return int(found[1]), int(found[2])
