"""Which model a lens was made for is told by the model's unembedding: two digests of it, one strict and one loose."""

from __future__ import annotations

import contextvars
import hashlib
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np
import torch

from tracelens.backends.packed import packed_at

if TYPE_CHECKING:
    from tracelens.model import Model

# numpy's own defaults, whatever the user has set: the loose digest is one of printed numbers.
_PRINTED = {
    "edgeitems": 3,
    "threshold": 1000,
    "linewidth": 75,
    "suppress": False,
    "floatmode": "maxprec",
    "sign": "-",
    "nanstr": "nan",
    "infstr": "inf",
    "formatter": None,
    "legacy": False,
}
Made = TypeVar("Made")
_ROUNDED = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Fingerprint:
    """Digests of an unembedding matrix.

    ``strict``: by the name of a dtype, SHA-256 over the shape and all numbers rounded to it. A model that is loaded in
    float32, float16 or bfloat16 has at least one of them in common with itself in another of these. ``loose``: the hash
    of the tuned-lens package, SHA-256 over what numpy prints of the matrix with one digit, which is its four corners:
    once for the numbers as they are, and once for them in float16, in which published lenses may have been trained.
    """

    strict: Mapping[str, str]
    loose: tuple[str, ...]

    def agrees(self, strict: Mapping[str, str]) -> bool:
        """Is this the matrix of which these are the strict digests?"""
        return any(self.strict.get(name) == digest for name, digest in strict.items())


def fingerprint(unembedding: torch.Tensor) -> Fingerprint:
    """The digests of an unembedding [V, D], of any float dtype, on the host."""
    matrix = unembedding.detach()
    # numpy prints three rows and columns at each end: rows in the middle make no difference.
    ends = matrix if len(matrix) <= 2 * _ROWS else torch.cat([matrix[:_ROWS], matrix[-_ROWS:]])
    loose = dict.fromkeys(_printed_digest(numbers.numpy()) for numbers in (ends.float(), ends.half()))
    return Fingerprint(strict_digests(matrix), tuple(loose))


def strict_digests(matrix: torch.Tensor) -> dict[str, str]:
    """By the name of a dtype SHA-256 over the shape of a matrix on the host and its numbers rounded to that dtype."""
    strict: dict[str, str] = {}
    for name, dtype in _ROUNDED.items():
        found = hashlib.sha256(repr(tuple(matrix.shape)).encode())
        for rows in matrix.split(_ROWS):  # the rounded matrix is never there as a whole
            found.update(rows.to(dtype).contiguous().view(torch.uint8).numpy().data)
        strict[name] = found.hexdigest()
    return strict


_ROWS = 1024


def _printed_digest(numbers: np.ndarray) -> str:
    with np.printoptions(**_PRINTED):
        return hashlib.sha256(np.array_str(numbers, precision=1).encode()).hexdigest()


class OfUnembeddings(Generic[Made]):
    """What is made of a model's unembedding once, and anew where that is another tensor, or has changed since.

    A user may train the model, or add tokens to it.
    """

    def __init__(self, make: Callable[[Model], Made]) -> None:
        self._make = make
        self._known: weakref.WeakKeyDictionary[object, tuple[object, Made]] = weakref.WeakKeyDictionary()

    def __call__(self, model: Model) -> Made:
        anatomy = model.anatomy
        parameter = anatomy.parameter(anatomy.head.weight)
        state: tuple[object, ...] = (parameter.data_ptr(), parameter._version, tuple(parameter.shape))
        if packed_at(anatomy.model, anatomy.head.weight) is not None:
            # Made anew for every use, so its numbers tell: an adapter may have been turned off.
            numbers = parameter.double()
            state = (tuple(numbers.shape), numbers.sum().item(), numbers.square().sum().item())
        known = self._known.get(anatomy)
        if known is None or known[0] != state:
            # In a context of its own, so that it can be asked for while the user's block is open.
            made = contextvars.Context().run(self._make, model)
            known = self._known[anatomy] = (state, made)
        return known[1]


def _fingerprint(model: Model) -> Fingerprint:
    with model.trace([[0]]):
        saved = model.unembed.save()
    return fingerprint(saved.value)


_fingerprints = OfUnembeddings(_fingerprint)


def fingerprint_of(model: Model) -> Fingerprint:
    """The digests of a model's unembedding, made once: it is read, whole, from wherever it lies."""
    return _fingerprints(model)
