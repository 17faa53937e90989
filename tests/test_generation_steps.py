"""Steps of a generation: what is said of some steps holds in these, and what is saved has a place for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import tracelens as tl
from tests.support import hand_generation as hand
from tests.support.families import D_MODEL, FAMILIES, LAYERS
from tests.support.hand_generation import Edit, steps_of
from tests.support.plain import assert_untouched, model_fingerprint
from tests.support.tokenizers import byte_level_bpe
from tracelens import errors

IDS = [3, 14, 15, 9, 2, 6]
ROWS = [[3, 14, 15, 9, 2, 6], [20, 21], [5, 6, 7, 8]]
CLOSE: dict[str, Any] = {"rtol": 2e-5, "atol": 2e-5}
HF = FAMILIES["llama"].build()
MODEL = tl.wrap(HF)
V = 2 * torch.randn(D_MODEL, generator=torch.Generator().manual_seed(7))


def plain(ids: list[int], count: int) -> list[int]:
    return hand.generate(HF, "llama", ids, count, [])


# --- errors of other tools, by name -------------------------------------------------------------------------


def test_a_position_is_the_same_with_and_without_a_cache() -> None:
    """steering-vectors #60: masks that count from the current chunk steer every new token as if it were the first."""
    edit = Edit(1, lambda text, prompt: torch.arange(len(text)) == 4, lambda h: h + 4 * V)
    expected = hand.generate(HF, "llama", IDS, 6, [edit])
    assert expected != plain(IDS, 6)
    for cached in (True, False):
        with MODEL.generate(IDS, max_new_tokens=6, use_cache=cached) as t:
            MODEL.layers[1].resid_post.tok[MODEL.positions == 4] += 4 * V
        assert t.tokens == expected
    with MODEL.generate(IDS, max_new_tokens=6) as t:
        MODEL.layers[1].resid_post.tok[4] += 4 * V
    assert t.tokens == expected


def test_positions_are_counted_in_each_row() -> None:
    edit = Edit(1, lambda text, prompt: torch.arange(len(text)) == 3, lambda h: h + 4 * V)
    expected = [hand.generate(HF, "llama", row, 6, [edit]) for row in ROWS]
    assert all(new != plain(row, 6) for new, row in zip(expected[1:], ROWS[1:], strict=True))
    with MODEL.generate(ROWS, max_new_tokens=6) as t:
        MODEL.layers[1].resid_post.tok[MODEL.positions == 3] += 4 * V
        MODEL.positions.save("positions")
        MODEL.token_ids.save("ids")
    assert t.tokens == expected
    for row, (prompt, new) in enumerate(zip(ROWS, expected, strict=True)):
        assert t["positions"][row][0].tolist() == list(range(len(prompt) + 5))
        assert t["ids"][row][0].tolist() == [*prompt, *new[:-1]]


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (1, 2), (1, 4), (3, None), (5, 6)])
def test_a_window_of_steps_is_not_off_by_one(start: int, stop: int | None) -> None:
    """EasySteer's windows, and nnsight's iter[1:3]: the first step of a window is the one that is named."""

    def chosen(text: torch.Tensor, prompt: int) -> torch.Tensor:
        steps = steps_of(len(text), prompt)
        return (steps >= start) & (steps < (stop or 99))

    edit = Edit(1, chosen, lambda h: h + V)
    expected = hand.generate(HF, "llama", IDS, 7, [edit])
    with MODEL.generate(IDS, max_new_tokens=7) as t:
        t.steps[start:stop].layers[1].resid_post += V
        h = t.steps[start:stop].layers[1].resid_post.save()
    assert t.tokens == expected
    _, streams = hand.forward(HF, "llama", [*IDS, *expected[:-1]], len(IDS), [edit])
    steps = steps_of(streams.shape[1], len(IDS))
    inside = (steps >= start) & (steps < (stop or 99))
    torch.testing.assert_close(h.value[0], streams[1, inside], **CLOSE)


