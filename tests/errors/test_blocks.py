"""Opening and closing blocks: nesting, saving nothing, updates that get lost, values of other blocks."""

from __future__ import annotations

import pytest
import torch

import tracelens as tl
from tests.errors import GPT2, IDS, LLAMA, D, refused
from tracelens.errors import (
    DuplicateNameError,
    ForeignValueError,
    LayerMappingError,
    LostUpdateError,
    NestedTraceError,
    NothingSavedError,
)

model, gpt2 = LLAMA.model, GPT2.model
V = torch.ones(D)


# --- nesting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inner",
    [
        lambda: model.trace(IDS),
        lambda: model.record(),
        lambda: model.generate(IDS, max_new_tokens=1),
    ],
)
def test_a_block_inside_a_block_of_the_same_model(inner) -> None:
    block = model.trace(IDS)
    with refused(NestedTraceError, "already open", instead="first block") as caught, block:  # opened
        model.logits.save()
        with inner():  # <-
            pass
    ((role, opened),) = caught.error.also
    assert "opened" in role
    assert "# opened" in opened.text


def test_what_to_write_instead_of_nesting() -> None:
    with model.trace(IDS):
        h = model.layers[1].resid_post.save()
    with model.trace(IDS) as t:
        model.layers[1].resid_post[:, -1] = h[:, 0]
        model.logits.save("logits")
    assert not torch.equal(t["logits"], LLAMA.logits)


def test_a_block_of_another_model_inside_is_fine() -> None:
    with model.trace(IDS):
        with gpt2.trace(IDS):
            there = gpt2.logits.save()
        here = model.logits.save()
    assert torch.equal(here.value, LLAMA.logits)
    assert torch.equal(there.value, GPT2.logits)


def test_a_block_entered_twice() -> None:
    t = model.trace(IDS)
    with t:  # first
        model.logits.save()
    with refused(NestedTraceError, "entered before", instead="for each block") as caught, t:  # <-
        pass
    assert "# first" in caught.error.also[0][1].text


def test_a_block_entered_inside_itself() -> None:
    t = model.trace(IDS)
    with refused(NestedTraceError, "already open", instead="end the first block"), t:
        model.logits.save()
        with t:  # <-
            pass


def test_a_trace_run_from_inside_a_run() -> None:
    def applied(x: torch.Tensor) -> torch.Tensor:
        with model.trace(IDS):  # <-
            model.logits.save()
        return x

    def generating(x: torch.Tensor) -> torch.Tensor:
        with model.generate(IDS, max_new_tokens=1):  # <- too
            pass
        return x

    for function, mark in ((applied, "# <-"), (generating, "# <- too")):
        block = model.trace(IDS)
        with (
            refused(NestedTraceError, "by an applied", instead="after the first", text=mark, forwards=1),
            block,
        ):
            tl.apply(function, model.layers[0].resid_post).save()


# --- saving nothing --------------------------------------------------------------------------------------------------


def test_writes_and_no_save() -> None:
    with refused(NothingSavedError, "saves nothing", instead="model.logits.save()"), model.trace(IDS):
        model.layers[0].resid_post += V
        model.layers[1].resid_post[:, -1] = 0  # <-
    with model.trace(IDS):
        model.layers[0].resid_post += V
        steered = model.logits.save()
    assert not torch.equal(steered.value, LLAMA.logits)


def test_a_program_that_only_writes() -> None:
    with model.record() as r:
        model.layers[0].resid_post += V  # writes
    with refused(NothingSavedError, "saves nothing", instead="model.logits.save()", text="# writes"):
        model.compile(r)


def test_a_program_that_saves_nothing() -> None:
    with model.record() as r:
        model.layers[0].resid_post * 2
    with refused(NothingSavedError, "saves nothing", instead="value.save()"):
        model.compile(r)  # <-


def test_nothing_saved_or_written_runs_nothing() -> None:
    before = LLAMA.forwards
    with model.trace(IDS) as t:
        model.layers[0].resid_post * 2
    assert LLAMA.forwards == before
    assert len(t.results) == 0


def test_an_apply_alone_runs() -> None:
    seen: list[torch.Size] = []
    with model.trace(IDS):
        tl.apply(lambda x: seen.append(x.shape) or x, model.layers[0].resid_post)
    assert seen == [torch.Size([1, 4, D])]


# --- lost updates ----------------------------------------------------------------------------------------------------


def test_an_update_of_a_read_value() -> None:
    with (
        refused(LostUpdateError, "nothing changed", instead="model.layers[0].resid_post += v"),
        model.trace(IDS),
    ):
        h = model.layers[0].resid_post
        h += V  # <-
        model.logits.save()


def test_both_spellings_that_it_names() -> None:
    with model.trace(IDS):
        h = model.layers[0].resid_post
        h = h + V
        computed = h.save()
        plain = model.logits.save()
    with model.trace(IDS):
        model.layers[0].resid_post += V
        written = model.layers[0].resid_post.save()
        steered = model.logits.save()
    assert torch.equal(plain.value, LLAMA.logits)
    assert torch.equal(computed.value, written.value)
    assert not torch.equal(steered.value, LLAMA.logits)


