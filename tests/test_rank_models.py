"""Models on ranks as users hold them: closed, let go of, interrupted, too slow, compared with one process."""

from __future__ import annotations

import copy
import gc
import os
import signal
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tracelens as tl
from tests.support.families import FAMILIES
from tests.support.ranks import PoolOf, fragile
from tracelens.errors import (
    ExtraMemoryError,
    ModelClosedError,
    OptionError,
    PlansDifferError,
    RankDiedError,
    RankTimeoutError,
    UntrustedApplyError,
)
from tracelens.model import Model
from tracelens.parallel_check import ParallelReport, SiteCheck

PROMPT = [[5, 6, 7, 8]]


@pytest.fixture(scope="module")
def one(tiny_folder: Path) -> Model:
    return tl.load(tiny_folder)


@pytest.fixture(scope="module")
def shared(tiny_folder: Path, ranks_of: PoolOf) -> Iterator[Model]:
    """A model whose layers two ranks share."""
    with tl.load(tiny_folder, tp=2, ranks=ranks_of(2)) as model:
        yield model


@pytest.fixture(scope="module")
def frail() -> Iterator[tl.Ranks]:
    """Two ranks of this file's own, which may be killed; their ``sinh`` can be made slow."""
    with fragile(2) as ranks:
        yield ranks


def neurons(model: Model) -> torch.Tensor:
    with model.trace(PROMPT):
        found = model.layers[1].mlp_act.sinh().save()
    return found.value


def held(ranks: tl.Ranks) -> list[list[str]]:
    """The models that each rank holds."""
    return [reply.header["models"] for reply in ranks.ask("ping")]


# --- what goes wrong around a trace ----------------------------------------------------------------------------------


@pytest.mark.timeout(120)
def test_a_rank_that_is_killed_in_a_trace_is_told_and_the_next_trace_works(
    frail: tl.Ranks, tiny_folder: Path, one: Model
) -> None:
    with tl.load(tiny_folder, tp=2, ranks=frail) as model, tl.load(tiny_folder, pp=2, ranks=frail) as stages:
        want = neurons(one)
        torch.testing.assert_close(neurons(model), want, rtol=1e-5, atol=1e-5)
        frail.ask("arm", {"rank": 1, "how": "sleep"})
        timer = threading.Timer(0.5, os.kill, [frail.pids[1], signal.SIGKILL])
        timer.start()
        with pytest.raises(RankDiedError, match=r"rank 1 of 2 was ended by SIGKILL .* at 'run'"):
            neurons(model)
        timer.join()
        # Both models are loaded again, each when it is needed.
        torch.testing.assert_close(neurons(model), want, rtol=1e-5, atol=1e-5)
        assert len(held(frail)[0]) == 1
        torch.testing.assert_close(neurons(stages), want, rtol=1e-5, atol=1e-5)
    assert held(frail) == [[], []]


def test_an_interrupted_trace_leaves_the_ranks_usable(frail: tl.Ranks, tiny_folder: Path, one: Model) -> None:
    with tl.load(tiny_folder, tp=2, ranks=frail) as model:
        want = neurons(one)
        neurons(model)
        pids = frail.pids
        frail.ask("arm", {"rank": "all", "how": "short sleep"})
        timer = threading.Timer(0.5, signal.raise_signal, [signal.SIGINT])
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            neurons(model)
        timer.join()
        frail.ask("arm", {"rank": None, "how": "short sleep"})
        torch.testing.assert_close(neurons(model), want, rtol=1e-5, atol=1e-5)
        assert frail.pids == pids