def test_every_row_is_steered_and_not_row_0_only() -> None:
    edit = Edit(0, lambda text, prompt: torch.ones(len(text), dtype=torch.bool), lambda h: h + V)
    with MODEL.generate(ROWS, max_new_tokens=5) as t:
        MODEL.layers[0].resid_post += V
    assert t.tokens == [hand.generate(HF, "llama", row, 5, [edit]) for row in ROWS]
    assert all(new != plain(row, 5) for new, row in zip(t.tokens, ROWS, strict=True))


def test_a_strength_for_each_row() -> None:
    strength = torch.tensor([0.0, 1.0, -1.5])

    def edit(alpha: float) -> Edit:
        return Edit(0, lambda text, prompt: torch.ones(len(text), dtype=torch.bool), lambda h: h + alpha * V)

    with MODEL.generate(ROWS, max_new_tokens=5) as t:
        MODEL.layers[0].resid_post += strength[:, None, None] * V
    expected = [
        hand.generate(HF, "llama", row, 5, [edit(float(alpha))])
        for row, alpha in zip(ROWS, strength, strict=True)
    ]
    assert t.tokens == expected
    assert expected[0] == plain(ROWS[0], 5)
    assert expected[1] != plain(ROWS[1], 5)


def test_left_padding_has_position_ids_of_its_own() -> None:
    hf = FAMILIES["gpt2"].build()
    model = tl.wrap(hf)
    with model.generate(ROWS, max_new_tokens=4, eos_token_id=None) as t:
        h = model.layers[:].resid_post.save()
    for row, prompt in enumerate(ROWS):
        new = hand.generate(hf, "gpt2", prompt, 4, [])
        assert t.tokens[row] == new
        _, streams = hand.forward(hf, "gpt2", [*prompt, *new[:-1]], len(prompt), [])
        torch.testing.assert_close(h.value[row][:, 0], streams, **CLOSE)


def test_code_after_the_last_step_still_counts() -> None:
    """In other tools what stands behind a loop over steps is lost where the model stops early."""
    end = plain(IDS, 6)[2]
    with MODEL.generate(IDS, max_new_tokens=50, eos_token_id=end) as t:
        steps = t.steps[:].layers[0].resid_post[:, -1].save()
        late = t.steps[10:20].layers[0].resid_post.save()
        last = MODEL.layers[2].resid_post.save()
    assert len(t.tokens) == 3 == steps.shape[0]
    assert late.shape == (1, 0, D_MODEL)
    assert last.shape == (1, len(IDS) + 2, D_MODEL)


def test_a_step_that_was_never_made_has_no_value() -> None:
    with MODEL.generate(IDS, max_new_tokens=3) as t:
        never = t.steps[7].layers[0].resid_post.save("never")
        there = t.steps[2].layers[0].resid_post.save("there")
    assert there.shape == (1, 1, D_MODEL)
    with pytest.raises(errors.GenerationStepError, match="ended after 3 steps"):
        _ = never.value
    with pytest.raises(errors.GenerationStepError):
        _ = t["never"]


# --- from step to step --------------------------------------------------------------------------------------


def test_values_flow_from_an_earlier_step_to_later_ones() -> None:
    """The prompt's last state is added to the stream of every new token, and to that of some."""
    _, streams = hand.forward(HF, "llama", IDS, len(IDS), [])
    first = streams[2, -1]

    def decode(text: torch.Tensor, prompt: int) -> torch.Tensor:
        return steps_of(len(text), prompt) >= 1

    expected = hand.generate(HF, "llama", IDS, 6, [Edit(0, decode, lambda h: h + 0.7 * first)])
    assert expected != plain(IDS, 6)
    with MODEL.generate(IDS, max_new_tokens=6) as t:
        t.decode.layers[0].resid_post += 0.7 * t.steps[0].layers[2].resid_post[:, -1:]
    assert t.tokens == expected
    with MODEL.generate(IDS, max_new_tokens=6) as t:
        late = t.prefill.layers[2].resid_post.tok[-1]
        t.decode.layers[0].resid_post[:, -1] += 0.7 * late
    assert t.tokens == expected


