"""Two runs beside each other: differences where the text is the same, refused where it is not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.lens.results_by_hand import by_hand, equal, logits_of
from tests.support.tokenizers import byte_level_bpe
from tracelens.errors import LensComparisonError, LensSelectionError
from tracelens.lens.result import LensResult

PLAIN = by_hand()
STEERED = LensResult.from_logits(
    logits_of((2, 6, 13)) + 0.5 * logits_of((2, 6, 13), seed=1),
    PLAIN.token_ids.tolist(),
    tokenizer=byte_level_bpe(),
    components=PLAIN.components,
    n_prompt=8,
    top_k=4,
    track=PLAIN.tracked,
    model="tiny",
)
BOTH = PLAIN.compare(STEERED, names=("plain", "steered"))


def test_a_change_is_the_second_minus_the_first() -> None:
    for words in (
        ("entropy",),
        ("kl",),
        ("prob",),
        ("log_prob", " Rome"),
        ("log_prob_difference", " Paris", " Rome"),
    ):
        change = BOTH.statistic(*words)
        equal(change, STEERED.statistic(*words) - PLAIN.statistic(*words))
        assert change[..., :-1].abs().max() > 0
    ranks = BOTH.statistic("rank")
    equal(ranks[..., :-1], (STEERED.rank - PLAIN.rank)[..., :-1].float())
    assert ranks[..., -1].isnan().all()


def test_what_is_said_of_different_next_tokens_is_not_compared() -> None:
    """The last token of a prompt goes on differently in the two runs."""
    elsewhere = replace(
        STEERED, next_ids=torch.cat([STEERED.next_ids[:-2], STEERED.token_ids[:1], STEERED.next_ids[-1:]])
    )
    both = PLAIN.compare(elsewhere)
    for name in ("log_prob", "prob", "rank", "cross_entropy"):
        change = both.statistic(name)
        assert change[..., -2:].isnan().all(), name
        assert not change[..., :-2].isnan().any(), name
    assert not both.statistic("rank", " Rome").isnan().any()
    assert not both.statistic("entropy").isnan().any()


def test_likeliest_tokens_of_both() -> None:
    same = BOTH.same_top
    assert same.any()
    assert not same.all()
    assert torch.equal(same, PLAIN.top_ids[..., 0] == STEERED.top_ids[..., 0])
    at = (1, 5, 3)
    mine, theirs = (set(result.top_ids[at].tolist()) for result in (PLAIN, STEERED))
    assert float(BOTH.overlap[at]) == len(mine & theirs) / 4
    assert (PLAIN.compare(PLAIN).overlap == 1).all()


def test_a_comparison_shows_what_differs() -> None:
    text = BOTH.table("kl", width=200)
    assert (
        f"plain → steered, where the likeliest token differs: {int((~BOTH.same_top).sum())} of 156 cells"
        in text
    )
    assert "change of the KL(final || layer)" in text
    assert " → " in text.splitlines()[-3]
    assert repr(PLAIN.compare(PLAIN)).count("→") == 1


def test_a_comparison_as_a_table() -> None:
    table = BOTH.to_pandas()
    assert len(table) == 156
    assert (table["entropy: steered"] - table["entropy: plain"] == table["change of entropy"]).all()
    assert table["rank: plain"].isna().sum() == 12
    assert table["change of rank"].isna().sum() == 12
    assert table.same_top.tolist() == BOTH.same_top.reshape(-1).tolist()


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (STEERED.at(positions=slice(0, 12)), "the positions differ"),
        (STEERED.at(layers=slice(1, None)), "the layers differ: (0, 1, 2, 3, 4, 5) and (1, 2, 3, 4, 5)"),
        (STEERED["resid_post"], "the components differ: ('attn_out', 'resid_post') and ('resid_post',)"),
        (
            replace(STEERED, token_ids=torch.cat([STEERED.token_ids[:9], STEERED.token_ids[3:7]])),
            "position 9 has ' of' in one run and ' France' in the other, and at 3 more positions",
        ),
    ],
)
def test_runs_of_something_else_are_refused(other: LensResult, said: str) -> None:
    with pytest.raises(LensComparisonError) as caught:
        PLAIN.compare(other)
    assert said in str(caught.value)
    assert caught.value.instead
    assert caught.value.at is not None
    assert caught.value.at.filename == __file__


def test_a_statistic_of_one_run_alone_is_refused() -> None:
    lean = replace(STEERED, statistics={})
    both = PLAIN.compare(lean)
    assert both.names_of_statistics == ("top_prob", "top_log_prob")
    with pytest.raises(LensSelectionError):
        both.statistic("entropy")
