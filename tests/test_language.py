"""Functions on values: torch, einops, modules, tl.where, tl.masked_mean, tl.apply, against the same on tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import einops
import numpy as np
import pytest
import torch
from torch import nn

import tracelens as tl
from tests.support.families import FAMILIES

IDS = [3, 14, 15, 9, 2, 6]
PROBE = nn.Sequential(nn.Linear(48, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 3))
VECTOR = torch.randn(48, generator=torch.Generator().manual_seed(0))


class Autoencoder(nn.Module):
    """As users bring them: two matrices, a ReLU, a bias taken off and put back."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.enc = nn.Parameter(torch.randn(48, 96, generator=generator) / 7)
        self.dec = nn.Parameter(torch.randn(96, 48, generator=generator) / 7)
        self.b = nn.Parameter(torch.zeros(48))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu((x - self.b) @ self.enc) @ self.dec + self.b


SAE = Autoencoder()

FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "rearrange": lambda h: einops.rearrange(h, "b p (h d) -> b h p d", h=4),
    "rearrange back": lambda h: einops.rearrange(
        einops.rearrange(h, "b p (h d) -> (b h) d p", h=4), "(b h) d p -> b p (h d)", h=4
    ),
    "reduce": lambda h: einops.reduce(h, "b p (k w) -> b p k", "max", w=6),
    "repeat": lambda h: einops.repeat(h, "b p d -> b p d k", k=3),
    "einsum": lambda h: einops.einsum(h, h, "b p d, b q d -> b p q"),
    "torch.einsum": lambda h: torch.einsum("bpd,d->bp", h, VECTOR),
    "matmul": lambda h: h @ VECTOR,
    "reflected": lambda h: 1.0 / (2.0 - h) + 3.0 * h,
    "methods": lambda h: h.norm(dim=-1, keepdim=True).clamp(min=1).log(),
    "softmax": lambda h: torch.softmax(h, dim=-1),
    "functional": lambda h: nn.functional.layer_norm(h, (48,)),
    "module": PROBE,
    "autoencoder": SAE,
    "topk": lambda h: h.topk(4).indices,
    "max": lambda h: h.max(dim=-1).values,
    "sort": lambda h: h.sort(dim=-1)[1],
    "split": lambda h: h.split(16, dim=-1)[1],
    "unbind": lambda h: torch.stack(h.unbind(1), 1).flip(-1),
    "mean": lambda h: h.mean(1),
    "indices": lambda h: h[:, [0, 2], ..., None],
    "steps": lambda h: h[:, 1::2, ::3],
    "gather": lambda h: h.gather(-1, h.argsort(-1)),
    "where": lambda h: torch.where(h > 0, h, -h),
    "dtype": lambda h: (h.double() * 2).to(torch.float32).half(),
    "cat": lambda h: torch.cat([h, 2 * h], dim=-1).reshape(1, 6, 2, 48),
    "comparison": lambda h: ((h > 0) & ~(h > 1)).float(),
    "cosine": lambda h: nn.functional.cosine_similarity(h, VECTOR, dim=-1),
    "linalg": lambda h: torch.linalg.vector_norm(h, ord=1, dim=-1),
    "transposes": lambda h: h.transpose(1, 2).mT.permute(2, 0, 1),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_a_function_of_a_value_is_the_function_of_its_tensor(function: Callable[[Any], Any]) -> None:
    model = tl.wrap(FAMILIES["llama"].build())
    with model.trace(IDS):
        h = model.layers[1].resid_post
        computed = function(h)
        declared = (computed.shape, computed.dtype)
        saved, plain = computed.save(), h.save()
    with torch.no_grad():
        expected = function(plain.value)
    assert declared == (expected.shape, expected.dtype)
    torch.testing.assert_close(saved.value, expected, rtol=0, atol=0)
    # A handle of a finished trace is as good as its tensor.
    with torch.no_grad():
        torch.testing.assert_close(function(plain), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["rearrange", "reduce", "matmul", "module", "autoencoder", "mean", "topk"])
def test_a_recording_without_a_prompt_fits_every_size(name: str) -> None:
    model = tl.wrap(FAMILIES["llama"].build())
    with model.record() as r:
        FUNCTIONS[name](model.layers[1].resid_post).save("f")
    program = model.compile(r)
    for prompt in ([IDS], [IDS[:3], IDS[1:4]]):
        with model.trace(prompt):
            h = model.layers[1].resid_post.save()
        with torch.no_grad():
            torch.testing.assert_close(program(prompt)["f"], FUNCTIONS[name](h.value), rtol=1e-6, atol=1e-6)


