"""Text from models whose layers lie in stages: the tokens are those of one process, whatever a block changes where."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.parallel.cells import knows_ep
from tests.support.families import POSITIONS
from tests.support.ranks import PoolOf
from tests.support.spread_models import Both, both
from tracelens.model import Model

ROWS = [[5, 6, 7, 8, 9, 10, 4, 3], [11, 12], [3, 4, 5]]
"""Of different lengths, and longer than the windows of the tiny models."""
NEW = 9
SHARP: dict[str, Any] = {"initializer_range": 0.4}
"""So that one token stands out at every step, and all ways of adding up numbers find the same one."""
STEERING = 3 * torch.randn(48, generator=torch.Generator().manual_seed(0))

Block = Callable[[Model], None]
SPREADS = {
    "llama pp2": ("llama", {"pp": 2}),
    "llama pp2 eager": ("llama", {"pp": 2, "attn_implementation": "eager"}),
    "llama_tied pp3": ("llama_tied", {"pp": 3}),
    "gemma3 pp2": ("gemma3", {"pp": 2}),
    "mistral pp3": ("mistral", {"pp": 3}),
    "qwen3_moe pp2": ("qwen3_moe", {"pp": 2}),
    "qwen3 pp2 x tp2": ("qwen3", {"pp": 2, "tp": 2}),
}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=knows_ep if "tp" in more else ()) for name, (_, more) in SPREADS.items()
    ],
)
def models(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, ranks_of: PoolOf
) -> Iterator[Both]:
    family, more = SPREADS[request.param]
    found = both(family, tmp_path_factory.mktemp("staged"), ranks_of, settings=SHARP, **more)
    if "eager" in request.param:
        found.hf.set_attn_implementation("eager")
    yield found
    found.close()


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory, ranks_of: PoolOf) -> Iterator[Both]:
    """The first layer on one rank, the other two on another."""
    found = both("llama", tmp_path_factory.mktemp("two"), ranks_of, pp=2, settings=SHARP)
    yield found
    found.close()


def tokens(model: Model, block: Block, rows: Any = ROWS, **options: Any) -> list[Any]:
    with model.generate(rows, **{"max_new_tokens": NEW, "eos_token_id": None, **options}) as t:
        block(model)
    return t.tokens


def nothing(model: Model) -> None:
    pass


def first(model: Model) -> None:
    """In the first stage."""
    model.layers[0].mlp_out[:, -1] *= -2


def embedded(model: Model) -> None:
    """Before all layers."""
    model.embed += STEERING / 10


def last(model: Model) -> None:
    """In the last stage."""
    model.layers[2].head(1).z = 0
    model.layers[2].resid_post += STEERING


def at_the_end(model: Model) -> None:
    """After all layers, of every position."""
    model.logits[..., :40] -= 1000.0


def across(model: Model) -> None:
    """In the last stage, by what the first one has in this same step."""
    model.layers[2].resid_post += 2 * model.layers[0].resid_post


def stale(model: Model) -> None:
    """The same from a stage on, without what travels."""
    model.layers[2].resid_post += 2 * model.layers[1].resid_post


BLOCKS = (first, embedded, last, at_the_end, across)


@pytest.mark.parametrize("block", BLOCKS)
def test_what_a_block_changes_in_any_stage_holds_in_every_step(block: Block, models: Both) -> None:
    expected = tokens(models.one, block)
    assert expected != tokens(models.one, nothing)
    assert tokens(models.spread, block) == expected


def test_a_text_without_any_change(models: Both) -> None:
    assert tokens(models.spread, nothing) == tokens(models.one, nothing)
    # The same without a cache, by passes over the whole text.
    assert tokens(models.spread, across, use_cache=False) == tokens(models.one, across, use_cache=False)


def test_what_travels_is_that_of_the_step(staged: Both) -> None:
    """The value of the first stage, and at each step its own."""
    assert tokens(staged.one, across) != tokens(staged.one, stale)
    for row in ROWS:
        together = tokens(staged.spread, across, row)
        # Traced at once, the whole text has at each position what chose the token that follows.
        with staged.one.trace(row + together[:-1]):
            across(staged.one)
            logits = staged.one.logits.save()
        chosen = logits.value[0, len(row) - 1 :]
        assert chosen.argmax(-1).tolist() == together
        best = chosen.topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > 1e-3


def test_rows_that_end_at_different_steps(models: Both) -> None:
    whole = tokens(models.one, first)
    # A token that some rows come to, and earlier than others.
    end = next(token for token in whole[1] if len({(*row, token).index(token) for row in whole}) > 1)
    expected = tokens(models.one, first, eos_token_id=end)
    assert len({len(row) for row in expected}) > 1
    assert tokens(models.spread, first, eos_token_id=end) == expected


def test_tokens_that_are_drawn(models: Both) -> None:
    """All ranks draw the same, and what one process draws from the seed that they are sent."""
    drawing: dict[str, Any] = {"do_sample": True, "temperature": 1.5, "top_k": 20}
    torch.manual_seed(5)
    actual = tokens(models.spread, across, **drawing)
    torch.manual_seed(5)
    torch.manual_seed(int(torch.randint(2**62, ()).item()))
    expected = tokens(models.one, across, **drawing)
    assert actual == expected
    assert actual != tokens(models.one, across)
    torch.manual_seed(6)
    assert tokens(models.spread, across, **drawing) != actual


def test_several_texts_are_followed_at_once(staged: Both) -> None:
    """Beams change places in the caches of all stages."""
    beams: dict[str, Any] = {"num_beams": 3}
    expected = tokens(staged.one, last, **beams)
    assert expected != tokens(staged.one, last)
    assert tokens(staged.spread, last, **beams) == expected


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_caches_of_other_kinds(cache: str, staged: Both) -> None:
    other: dict[str, Any] = {"cache_implementation": cache}
    assert tokens(staged.spread, across, **other) == tokens(staged.one, across, **other)


def test_tokens_are_proposed_from_the_prompt(staged: Both) -> None:
    """Steps of several tokens, of which some are taken back."""
    row = [[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]]
    proposing: dict[str, Any] = {"prompt_lookup_num_tokens": 3}
    assert tokens(staged.spread, across, row, **proposing) == tokens(staged.one, across, row)


def test_one_token_and_the_longest_text(staged: Both) -> None:
    for new in (1, POSITIONS - len(ROWS[0])):
        options = {"max_new_tokens": new}
        assert tokens(staged.spread, last, **options) == tokens(staged.one, last, **options)


def test_traces_before_and_after_find_their_own_stages(staged: Both) -> None:
    def traced(model: Model) -> torch.Tensor:
        with model.trace(ROWS[0]):
            across(model)
            logits = model.logits.save()
        return logits.value

    for _ in range(2):
        torch.testing.assert_close(traced(staged.spread), traced(staged.one), rtol=1e-4, atol=1e-4)
        assert tokens(staged.spread, last) == tokens(staged.one, last)