def test_the_mean_over_each_prompt_is_there_in_later_steps() -> None:
    with MODEL.trace(ROWS):
        expected = tl.masked_mean(MODEL.layers[0].resid_post).save()
    with MODEL.generate(ROWS, max_new_tokens=3) as t:
        mean = tl.masked_mean(t.prefill.layers[0].resid_post)
        t.decode.layers[1].resid_post = mean[:, None]
        mean.save("mean")
        t.decode.layers[1].resid_post[:, -1].save("written")
    torch.testing.assert_close(t["mean"], expected.value, rtol=1e-5, atol=1e-6)
    assert torch.equal(t["written"], t["mean"].expand_as(t["written"]))
    with (
        pytest.raises(errors.PositionAxisError, match="all positions of a row"),
        MODEL.generate(ROWS, max_new_tokens=2),
    ):
        tl.masked_mean(MODEL.layers[0].resid_post)


def test_a_later_site_of_the_prompt_cannot_feed_an_earlier_one_in_every_step() -> None:
    with (
        pytest.raises(errors.CausalityError, match="reaches later") as caught,
        MODEL.generate(IDS, max_new_tokens=2) as t,
    ):
        MODEL.layers[0].resid_post += t.prefill.layers[2].resid_post[:, -1:]
    assert caught.value.instead is not None
    assert "t.decode" in caught.value.instead
    assert "test_generation_steps.py" in str(caught.value.at)
    with MODEL.generate(IDS, max_new_tokens=2) as t:  # an earlier site can
        MODEL.layers[2].resid_post += t.prefill.layers[0].resid_post[:, -1:]
    assert t.tokens


def test_steps_that_do_not_fit_are_refused_at_their_line() -> None:
    with (
        pytest.raises(errors.GenerationStepError, match="neither are all"),
        MODEL.generate(IDS, max_new_tokens=2) as t,
    ):
        _ = t.steps[0:4].layers[0].resid_post + t.steps[2:6].layers[0].resid_post
    with (
        pytest.raises(errors.GenerationStepError, match="before it is there"),
        MODEL.generate(IDS, max_new_tokens=2) as t,
    ):
        t.steps[2:5].layers[2].resid_post += t.steps[3].layers[0].resid_post
    with (
        pytest.raises(errors.GenerationStepError, match="not all of these"),
        MODEL.generate(IDS, max_new_tokens=2) as t,
    ):
        MODEL.layers[2].resid_post += t.decode.layers[0].resid_post
    with (
        pytest.raises(errors.PositionAxisError, match="holds the positions of step 0"),
        MODEL.generate(IDS, max_new_tokens=2) as t,
    ):
        t.decode.layers[2].resid_post += t.prefill.layers[0].resid_post
    with (
        pytest.raises(errors.GenerationStepError, match="before it is there"),
        MODEL.generate(IDS, max_new_tokens=2) as t,
    ):
        t.steps[2:5].layers[2].resid_post = t.steps[3].layers[0].resid_post
    for wrong in (-1, slice(-3, None), slice(5, 5), slice(0, 4, 2), "decode", True):
        with pytest.raises(errors.OptionError), MODEL.generate(IDS, max_new_tokens=2) as t:
            _ = t.steps[wrong]
    with pytest.raises(errors.OptionError, match="no end"), MODEL.generate(IDS, max_new_tokens=2) as t:
        list(t.steps)
    with pytest.raises(errors.OptionError, match="one forward pass"), MODEL.trace(IDS) as t:
        _ = t.decode.layers[0].resid_post


