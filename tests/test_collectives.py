"""What a plan says that ranks do together is what they do, and counts the bytes that cross between them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import tracelens as tl
from tests.support.families import D_MODEL, NEURONS, VOCABULARY
from tests.support.ranks import fragile
from tracelens.backends.ranks.pool import Ranks
from tracelens.collectives import SUMMED, Collective, collectives
from tracelens.errors import OpFailedError
from tracelens.ir.layout import Joined, Partial, Shard
from tracelens.ir.types import DType, TensorType, bytes_text
from tracelens.model import Model

PROMPT = [5, 6, 7, 8, 9]
F32 = 4


@pytest.fixture(scope="module")
def watched() -> Iterator[Ranks]:
    """Two ranks that note every collective that they take part in."""
    with fragile(2) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def model(watched: Ranks, tiny_folder: Path) -> Iterator[Model]:
    with tl.load(str(tiny_folder), tp=2, ranks=watched) as model:
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
        summed = isinstance(one.source, Partial) and one.source.joined in SUMMED
        return "reduce" if summed else "gather", total // (n - 1)
    if isinstance(one.source, Partial) and one.source.joined in SUMMED:
        return "all_reduce", total // (2 * (n - 1))
    return "all_gather_into_tensor", total // (n * (n - 1))


BLOCKS = {
    "parts are saved": "a = L.mlp_act.save()",
    "a mean over neurons": "m = L.mlp_act.mean(-1).save()",
    "the largest neuron": "m = L.mlp_act.amax(-1).save(); n = L.mlp_act.amin((0, 2)).save()",
    "the largest neurons": "v, i = L.mlp_act.topk(3); v.save(); i.save(); L.mlp_act.argmax(-1).save()",
    "a norm": "m = L.mlp_act.norm(dim=-1).save()",
    "a mean, rounded": "m = L.mlp_act.mean(-1).save(dtype=torch.bfloat16)",
    "a mean that is used as well": "m = L.mlp_act.mean(-1); m.exp().save(); m.save()",
    "neurons by number": "m = L.mlp_act[..., [3, 70, -1]].save()",
    "tokens of a row over the vocabulary": (
        "x = L.resid_post @ model.unembed.T; x.gather(-1, torch.tensor([[[3], [96], [0], [49], [3]]])).save();"
        "torch.take_along_dim(x, torch.tensor([[[3, 96]]]), -1).exp().save()"
    ),
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
    assert total.endswith(f"between the ranks of a place: {bytes_text(crossing)}")


def test_a_sum_is_rounded_once(model: Model) -> None:
    """Not the parts of each rank, and then their sum."""
    with model.trace([PROMPT] * 4) as t:
        total = model.layers[1].mlp_act.sum(-1)
        total.save("narrow", dtype=torch.bfloat16)
        (total * 1.0).save("full")
    assert torch.equal(t["narrow"], t["full"].to(torch.bfloat16))
    assert "  sums 'narrow'" not in t.explain()


def test_a_number_that_no_rank_has_is_an_error(model: Model) -> None:
    """Each rank gives zeros for what others have; so would all, for what nobody has."""
    for block in (
        lambda act: act[..., torch.tensor([3, 200])].save(),
        lambda act: act[..., act.argmax(-1)[0] + 200].save(),
        lambda act: act.gather(-1, torch.full((1, 5, 1), 80)).save(),
    ):
        with pytest.raises(OpFailedError, match="is out of bounds") as caught, model.trace(PROMPT):
            block(model.layers[1].mlp_act)
        assert caught.value.at is not None
        assert caught.value.at.filename == __file__


@pytest.mark.parametrize("neuron", [3, 77])
def test_the_largest_of_all_ranks_knows_nan_and_booleans(model: Model, neuron: int) -> None:
    """A collective for the largest number would lose a nan, and knows no booleans."""
    with model.trace(PROMPT):
        act = model.layers[1].mlp_act
        largest = tl.where(act == act[..., neuron : neuron + 1], float("nan"), act).amax((1, 2)).save()
        smallest = tl.where(act == act[..., neuron : neuron + 1], float("nan"), act).amin((1, 2)).save()
        some = (act > act[..., neuron : neuron + 1]).amax((1, 2)).save()
        whole = act.save()
    assert largest.value.isnan().all()
    assert smallest.value.isnan().all()
    one = whole.value[..., neuron : neuron + 1]
    assert torch.equal(some.value, (whole.value > one).amax((1, 2)))


def test_a_plan_names_gathers_sums_and_what_lies_in_parts(model: Model) -> None:
    with model.trace(PROMPT) as t:
        act = model.layers[1].mlp_act
        act.cumsum(-1)[..., -1].save("scan")
        act.sum(-1).save("sum")
        act.mean(-1).exp().save("mean")
        act.save("act")
    lines = t.explain().splitlines()
    n = len(PROMPT)
    assert "  mlp_act of layer 1 lies in parts of axis 2 on 2 ranks" in lines
    assert (
        f"  gathers %0 f32[B,P,80] from 2 ranks after layers.1.mlp_act, {_shown(n * NEURONS * F32)} between ranks"
        in lines
    )
    assert (
        f"  sums 'sum' on the first of 2 ranks when the pass is over, {_shown(n * F32)} between ranks"
        in lines
    )
    (averaged,) = (line for line in lines if line.startswith("  averages %"))
    assert averaged.endswith(
        f" f32[B,P] over 2 ranks after layers.1.mlp_act, {_shown(2 * n * F32)} between ranks"
    )
    last = "  gathers 'act' on the first of 2 ranks when the pass is over"
    assert f"{last}, {_shown(n * NEURONS // 2 * F32)} between ranks" in lines


def test_a_plan_says_which_rank_has_what_an_index_names(model: Model) -> None:
    """Heads 0 and 1 are the first rank's, neurons to 39 too, and 49 rows of the unembedding."""
    with model.record() as r:
        model.layers[1].head(2).z = 0
        model.layers[:].mlp_act[..., :70] = 0
        model.layers[2].mlp_act[..., 10:60:25].save()
        model.layers[2].mlp_act[..., 7:7].save()
        model.layers[2].resid_post += model.unembed[48] + model.unembed[-1]
        model.logits.save()
    lines = [
        line for line in str(r.plan().plan).splitlines() if "rank has" in line or re.search(r"rank \d", line)
    ]
    assert [re.sub("%[0-9]+", "%", line) for line in lines] == [
        "  %[48]: rank 0 has 48",
        "  %[-1]: rank 1 has 96",
        "  % and 2 more [:, :, :70]: rank 0 has 0 to 39, rank 1 has 40 to 69",
        "  %[:, :, 2]: rank 1 has 2",
        "  %[:, :, 10:60:25]: rank 0 has 10 to 35 in steps of 25",
        "  %[:, :, 7:7]: no rank has any of it",
    ]


