"""Which model a vector was made for is told by a sample of the model's unembedding."""

from __future__ import annotations

import contextvars
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from tracelens.lens.fingerprint import strict_digests

if TYPE_CHECKING:
    from tracelens.model import Model

ROWS, AMONG = 64, 4096
"""So many rows of the unembedding, evenly spread among the first, which stay what they are where tokens are added."""

_known: weakref.WeakKeyDictionary[object, tuple[object, Mapping[str, str]]] = weakref.WeakKeyDictionary()


def sample_digests(model: Model) -> Mapping[str, str]:
    """By the name of a dtype SHA-256 over a sample of the unembedding, rounded to it; made once for a model.

    A model that is loaded in float32, float16 or bfloat16 has at least one of them in common with itself in another of
    these.
    """
    anatomy = model.anatomy
    parameter = anatomy.parameter(anatomy.head.weight)
    # Of another tensor, or changed since: a user may train the model, or add tokens to it.
    state = (parameter.data_ptr(), parameter._version, tuple(parameter.shape))
    known = _known.get(anatomy)
    if known is None or known[0] != state:
        # In a context of its own, so that it can be asked for while the user's block is open.
        rows = contextvars.Context().run(_sample, model)
        known = _known[anatomy] = (state, strict_digests(rows))
    return known[1]


def _sample(model: Model) -> torch.Tensor:
    count = min(AMONG, model.anatomy.vocabulary)
    rows = torch.arange(0, count, max(1, count // ROWS))
    with model.trace([[0]]):
        saved = model.unembed[rows].save()
    return saved.value