def test_a_later_step_cannot_feed_an_earlier_one() -> None:
    """However it is written: at the line of the write, with that of the value."""

    def in_place(t: tl.Generation) -> None:
        t.steps[1].layers[0].resid_post += t.steps[2].layers[0].resid_post

    def newest(t: tl.Generation) -> None:
        t.steps[1].layers[0].resid_post[:, -1] += t.steps[2].layers[0].resid_post[:, -1]

    def several(t: tl.Generation) -> None:
        t.steps[0:2].layers[0].resid_post[:, -1] += t.steps[2].layers[0].resid_post[:, -1]

    def mapped(t: tl.Generation) -> None:
        t.steps[1].layers[:].resid_post += t.steps[2].layers[:].resid_post

    def whole(t: tl.Generation) -> None:
        t.steps[1].layers[0].resid_post = t.steps[2].layers[0].resid_post

    for block in (in_place, newest, several, mapped, whole):
        with (
            pytest.raises(errors.CausalityError, match="which is made later") as caught,
            MODEL.generate(IDS, max_new_tokens=4) as t,
        ):
            block(t)
        first = block.__code__.co_firstlineno
        assert caught.value.at is not None
        assert first < caught.value.at.line <= first + 3
        assert "t.steps[2:].layers[" in str(caught.value.instead)
        assert first < caught.value.also[0][1].line <= first + 3
    with (
        pytest.raises(errors.PositionAxisError, match="holds the positions of step 1"),
        MODEL.generate(IDS, max_new_tokens=4) as t,
    ):
        _ = t.steps[1].layers[0].resid_post + t.steps[2].layers[0].resid_post  # which is no write
    with MODEL.generate(IDS, max_new_tokens=4) as t:
        both = t.steps[1].layers[0].resid_post[:, -1] + t.steps[2].layers[0].resid_post[:, -1]
        both.save("both")
    assert t["both"].shape == (1, D_MODEL)


