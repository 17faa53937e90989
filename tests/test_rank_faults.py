"""What goes wrong on one rank of a model, or on all: it is told by name, nobody waits, and the next trace works."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tracelens as tl
from tests.support.ranks import fragile
from tracelens.backends.ranks.pool import Ranks
from tracelens.errors import OpFailedError, RankFailedError, UnusedGradientError
from tracelens.model import Model

PROMPT = [[5, 6, 7, 8]]
Block = Callable[[Model], "dict[str, torch.Tensor]"]


@pytest.fixture(scope="module")
def one(tiny_folder: Path) -> Model:
    """The model in this process."""
    return tl.load(tiny_folder)


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    """Two ranks in which ``sinh`` goes wrong where they are told so."""
    with fragile(2) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def layers_shared(tiny_folder: Path, two: Ranks) -> Model:
    return tl.load(tiny_folder, tp=2, ranks=two)


@pytest.fixture(scope="module")
def stages(tiny_folder: Path, two: Ranks) -> Model:
    return tl.load(tiny_folder, pp=2, ranks=two)


def arm(ranks: Ranks, rank: int | str | None, how: str = "memory") -> None:
    ranks.ask("arm", {"rank": rank, "how": how})


def caught(block: Callable[[Model], object], model: Model) -> OpFailedError | None:
    """What a block raises, if it is what goes wrong in a step."""
    try:
        block(model)
    except OpFailedError as error:
        return error
    return None


def values(**saved: Any) -> dict[str, torch.Tensor]:
    return {name: one.value for name, one in saved.items()}


# --- blocks ----------------------------------------------------------------------------------------------------------


def first(model: Model) -> dict[str, torch.Tensor]:
    """At the first site of all."""
    with model.trace(PROMPT):
        a = model.layers[0].resid_pre.sinh().save()
        b = model.layers[1].mlp_act.mean(-1).save()
        q = model.layers[2].q.save()
    return values(a=a, b=b, q=q)


def before(model: Model) -> dict[str, torch.Tensor]:
    """Before the pass; what comes of it is needed in the last layer."""
    with model.trace(PROMPT):
        model.layers[2].resid_post += model.unembed[7].sinh()
        a = model.layers[0].mlp_act.mean(-1).save()
        b = model.logits.save()
    return values(a=a, b=b)


def between(model: Model) -> dict[str, torch.Tensor]:
    """Between two values that are put together of the ranks' parts."""
    with model.trace(PROMPT):
        a = model.layers[1].mlp_act.sum(-1).sinh().save()
        model.layers[1].mlp_act[..., :41] *= a.mean() / 1e3
        b = model.layers[1].mlp_act.mean(-1).save()
        z = model.layers[2].z.save()
    return values(a=a, b=b, z=z)


def across(model: Model) -> dict[str, torch.Tensor]:
    """Of what comes from another stage, where there are some, and goes on to the logits."""
    with model.trace(PROMPT):
        early, late = model.layers[0].resid_post, model.layers[2].resid_mid
        model.layers[2].resid_post += (early + late).sinh() / 10
        a = model.logits[..., :50].save()
        b = early.mean(-1).save()
    return values(a=a, b=b)


BLOCKS = (first, before, between, across)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("how", ["layers_shared", "stages"])
def test_a_step_that_goes_wrong_on_one_rank_leaves_all_of_them_ready(
    how: str, block: Block, request: pytest.FixtureRequest, two: Ranks, one: Model
) -> None:
    model: Model = request.getfixturevalue(how)
    want = block(one)
    torch.testing.assert_close(block(model), want, rtol=1e-5, atol=1e-5)
    pids = two.pids
    line = next(
        number
        for number, text in enumerate(Path(__file__).read_text().splitlines(), 1)
        if number > block.__code__.co_firstlineno and "sinh" in text
    )
    failed = 0
    for rank in (0, 1, "all"):
        arm(two, rank)
        error = caught(block, model)
        arm(two, None)
        if error is not None:
            failed += 1
            assert "OutOfMemoryError while the model ran: no memory is left for this step" in str(error)
            assert error.at is not None
            assert (error.at.filename, error.at.line) == (__file__, line)
            cause = error.__cause__
            assert isinstance(cause, RankFailedError)
            assert "_out_of_memory" in cause.remote_traceback
            everywhere = how == "layers_shared" and rank == "all"
            assert rank in ("all", cause.rank)
            notes = [] if everywhere else [f"It went wrong on rank {cause.rank}, and not on all of them."]
            assert getattr(error, "__notes__", []) == notes
        torch.testing.assert_close(block(model), want, rtol=1e-5, atol=1e-5)
    # A stage that does not do the step has nothing that could go wrong.
    assert failed == (3 if how == "layers_shared" else 2)
    assert two.pids == pids, "nothing had to be started anew"


