"""Streams of models in several processes: the events of one process, and ranks that end them together."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

import tracelens as tl
from tests.support.families import D_MODEL
from tests.support.ranks import fragile
from tests.support.spread_models import Both, fixture_of
from tracelens import errors, ranked
from tracelens.backends.ranks.pool import Ranks

ROWS = [[5, 6, 7, 8, 9, 10, 4, 3], [11, 12], [3, 4, 5]]
NEW = 5
SHARP: dict[str, Any] = {"initializer_range": 0.4}
"""So that one token stands out at every step, and all ways of adding up numbers find the same one."""
V = 3 * torch.randn(D_MODEL, generator=torch.Generator().manual_seed(0))
SPREADS = {"llama tp2": ("llama", {"tp": 2}), "gemma3 pp2": ("gemma3", {"pp": 2})}


models = fixture_of(SPREADS, SHARP)


def recorded(model: tl.Model) -> tl.Graph:
    """Values in parts, partial sums and whole ones, of all steps, of some, of one, and of an earlier one in later."""
    with model.record(generation=True) as r:
        r.decode.layers[0].resid_post[:, -1] += 0.3 * r.prefill.layers[2].resid_post.tok[-1]
        model.layers[0].resid_post += V
        r.decode.layers[2].mlp_act[..., :40] = 0
        for name, scope in {"all": model, "decode": r.decode, "one": r.steps[2]}.items():
            scope.layers[:].mlp_act.save(f"{name} act")
            scope.layers[1].z[:, -1].save(f"{name} z")
            scope.layers[2].mlp_out.save(f"{name} out", dtype=torch.bfloat16)
        model.logits[:, -1].argmax(-1).save("pick")
        (model.next_tokens[:, -1] * 1).save("next")  # known when the pass is over
    return r.graph


def same(spread: Any, one: Any) -> None:
    """Two events."""
    assert (spread.step, spread.tokens, list(spread.saves)) == (one.step, one.tokens, list(one.saves))
    for name, wanted in one.saves.items():
        pairs = (
            zip(spread[name], wanted, strict=True) if isinstance(wanted, list) else [(spread[name], wanted)]
        )
        for x, y in pairs:
            within = 2e-2 if x.dtype is torch.bfloat16 else 2e-4
            torch.testing.assert_close(
                x, y, rtol=within, atol=within, msg=lambda m, name=name: f"{name}: {m}"
            )


def free(models: Both) -> None:
    """The ranks do what they did before."""
    found: list[torch.Tensor] = []
    for model in (models.spread, models.one):
        with model.trace(ROWS[:1]):
            logits = model.logits.save()
        found.append(logits.value)
    torch.testing.assert_close(*found, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    "options",
    [{"eos_token_id": None}, {"eos_token_id": None, "do_sample": True, "seed": 3}, {"eos_token_id": "found"}],
    ids=["greedy", "sampled", "rows end"],
)
def test_events_are_those_of_one_process(models: Both, options: dict[str, Any]) -> None:
    if options["eos_token_id"] is not None:
        rows = list(models.one.stream(ROWS, recorded(models.one), max_new_tokens=NEW, eos_token_id=None))
        options = {"eos_token_id": rows[1].tokens[1]}
    wanted = list(models.one.stream(ROWS, recorded(models.one), max_new_tokens=NEW, **options))
    events = list(models.spread.stream(ROWS, recorded(models.spread), max_new_tokens=NEW, **options))
    for spread, one in zip(events, wanted, strict=True):
        same(spread, one)
    if "seed" not in options and options["eos_token_id"] is not None:
        assert any(None in event.tokens for event in events)
    free(models)


def test_leaving_the_loop_ends_it_on_all_ranks(models: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    pass_on = ranked._pass_on
    monkeypatch.setattr(ranked, "_pass_on", lambda *said: told.append(said[1]) or pass_on(*said))
    ranks = models.spread.ranks
    assert ranks is not None
    pids = ranks.pids
    graph = recorded(models.spread)
    stream = models.spread.stream(ROWS, graph, max_new_tokens=40, eos_token_id=None)
    seen = []
    for event in stream:
        seen.append(event.step)
        if event.step == 2:
            break
    free(models)

    def body() -> None:
        for event in models.spread.stream(ROWS, graph, max_new_tokens=40, eos_token_id=None):
            raise RuntimeError(event.step)

    with pytest.raises(RuntimeError):
        body()
    free(models)
    with models.spread.stream(ROWS, graph, max_new_tokens=40, eos_token_id=None) as other:
        next(other)
    assert next(other, None) is None
    free(models)
    unused = models.spread.stream(ROWS, graph, max_new_tokens=40)
    unused.close()
    assert seen == [0, 1, 2]
    assert len(told) <= 3 * 5  # at most some steps ahead of the loops, and not all 40
    assert ranks.pids == pids, "nothing had to be started anew"


def test_the_ranks_take_part_in_one_stream_at_a_time(models: Both) -> None:
    """What is asked for in its loop would wait for its end."""
    with models.spread.stream(ROWS, max_new_tokens=9, eos_token_id=None) as stream:
        next(stream)
        with (
            pytest.raises(errors.NestedTraceError, match="loop over a stream") as caught,
            models.spread.trace(ROWS),
        ):
            models.spread.logits.save()
        assert caught.value.at is not None
        assert caught.value.at.filename == __file__
        other = models.spread.stream(ROWS, max_new_tokens=2)
        with pytest.raises(errors.NestedTraceError) as caught:
            next(other)
        assert caught.value.at is not None
        assert caught.value.at.text == "other = models.spread.stream(ROWS, max_new_tokens=2)"
        assert next(stream).step == 1
    free(models)


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    """Two ranks in which ``sinh`` goes wrong where they are told so."""
    with fragile(2) as ranks:
        yield ranks


@pytest.mark.parametrize("how", ["tp", "pp"])
def test_a_rank_that_fails_in_a_step_ends_the_stream_with_its_line(
    how: Literal["tp", "pp"], two: Ranks, tiny_folder: Path
) -> None:
    model = tl.load(tiny_folder, ranks=two, tp=1 + (how == "tp"), pp=1 + (how == "pp"))
    with model.record(generation=True) as r:
        (model.layers[0].resid_post / 10).sinh().save("x")
    pids = two.pids

    def events() -> tuple[list[int], errors.OpFailedError | None]:
        seen: list[int] = []
        try:
            for event in model.stream([[5, 6, 7]], r, max_new_tokens=5, eos_token_id=None):
                seen.append(event.step)
        except errors.OpFailedError as error:
            return seen, error
        return seen, None

    for rank in (0, 1, "all"):
        two.ask("arm", {"rank": rank, "how": "third time"})
        seen, error = events()
        if how == "pp" and rank == 1:  # which has no such step
            assert (seen, error) == ([0, 1, 2, 3, 4], None)
            continue
        assert seen == [0, 1]
        assert error is not None
        assert "no memory is left" in str(error)
        assert error.at is not None
        assert error.at.text.endswith('.sinh().save("x")')
    two.ask("arm", {"rank": None, "how": "memory"})
    assert len(list(model.stream([[5, 6, 7]], r, max_new_tokens=3, eos_token_id=None))) == 3
    assert two.pids == pids, "nothing had to be started anew"


def test_the_time_limit_is_that_of_a_step(two: Ranks, tiny_folder: Path) -> None:
    """The steps before it, and what the loop does meanwhile, are not counted."""
    model = tl.load(tiny_folder, tp=2, ranks=two, timeout=30)
    with model.record(generation=True) as r:
        r.steps[1].layers[0].resid_post.sinh().save("x")
    assert model._parts is not None
    model._parts.timeout = 3
    two.ask("arm", {"rank": 1, "how": "short sleep"})
    events = model.stream([[5, 6, 7]], r, max_new_tokens=4, eos_token_id=None)
    next(events)
    time.sleep(5.4)  # step 1 takes 2 of these seconds, and then the ranks wait
    assert [event.step for event in events] == [1, 2, 3]
    two.ask("arm", {"rank": 1, "how": "sleep"})
    with pytest.raises(errors.RankTimeoutError, match="each step has that time") as caught:
        list(model.stream([[5, 6, 7]], r, max_new_tokens=3, eos_token_id=None))
    assert caught.value.at is not None
    assert caught.value.at.filename == __file__


def test_a_rank_that_dies_ends_the_stream(two: Ranks, tiny_folder: Path) -> None:
    """Also ranks that were started anew, as here, after a step that took too long."""
    model = tl.load(tiny_folder, tp=2, ranks=two)
    stream = model.stream([[5, 6, 7]], max_new_tokens=40, eos_token_id=None)
    next(stream)
    two._owner.ranks[1].kill()
    with pytest.raises(errors.RankDiedError):
        list(stream)


def test_what_a_stream_or_a_generation_refuses(models: Both, tmp_path: Path) -> None:
    """The same words as in one process, and ranks that go on."""
    ranks = models.spread.ranks
    assert ranks is not None
    pids = ranks.pids
    for options in (
        {"bad_words_ids": [1]},
        {"unknown_option": 1},
        {"top_p": 7},
        {"temperature": 0.0, "do_sample": True},
    ):
        said: list[str] = []
        for model in (models.spread, models.one):
            with pytest.raises(errors.OptionError) as caught:  # noqa: SIM117  # the guilty line is the inner one
                with model.generate(ROWS, max_new_tokens=2, **options):
                    model.layers[0].resid_post.save()
            assert caught.value.at is not None
            assert "model.generate(ROWS" in caught.value.at.text
            said.append(f"{caught.value.problem} {caught.value.instead}")
            with pytest.raises(errors.OptionError) as caught:
                list(model.stream(ROWS, max_new_tokens=2, **options))
            said.append(f"{caught.value.problem} {caught.value.instead}")
        assert len(set(said)) == 1
    file = tmp_path / "h.safetensors"
    with models.spread.record(generation=True) as r:
        models.spread.layers[0].resid_post.save("h", to=file)
    with pytest.raises(errors.OptionError, match="writes no file"):
        models.spread.stream(ROWS, r, max_new_tokens=2)
    free(models)
    assert ranks.pids == pids


def test_what_cannot_be_sent_is_told_by_name(models: Both) -> None:
    """The first rank finds out by itself, while the others wait for a word."""
    model = models.spread
    with model.record(generation=True) as r:
        model.layers[0].resid_post.to(torch.complex128).save("x")
    ranks = model.ranks
    assert ranks is not None
    pids = ranks.pids
    with pytest.raises(errors.RankMessageError, match="complex128"):
        list(model.stream(ROWS, r, max_new_tokens=2))
    free(models)
    assert ranks.pids == pids