def test_an_update_of_a_view() -> None:
    with refused(LostUpdateError, "layers.0.resid_post", instead="h = h + v"), model.trace(IDS):
        last = model.layers[0].resid_post[:, -1]
        last -= V  # <-
        model.logits.save()


def test_an_update_of_a_token() -> None:
    with refused(LostUpdateError, "layers.0.resid_post", instead="h = h + v"), model.trace(IDS):
        last = model.layers[0].resid_post.tok[-1]
        last *= 2  # <-
        model.logits.save()


def bump(h: tl.Value) -> None:
    h += V  # in the function


def test_an_update_in_a_function() -> None:
    block = model.trace(IDS)
    with refused(LostUpdateError, instead="model.layers[2].mlp_out += v", text="# in the function"), block:
        bump(model.layers[2].mlp_out)
        model.logits.save()


def test_an_update_of_a_mapped_value() -> None:
    with refused(LostUpdateError, "layers.0.resid_post", instead="+= v"), model.trace(IDS):
        h = model.layers[0:2].resid_post
        h += V  # <-
        model.logits.save()


def test_an_update_given_to_another_site() -> None:
    with (
        refused(LostUpdateError, "layers.0.resid_post", instead="model.layers[0].resid_post += v"),
        model.trace(IDS),
    ):
        h = model.layers[0].resid_post
        h += V  # <-
        model.layers[1].resid_post = h
        model.logits.save()


def test_an_update_of_an_update() -> None:
    with refused(LostUpdateError, "layers.0.resid_post", instead="h = h + v"), model.trace(IDS):
        h = model.layers[0].resid_post
        h += V
        h += V  # <-
        model.logits.save()


def test_updates_that_come_home_are_fine() -> None:
    with model.trace(IDS):
        h = model.layers[0].resid_post
        h += V
        h += V
        model.layers[0].resid_post = h
        model.layers[1].resid_post[:, -1] += V
        derived = model.layers[2].resid_post * 2
        derived += 1
        derived.save()
        model.logits.save()


# --- values of other blocks ------------------------------------------------------------------------------------------


def test_an_unsaved_value_of_a_finished_trace() -> None:
    with model.trace(IDS):  # opened
        h = model.layers[0].resid_post
        mapped = model.layers[0:2].resid_post
    for use in (
        lambda: setattr(model.layers[1], "resid_post", h),
        lambda: h + model.layers[1].resid_post,
        lambda: model.layers[1].resid_post + h,
        lambda: torch.cat([model.layers[1].resid_post, h]),
        lambda: torch.where(model.layers[1].resid_post > 0, h, 0.0),
        lambda: model.layers[0:2].resid_post - mapped,
        lambda: model.layers[1].resid_post.__setitem__(slice(None), h),
    ):
        block = model.trace(IDS)
        with (
            refused(ForeignValueError, "not saved there", instead=".save()", text="lambda: ") as caught,
            block,
        ):
            use()
        assert "# opened" in caught.error.also[0][1].text


def test_a_value_of_a_trace_that_is_still_open() -> None:
    with (
        refused(ForeignValueError, "another trace", instead="after that block has ended", on=GPT2),
        model.trace(IDS),
    ):
        h = model.layers[0].resid_post.save()
        with gpt2.trace(IDS):
            gpt2.layers[0].resid_post = h  # <-
            gpt2.logits.save()


def test_a_saved_value_of_another_trace_is_a_constant() -> None:
    with model.trace(IDS):
        h = model.layers[0].resid_post.save()
        mapped = model.layers[0:2].resid_post.save()
    with model.trace(IDS):
        twice = (h + model.layers[0].resid_post).save()
        pair = (model.layers[0:2].resid_post.stack() - mapped).save()
    torch.testing.assert_close(twice.value, 2 * h.value, rtol=0, atol=0)
    assert pair.value.abs().max() == 0


def test_a_result_over_layers_meets_a_value_over_layers() -> None:
    with model.trace(IDS):
        saved = model.layers[0:2].resid_post.save()
    with refused(LayerMappingError, "one tensor", instead="tl.per_layer(saved)"), model.trace(IDS):
        (model.layers[0:2].resid_post - saved).save()  # <-
    with model.trace(IDS):
        none = (model.layers[0:2].resid_post - tl.per_layer(saved)).save()
    assert none.value.abs().max() == 0


# --- names -----------------------------------------------------------------------------------------------------------


def test_one_name_for_two_saves() -> None:
    with refused(DuplicateNameError, "'h'", instead='"h_2"') as caught, model.trace(IDS):
        model.layers[0].resid_post.save("h")  # first
        model.layers[1].resid_post.save("h")  # <-
    assert "# first" in caught.error.also[0][1].text
    with model.trace(IDS) as t:
        model.layers[0].resid_post.save("h")
        model.layers[1].resid_post.save("h_2")
    assert list(t.results) == ["h", "h_2"]


def test_one_name_in_a_loop() -> None:
    with refused(DuplicateNameError, "'h'", instead="another name"), model.trace(IDS):
        for layer in range(3):
            model.layers[layer].resid_post.save("h")  # <-
