"""What a lens has read: whole or refused, windows of it, and numbers that follow from others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.lens.results_by_hand import TEXT, by_hand, equal, logits_of
from tracelens.errors import LensResultError, LensSelectionError
from tracelens.lens.result import LensResult
from tracelens.lens.results import LensResults

LENS = by_hand()


def test_the_numbers_are_those_of_a_soft_max_over_the_whole_vocabulary() -> None:
    """Against formulas written out with probabilities in double precision."""
    probs = logits_of((2, 6, 13)).double().softmax(-1)
    final = probs[-1, -1]
    following = LENS.next_ids[:-1]
    own = probs[:, :, torch.arange(12), following]
    close(LENS.prob[..., :-1], own)
    close(LENS.cross_entropy[..., :-1], -own.log())
    assert torch.equal(LENS.rank[..., :-1], (probs[:, :, :-1] > own[..., None]).sum(-1))
    close(LENS.entropy, -(probs * probs.log()).sum(-1))
    close(LENS.kl, (final * (final / probs).log()).sum(-1))
    middle = (final + probs) / 2
    close(LENS.js, ((final * (final / middle).log() + probs * (probs / middle).log()) / 2).sum(-1))
    close(LENS.tv, (final - probs).abs().sum(-1) / 2)
    close(LENS.logsumexp, logits_of((2, 6, 13)).double().logsumexp(-1))
    best = probs.sort(-1, descending=True)
    assert torch.equal(LENS.top_ids, best.indices[..., :4])
    close(LENS.probs, best.values[..., :4])
    close(LENS.statistic("top_prob"), best.values[..., 0])
    paris, rome = LENS.tracked.values()
    close(LENS.log_prob_difference(" Paris", " Rome"), (probs[..., paris] / probs[..., rome]).log())
    close(LENS.statistic("prob", " Rome"), probs[..., rome])
    assert torch.equal(LENS.statistic("rank", " Paris"), (probs > probs[..., paris, None]).sum(-1))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected.float(), rtol=2e-4, atol=2e-5)


def test_the_last_token_has_no_next_one() -> None:
    assert int(LENS.next_ids[-1]) == -1
    assert LENS.next_tokens[-1] is None
    assert LENS.log_prob[..., -1].isnan().all()
    assert LENS.prob[..., -1].isnan().all()
    assert (LENS.rank[..., -1] == -1).all()
    assert not LENS.log_prob[..., :-1].isnan().any()


def test_tokens_are_those_of_the_text() -> None:
    assert "".join(LENS.tokens) == TEXT
    assert LENS.next_tokens[:-1] == LENS.tokens[1:]
    assert all(LENS.text_of.values())


def test_a_token_that_never_comes_leaves_numbers_as_they_are() -> None:
    """Logits of minus infinity are masked tokens; 0 x infinity must not make a nan of the rest."""
    logits = logits_of((1, 2, 3))
    logits[..., 5] = -torch.inf
    lens = LensResult.from_logits(logits, [7, 8, 9], top_k=2)
    for name in ("entropy", "kl", "js", "tv"):
        assert lens.statistic(name).isfinite().all(), name
    assert (lens.entropy > 0.5).all()


# --- windows ---------------------------------------------------------------------------------------------------------

EVERY_OTHER = by_hand(layers=4)
EVERY_OTHER = replace(EVERY_OTHER, layers=(2, 4, 8, 16), positions=tuple(range(100, 113)), n_prompt=108)


@pytest.mark.parametrize(
    ("window", "layers"),
    [
        (None, (2, 4, 8, 16)),
        (4, (4,)),
        (-1, (16,)),
        ([2, 16], (2, 16)),
        ([2, -1], (2, 16)),
        (range(2, 5, 2), (2, 4)),
        (slice(3, 16), (4, 8)),
        (slice(None, -1), (2, 4, 8)),
        (slice(-2, None), (8, 16)),
        (slice(None, None, 2), (2, 8)),
        (slice(-99, 5), (2, 4)),
        (torch.tensor(8), (8,)),
    ],
)
def test_a_window_of_layers(window: Any, layers: tuple[int, ...]) -> None:
    if isinstance(window, torch.Tensor):
        window = int(window)
    part = EVERY_OTHER.at(layers=window)
    assert part.layers == layers
    places = [EVERY_OTHER.layers.index(layer) for layer in layers]
    equal(part.top_ids, EVERY_OTHER.top_ids[:, places])
    equal(part.entropy, EVERY_OTHER.entropy[:, places])
    equal(part.statistic("rank", " Rome"), EVERY_OTHER.statistic("rank", " Rome")[:, places])
    assert part.tokens == EVERY_OTHER.tokens


def test_a_window_of_positions_has_their_tokens() -> None:
    part = EVERY_OTHER.at(positions=slice(-3, None))
    assert part.positions == (110, 111, 112)
    assert part.tokens == EVERY_OTHER.tokens[-3:]
    equal(part.next_ids, EVERY_OTHER.next_ids[-3:])
    equal(part.kl, EVERY_OTHER.kl[..., -3:])
    equal(
        part.log_prob_difference(" Paris", " Rome"),
        EVERY_OTHER.log_prob_difference(" Paris", " Rome")[..., -3:],
    )
    assert part.n_prompt == 108


@pytest.mark.parametrize(
    "window", [3, -5, [2, 3], [4, 2], [2, 2], [], slice(5, 5), slice(None, None, -1), 2.0, "2", True]
)
def test_a_window_of_what_is_not_there_is_refused(window: Any) -> None:
    with pytest.raises(LensSelectionError) as caught:
        EVERY_OTHER.at(layers=window)
    assert caught.value.at is not None
    assert caught.value.at.filename == __file__
    assert caught.value.instead


def test_one_component() -> None:
    part = LENS["resid_post"]
    assert part.components == ("resid_post",)
    equal(part.top_log_probs, LENS.top_log_probs[1:])
    equal(part.js, LENS.js[1:])
    equal(
        part.tracked_ranks,
        LENS.statistic("rank", " Paris")[1:, ..., None].new_tensor(part.tracked_ranks.numpy()),
    )
    with pytest.raises(LensSelectionError, match="no component 'mlp_out'; it has 'attn_out', 'resid_post'"):
        LENS["mlp_out"]


# --- statistics that are not there -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("entropie",), "'entropy'"),
        (("entropy", " Paris"), "one of 'log_prob'"),
        (("rank", " Berlin"), "track"),
        (("log_prob_difference", " Paris"), "with two"),
        (("log_prob_difference", " Paris", " Berlin"), "track"),
    ],
)
def test_a_statistic_that_is_not_there_is_refused(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(LensSelectionError) as caught:
        LENS.statistic(*words)
    assert said in str(caught.value.instead)
    assert caught.value.at is not None


def test_a_statistic_that_was_not_asked_for_says_how_to_ask() -> None:
    lean = replace(LENS, statistics={"entropy": LENS.entropy})
    assert lean.names == ("top_prob", "top_log_prob", "entropy")
    with pytest.raises(LensSelectionError) as caught:
        lean.prob
    assert "metrics=[..., 'log_prob']" in str(caught.value.instead)
    with pytest.raises(LensSelectionError) as caught:
        lean.kl
    assert "metrics=[..., 'kl']" in str(caught.value.instead)


# --- parts that do not fit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"components": ("resid_post",)}, "top_ids is [2, 6, 13, 4]"),
        ({"components": ()}, "components is ()"),
        ({"components": ("a", "a")}, "twice"),
        ({"layers": (0, 1, 2, 3, 4)}, "top_ids"),
        ({"layers": (0, 1, 2, 3, 5, 4)}, "upwards"),
        ({"layers": [0, 1, 2, 3, 4, 5]}, "a tuple"),
        ({"positions": tuple(range(12))}, "token_ids is [13]"),
        ({"positions": (*range(12), 10)}, "twice"),
        ({"token_ids": torch.arange(13, dtype=torch.int32)}, "int32"),
        ({"next_ids": torch.full((13,), -2)}, "negative"),
        ({"top_ids": torch.zeros(2, 6, 13, 0, dtype=torch.int64)}, "top_k=1"),
        ({"top_log_probs": torch.zeros(2, 6, 13, 3)}, "top_log_probs is [2, 6, 13, 3]"),
        ({"top_log_probs": torch.zeros(2, 6, 13, 4, dtype=torch.bfloat16)}, "bfloat16"),
        ({"statistics": {"entropie": torch.zeros(2, 6, 13)}}, "'entropie' is not a statistic"),
        ({"statistics": {"rank": torch.zeros(2, 6, 13)}}, "of float32"),
        ({"statistics": {"kl": torch.zeros(2, 6, 13, requires_grad=True)}}, "autograd"),
        ({"statistics": {"kl": torch.zeros(2, 6, 13, device="meta")}}, "on meta"),
        ({"statistics": {"kl": [0.0]}}, "is [0.0]"),
        ({"tracked": {}}, "tracked_log_probs"),
        ({"tracked_ranks": None}, "tracked_ranks is None"),
        ({"n_prompt": 0}, "n_prompt"),
        ({"text_of": {}}, "text_of has no text"),
        (
            {"text_of": {**LENS.text_of, int(LENS.top_ids[0, 0, 0, 0]): ""}},
            "text_of has no text for the token [",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts: dict[str, Any], said: str) -> None:
    with pytest.raises(LensResultError) as caught:
        replace(LENS, **parts)
    assert said in str(caught.value)
    assert caught.value.instead
    assert caught.value.at is not None
    assert caught.value.at.text == "replace(LENS, **parts)"


def test_dense_logits_have_four_axes() -> None:
    with pytest.raises(LensResultError, match=r"logits are \[2, 3\]"):
        LensResult.from_logits(torch.zeros(2, 3), [1])


def test_what_is_held_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        LENS.statistics["kl"] = torch.zeros(1)
    with pytest.raises(AttributeError):
        LENS.model = "another"


# --- several prompts -------------------------------------------------------------------------------------------------


def test_results_of_several_prompts() -> None:
    results = LensResults((LENS, EVERY_OTHER))
    assert len(results) == 2
    assert results[1] is EVERY_OTHER
    assert list(results) == [LENS, EVERY_OTHER]
    assert repr(results).startswith("prompt 0: Logit lens of tiny")
    assert "left out: 2 more prompts" in repr(LensResults((LENS,) * 6))
    with pytest.raises(LensResultError):
        LensResults(())