def test_a_trace_that_takes_too_long_is_told(
    frail: tl.Ranks, tiny_folder: Path, one: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tl.load(tiny_folder, tp=2, ranks=frail, timeout=0.5) as model, monkeypatch.context() as limits:
        frail.ask("arm", {"rank": 1, "how": "sleep"})
        limits.setattr(frail, "timeout", 3.0)  # which would end it too: the message says which limit did
        with pytest.raises(RankTimeoutError, match=r"did not finish 'run' within 0\.5 s;") as caught:
            neurons(model)
        assert 1 in caught.value.waiting_for
    with tl.load(tiny_folder, tp=2, ranks=frail) as model:
        torch.testing.assert_close(neurons(model), neurons(one), rtol=1e-5, atol=1e-5)


# --- what a model is -------------------------------------------------------------------------------------------------


def test_a_closed_model_says_so(tiny_folder: Path, ranks_of: PoolOf, shared: Model) -> None:
    ranks = ranks_of(2)
    before = held(ranks)
    with tl.load(tiny_folder, pp=2, ranks=ranks) as model:
        assert all(len(now) == len(then) + 1 for now, then in zip(held(ranks), before, strict=True))
        program = model.compile(_recorded(model))
        assert program(PROMPT)["found"].shape == (1, 4, 48)
    model.close()
    assert held(ranks) == before
    with pytest.raises(ModelClosedError, match="this model was closed"):
        neurons(model)
    with pytest.raises(ModelClosedError, match="this model was closed"):
        program(PROMPT)
    assert neurons(shared).shape == (1, 4, 80), "the other model on these ranks is there"


def _recorded(model: Model) -> Any:
    with model.record() as recorded:
        model.layers[1].resid_post.save("found")
    return recorded


def test_ranks_let_go_of_a_model_that_nobody_has(tiny_folder: Path, ranks_of: PoolOf, shared: Model) -> None:
    ranks = ranks_of(2)
    before = held(ranks)
    model = tl.load(tiny_folder, tp=2, ranks=ranks)
    program = model.compile(_recorded(model))
    assert held(ranks) != before
    gone = weakref.ref(model._parts)
    del model
    gc.collect()
    program(PROMPT)  # it needs the parts
    del program
    gc.collect()
    assert gone() is None
    assert held(ranks) == before


def test_a_model_on_ranks_is_not_copied(shared: Model) -> None:
    with pytest.raises(OptionError, match="cannot be copied"):
        copy.deepcopy(shared)


# --- what it can do --------------------------------------------------------------------------------------------------


def test_what_ranks_cannot_do_is_refused_at_the_line(shared: Model) -> None:
    with (
        pytest.raises(OptionError, match="the ranks keep nothing between runs") as kept,
        shared.trace(PROMPT),
    ):
        shared.logits.save(device="keep")
    assert kept.value.at is not None
    assert kept.value.at.filename == __file__
    with pytest.raises(OptionError, match="the peak of memory"), shared.trace(PROMPT, measure=True):
        shared.logits.save()
    with pytest.raises(ExtraMemoryError), shared.trace(PROMPT, max_extra_memory=100):
        shared.logits.save()
    with pytest.raises(UntrustedApplyError), shared.trace(PROMPT):
        tl.apply(torch.sin, shared.layers[0].resid_post, like=shared.layers[0].resid_post).save()


def test_saves_go_to_files_of_this_process(shared: Model, one: Model, tmp_path: Path) -> None:
    path = tmp_path / "saved.safetensors"
    with shared.trace(PROMPT, max_extra_memory="1GiB"):
        found = shared.layers[1].q.save(to=str(path))
    with one.trace(PROMPT):
        want = one.layers[1].q.save()
    assert path.exists()
    torch.testing.assert_close(found.value, want.value, rtol=1e-5, atol=1e-5)


def test_a_sweep_on_ranks_is_that_of_one_process(shared: Model, one: Model) -> None:
    def swept(model: Model) -> torch.Tensor:
        with model.record(PROMPT) as recorded:
            strength = tl.constant(1.0, name="strength")
            model.layers[1].resid_post += strength * model.unembed[3]
            model.logits[:, -1].save("last")
        return tl.sweep(model.compile(recorded), PROMPT, strength=[0.0, 1.0, 40.0])["last"]

    want = swept(one)
    assert not torch.allclose(want[0], want[2], atol=1e-2)
    torch.testing.assert_close(swept(shared), want, rtol=1e-5, atol=1e-5)


class _Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(48, 100), nn.Linear(100, 48)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(x).relu()

    def decode(self, features: torch.Tensor) -> torch.Tensor:
        return self.decoder(features)


def test_features_on_ranks_are_those_of_one_process(shared: Model, one: Model) -> None:
    torch.manual_seed(0)
    module = _Autoencoder().requires_grad_(False)

    def features(model: Model) -> dict[str, torch.Tensor]:
        with model.trace(PROMPT):
            with tl.splice(model.layers[1].resid_post, module) as spliced:
                found = spliced.features.save()
                spliced.features[..., :50] = 0.0
            gradient = tl.grad(model.logits[:, -1].mean(), model.layers[0].mlp_out).save()
            logits = model.logits.save()
        return {"features": found.value, "gradient": gradient.value, "logits": logits.value}

    want = features(one)
    assert want["gradient"].abs().sum() > 0
    torch.testing.assert_close(features(shared), want, rtol=1e-4, atol=1e-6)


# --- beside one process ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [{"tp": 2}, {"pp": 2}], ids=["tp2", "pp2"])
def test_every_site_on_ranks_is_that_of_one_process(
    sizes: dict[str, int], tiny_folder: Path, ranks_of: PoolOf
) -> None:
    with tl.load(tiny_folder, ranks=ranks_of(2), **sizes) as model:
        report = model.check_parallel([[5, 6, 7, 8], [9, 10]])
    present = {row.name for row in model.sites() if row.absent is None} - {"head_out"}
    assert {row.site for row in report} == present
    assert report.ok
    assert report.worst.error < 5e-6
    assert all(row.refused is None for row in report)
    assert "all sites are within 1.0e-05" in repr(report)
    assert "<table>" in report._repr_html_()


def test_a_model_on_ranks_with_other_numbers_is_noticed(
    tiny_folder: Path, tmp_path: Path, ranks_of: PoolOf
) -> None:
    other = tmp_path / "other"
    hf: Any = FAMILIES["llama"].build()
    hf.save_pretrained(other)
    with tl.load(other, tp=2, ranks=ranks_of(2)) as model:
        with torch.no_grad():
            hf.model.layers[1].mlp.down_proj.weight[3, 5] += 0.5
        hf.save_pretrained(other)  # what is loaded now is another model
        report = model.check_parallel(PROMPT)
    assert not report.ok
    wrong = {row.site for row in report if not row.within}
    assert "mlp_out" in wrong
    assert "embed" not in wrong
    assert report["mlp_out"].layer in (1, 2)
    assert report["attn_out"].layer == 2
    assert "NOT all sites are within" in repr(report)


def test_a_model_of_this_process_has_nothing_to_compare(one: Model) -> None:
    with pytest.raises(OptionError, match="compares a model on ranks"):
        one.check_parallel(PROMPT)


def test_a_save_that_does_not_fit_is_refused_before_anything_runs(shared: Model, one: Model) -> None:
    ranks: Any = shared.ranks
    pids = ranks.pids
    with (
        pytest.raises(ExtraMemoryError, match="the run would hold") as caught,
        shared.trace(PROMPT, max_extra_memory="1KiB"),
    ):
        shared.layers[:].mlp_act.save()
    assert caught.value.at is not None
    assert caught.value.at.filename == __file__
    with shared.trace(PROMPT, max_extra_memory="100KiB"):
        shared.layers[:].mlp_act.save()
    torch.testing.assert_close(neurons(shared), neurons(one), rtol=1e-5, atol=1e-5)
    assert ranks.pids == pids


def test_a_model_that_was_closed_has_nothing_to_compare(tiny_folder: Path, ranks_of: PoolOf) -> None:
    model = tl.load(tiny_folder, tp=2, ranks=ranks_of(2))
    model.close()
    with pytest.raises(ModelClosedError):
        model.check_parallel(PROMPT)


def test_what_cannot_be_compared_is_not_alike() -> None:
    rows = (
        SiteCheck("z", 0.0, 1, within=True),
        SiteCheck("q", float("nan"), None, within=False, refused="why"),
    )
    report = ParallelReport(rows, 1e-5, "a model")
    assert not report.ok
    assert "1 COULD NOT BE COMPARED" in repr(report)
    assert report.worst.site == "z"


@pytest.mark.parametrize("layer", [0, 2])
def test_a_module_is_replaced_in_a_stage(layer: int, one: Model, tiny_folder: Path, ranks_of: PoolOf) -> None:
    found: list[torch.Tensor] = []
    with tl.load(tiny_folder, pp=2, ranks=ranks_of(2)) as stages:
        for model in (one, stages):
            with model.trace(PROMPT):
                before = model.layers[0].resid_pre
                model.layers[layer].replace(mlp_add=0.5 * before)
                logits = model.logits.save()
            found.append(logits.value)
    with one.trace(PROMPT):
        clean = one.logits.save()
    assert (found[0] - clean.value).abs().max() > 0.01
    assert torch.equal(found[1], found[0])


def test_models_that_are_spread_alike_share_groups_of_ranks(tiny_folder: Path, ranks_of: PoolOf) -> None:
    """A group has threads that look for messages as long as the process lives."""

    def threads() -> list[int]:
        return [len(list(Path(f"/proc/{pid}/task").iterdir())) for pid in ranks_of(2).pids]

    def load() -> None:
        for sizes in ({"tp": 2}, {"pp": 2}, {"tp": 2, "parallelize": "tests.support.users_plans:tutorial"}):
            with tl.load(tiny_folder, ranks=ranks_of(2), **sizes) as model, model.trace(PROMPT):
                model.logits.save()

    load()
    before = threads()
    for _ in range(3):
        load()
    assert max(after - old for after, old in zip(threads(), before, strict=True)) <= 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tp": 2, "ranks": 2}, "ranks=2 are no ranks"),
        ({"tp": True}, "tp=True is no number of ranks"),
        ({"tp": "3"}, "tp='3' is no number of ranks"),
        ({"timeout": 3}, "timeout= has no effect without tp="),
        ({"tp_plan": "auto"}, "tp_plan= is how transformers spreads"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], words: str, tiny_folder: Path) -> None:
    with pytest.raises(OptionError, match=words) as caught:
        tl.load(tiny_folder, **options)
    assert caught.value.at is not None
    assert caught.value.at.filename == __file__


