"""Which model a vector was made for is told by a sample of the model's unembedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from tracelens.lens.fingerprint import OfUnembeddings, strict_digests

if TYPE_CHECKING:
    from tracelens.model import Model

ROWS, AMONG = 64, 4096
"""So many rows of the unembedding, evenly spread among the first, which stay what they are where tokens are added."""


def sample_digests(model: Model) -> Mapping[str, str]:
    """By the name of a dtype SHA-256 over a sample of the unembedding, rounded to it; made once for a model.

    A model that is loaded in float32, float16 or bfloat16 has at least one of them in common with itself in another of
    these.
    """
    return _digests(model)


def _of_sample(model: Model) -> Mapping[str, str]:
    count = min(AMONG, model.anatomy.vocabulary)
    rows = torch.arange(0, count, max(1, count // ROWS))
    with model.trace([[0]]):
        saved = model.unembed[rows].save()
    return strict_digests(saved.value)


_digests = OfUnembeddings(_of_sample)
