"""Which function is meant, and what comes out of it: the one file of this floor that imports torch.

Rules written by hand (:mod:`tracelens.ir.rules`) answer first; torch itself, on meta tensors, answers for everything
else and has the last word on every refusal. Answers are remembered.
"""

from __future__ import annotations

from tracelens.ir.abstract import (
    AbstractArg,
    Inferred,
)

__all__ = [
    "AbstractArg",
    "Inferred",
    "canonical_call",
    "dtype_of",
    "infer_call",
    "infer_index",
    "infer_index_put",
    "memo_clear",
    "name_of",
    "refusal_of",
    "resolve",
    "static_argument",
    "torch_dtype",
]
