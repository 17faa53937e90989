"""Where a vector is applied: each scope is the write that a user would have made there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import tracelens as tl
from tests.support.families import D_MODEL, FAMILIES
from tests.support.tokenizers import byte_level_bpe
from tracelens.steering import SteeringVector

ROWS = [[5, 6, 7, 8, 9], [11, 12, 13]]
NEW = 4


@pytest.fixture(scope="module")
def model() -> tl.Model:
    return tl.wrap(FAMILIES["llama"].build(vocab_size=len(byte_level_bpe())), byte_level_bpe())


@pytest.fixture(scope="module")
def v(model: tl.Model) -> SteeringVector:
    generator = torch.Generator().manual_seed(0)
    return SteeringVector.from_directions(
        model, {("resid_mid", layer): torch.randn(D_MODEL, generator=generator) for layer in (0, 1)}
    )


def traced(model: tl.Model, write: Callable[[tl.Trace], None], rows: Any = ROWS) -> torch.Tensor:
    with model.trace(rows) as t:
        write(t)
        last = model.logits[:, -1].save()
    return last.value


def generated(model: tl.Model, write: Callable[[tl.Generation], None], **options: Any) -> Any:
    with model.generate(ROWS, max_new_tokens=NEW, eos_token_id=None, **options) as t:
        write(t)
        model.layers[2].resid_post.save("h")
    return t.tokens, t["h"]


MASK = torch.tensor([[True, False, False, True, True], [False, False, False, True, False]])
SINGLE: dict[str, tuple[Any, Callable[[Any, Any], Any]]] = {
    "all": ("all", lambda t, site: site[:]),
    "prompt": ("prompt", lambda t, site: site[:]),
    "last prompt token": ("last_prompt_token", lambda t, site: site.tok[-1]),
    "newest": ("newest", lambda t, site: site.tok[-1]),
    "number": (1, lambda t, site: site.tok[1]),
    "from the end": (-2, lambda t, site: site.tok[-2]),
    "slice": (slice(1, 3), lambda t, site: site.tok[1:3]),
    "list": ([0, 2], lambda t, site: site.tok[[0, 2]]),
    "id": (tl.token_id(6), lambda t, site: site.tok[tl.token_id(6)]),
    "function": (lambda t: slice(0, 2), lambda t, site: site.tok[0:2]),
}
# Each of these says where the direction goes by itself.


def added(site: Any, where: Callable[[Any, Any], Any], t: Any, new: torch.Tensor) -> None:
    part = where(t, site)
    part[...] = part + new


@pytest.mark.parametrize("name", SINGLE)
def test_each_scope_of_a_trace(name: str, model: tl.Model, v: SteeringVector) -> None:
    given, where = SINGLE[name]
    rows = [[5, 6, 7, 8, 9], [6, 12, 13]]

    def by_hand(t: tl.Trace) -> None:
        for layer in (0, 1):
            added(model.layers[layer].resid_mid, where, t, 2.0 * v["resid_mid", layer])

    wanted = traced(model, by_hand, rows)
    found = traced(model, lambda t: v.apply(t, 2.0, positions=given), rows)
    assert torch.equal(found, wanted)
    assert not torch.allclose(found, traced(model, lambda t: None, rows), atol=1e-2)