def test_a_gradient_is_taken_by_all_ranks_or_by_none(two: Ranks, layers_shared: Model, one: Model) -> None:
    def block(model: Model) -> dict[str, torch.Tensor]:
        with model.trace(PROMPT):
            point = model.layers[0].resid_post
            loss = model.layers[2].mlp_act.sinh().sum() + model.logits.mean()
            found = tl.grad(loss, point).save()
            late = model.layers[2].q.save()
        return values(found=found, late=late)

    want = block(one)
    pids = two.pids
    for rank in (0, 1, "all"):
        arm(two, rank)
        with pytest.raises(OpFailedError, match="no memory is left"):
            block(layers_shared)
        arm(two, None)
        torch.testing.assert_close(block(layers_shared), want, rtol=1e-4, atol=1e-5)
    with layers_shared.record() as unused:
        point = layers_shared.layers[0].resid_post
        layers_shared.layers[1].resid_post = 0.0  # from here on nothing depends on it
        tl.grad(layers_shared.logits.sum(), point).save()
    with pytest.raises(UnusedGradientError, match="does not depend on"):
        layers_shared.compile(unused)(PROMPT)
    torch.testing.assert_close(block(layers_shared), want, rtol=1e-4, atol=1e-5)
    assert two.pids == pids


def steered(model: Model) -> None:
    """In a layer of the first stage, where there are some."""
    model.layers[0].resid_post += model.layers[0].resid_post.sinh()


def steered_later(model: Model) -> None:
    """In a layer of the second stage, by what comes from the first."""
    model.layers[2].resid_post += (model.layers[0].resid_post / 10).sinh()


@pytest.mark.parametrize("block", [steered, steered_later])
@pytest.mark.parametrize("how", ["layers_shared", "stages"])
def test_tokens_are_drawn_by_all_ranks_or_by_none(
    how: str, block: Callable[[Model], None], request: pytest.FixtureRequest, two: Ranks, one: Model
) -> None:
    model: Model = request.getfixturevalue(how)

    def tokens(model: Model) -> list[Any]:
        with model.generate(PROMPT, max_new_tokens=5, eos_token_id=None) as t:
            block(model)
        return t.tokens

    want = tokens(one)
    assert tokens(model) == want
    pids = two.pids
    line = block.__code__.co_firstlineno + 2
    failed = 0
    for rank in (0, 1, "all"):
        for fault in ("memory", "third time"):
            arm(two, rank, fault)
            error = caught(tokens, model)
            arm(two, None)
            if error is not None:  # the rank takes this step
                failed += 1
                assert "no memory is left" in str(error)
                assert error.at is not None
                assert (error.at.filename, error.at.line) == (__file__, line)
            assert tokens(model) == want
    assert failed == (6 if how == "layers_shared" else 4)
    assert two.pids == pids


@pytest.mark.parametrize(("tp", "pp", "gradient"), [(2, 1, False), (2, 1, True), (1, 2, False)])
def test_a_script_on_all_ranks_is_told_on_all_of_them(
    tp: int, pp: int, gradient: bool, two: Ranks, tiny_folder: Path, one: Model
) -> None:
    def run() -> list[Any]:
        return two.ask("as_script", {"source": str(tiny_folder), "tp": tp, "pp": pp, "gradient": gradient})

    with one.trace([[5, 6, 7]]):
        want = one.layers[0].mlp_act.sinh().sum(-1).save()
    torch.testing.assert_close(run()[0].tensors["total"], want.value, rtol=1e-5, atol=1e-5)
    pids = two.pids
    for rank in (0, 1):
        arm(two, rank)
        replies = run()
        arm(two, None)
        if pp == 2 and rank == 1:
            continue  # the layer is not its own
        for number, reply in enumerate(replies):
            about = reply.header
            assert about["error"] == "OpFailedError"
            assert "no memory is left for this step" in about["text"]
            assert "mlp_act.sinh()" in about["text"]
            # Of what another rank did, with its number.
            assert about["cause"] == ("OutOfMemoryError" if number == rank else "RankFailedError")
            assert about["rank"] == (None if number == rank else rank)
        torch.testing.assert_close(run()[0].tensors["total"], want.value, rtol=1e-5, atol=1e-5)
    two.ask("drop", {"model": "script"})
    assert two.pids == pids


