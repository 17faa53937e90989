"""Which operands of a product share keys that the result no longer has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tracelens.ir.ops import Call, operands
from tracelens.ir.padding import key_axes
from tracelens.ir.types import TensorType


def contracted(op: Call, types: Mapping[int, TensorType]) -> Sequence[Sequence[int]]:
    """For every axis of keys that is summed over, the values that have it."""
    values = operands(op)
    keyed = [value for value in values for _ in key_axes(types[value])]
    kept = sum(len(key_axes(type_)) for type_ in op.types)
    terms = _terms(op, [types[value].ndim for value in values])
    if terms is not None:
        *inputs, out = terms
        groups: dict[str, list[int]] = {}
        for value, labels in zip(values, inputs, strict=True):
            for axis in key_axes(types[value]):
                if labels[axis] not in out:
                    groups.setdefault(labels[axis], []).append(value)
        return list(groups.values())
    if not kept:
        return [keyed]
    # Which keys are kept is not said here: all of them have to add nothing.
    return [] if len(keyed) == kept else [[value] for value in keyed]


def _terms(op: Call, ndims: Sequence[int]) -> list[list[str]] | None:
    """The labels of every operand and of the result, where a pattern says them."""
    if op.function == "torch.einsum" and isinstance(op.args[0], str):
        left, arrow, right = op.args[0].replace(" ", "").partition("->")
        terms = left.split(",")
        inputs = [_letters(term, ndim) for term, ndim in zip(terms, ndims, strict=True)]
        every = [label for labels in inputs for label in labels]
        if arrow:
            dots = {label for label in every if label[0] == "."}
            out = [*right.replace("...", ""), *dots]
        else:
            out = [label for label in every if every.count(label) == 1 or label[0] == "."]
        return [*inputs, out]
    if op.function == "einops.einsum" and isinstance(op.args[-1], str):
        left, _, right = op.args[-1].partition("->")
        return [*(term.split() for term in left.split(",")), right.split()]
    return None


def _letters(term: str, ndim: int) -> list[str]:
    before, _, after = term.partition("...")
    hidden = ndim - len(before) - len(after)
    return [*before, *(f".{number}" for number in range(hidden, 0, -1)), *after]