def test_modules_and_functions_are_mapped_over_layers() -> None:
    model = tl.wrap(FAMILIES["llama"].build())
    with model.trace(IDS):
        mapped = model.layers[:].resid_post
        probed = PROBE(mapped[:, -1]).save()
        best = mapped.topk(2)
        values, heads = best.values.save(), einops.rearrange(mapped, "b p (h d) -> b h p d", h=4).save()
        means = tl.masked_mean(mapped).save()
        doubled = tl.apply(lambda x: 2 * x, mapped).save()
        whole = mapped.save()
    h = whole.value
    with torch.no_grad():
        torch.testing.assert_close(probed.value, PROBE(h[:, :, -1]))
    assert torch.equal(values.value, h.topk(2).values)
    assert torch.equal(heads.value, einops.rearrange(h, "l b p (h d) -> l b h p d", h=4))
    torch.testing.assert_close(means.value, h.mean(2))
    assert torch.equal(doubled.value, 2 * h)


def test_numpy_arrays_are_constants() -> None:
    model = tl.wrap(FAMILIES["llama"].build())
    array = np.arange(48, dtype=np.float32)
    with model.trace(IDS):
        h = model.layers[1].resid_post
        right, left = (h * array + np.float32(2)).save(), (array - h).save()
        plain = h.save()
    assert torch.equal(right.value, plain.value * torch.from_numpy(array) + 2)
    assert torch.equal(left.value, torch.from_numpy(array) - plain.value)


def test_masked_mean_leaves_padding_out() -> None:
    model = tl.wrap(FAMILIES["qwen3"].build())
    rows = [IDS, IDS[:2]]
    with model.trace(rows):
        mean = tl.masked_mean(model.layers[1].resid_post).save()
    for row, found in zip(rows, mean.value, strict=True):
        with model.trace(row):
            h = model.layers[1].resid_post.save()
        torch.testing.assert_close(found, h.value[0].mean(0), rtol=1e-5, atol=1e-5)


def test_where_gates_a_write() -> None:
    model = tl.wrap(FAMILIES["llama"].build())
    with model.trace(IDS):
        before = model.layers[1].resid_post.save()
        gate = (model.layers[1].resid_post @ VECTOR > 0)[..., None]
        model.layers[1].resid_post += tl.where(gate, VECTOR, 0.0)
        after = model.layers[1].resid_post.save()
    h = before.value
    open_ = (h @ VECTOR > 0)[..., None]
    assert 0 < open_.sum() < open_.numel()
    assert torch.equal(after.value, h + torch.where(open_, VECTOR, torch.tensor(0.0)))


def test_apply_runs_any_python_on_real_tensors() -> None:
    model = tl.wrap(FAMILIES["llama"].build())
    seen: list[tuple[int, ...]] = []

    def odd(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(tuple(x.shape))
        flags = torch.tensor([float(v) > 0 for v in x.flatten().tolist()]).reshape(x.shape)
        return x * flags, y.sum(-1)

    with model.trace(IDS):
        h = model.layers[0].resid_post
        kept, total = tl.apply(odd, h, VECTOR.expand(6, 48), like=(h, torch.empty(6)))
        model.layers[0].resid_post = kept
        written, sums = model.layers[0].resid_post.save(), total.save()
        plain = h.save()
    assert seen == [(1, 6, 48)]
    assert torch.equal(written.value, plain.value.clamp(min=0))
    torch.testing.assert_close(sums.value, VECTOR.sum().expand(6))
    # It runs even when nothing is saved.
    with model.trace(IDS):
        tl.apply(lambda x: seen.append((1,)) or x, model.layers[1].resid_post)
    assert seen[-1] == (1,)


def test_patching_across_layers_and_traces() -> None:
    model = tl.wrap(FAMILIES["gpt2"].build())
    with model.trace(IDS):
        donor = model.layers[0].resid_post.save()
    with model.trace(IDS[::-1]):
        model.layers[0].resid_post[:, 2] = donor[:, 2]
        inside = model.layers[0].resid_post.save()
        model.layers[2].mlp_in += model.layers[0].mlp_out
        mixed = model.layers[2].mlp_in.save()
        base, early = model.layers[2].mlp_norm.save(), model.layers[0].mlp_out.save()
    assert torch.equal(inside.value[:, 2], donor.value[:, 2])
    assert torch.equal(mixed.value, base.value + early.value)