def _shown(size: int) -> str:
    return bytes_text(size)


def test_parts_that_do_not_divide_evenly_are_filled_up() -> None:
    type_ = TensorType(DType.FLOAT32, (VOCABULARY, 2))
    one = Collective(0, 2, 0, type_, Shard(0))
    assert one.nbytes({}) == 2 * 49 * 2 * F32
    assert Collective(0, 4, 0, type_, Shard(0), saved="u").nbytes({}) == 3 * 25 * 2 * F32
    assert Collective(0, 4, 0, type_, Partial(Joined.SUM)).nbytes({}) == 2 * 3 * type_.nbytes({})
    assert Collective(0, 4, 0, type_, Partial(Joined.MAX)).nbytes({}) == 4 * 3 * type_.nbytes({})


def test_memory_is_that_of_one_rank(model: Model) -> None:
    """Half of the neurons are held; at the end the first rank has what is saved as a whole, too."""
    n = len(PROMPT)
    whole = n * NEURONS * F32
    with model.trace(PROMPT) as t:
        (model.layers[1].mlp_act * 2).sum(-1).save()
    (held,) = t.report.held
    assert held.bytes < whole
    with model.trace(PROMPT) as t:
        (model.layers[1].mlp_act * 2).save()
    (held,) = t.report.held
    assert held.bytes == whole // 2 + whole


def test_the_largest_neurons_are_those_of_the_whole(model: Model) -> None:
    with model.trace(PROMPT):
        act = model.layers[1].mlp_act
        values, indices = act.topk(3)
        top, at, soft = values.save(), indices.save(), act.softmax(-1).sum(1).save()
        whole = act.save()
    wanted = whole.value.topk(3)
    assert torch.equal(top.value, wanted.values)
    assert torch.equal(at.value, wanted.indices)
    torch.testing.assert_close(soft.value, whole.value.softmax(-1).sum(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("drawn", [False, True])
def test_what_travels_between_stages_in_a_step_of_a_text(
    drawn: bool, watched: Ranks, tiny_folder: Path
) -> None:
    """The stream, and what the block sends, of the positions of the step; and the logits of the newest one."""
    rows, new = 2, 3
    stream = [rows * length * D_MODEL * F32 for length in (len(PROMPT), *[1] * (new - 1))]
    with tl.load(str(tiny_folder), pp=2, ranks=watched) as staged:
        with staged.generate([PROMPT] * rows, max_new_tokens=new, do_sample=drawn, eos_token_id=None):
            staged.logits *= 2.0  # of all positions
            staged.layers[2].resid_post += staged.layers[0].resid_post[..., :1]
        first, last = _done(watched)
    told = {rows * VOCABULARY * F32, 4 * 8}  # the logits, and what they are
    if drawn:
        told.add(torch.get_rng_state().nbytes)
    for rank in (first, last):
        seen = {size: count for (name, size), count in rank.items() if name == "broadcast"}
        assert seen == dict.fromkeys(told, new)
    sent, received = (
        Counter({size: count for (name, size), count in rank.items() if name == what})
        for rank, what in ((first, "send"), (last, "recv"))
    )
    assert sent == received == Counter(stream) + Counter(size // D_MODEL for size in stream)