def test_plans_that_differ_are_refused_before_anything_runs(shared: Model, one: Model) -> None:
    neurons(shared)
    ranks: Any = shared.ranks
    pids = ranks.pids
    compiler: Any = shared._compiler
    for compiled in compiler._known.values():
        vars(compiled)["plan_digest"] = "another"
    with pytest.raises(PlansDifferError, match="a rank has made another plan") as caught:
        neurons(shared)
    assert not hasattr(caught.value, "__notes__"), "it is so on all ranks"
    for compiled in compiler._known.values():
        del vars(compiled)["plan_digest"]
    torch.testing.assert_close(neurons(shared), neurons(one), rtol=1e-5, atol=1e-5)
    assert ranks.pids == pids


@pytest.mark.parametrize("sizes", [{"tp": 2}, {"pp": 2}], ids=["tp2", "pp2"])
def test_the_newest_logits_of_a_generation_are_asked_of_ranks(
    tiny_folder: Path, ranks_of: PoolOf, sizes: dict[str, int]
) -> None:
    """The owner plans for one position; the ranks are told what was recorded, and plan the same."""
    with tl.load(tiny_folder, ranks=ranks_of(2), **sizes) as model:
        with model.generate(PROMPT, max_new_tokens=3, eos_token_id=None) as t:
            model.logits[:, -1, 5] += 0.0
            picks = model.logits[:, -1].argmax(-1).save()
        assert [picks.value[:, 0].tolist()] == t.tokens