# --- ranks that differ -----------------------------------------------------------------------------------------------


def test_ranks_that_differ_in_the_last_bit_are_noticed(tiny_folder: Path, two: Ranks) -> None:
    """Results come from the first rank, and would show nothing; what follows from the other's share would."""
    with tl.load(tiny_folder, tp=2, ranks=two) as model:
        before = model.check_parallel(PROMPT)
        parts: Any = model._parts
        gain = "model.layers.1.input_layernorm.weight"
        two.ask("drift", {"rank": 1, "path": gain, "model": parts.model})
        after = model.check_parallel(PROMPT)
    assert before.ok
    assert {row.site: row.alike for row in before if row.site in ("attn_norm", "q", "z", "resid_post")} == {
        "attn_norm": True,
        "resid_post": True,
        "q": None,
        "z": None,
    }
    assert not after.ok
    assert all(row.within for row in after)
    assert [row.site for row in after if row.alike is False] == ["attn_norm", "attn_in"]
    assert "the RANKS DIFFER in attn_norm, attn_in" in repr(after)


def test_stages_have_nothing_in_common_to_compare(stages: Model) -> None:
    assert all(row.alike is None for row in stages.check_parallel(PROMPT))


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_a_script_that_generates_is_told_on_all_ranks(
    tp: int, pp: int, two: Ranks, tiny_folder: Path, one: Model
) -> None:
    def run() -> list[Any]:
        return two.ask("as_script", {"source": str(tiny_folder), "tp": tp, "pp": pp, "text": True})

    with one.generate([[5, 6, 7]], max_new_tokens=5, eos_token_id=None) as want:
        one.layers[2].resid_post += (one.layers[0].resid_post / 10).sinh()
    pids = two.pids
    failing = 0 if pp == 2 else 1  # the stage that has the value computes with it
    for rank, fault in ((None, "memory"), (failing, "memory"), (failing, "third time"), (None, "memory")):
        arm(two, rank, fault)
        replies = run()
        arm(two, None)
        if rank is None:
            assert [reply.tensors["tokens"].tolist() for reply in replies] == [want.tokens] * 2
            continue
        for number, reply in enumerate(replies):
            about = reply.header
            assert about["error"] == "OpFailedError"
            assert "resid_post / 10).sinh()" in about["text"]
            assert about["cause"] == ("OutOfMemoryError" if number == rank else "RankFailedError")
            assert about["rank"] == (None if number == rank else rank)
    two.ask("drop", {"model": "script"})
    assert two.pids == pids


def steps(model: Model) -> dict[str, Any]:
    """In every step, with saves of several steps and values that later ones use."""
    with model.generate([[5, 6, 7], [8, 9]], max_new_tokens=5, eos_token_id=None) as t:
        late = t.prefill.layers[1].resid_post.tok[-1]
        t.decode.layers[2].resid_post[:, -1] += late
        model.layers[2].resid_post += (model.layers[0].resid_post / 10).sinh()
        model.layers[2].mlp_act[:, -1].save("act")
        model.layers[0].resid_post.save("stream")
    return {"tokens": torch.tensor(t.tokens), "act": t["act"], "stream": torch.cat(t["stream"], 1)}


@pytest.mark.parametrize("spread", ["layers_shared", "stages"])
def test_a_step_that_fails_on_one_rank_ends_the_generation(
    spread: str, request: pytest.FixtureRequest, two: Ranks, one: Model, tmp_path: Path
) -> None:
    """In the third pass; nothing is saved, nobody waits, and the next generation is as if nothing had been."""
    model, pids = request.getfixturevalue(spread), two.pids
    want = steps(one)
    for rank in (0, 1, None) if spread == "layers_shared" else (0, None):  # the first stage has the value
        arm(two, rank, "third time")
        error = caught(steps, model)
        arm(two, None)
        if rank is None:
            assert error is None
        else:
            assert error is not None
            assert "no memory is left for this step" in str(error)
            assert "resid_post / 10).sinh()" in str(error)
            assert "test_rank_faults.py" in str(error.at)
            assert any(f"rank {rank}" in note for note in error.__notes__)
        for name, found in steps(model).items():
            torch.testing.assert_close(found, want[name], rtol=1e-4, atol=1e-4)
    assert two.pids == pids
