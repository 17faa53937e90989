"""What is done to one prompt of a batch is what it is in a block over that prompt alone, and nothing to the others."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tracelens as tl
from tests.support.batches import random_rows
from tests.support.families import D_MODEL, FAMILIES, LAYERS

STREAM = ("resid_pre", "resid_post", "attn_norm", "mlp_add", "attn_add")
OTHERS = ("z", "q", "v", "mlp_act", "scores", "pattern")
LOOKS = ("scores", "pattern")
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}
"""In float64: kernels may order their sums by the number of positions, padding included."""
V = torch.linspace(-1, 1, D_MODEL, dtype=torch.float64)


@cache
def model(family: str) -> tl.Model:
    return tl.wrap(FAMILIES[family].build(dtype=torch.float64))


@dataclass(frozen=True)
class Step:
    """A change of one site of one layer; ``k`` and ``j`` choose tokens."""

    kind: str
    layer: int
    site: str
    k: int
    j: int

    def do(self, prompt: Any, length: int) -> None:
        """The same code for ``t.prompts[i]`` and for a model with one prompt."""
        layer, name = prompt.layers[self.layer], self.site
        site = getattr(layer, name)
        k, j = self.k % length, self.j % length
        first, last = min(k, j), max(k, j) + 1
        looks = name in LOOKS
        match self.kind:
            case "whole":
                setattr(layer, name, site * 0.5 + 0.25)
            case "add":
                site += 0.5
                setattr(layer, name, site)
            case "index" if looks:
                site[:, 1, k] = 0.25
            case "index":
                site[:, k] = 0.25
            case "slice" if looks:
                site[:, :, first:last] *= 0.5
            case "slice":
                site[:, first:last] *= 0.5
            case "tok":
                site.tok[k - length] = site.tok[j] * 2
            case "tokens" if k != j:
                site.tok[[k, j]] += 1.0
            case "mixed" if name == "scores":
                pass  # their mean is that of the lowest numbers, which a mask puts there
            case "mixed" if looks:
                setattr(layer, name, site - site.mean(-1, keepdim=True))
            case "mixed":
                setattr(layer, name, site - site.mean(1, keepdim=True))
            case "turned" if not looks:
                setattr(layer, name, site.flip(1))
            case "head" if name == "z":
                layer.head(2).z[:, first:last] = 0
            case "several":
                prompt.layers[0:2].resid_post.tok[k] += V
            case "mask":
                mask = torch.zeros(1, length, dtype=torch.bool)
                mask[0, k] = mask[0, j] = True
                if not looks:
                    site.tok[mask] = 0.75
            case _:
                pass


KINDS = ("whole", "add", "index", "slice", "tok", "tokens", "mixed", "turned", "head", "several", "mask")
STEPS = st.lists(
    st.builds(
        Step,
        st.sampled_from(KINDS),
        st.integers(0, LAYERS - 1),
        st.sampled_from(STREAM + OTHERS),
        st.integers(0, 5),
        st.integers(0, 5),
    ),
    min_size=1,
    max_size=4,
)
LENGTHS = st.lists(st.integers(1, 6), min_size=2, max_size=4)
SITES = (("resid_post", 0), ("pattern", 1), ("z", 2), ("resid_post", 2))


def kept(prompt: Any) -> dict[str, Any]:
    found = {f"{name}.{layer}": getattr(prompt.layers[layer], name).save() for name, layer in SITES}
    found["mean"] = prompt.layers[1].resid_post.mean(1).save()
    return {**found, "logits": prompt.logits.save()}


def values(found: dict[str, Any]) -> dict[str, Tensor]:
    return {name: handle.value for name, handle in found.items()}


@given(st.sampled_from(["llama", "gpt2", "gemma3"]), LENGTHS, st.integers(0, 3), STEPS)
def test_a_prompt_of_a_batch_is_as_alone(
    family: str, lengths: list[int], chosen: int, steps: list[Step]
) -> None:
    one, rows, chosen = model(family), random_rows(lengths), chosen % len(lengths)
    with one.trace(rows) as t:
        for step in steps:
            step.do(t.prompts[chosen], lengths[chosen])
        together = [kept(prompt) for prompt in t.prompts]
    with one.trace([rows[chosen]]):
        for step in steps:
            step.do(one, lengths[chosen])
        alone = kept(one)
    with one.trace(rows) as clean:
        before = [kept(prompt) for prompt in clean.prompts]
    for name, expected in values(alone).items():
        torch.testing.assert_close(values(together[chosen])[name], expected, **TOLERANCE)
    for row in range(len(lengths)):
        if row != chosen:
            for name, expected in values(before[row]).items():
                found = values(together[row])[name]
                if any(
                    step.site in LOOKS for step in steps
                ):  # the layer computes attention in another way, for all
                    torch.testing.assert_close(found, expected, **TOLERANCE)
                else:
                    assert torch.equal(found, expected), (row, name)


@given(LENGTHS, st.data())
def test_steps_for_each_prompt_do_not_meet(lengths: list[int], data: st.DataObject) -> None:
    one, rows = model("llama"), random_rows(lengths)
    each = [data.draw(STEPS) for _ in rows]
    with one.trace(rows) as t:
        for prompt, length, steps in zip(t.prompts, lengths, each, strict=True):
            for step in steps:
                step.do(prompt, length)
        together = [kept(prompt) for prompt in t.prompts]
    for row, (ids, length, steps) in enumerate(zip(rows, lengths, each, strict=True)):
        with one.trace([ids]):
            for step in steps:
                step.do(one, length)
            alone = kept(one)
        for name, expected in values(alone).items():
            torch.testing.assert_close(values(together[row])[name], expected, **TOLERANCE)


@given(LENGTHS, st.integers(0, LAYERS - 1), st.integers(0, 5), st.integers(0, 5), st.booleans())
def test_values_flow_between_prompts_as_by_hand(
    lengths: list[int], layer: int, k: int, j: int, own: bool
) -> None:
    """In one forward pass, without barriers; by hand it takes two."""
    one, rows = model("llama"), random_rows(lengths)
    k, j = k % lengths[0], j % lengths[1]
    later = layer if own else LAYERS - 1
    with one.trace(rows) as t:
        a, b = t.prompts[0], t.prompts[1]
        b.layers[later].resid_post.tok[j] = a.layers[layer].resid_post.tok[k] * 3
        together = kept(b)
    with one.trace([rows[0]]):
        donor = one.layers[layer].resid_post[:, k].save()
    with one.trace([rows[1]]):
        one.layers[later].resid_post[:, j] = donor.value * 3
        alone = kept(one)
    for name, expected in values(alone).items():
        torch.testing.assert_close(values(together)[name], expected, **TOLERANCE)


@given(LENGTHS, STEPS, st.randoms(use_true_random=False))
def test_prompts_in_another_order_are_the_same_prompts(
    lengths: list[int], steps: list[Step], random: Any
) -> None:
    one, rows = model("llama"), random_rows(lengths)
    order = list(range(len(rows)))
    random.shuffle(order)
    found: list[list[dict[str, Any]]] = []
    for numbers in (list(range(len(rows))), order):
        with one.trace([rows[number] for number in numbers]) as t:
            for step in steps:
                step.do(t.prompts[numbers.index(0)], lengths[0])
            found.append([kept(prompt) for prompt in t.prompts])
    for place, number in enumerate(order):
        for name, expected in values(found[0][number]).items():
            torch.testing.assert_close(values(found[1][place])[name], expected, **TOLERANCE)


@pytest.mark.parametrize("site", STREAM + OTHERS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_steps_matter(kind: str, site: str) -> None:
    """Else the properties would hold for steps that do nothing."""
    one = model("llama")
    looks = site in LOOKS
    none = (kind == "head" and site != "z") or (looks and kind in ("turned", "mask"))
    # Of scores that are all higher by as much nothing follows.
    if none or (site == "scores" and kind in ("mixed", "add", "tokens")):
        return
    logits: list[Tensor] = []
    for steps in ([], [Step(kind, 1, site, 1, 2)]):
        with one.trace([[5, 6, 7, 8], [9, 10]]) as t:
            for step in steps:
                step.do(t.prompts[0], 4)
            saved = t.prompts[0].logits.save()
        logits.append(saved.value)
    assert (logits[0] - logits[1]).abs().max() > 1e-6, (kind, site)
