"""Tensors of the user's that are changed between the line that uses them and the run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.errors import IDS, LLAMA, D, refused
from tracelens.errors import ConstantChangedError

model = LLAMA.model


def steer(v: Any) -> None:
    model.layers[0].resid_post += v
    model.logits.save("logits")


CHANGES = [
    lambda v: v.add_(1),
    lambda v: v.__iadd__(1),
    lambda v: v.mul_(2),
    lambda v: v.zero_(),
    lambda v: v.__setitem__(0, 5),
    lambda v: v[3:].fill_(7),
    lambda v: v.copy_(torch.zeros(D)),
    lambda v: v.view(6, 8).neg_(),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_tensor_changed_in_the_block(change) -> None:
    v = torch.ones(D)
    says = ("f32[48]", "changed before the run", "-->")
    with refused(ConstantChangedError, *says, instead="tensor.clone()"), model.trace(IDS):
        model.layers[0].resid_post += v  # <-
        change(v)
        model.logits.save()


@pytest.mark.parametrize("change", CHANGES)
def test_a_tensor_changed_before_it_is_compiled(change) -> None:
    v = torch.ones(D)
    with model.record() as r:
        model.layers[0].resid_post += v  # captured
        model.logits.save("logits")
    change(v)
    with refused(ConstantChangedError, "f32[48]", "-->", instead="tensor.clone()", text="# captured"):
        model.compile(r)


@pytest.mark.parametrize("change", [CHANGES[1], CHANGES[4]])
def test_an_array_changed_in_the_block(change) -> None:
    v = np.ones(D, dtype=np.float32)
    with refused(ConstantChangedError, "f32[48]", instead="tensor.clone()"), model.trace(IDS):
        model.layers[0].resid_post += v  # <-
        change(v)
        model.logits.save()


def test_a_view_of_a_tensor_that_changed() -> None:
    table = torch.ones(3, D)
    with refused(ConstantChangedError, "f32[48]", instead="tensor.clone()"), model.trace(IDS):
        model.layers[0].resid_post += table[1]  # <-
        table.mul_(2)
        model.logits.save()


def test_what_to_write_instead() -> None:
    step = torch.ones(D)
    with model.trace(IDS) as t:
        for layer in range(3):
            model.layers[layer].resid_post += step
            step = step * 0.5
        model.logits.save("logits")
    again = torch.ones(D)
    with model.trace(IDS) as t2:
        for layer in range(3):
            model.layers[layer].resid_post += again.clone()
            again *= 0.5
        model.logits.save("logits")
    assert torch.equal(t["logits"], t2["logits"])


def test_changes_before_and_after_the_block_are_fine() -> None:
    v = torch.zeros(D)
    v += 1
    with model.trace(IDS) as t:
        steer(v)
    kept = t["logits"].clone()
    v += 1
    assert torch.equal(t["logits"], kept)
    with model.trace(IDS) as t2:
        steer(v)
    assert not torch.equal(t2["logits"], kept)


def test_a_program_owns_its_constants() -> None:
    v = torch.ones(D)
    with model.record() as r:
        steer(v)
    program = model.compile(r)
    before = program(IDS)["logits"]
    v.zero_()
    assert torch.equal(program(IDS)["logits"], before)
