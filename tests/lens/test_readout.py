"""Statistics of streamed logits against whole logits in float64, however the vocabulary is cut and read."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from tests.support.pretend import Pretend, pretend, watched
from tracelens import readout, readout_distance, readout_tiles
from tracelens.readout_distance import lens_distance
from tracelens.readout_part import asked, costs
from tracelens.readout_tiles import tiles_of

__all__ = ["pretend"]

ASKS = (
    ("topk", 3),
    ("entropy",),
    ("kl",),
    ("log_prob", 0),
    ("rank", 0),
    ("logit", 1),
    ("logsumexp",),
    ("rank", 1),
    ("topk", 1),
)


def whole(
    state: Tensor, weight: Tensor, bias: Tensor | None, scale: float | None, softcap: float | None
) -> Tensor:
    """All logits, in float64."""
    logits = state.double() @ weight.double().T
    logits = logits if bias is None else logits + bias.double()
    logits = logits if scale is None else logits * scale
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def answers(logits: Tensor, reference: Tensor, targets: list[Tensor], k: int) -> list[Tensor]:
    log_probs = logits.log_softmax(-1)
    other = reference.log_softmax(-1)
    size = logits.shape[-1]
    found: list[Tensor] = [*log_probs.topk(k, -1)]
    found.append(-(log_probs.exp() * log_probs).sum(-1))
    found.append((other.exp() * (other - log_probs)).sum(-1))
    own, ranks = [], []
    for target in targets:
        known = (target >= 0) & (target < size)
        at = logits.gather(-1, target.clamp(0, size - 1)[..., None])
        own.append(at[..., 0].masked_fill(~known, torch.nan))
        ranks.append((logits > at).sum(-1).masked_fill(~known, -1))
    found += [own[0] - logits.logsumexp(-1), ranks[0], own[1], logits.logsumexp(-1), ranks[1]]
    return [*found, *log_probs.topk(1, -1)]


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    width = draw(st.integers(1, 12))
    vocabulary = draw(st.integers(1, 300))
    parts = draw(st.integers(1, min(5, vocabulary)))
    cuts = sorted(
        draw(st.lists(st.integers(0, vocabulary), min_size=parts - 1, max_size=parts - 1, unique=False))
    )
    return {
        "lead": draw(st.sampled_from([(), (3,), (2, 3), (4, 2, 3), (1, 5, 1)])),
        "of_reference": draw(st.integers(0, 2)),
        "width": width,
        "vocabulary": vocabulary,
        "cuts": cuts,
        "k": min(vocabulary, draw(st.sampled_from([1, 3, 400]))),
        "workspace": draw(st.sampled_from([1, 500, 5000, 20000, 10**8])),
        "least": draw(st.sampled_from([8, 64, 256])),
        "scale": draw(st.sampled_from([None, 0.3])),
        "softcap": draw(st.sampled_from([None, 2.0])),
        "bias": draw(st.booleans()),
        "dtype": draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16])),
        "offset": draw(st.sampled_from([0.0, 300.0, -300.0])),
        "seed": draw(st.integers(0, 10**6)),
    }


def made(case: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None, Tensor, list[Tensor], list[Any]]:
    generator = torch.Generator().manual_seed(case["seed"])

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(case["dtype"])

    lead, width, vocabulary = case["lead"], case["width"], case["vocabulary"]
    state, weight = normal(*lead, width), normal(vocabulary, width)
    bias = normal(vocabulary) + case["offset"] if case["bias"] else None
    reference = normal(*lead[min(case["of_reference"], len(lead)) :], width)
    ids = torch.randint(-2, vocabulary, lead[1:] if len(lead) > 1 else lead, generator=generator)
    one = int(torch.randint(0, vocabulary, (), generator=generator))
    return state, weight, bias, reference, [ids.expand(lead), torch.full(lead, one)], [ids, one]


def spoken(case: dict[str, Any], asks: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """As one process says it, or as ranks with a part each do, one after the other."""
    state, weight, bias, reference, _, targets = made(case)
    bent = {name: case[name] for name in ("scale", "softcap")}
    room = case["workspace"]
    starts = [0, *case["cuts"]]
    if len(starts) == 1:
        return readout.lens(state, weight, bias, reference, targets, asks, workspace=room, **bent)
    heads = [
        (weight[low:high], None if bias is None else bias[low:high])
        for low, high in zip(starts, [*starts[1:], len(weight)], strict=True)
    ]
    own = torch.stack(
        [
            readout.lens_targets(state, *head, targets, starts, rank=rank, workspace=room, **bent)
            for rank, head in enumerate(heads)
        ]
    ).amax(0)
    said = [
        readout.lens_part(
            state, *head, reference, own, targets, asks, starts, rank=rank, workspace=room, **bent
        )
        for rank, head in enumerate(heads)
    ]
    floats, integers = (torch.cat(of) for of in zip(*said, strict=True))
    return readout.lens_joined(floats, integers, len(targets), asks, starts)


@given(cases())
@settings(max_examples=60)
def test_however_it_is_cut_the_numbers_are_those_of_whole_logits(case: dict[str, Any]) -> None:
    asks = (("topk", case["k"]), *ASKS[1:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readout_tiles, "CHUNK", 4 * case["least"])
        patch.setattr(readout_tiles, "LEAST", case["least"])
        found = spoken(case, asks)
    state, weight, bias, reference, targets, _ = made(case)
    bent = case["scale"], case["softcap"]
    logits, others = whole(state, weight, bias, *bent), whole(reference, weight, bias, *bent)
    wanted = answers(logits, others, targets, case["k"])
    assert len(found) == len(wanted)
    # What rounding to the dtype of the model, and 300 beside a logit, leave of the digits.
    largest = max(1.0, logits.abs().max().item(), others.abs().max().item())
    exact = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2.0**-7}[case["dtype"]]
    bound = (
        max(1e-12, 4 * largest * exact)
        if case["dtype"] is not torch.float32
        else max(1e-5, 4 * largest * exact)
    )
    asked = [name for name, *_ in asks for _ in range(2 if name == "topk" else 1)]
    for place, (name, one, other) in enumerate(zip(asked, found, wanted, strict=True)):
        assert one.shape == other.shape
        if name == "rank":
            target = targets[0] if place == asked.index("rank") else targets[1]
            at = logits.gather(-1, target.clamp(min=0)[..., None])
            low = (logits > at + bound).sum(-1).where(target >= 0, -1)
            high = (logits > at - bound).sum(-1).where(target >= 0, -1)
            assert ((low <= one) & (one <= high)).all()
            assert torch.equal(one.eq(-1), target < 0)
        elif one.dtype is torch.int64:
            assert ((one >= 0) & (one < case["vocabulary"])).all()
            at = logits.log_softmax(-1).gather(-1, one)
            assert_close(at, wanted[place - 1], atol=2 * bound, rtol=0)
            assert all(len(set(row)) == one.shape[-1] for row in one.reshape(-1, one.shape[-1]).tolist())
        else:
            assert one.dtype is (torch.float64 if case["dtype"] is torch.float64 else torch.float32)
            assert_close(one.double(), other, atol=10 * bound, rtol=1e-5, equal_nan=True)


@given(cases())
@settings(max_examples=40)
def test_distances_add_up_over_parts_and_are_those_of_whole_distributions(case: dict[str, Any]) -> None:
    state, weight, bias, reference, _, _ = made(case)
    bent = {name: case[name] for name in ("scale", "softcap")}
    logits, others = whole(state, weight, bias, **bent), whole(reference, weight, bias, **bent)
    wide = torch.float64 if case["dtype"] is torch.float64 else torch.float32
    totals = logits.logsumexp(-1).to(wide), others.logsumexp(-1).to(wide)
    starts = [0, *case["cuts"], len(weight)]
    p, q = logits.softmax(-1), others.softmax(-1)
    mean = (p + q) / 2
    wanted = {
        "tv": (p - q).abs().sum(-1) / 2,
        "js": (torch.special.xlogy(p, p / mean) + torch.special.xlogy(q, q / mean)).sum(-1) / 2,
    }
    largest = max(1.0, logits.abs().max().item(), others.abs().max().item())
    exact = {torch.float64: 1e-12, torch.float32: 4e-7, torch.bfloat16: 2.0**-7}[case["dtype"]]
    for kind, right in wanted.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(readout_tiles, "CHUNK", 4 * case["least"])
            patch.setattr(readout_tiles, "LEAST", case["least"])
            found = torch.zeros(case["lead"], dtype=wide)
            for low, high in pairwise(starts):
                part = None if bias is None else bias[low:high]
                given = (state, weight[low:high], part, reference, *totals, kind)
                found += lens_distance(*given, workspace=case["workspace"], **bent)
        assert found.shape == right.shape
        assert_close(found.double(), right, atol=1e-6 + 8 * largest * exact, rtol=1e-5)


def test_where_logits_are_apart_the_tokens_and_ranks_are_the_very_same() -> None:
    generator = torch.Generator().manual_seed(0)
    state, weight = torch.randn(6, 40, 16, generator=generator), torch.randn(5000, 16, generator=generator)
    ids = torch.randint(0, 5000, (40,), generator=generator)
    logits = whole(state, weight, None, None, None)
    values, indices = logits.topk(21, -1)
    clear = values[..., :20] - values[..., 1:] > 1e-4
    at = logits.gather(-1, ids.expand(6, 40)[..., None])
    alone = ((logits - at).abs() < 1e-4).sum(-1) == 1
    assert clear.float().mean() > 0.9 < alone.float().mean() + 0.2
    for workspace in (1, 10**5, 10**6, 10**9):
        _, tokens, ranks = readout.lens(
            state, weight, None, None, [ids], (("topk", 20), ("rank", 0)), workspace=workspace
        )
        assert torch.equal(tokens[clear], indices[..., :20][clear])
        assert torch.equal(ranks[alone], (logits > at).sum(-1)[alone])


def test_equal_logits_are_no_better_ones() -> None:
    weight = torch.ones(1000, 4)
    weight[10] = 2
    (rank,) = readout.lens(torch.ones(3, 4), weight, None, None, [700], (("rank", 0),), workspace=1)
    assert rank.tolist() == [1, 1, 1]


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_derivatives_go_through_the_same_numbers(softcap: float | None) -> None:
    case = {
        "lead": (2, 3), "of_reference": 1, "width": 8, "vocabulary": 50, "cuts": [], "k": 3, "workspace": 900,
        "scale": 0.7, "softcap": softcap, "bias": True, "dtype": torch.float64, "offset": 0.0, "seed": 3,
    }  # fmt: skip
    state, weight, bias, reference, _, targets = made(case)
    bent = {"scale": 0.7, "softcap": softcap}
    streamed = readout.lens(state, weight, bias, reference, targets, ASKS, **bent)
    state = state.requires_grad_()
    through = readout.lens(state, weight, bias, reference, targets, ASKS, **bent)
    for one, other in zip(streamed, through, strict=True):
        assert_close(one, other.detach(), atol=1e-12, rtol=1e-12, equal_nan=True)
    assert torch.autograd.gradcheck(
        lambda x: readout.lens(x, weight, bias, reference, [4], (("kl",), ("log_prob", 0)), **bent), (state,)
    )


@pytest.mark.parametrize("kind", ["js", "tv"])
def test_derivatives_of_a_distance(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    state, reference = torch.randn(2, 2, 3, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(50, 8, generator=generator, dtype=torch.float64)

    def distance(state: Tensor) -> Tensor:
        total, other = ((rows @ weight.T).logsumexp(-1) for rows in (state, reference))
        return lens_distance(state, weight, None, reference, total, other, kind)

    assert_close(distance(state), distance(state.clone().requires_grad_()).detach(), atol=1e-12, rtol=1e-12)
    assert torch.autograd.gradcheck(distance, (state.requires_grad_(),))


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asks", "dtype", "softcap"),
    [
        ((("entropy",),), torch.bfloat16, 2.0),
        ((("topk", 5),), torch.float32, None),
        ((("topk", 60),), torch.float32, None),
        ((("rank", 0), ("log_prob", 0)), torch.float32, 2.0),
        ((("kl",),), torch.float32, None),
        (ASKS, torch.bfloat16, 2.0),
    ],
    ids=["entropy", "few of the largest", "many of the largest", "ranks", "divergence", "all"],
)
def test_beside_what_it_says_it_holds_its_workspace(
    pretend: Pretend, monkeypatch: pytest.MonkeyPatch, asks: Any, dtype: torch.dtype, softcap: float | None
) -> None:
    """Six layers of 30 positions: the most bytes alive while it runs, counted on a device of its own."""
    monkeypatch.setattr(readout_tiles, "CHUNK", 512)
    width, vocabulary, layers, columns = 16, 4000, 6, 30
    state = torch.randn(layers, columns, width).to("pretend:0", dtype)
    weight = torch.randn(vocabulary, width).to("pretend:0", dtype)
    reference = state[-1].clone() if ("kl",) in asks else None
    ids = torch.randint(0, vocabulary, (columns,)).to("pretend:0")
    targets = [ids, ids] if ("rank", 0) in asks else []
    need = asked(asks, len(targets))
    # What parts of a vocabulary say, and the answers that are made of it.
    results = layers * columns * (need.floats * 4 + need.integers * 8)
    form = costs(width, dtype, need)
    found: list[int] = []
    for workspace in (2 * 10**6, 10**6, 5 * 10**5, 2.5 * 10**5):
        tiles = tiles_of(layers, columns, vocabulary, int(workspace), form)
        said = form.of_tiles(layers, tiles)
        assert said <= workspace
        with watched() as seen:
            readout.lens(
                state, weight, None, reference, targets, asks, workspace=int(workspace), softcap=softcap
            )
        found.append(seen.extra("pretend:0"))
        assert 0.9 * said <= found[-1] <= 1.05 * said + 2 * results
        assert found[-1] <= 1.05 * workspace + 2 * results
    assert all(more > 1.3 * less for more, less in pairwise(found[:2]))
    assert all(more > less for more, less in pairwise(found))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["js", "tv"])
def test_a_distance_holds_its_workspace(
    pretend: Pretend, monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(readout_tiles, "CHUNK", 512)
    width, vocabulary, layers, columns = 16, 4000, 6, 30
    state = torch.randn(layers, columns, width).to("pretend:0", dtype)
    weight = torch.randn(vocabulary, width).to("pretend:0", dtype)
    totals = torch.zeros(layers, columns).to("pretend:0"), torch.zeros(columns).to("pretend:0")
    form = readout_distance.costs(width, dtype, kind)
    found: list[int] = []
    for workspace in (10**6, 5 * 10**5, 10**5):
        said = form.of_tiles(layers, tiles_of(layers, columns, vocabulary, workspace, form))
        with watched() as seen:
            lens_distance(state, weight, None, state[-1].clone(), *totals, kind, workspace=workspace)
        found.append(seen.extra("pretend:0"))
        assert 0.9 * said <= found[-1] <= 1.05 * said + 2 * layers * columns * 4 + 4000
        assert said <= workspace
    assert all(more > less for more, less in pairwise(found))
