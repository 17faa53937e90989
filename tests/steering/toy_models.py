"""A model whose answer is a dot product: what a sweep has to find can be written down."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import tracelens as tl
from tests.support.families import D_MODEL, FAMILIES, VOCABULARY
from tracelens.steering import LabelledRow

# Next to a number as large as this, the others do not change the norm of a position.
_LARGE = 1e6


def linear_model() -> tuple[tl.Model, Tensor]:
    """A model in float64 whose logits are ``U @ h`` with h the sum of embedding and whatever is added; and U [V, D].

    It is a Llama whose sublayers write nothing. The first number of each embedding is so large that the last norm
    divides by a constant, which U makes good, and U does not look at that number.
    """
    hf = FAMILIES["llama"].build(dtype=torch.float64)
    unembedding = torch.randn(
        VOCABULARY, D_MODEL, generator=torch.Generator().manual_seed(5), dtype=torch.float64
    )
    unembedding[:, 0] = 0
    with torch.no_grad():
        for layer in hf.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        # The norm of Llama computes in float32: small numbers leave 1e-6 for what is compared.
        hf.model.embed_tokens.weight.mul_(0.1)
        hf.model.embed_tokens.weight[:, 0] = _LARGE
        hf.model.norm.weight.fill_(1.0)
        hf.lm_head.weight.copy_(unembedding * (_LARGE / math.sqrt(D_MODEL)))
    return tl.wrap(hf), unembedding


def rows_of(
    prompts: list[list[int]], labels: list[tuple[int, int]], more: tuple[int, ...] = ()
) -> list[LabelledRow]:
    """Rows as ids: a prompt, and the tokens of the positive and the negative answer; ``more``: further options."""
    return [
        LabelledRow(
            number,
            (*prompt, positive),
            (*prompt, negative),
            len(prompt),
            positive,
            negative,
            (positive, negative, *more),
        )
        for number, (prompt, (positive, negative)) in enumerate(zip(prompts, labels, strict=True))
    ]


def drawn_rows(count: int, seed: int = 0, longest: int = 7) -> list[LabelledRow]:
    """Rows of different lengths with labels from all over the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [
        torch.randint(3, VOCABULARY, (2 + number % (longest - 1),), generator=generator).tolist()
        for number in range(count)
    ]
    labels = [
        tuple(torch.randperm(VOCABULARY - 3, generator=generator)[:2].add(3).tolist()) for _ in range(count)
    ]
    return rows_of(prompts, labels)