def test_modules_by_path_have_steps_too() -> None:
    with MODEL.generate(IDS, max_new_tokens=4) as t:
        t.decode.module("model.layers.1.mlp").output *= 3.0
        neurons = t.decode.module("model.layers.2.mlp.down_proj").input.save()
    seen: list[torch.Tensor] = []

    def tripled(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.cat([output[:, : len(IDS)], 3.0 * output[:, len(IDS) :]], 1)

    hooks = [
        HF.model.layers[1].mlp.register_forward_hook(tripled),
        HF.model.layers[2].mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0])),
    ]
    text = list(IDS)
    with torch.no_grad():
        for _ in range(4):
            text.append(int(HF(torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
    for hook in hooks:
        hook.remove()
    assert t.tokens == text[len(IDS) :]
    assert torch.allclose(neurons.value, seen[-1][:, len(IDS) :], atol=1e-4)


def test_a_read_sees_the_writes_of_its_own_steps() -> None:
    with MODEL.generate(IDS, max_new_tokens=4) as t:
        MODEL.layers[0].resid_post += V
        both = t.decode.layers[0].resid_post.save("one")
        t.steps[2:4].layers[0].resid_post *= 0.0
        after = MODEL.layers[0].resid_post.save("all")
        t.steps[3].layers[0].resid_post += 1.0
        late = t.steps[3].layers[0].resid_post.save("late")
    assert (both.value[:, 1:] != 0).all()
    assert (after.value[:, : len(IDS) + 1] != 0).all()
    assert (after.value[:, len(IDS) + 1 :] == 0).all()
    assert (late.value == 1).all()


# --- what is saved ------------------------------------------------------------------------------------------


def test_include_last_has_all_positions_of_the_text() -> None:
    for rows in ([IDS], ROWS):
        with MODEL.generate(rows, max_new_tokens=4, include_last=True) as t:
            h = MODEL.layers[:].resid_post.save()
            p = MODEL.logits[:, -1].argmax(-1).save()
        assert p.shape == (4, len(rows))
        for row, prompt in enumerate(rows):
            _, streams = hand.forward(HF, "llama", [*prompt, *t.tokens[row]], len(prompt), [])
            own = h.value[:, 0] if len(rows) == 1 else h.value[row][:, 0]
            torch.testing.assert_close(own, streams, **CLOSE)
            assert p.value[:, row].tolist() == t.tokens[row]


@pytest.mark.parametrize("rows", [[IDS], [IDS, IDS[::-1]], ROWS])
def test_what_goes_to_a_file_is_what_is_saved(rows: list[list[int]], tmp_path: Path) -> None:
    path = str(tmp_path / "traj.safetensors")
    end = plain(IDS, 6)[3]
    for options in ({}, {"eos_token_id": end}):
        with MODEL.generate(rows, max_new_tokens=6, **options):
            kept = MODEL.layers[:].resid_post.save("kept")
            filed = MODEL.layers[:].resid_post.save("filed", to=path)
            half = MODEL.layers[1].resid_post[:, -1].save("half", to=path, dtype=torch.bfloat16)
            newest = MODEL.layers[1].resid_post[:, -1].save("newest")
        if isinstance(kept.value, list):
            for one, other in zip(kept.value, filed.value, strict=True):
                assert torch.equal(one, other)
        else:
            assert torch.equal(kept.value, filed.value)
        torch.testing.assert_close(half.value, newest.value.bfloat16(), equal_nan=True)
        with safe_open(path, framework="pt") as file:
            assert any(key.startswith("filed") for key in file.keys())  # noqa: SIM118  # not a dict
    assert [one.name for one in tmp_path.iterdir()] == ["traj.safetensors"]


def test_a_generation_that_fails_leaves_no_file_and_no_value(tmp_path: Path) -> None:
    path = tmp_path / "traj.safetensors"
    before = model_fingerprint(HF)

    def fail(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("in a step")

    t = MODEL.generate(IDS, max_new_tokens=4)
    with pytest.raises(errors.OpFailedError, match="in a step"), t:  # noqa: PT012  # the block is what raises
        h = MODEL.layers[0].resid_post.save(to=str(path))
        x = t.steps[2].layers[1].resid_post
        tl.apply(fail, x, like=x).save()
    assert not list(tmp_path.iterdir())
    with pytest.raises(errors.FailedRunError):
        _ = h.value
    assert_untouched(before, model_fingerprint(HF))


def test_zero_new_tokens_run_the_prompt_alone() -> None:
    with MODEL.generate(ROWS, max_new_tokens=0) as t:
        h = MODEL.layers[1].resid_post.save()
        p = MODEL.logits[:, -1].save()
    assert t.tokens == [[], [], []]
    for row, prompt in enumerate(ROWS):
        logits, streams = hand.forward(HF, "llama", prompt, len(prompt), [])
        torch.testing.assert_close(h.value[row][0], streams[1], **CLOSE)
        torch.testing.assert_close(p.value[0, row], logits[-1], **CLOSE)


def test_what_cannot_be_continued_is_refused() -> None:
    with (
        pytest.raises(errors.SaveInGenerationError, match="axis of keys"),
        MODEL.generate(IDS, max_new_tokens=2),
    ):
        MODEL.layers[0].pattern.save()
    with MODEL.generate(IDS, max_new_tokens=3) as t:
        one = t.steps[2].layers[0].pattern.save()
        prompt = t.prefill.layers[0].pattern.save()
        summed = MODEL.layers[0].pattern.amax(-1).save()
    assert one.shape == (1, 4, 1, len(IDS) + 2)
    assert prompt.shape == (1, 4, len(IDS), len(IDS))
    assert summed.shape == (1, 4, len(IDS) + 2)
    with (
        pytest.raises(errors.SaveInGenerationError, match="several rows"),
        MODEL.generate(ROWS, max_new_tokens=2),
    ):
        MODEL.layers[0].resid_post[:, -1].mean(0).save()


def test_results_know_their_steps() -> None:
    with MODEL.generate(IDS, max_new_tokens=4) as t:
        t.steps[1:4].layers[0].resid_post[:, -1, :2].save("late")
        MODEL.layers[0].resid_post.save("all")
    table = t.results.to_pandas("late")
    assert table["step"].tolist() == [1, 1, 2, 2, 3, 3]
    assert t.results.entries["late"].described == "steps[1:4].layers[0].resid_post[:, -1, :2]"
    assert t.results.entries["all"].axes == ("row", "position", "2")


# --- how tokens are chosen ----------------------------------------------------------------------------------


def test_a_seed_gives_the_same_text_again_and_leaves_other_random_numbers_alone() -> None:
    texts = []
    for _ in range(2):
        torch.manual_seed(1)
        with MODEL.generate(IDS, max_new_tokens=8, do_sample=True, seed=5) as t:
            h = MODEL.layers[0].resid_post.save()
        texts.append((t.tokens, float(torch.rand(()))))
    torch.manual_seed(1)
    assert texts[0] == texts[1] == (texts[0][0], float(torch.rand(())))
    with MODEL.generate(IDS, max_new_tokens=8, do_sample=True, seed=6) as t:
        pass
    assert t.tokens != texts[0][0]
    assert h.shape == (1, len(IDS) + 7, D_MODEL)


def test_several_texts_of_a_prompt_are_rows() -> None:
    with MODEL.generate(ROWS[:2], max_new_tokens=4, do_sample=True, seed=0, num_return_sequences=3) as t:
        h = MODEL.layers[1].resid_post.save()
    assert len(t.tokens) == 6 == len(h.value)
    for row, new in enumerate(t.tokens):
        prompt = ROWS[row // 3]
        _, streams = hand.forward(HF, "llama", [*prompt, *new[:-1]], len(prompt), [])
        torch.testing.assert_close(h.value[row][0], streams[1], **CLOSE)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 2},
        {"assistant_model": HF},
        {"guidance_scale": 2.0},
        {"prefill_chunk_size": 2},
        {"return_dict_in_generate": True},
        {"past_key_values": object()},
        {"streamer": object()},
        {"attention_mask": torch.ones(1, 6)},
        {"max_length": 20},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_under_which_a_step_is_no_token_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(errors.OptionError) as caught, MODEL.generate(IDS, max_new_tokens=3, **options):
        MODEL.layers[0].resid_post.save()
    assert next(iter(options)) in str(caught.value)
    assert "test_generation_steps.py" in str(caught.value.at)


def test_logits_that_are_written_choose_the_token() -> None:
    with MODEL.generate(ROWS, max_new_tokens=4) as t:
        t.steps[1].logits[:, -1, 50] += 1e4
        MODEL.logits[..., 60] += 1e3
    assert t.tokens == [[60, 50, 60, 60]] * 3


def test_stop_strings_end_each_row_where_its_text_has_them() -> None:
    tokenizer = byte_level_bpe()
    hf = FAMILIES["qwen2"].build(vocab_size=len(tokenizer))
    model = tl.wrap(hf, tokenizer)
    with model.generate(ROWS, max_new_tokens=8) as t:
        pass
    stop = tokenizer.decode(t.tokens[1][2:4])
    assert stop
    with model.generate(ROWS, max_new_tokens=8, stop_strings=[stop]) as ended:
        h = model.layers[0].resid_post[:, -1].save()
    for new, whole in zip(ended.tokens, t.tokens, strict=True):
        assert new == whole[: len(new)]
        assert (stop in tokenizer.decode(new)) == (len(new) < 8 or stop in tokenizer.decode(whole))
    assert len(ended.tokens[1]) <= 4
    assert (~h.value.isnan().any(-1) == ended.valid).all()


@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_caches_of_all_kinds_give_the_same(family: str, cache: str) -> None:
    hf = FAMILIES[family].build()
    model = tl.wrap(hf)
    options: dict[str, Any] = {"use_cache": False} if cache == "none" else {"cache_implementation": cache}
    edit = Edit(1, lambda text, prompt: torch.ones(len(text), dtype=torch.bool), lambda h: h + V)
    with model.generate(ROWS, max_new_tokens=5, **options) as t:
        model.layers[1].resid_post += V
        h = model.layers[:].resid_post.save()
        last = model.layers[2].resid_post[:, -1].save()
    for row, prompt in enumerate(ROWS):
        new = hand.generate(hf, family, prompt, 5, [edit])
        assert t.tokens[row] == new
        _, streams = hand.forward(hf, family, [*prompt, *new[:-1]], len(prompt), [edit])
        torch.testing.assert_close(h.value[row][:, 0], streams, **CLOSE)
        torch.testing.assert_close(last.value[:, row], streams[2, len(prompt) - 1 :], **CLOSE)


def test_without_a_cache_writes_bound_to_a_step_are_refused() -> None:
    for write in (
        lambda t: setattr(t.decode.layers[1], "resid_post", t.decode.layers[1].resid_post + V),
        lambda t: MODEL.layers[1].resid_post.__setitem__((slice(None), -1), 0.0),
        lambda t: MODEL.layers[1].resid_post.tok.__setitem__(2, 0.0),
    ):
        with (
            pytest.raises(errors.OptionError, match="without a cache"),
            MODEL.generate(IDS, max_new_tokens=3, use_cache=False) as t,
        ):
            write(t)


# --- programs -----------------------------------------------------------------------------------------------


def test_a_program_is_compiled_once_for_a_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    from tracelens import compiling

    made: list[Any] = []
    prepare = compiling.prepare
    monkeypatch.setattr(compiling, "prepare", lambda *args: made.append(args) or prepare(*args))
    model = tl.wrap(HF)
    for _ in range(2):
        with model.generate(IDS, max_new_tokens=9) as t:
            model.layers[:].resid_post.save()
            t.decode.layers[1].resid_post += V
    assert len(made) == 2  # the prompt's step, and all others


def test_explain_says_what_runs_in_which_steps() -> None:
    with MODEL.generate(IDS, max_new_tokens=9) as t:
        MODEL.layers[:].resid_post.save("traj")
        t.steps[3:5].layers[1].resid_post += V
        x = t.steps[6].layers[0].resid_post
        tl.apply(lambda x: x, x, like=x).save("applied")
    text = t.explain()
    assert (
        f"'traj', position after position: {LAYERS} x f32[B,P,48], at most {LAYERS * 14 * 48 * 4 / 1024:.1f} KiB"
        in text
    )
    for header in ("steps 0:3\n", "steps 3:5\n", "step 5\n", "step 6\n", "steps 7:\n"):
        assert header in text
    assert text.count("can be captured in a CUDA graph: yes") == 4
    assert "can be captured in a CUDA graph: no: tl.apply runs Python" in text


def test_memory_is_known_before_the_generation() -> None:
    with MODEL.generate(IDS, max_new_tokens=9, max_extra_memory="12KiB") as t:
        MODEL.layers[1].resid_post.save()
    with (
        pytest.raises(errors.ExtraMemoryError, match="max_extra_memory"),
        MODEL.generate(IDS, max_new_tokens=9, max_extra_memory="2KiB"),
    ):
        MODEL.layers[1].resid_post.save("h")
    assert len(t.tokens) == 9


@pytest.mark.parametrize("cached", [True, False])
def test_logits_of_the_prompt_are_those_of_the_newest_position_alone(cached: bool) -> None:
    seen: list[int] = []
    expected = plain(IDS, 4)
    handle = HF.lm_head.register_forward_hook(lambda _m, _a, output: seen.append(output.shape[1]))
    try:
        with MODEL.generate(IDS, max_new_tokens=4, use_cache=cached) as t:
            picks = MODEL.logits[:, -1].argmax(-1).save()
            p = MODEL.logits.sigmoid()[:, -1:, 3].save()
        assert picks.value[:, 0].tolist() == t.tokens == expected
        assert p.shape == (4, 1, 1)
        assert seen == [1] * 4
        seen.clear()
        with MODEL.generate(IDS, max_new_tokens=4, use_cache=cached) as t:
            MODEL.logits[..., 7] += 1e9
        assert t.tokens == [7] * 4
        assert seen == [1] * 4
        seen.clear()
        with MODEL.generate(IDS, max_new_tokens=4, use_cache=cached) as t:
            every = MODEL.logits.save()
        assert t.tokens == expected
        assert every.value[0, len(IDS) - 1 :].argmax(-1).tolist() == expected
        assert seen == [len(IDS), *([1] * 3 if cached else range(len(IDS) + 1, len(IDS) + 4))]
        seen.clear()
        if cached:
            with MODEL.generate(IDS, max_new_tokens=4) as t:
                t.decode.logits.softmax(-1).save("p")
            assert seen == [1] * 4
    finally:
        handle.remove()


def test_zero_tokens_make_no_logits_that_nobody_asked_for() -> None:
    seen: list[int] = []
    handle = HF.lm_head.register_forward_hook(lambda _m, _a, output: seen.append(output.shape[1]))
    try:
        with MODEL.generate(ROWS, max_new_tokens=0):
            MODEL.layers[0].resid_post.save()
    finally:
        handle.remove()
    assert seen == [1]


def test_explain_shows_on_the_prompt_what_is_read_and_written() -> None:
    tokenizer = byte_level_bpe()
    model = tl.wrap(FAMILIES["qwen2"].build(vocab_size=len(tokenizer)), tokenizer)
    texts = ["The capital of France", "Paris is the capital"]
    with model.generate(texts, max_new_tokens=2) as t:
        model.layers[0].resid_post.tok[" capital"] += 1.0
        a, b = t.prompts
        b.layers[1].resid_post.tok[-1] = a.layers[1].resid_post.tok[0]
        t.prefill.layers[2].resid_post.tok[[0, 1]].save()
    assert """
  row 0: 0 "The"  1 " capital"  2 " of"  3 " France"
  row 1: 0 "Paris"  1 " is"  2 " the"  3 " capital"
  reads layers.0.resid_post.tok[" capital"]: 1 " capital" of row 0; 3 " capital" of row 1
  writes layers.0.resid_post.tok[" capital"]: 1 " capital" of row 0; 3 " capital" of row 1
  reads prompts[0].layers.1.resid_post.tok[0]: 0 "The" of row 0
  writes prompts[1].layers.1.resid_post.tok[-1]: 3 " capital" of row 1
  reads layers.2.resid_post.tok[[0, 1]] in step 0: 0 "The", 1 " capital" of row 0; 0 "Paris", 1 " is" of row 1
""" in t.explain()


def test_the_logits_of_a_module_are_those_of_all_positions() -> None:
    with MODEL.generate(IDS, max_new_tokens=3, eos_token_id=None) as t:
        newest = MODEL.logits[:, -1].save()
        every = MODEL.module("").output["logits"].save()
    torch.testing.assert_close(every.value[0, len(IDS) - 1 :], newest.value[:, 0], rtol=0, atol=0)
    assert newest.value.argmax(-1)[:, 0].tolist() == t.tokens


@pytest.mark.parametrize("seed", ["x", 1.5, True])
def test_a_seed_that_is_none_is_refused(seed: Any) -> None:
    with pytest.raises(errors.OptionError, match="no whole number"):
        MODEL.generate(IDS, max_new_tokens=2, do_sample=True, seed=seed)
