"""What a plan says that ranks do together is what they do, and counts the bytes that cross between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import tracelens as tl
from tests.support.families import FAMILIES
from tests.support.ranks import fragile
from tracelens.backends.ranks.pool import Ranks
from tracelens.collectives import SUMMED, Collective, collectives
from tracelens.ir.layout import Partial
from tracelens.model import Model

PROMPT = [5, 6, 7, 8, 9]
F32 = 4


@pytest.fixture(scope="module")
def watched() -> Iterator[Ranks]:
    """Two ranks that note every collective that they take part in."""
    with fragile(2) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    FAMILIES["llama"].build().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(watched: Ranks, folder: Path) -> Iterator[Model]:
    with tl.load(str(folder), tp=2, ranks=watched) as model:
        yield model


@pytest.fixture(scope="module")
def alone(watched: Ranks, model: Model) -> list[Counter[tuple[str, int]]]:
    """What each rank does in a pass whose block does nothing with values in parts."""
    with model.trace(PROMPT):
        model.logits[:, -1].save("next")
    return _done(watched)


def _done(ranks: Ranks) -> list[Counter[tuple[str, int]]]:
    replies = ranks.ask("communicated")
    return [Counter((name, size) for name, size in reply.header["seen"]) for reply in replies]


def _planned(one: Collective, sizes: dict[str, int]) -> tuple[str, int]:
    """The call that a rank makes for it: by which name, and with how many bytes of its own."""
    total, n = one.nbytes(sizes), one.ranks
    if one.saved is not None:
        return "gather", total // (n - 1)
    if isinstance(one.source, Partial) and one.source.joined in SUMMED:
        return "all_reduce", total // (2 * (n - 1))
    return "all_gather_into_tensor", total // (n * (n - 1))


BLOCKS = {
    "parts are saved": "a = L.mlp_act.save()",
    "a mean over neurons": "m = L.mlp_act.mean(-1).save()",
    "the largest neuron": "m = L.mlp_act.amax(-1).save(); n = L.mlp_act.amin((0, 2)).save()",
    "a norm": "m = L.mlp_act.norm(dim=-1).save()",
    "neurons by number": "m = L.mlp_act[..., [3, 70, -1]].save()",
    "a scan": "m = L.mlp_act.cumsum(-1)[..., -1].save()",
    "a row of the unembedding": "m = (model.unembed[11] * 2).save()",
    "all unembeddings": "m = model.unembed.norm(dim=-1).save()",
    "neurons are edited": "L.mlp_act[..., :70] = 0; m = L.mlp_out.save()",
    "several": "a = L.z.save(dtype=torch.bfloat16); b = L.q.sum((1, 3)).save(); c = (L.k * L.v).softmax(2).save()",
}


@pytest.mark.parametrize("name", BLOCKS)
def test_the_ranks_do_what_is_planned(
    watched: Ranks, model: Model, alone: list[Counter[tuple[str, int]]], name: str
) -> None:
    with model.trace(PROMPT) as t:
        exec(BLOCKS[name], {"model": model, "L": model.layers[1], "torch": torch})
        model.logits[:, -1].save("next")
    plan = t.plan().plan
    sizes = {"B": 1, "P": len(PROMPT), "S": len(PROMPT)}
    planned = collectives(plan)
    wanted = Counter(_planned(one, sizes) for one in planned)
    for before, now in zip(alone, _done(watched), strict=True):
        more = now.copy()
        more.subtract(before)
        assert +more == wanted
        assert not -more
    by_kind = {
        what: (
            sum(one.what == what for one in planned),
            sum(one.nbytes(sizes) for one in planned if one.what == what),
        )
        for what in {one.what for one in planned}
    }
    moved = {one.what: (one.copies, one.bytes) for one in t.report.moved if one.source == one.target}
    assert moved == by_kind
    crossing = sum(one.nbytes(sizes) for one in planned)
    total = next(line for line in t.explain().splitlines() if "between the ranks of a place" in line)
    assert total.endswith(f"between the ranks of a place: {tl.ir.types.bytes_text(crossing)}")
